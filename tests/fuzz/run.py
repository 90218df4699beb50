"""`python -m fuzz.run --minutes 5`: every target under atheris; prints what came of it.

One process a core; each works from the committed corpus and keeps what it finds below build/fuzz. The exit
status is 1 when a property failed: the input is kept, and `--replay FILE` runs it again.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz

_MOST_INPUT_BYTES = 32_768
_MOST_MEMORY_MB = 1024
_HANG_SECONDS = 60
_STATUS = re.compile(r"^#\d+\t\S+\s+cov: (\d+) ft: (\d+) corp: (\d+)/(\S+)", re.MULTILINE)
_RUNS = re.compile(r"^stat::number_of_executed_units:\s*(\d+)", re.MULTILINE)
_RATE = re.compile(r"^stat::average_exec_per_sec:\s*(\d+)", re.MULTILINE)


def fuzz_one(name: str, options: Sequence[str]) -> None:
    """In a process of its own, whose imports are instrumented; libFuzzer ends it."""
    import atheris  # noqa: PLC0415 - an extra: the corpora are also replayed without it

    with atheris.instrument_imports(include=["gup"]), fuzz.target(name) as check:
        again = f"{sys.executable} -m fuzz.run --child {name} --"  # a merge starts processes of its own
        atheris.Setup([again, *options], check)
        atheris.Fuzz()


def _in_child(name: str, options: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of a process that fuzzes. What it leaves in its temporary folder is removed."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="gup-fuzz-", dir=memory) as folder:
        log = fuzz.BUILD / name / "log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            ended = subprocess.run(
                [sys.executable, "-m", "fuzz.run", "--child", name, "--", *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": folder},
                check=False,
            )
        return ended.returncode, log.read_text(errors="replace")


def run(name: str, seconds: int, seed: int) -> bool:
    """Fuzz one target; whether its property held."""
    found = fuzz.BUILD / name / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={_MOST_INPUT_BYTES}",
        f"-rss_limit_mb={_MOST_MEMORY_MB}",
        f"-timeout={_HANG_SECONDS}",
        f"-artifact_prefix={fuzz.BUILD / name}/",
        "-print_final_stats=1",
        str(found),
        str(fuzz.CORPUS / name),
    ]
    before = set(_kept(name))
    status, said = _in_child(name, options)
    runs, rate = (int(match[1]) if (match := pattern.search(said)) else 0 for pattern in (_RUNS, _RATE))
    edges, features, inputs, size = (_STATUS.findall(said) or [("0", "0", "0", "0")])[-1]
    _say(
        f"{name}: {runs} executions, {rate} a second, {edges} edges, {features} features, "
        f"{inputs} inputs of {size} in the corpus: {'ok' if status == 0 else 'FAILED'}"
    )
    if status:
        _say("\n".join(said.splitlines()[-40:]))
        for file in sorted(set(_kept(name)) - before):
            _say(f"{name}: the input is kept; run it again with: make fuzz REPLAY={file}")
    return status == 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _kept(name: str) -> list[Path]:
    return [
        file for kind in ("crash", "timeout", "oom", "leak") for file in (fuzz.BUILD / name).glob(f"{kind}-*")
    ]


def replay(file: Path) -> None:
    """Run one input again, by the target whose folder it is in; raises what it raised."""
    name = next((part for part in reversed(file.resolve().parts[:-1]) if part in fuzz.NAMES), None)
    if name is None:
        raise SystemExit(f"{file} is in the folder of no target: {', '.join(fuzz.NAMES)}")
    with fuzz.target(name) as check:
        check(file.read_bytes())
    _say(f"{file}: the property of {name} holds")


def merge(name: str) -> None:
    """Add to the committed corpus what was found and reaches more than it does."""
    status, said = _in_child(name, ["-merge=1", str(fuzz.CORPUS / name), str(fuzz.BUILD / name / "corpus")])
    if status:
        raise SystemExit(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--targets", nargs="*", default=[], help=f"of {', '.join(fuzz.NAMES)}; all")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; one a core"
    )
    parser.add_argument("--replay", type=Path, help="one input")
    parser.add_argument("--merge", action="store_true", help="add what was found to the committed corpora")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    names = chosen.targets or fuzz.NAMES
    if unknown := set(names) - set(fuzz.NAMES):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if chosen.child:
        fuzz_one(chosen.child, chosen.options)
    elif chosen.replay:
        replay(chosen.replay)
    elif chosen.merge:
        for name in names:
            merge(name)
    else:
        with ThreadPoolExecutor(chosen.jobs) as pool:
            held = list(pool.map(lambda name: run(name, int(chosen.minutes * 60), chosen.seed), names))
        return 0 if all(held) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
