"""What a server spends and what came through, by wrk and the kernel; figures as tables, kept as JSON."""

import contextlib
import json
import re
import resource
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.servers import Server, program


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of the processes, those that have ended left out."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


def children_cpu_seconds() -> float:
    """CPU time of this process's children that have ended, such as the load generator."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def resident_bytes(pids: Iterable[int], field: str = "VmRSS") -> int:
    """Sum of a field of /proc/PID/status: VmRSS, RssAnon, VmHWM."""
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name == field:
                    total += int(rest.split()[0]) * 1024
    return total


def forget_peaks(pids: Iterable[int]) -> None:
    """VmHWM starts anew."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def machine_busy_seconds() -> tuple[float, float]:
    """CPU seconds of all cores together: busy, and in all."""
    times = psutil.cpu_times()
    idle = times.idle + times.iowait
    return sum(times[:8]) - idle, sum(times[:8])


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@contextlib.contextmanager
def every(seconds: float, work: Callable[[], None]) -> Iterator[None]:
    """Do it again and again in a thread meanwhile."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# --- wrk


SCRIPTS = Path(__file__).parent / "wrk"
_TOLD = re.compile(r"^bench requests=(\d+) bytes=(\d+) micros=(\d+) errors=(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Run:
    """`sent_bytes` counts heads too, and answers that were under way at the end."""

    seconds: float
    requests: int
    sent_bytes: int
    errors: int
    cpu_seconds: float
    """Of all the server's processes."""
    load_cpu_seconds: float

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def bytes_per_second(self) -> float:
        return self.sent_bytes / self.seconds

    def cpu_per_answer(self) -> float:
        """Microseconds."""
        return self.cpu_seconds * 1e6 / max(self.requests, 1)

    def cpu_per_gb(self) -> float:
        """Milliseconds for 10^9 bytes; of large bodies few are whole at the end of a run."""
        return self.cpu_seconds * 1e12 / max(self.sent_bytes, 1)


def wrk(
    server: Server, target: str, connections: int, seconds: float, script: str = "plain", *words: str
) -> Run:
    """Load a server. AssertionError when answers were not as they should be."""
    command = [program("wrk"), "-t2", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "60s"]
    command += ["-s", str(SCRIPTS / f"{script}.lua"), f"http://127.0.0.1:{server.port}{target}", "--", *words]
    pids = server.pids()
    before, load = cpu_seconds(pids), children_cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SCRIPTS)
    spent, load = cpu_seconds(pids) - before, children_cpu_seconds() - load
    told = _TOLD.search(done.stdout)
    assert told, done.stdout + done.stderr
    requests, size, micros, errors = (int(word) for word in told.groups())
    assert errors == 0, f"{server.name}: {errors} bad answers\n{done.stdout}"
    return Run(micros / 1e6, requests, size, errors, spent, load)


# --- tables


class Chosen:
    """The cells asked for: beginnings of names, each with or without `@` and a number of connections."""

    def __init__(self, words: str) -> None:
        self.words = words
        self._words = [word.strip() for word in words.split(",") if word.strip()]

    def __call__(self, name: str, connections: int | None = None) -> bool:
        if not self._words:
            return True
        for word in self._words:
            begins, _, count = word.partition("@")
            if name.startswith(begins) and (not count or connections is None or int(count) == connections):
                return True
        return False


@dataclass(slots=True)
class Table:
    """One table of results. `notes` stand below it."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)
    """Every run, for the JSON."""

    def add(self, *cells: str) -> None:
        assert len(cells) == len(self.columns), (cells, self.columns)
        self.rows.append(list(cells))
        sys.stdout.write(f"{cells}\n")

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|---" + "|---:" * (len(self.columns) - 1) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"


def verdict(value: float, wanted: float | None, *, most: bool = False) -> str:
    """A figure beside its goal, if it has one: a minimum, or with `most` a maximum."""
    if wanted is None:
        return f"{value:.2f}"
    met = value <= wanted if most else value >= wanted
    return f"{value:.2f} ({'≤' if most else '≥'} {wanted:g}{'' if met else ', **missed**'})"


def save(folder: Path, name: str, tables: Sequence[Table], machine: dict[str, Any]) -> None:
    """Keep what was found, as JSON and as Markdown; the last run of a name counts."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "tables": [asdict(table) for table in tables]}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    text = [f"## {name}\n\n" + ", ".join(f"{what} {value}" for what, value in machine.items()) + "\n"]
    (folder / f"{name}.md").write_text("\n".join(text + [table.markdown() for table in tables]))
