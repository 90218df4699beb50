"""How often entries had to be demoted lately: a disk that damages more and more is not to be written to."""

import time
from collections.abc import Callable
from pathlib import Path

from gup.errors import GupError

_MOST_A_MINUTE = 16
_MOST_A_DAY = 2
"""Of one key."""
_DAY_SECONDS = 86400.0
_KEPT_LINES = 4096
_WHY = "the disk damages what is stored, again and again: replace it, then run gup cache verify --repair"


class BadDiskError(GupError):
    """The disk damages what is stored: nothing more is demoted, and nothing stored, for a while."""


class Demotions:
    """A line a demotion in a file of all processes: Unix time and the key's id."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock

    def note(self, id_: str) -> None:
        """Count one more. BadDiskError instead, when there were too many. Blocks; OSError."""
        now, rows = self._clock(), self._rows()
        of_key = sum(1 for at, other in rows if other == id_ and 0 <= now - at < _DAY_SECONDS)
        if of_key >= _MOST_A_DAY or _many(rows, now):
            raise BadDiskError(_WHY)
        with self._path.open("a") as file:
            file.write(f"{int(now)} {id_}\n")

    def disk_is_bad(self) -> str | None:
        """Why nothing should be stored now, None when nothing speaks against it. Blocks."""
        now = self._clock()
        try:
            recent = 0 <= now - self._path.stat().st_mtime < 60.0
        except OSError:
            return None
        return _WHY if recent and _many(self._rows(), now) else None

    def _rows(self) -> list[tuple[float, str]]:
        try:
            lines = self._path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        split = (line.partition(" ") for line in lines[-_KEPT_LINES:])
        rows = [(float(at), id_) for at, _, id_ in split if at.isdecimal() and len(id_) == 32]
        if len(lines) > 2 * _KEPT_LINES:
            self._path.write_text("".join(f"{int(at)} {id_}\n" for at, id_ in rows))
        return rows


def _many(rows: list[tuple[float, str]], now: float) -> bool:
    return sum(1 for at, _ in rows if 0 <= now - at < 60.0) >= _MOST_A_MINUTE
