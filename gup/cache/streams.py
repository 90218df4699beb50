"""Numbers for streams, so that their bytes can be counted in words: one short list for all processes."""

import contextlib
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from gup.content.key import ContentKey
from gup.files import replace_file
from gup.metrics import MAX_STREAMS


def read_streams(path: Path) -> list[tuple[str, str, str]]:
    """Version, language and stream of each number in use, in order."""
    try:
        lines = path.read_text(errors="replace").splitlines()  # a damaged line costs its stream's number
    except FileNotFoundError:
        return []
    rows = [line.split("/") for line in lines[:MAX_STREAMS]]
    return [(row[0], row[1], row[2]) if len(row) == 3 else ("", "", "") for row in rows]


class Streams:
    """Numbers streams when a body of theirs arrives; all others share the number MAX_STREAMS.

    A line a stream in a file of all processes, which changes under a lock, a few times in a site's life. At a
    start of the service, when no number is left, streams without a stored body lose theirs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers: dict[str, int] = {}
        self._read_at: tuple[int, int] | None = None

    def number(self, key: ContentKey) -> int:
        """A stream that is only asked for takes no number."""
        name = _name(key)
        if name not in self._numbers:
            try:
                stat = self._path.stat()
            except OSError:
                return MAX_STREAMS
            if self._read_at != (stat.st_ino, stat.st_size):  # another process has given a number
                self._read_at = (stat.st_ino, stat.st_size)
                self._numbers = {"/".join(row): number for number, row in enumerate(read_streams(self._path))}
        return self._numbers.get(name, MAX_STREAMS)

    def add(self, key: ContentKey) -> int:
        """The stream's number; it gets one if one is left."""
        number = self.number(key)
        if number == MAX_STREAMS > len(self._numbers):
            with contextlib.suppress(OSError):  # a full disk: it shares a number until there is room
                number = self._numbers[_name(key)] = self._append(_name(key))
        return number

    def _append(self, name: str) -> int:
        fd = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            names = ["/".join(row) if any(row) else "" for row in read_streams(self._path)]
            if name not in names:
                free = names.index("") if "" in names else len(names)
                if free == MAX_STREAMS:
                    return MAX_STREAMS
                names[free : free + 1] = [name]
                _write(self._path, names)
            return names.index(name)
        finally:
            os.close(fd)


def idle_streams(path: Path, content: Path) -> list[int]:
    """If no number is left: those whose stream has no stored body."""
    rows = read_streams(path)
    if len(rows) < MAX_STREAMS or not all(map(any, rows)):
        return []
    return [number for number, row in enumerate(rows) if not content.joinpath(*row).is_dir()]


def free_streams(path: Path, numbers: Iterable[int]) -> None:
    """Make these numbers available again. The caller is alone, and has moved what was counted under them."""
    names = ["/".join(row) for row in read_streams(path)]
    for number in numbers:
        names[number] = ""
    _write(path, names)


def _write(path: Path, names: list[str]) -> None:
    replace_file(path, "".join(f"{name}\n" for name in names).encode(), durable=False)


def _name(key: ContentKey) -> str:
    return f"{key.version}/{key.language}/{key.stream}"
