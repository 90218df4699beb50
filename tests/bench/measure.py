"""What a server spends: CPU time and memory of its processes, read from the kernel; starts nothing."""

import contextlib
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of the processes, those that have ended left out."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


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
