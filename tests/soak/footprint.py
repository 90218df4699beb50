"""Memory, descriptors and disk over the time of a soak, and whether they are flat."""

import os
import statistics
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from harness.processes import command_line
from harness.service import Gup

MB = 1_000_000
_SETTLED = 0.5
"""From this share of the time on, nothing may grow."""
_GROWTH = 1.15
_GROWTH_BYTES = 8 * MB
_GROWTH_DESCRIPTORS = 200


@dataclass(frozen=True, slots=True)
class _Look:
    progress: float
    worker_bytes: int
    controller_bytes: int
    descriptors: int
    disk_bytes: int


class Footprint:
    """Looks at the oldest worker and the controller, and at the cache directory."""

    def __init__(self, gup: Gup) -> None:
        self._gup = gup
        self._looks: list[_Look] = []

    def look(self, progress: float) -> None:
        with suppress(psutil.NoSuchProcess, ValueError, AssertionError):
            worker = psutil.Process(min(self._gup.workers()))
            (controller,) = (
                psutil.Process(pid)
                for pid in self._gup.children()
                if "gup.process.controller" in command_line(pid)
            )
            self._looks.append(
                _Look(
                    progress,
                    worker.memory_info().rss,
                    controller.memory_info().rss,
                    worker.num_fds() + controller.num_fds(),
                    _size(self._gup.cache_dir),
                )
            )

    def figures(self) -> dict[str, Any]:
        """Medians of the settled time's first and last quarter, and the most at any time."""
        first, last = self._quarters()
        return {
            name: {
                "then": _median(first, name),
                "at_the_end": _median(last, name),
                "most": max((getattr(look, name) for look in self._looks), default=0),
            }
            for name in ("worker_bytes", "controller_bytes", "descriptors", "disk_bytes")
        }

    def complaints(self) -> list[str]:
        wrong = []
        first, last = self._quarters()
        for name, more in (
            ("worker_bytes", _GROWTH_BYTES),
            ("controller_bytes", _GROWTH_BYTES),
            ("descriptors", _GROWTH_DESCRIPTORS),
        ):
            before, after = _median(first, name), _median(last, name)
            if after > _GROWTH * before + more:
                wrong.append(f"{name} grew from {before} to {after}")
        return wrong

    def _quarters(self) -> tuple[list[_Look], list[_Look]]:
        settled = [look for look in self._looks if look.progress >= _SETTLED]
        quarter = max(1, len(settled) // 4)
        return settled[:quarter], settled[-quarter:]


def _median(looks: list[_Look], name: str) -> float:
    return statistics.median([getattr(look, name) for look in looks]) if looks else 0


def _size(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):  # what vanishes meanwhile is passed over
        for file in files:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, file)).st_size  # noqa: PTH118 - hundreds, twice a second
    return total
