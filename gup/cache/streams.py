"""Numbers for streams, so that their bytes can be counted in words: one short list for all processes."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from gup.content.key import ContentKey
from gup.metrics import MAX_STREAMS


def read_streams(path: Path) -> list[tuple[str, str, str]]:
    """Version, language and stream of each number in use, in order."""
    try:
        rows = [line.split("/") for line in path.read_text().splitlines()[:MAX_STREAMS]]
    except FileNotFoundError:
        return []
    return [(row[0], row[1], row[2]) if len(row) == 3 else ("", "", "") for row in rows]


class Streams:
    """Numbers streams when a body of theirs arrives; all others share the number MAX_STREAMS.

    The list only grows, a line a stream, appended under a lock: 50 times in a site's life.
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
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            lines = os.pread(fd, 1 << 20, 0).decode(errors="replace").splitlines()[:MAX_STREAMS]
            if name in lines:
                return lines.index(name)
            if len(lines) < MAX_STREAMS:
                line, end = f"{name}\n".encode(), os.fstat(fd).st_size
                if os.write(fd, line) < len(line):  # the disk became full: remove the partial line
                    os.ftruncate(fd, end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(lines)
        finally:
            os.close(fd)


def _name(key: ContentKey) -> str:
    return f"{key.version}/{key.language}/{key.stream}"
