"""What each mode of `cache.verify` costs: hits of 4 KiB and of 100 MiB, all modes in one run, by wrk.

Run as `PYTHONPATH=tests:. .venv/bin/python tests/fault/measure_modes.py`; wrk runs on the same cores.
Rounds alternate between the modes, so that whatever else goes on strikes all alike; the median counts.
"""

import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from harness.scripted import Answer, ScriptedUpstream
from harness.service import Gup
from harness.trees import content_path, noise

MODES = ("first_use", "scrub")
SMALL = content_path("xdelta260801000_To_260801001.dax")
LARGE = content_path("full.dax")
SECONDS = 3
ROUNDS = 5
WORKERS = 2


def cpu_seconds(pids: list[int]) -> float:
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def loaded(gup: Gup, path: str, connections: int) -> tuple[float, float, float]:
    """Requests a second, MB a second, and the workers' CPU seconds for each request."""
    workers = gup.workers()
    before = cpu_seconds(workers)
    done = subprocess.run(
        ["wrk", "-t2", f"-c{connections}", f"-d{SECONDS}s", "--timeout", "30s", gup.url + path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Non-2xx" not in done, done
    found = re.search(r"(\d+) requests in ([\d.]+)s, ([\d.]+)(MB|GB)", done)
    assert found, done
    requests, seconds = int(found[1]), float(found[2])
    megabytes = float(found[3]) * (1024 if found[4] == "GB" else 1) * 1.048576
    spent = cpu_seconds(workers) - before
    return (
        requests / seconds,
        megabytes / seconds,
        spent / max(megabytes, 1e-9) if path == LARGE else spent / requests,
    )


def main() -> None:
    rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, ScriptedUpstream() as upstream:
        upstream.answer(SMALL, Answer(noise("small", 4096), etag='"s"'))
        upstream.answer(LARGE, Answer(noise("large", 100 << 20), etag='"l"'))
        services = {}
        for mode in MODES:
            env = {"GUP_CACHE__VERIFY": mode, "GUP_CACHE__SCRUB_RATE": "0"}
            services[mode] = Gup(Path(folder) / mode, [upstream.url], workers=WORKERS, env=env)
        try:
            for gup in services.values():
                for path, file in ((SMALL, SMALL.split("/")[-1]), (LARGE, "full.dax")):
                    gup.get(path)
                    gup.wait_stored(file)
                    loaded(gup, path, 8)
            for _ in range(ROUNDS):
                for mode, gup in services.items():
                    for path, connections in ((SMALL, 64), (LARGE, 8)):
                        rows.setdefault((mode, path), []).append(loaded(gup, path, connections))
        finally:
            for gup in services.values():
                gup.stop()
    for (mode, path), found in sorted(rows.items(), key=lambda row: row[0][1]):
        rate, megabytes, spent = (statistics.median(column) for column in zip(*found, strict=True))
        unit = "MB" if path == LARGE else "request"
        figures = f"{rate:9.1f}/s {megabytes:8.1f} MB/s {spent * 1e6:8.1f} µs CPU/{unit}"
        sys.stdout.write(f"{path.split('/')[-1]:34} {mode:10} {figures}\n")


if __name__ == "__main__":
    main()
