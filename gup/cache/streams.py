"""Numbers for streams, so that their bytes can be counted in words: one short list for all processes."""

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
    """Gives each stream a permanent number; the streams after the first MAX_STREAMS share that number.

    The list only grows, a line a stream, appended under a lock: 50 times in a site's life.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers: dict[str, int] = {}

    def number(self, key: ContentKey) -> int:
        name = f"{key.version}/{key.language}/{key.stream}"
        if name not in self._numbers:
            if len(self._numbers) > 10 * MAX_STREAMS:
                self._numbers.clear()
            try:
                self._numbers[name] = self._find(name)
            except OSError:  # a full disk: it is counted with the shared ones until there is room
                return MAX_STREAMS
        return self._numbers[name]

    def _find(self, name: str) -> int:
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
