"""Harm done to files as disks and people do it."""

import os
from collections.abc import Iterable
from pathlib import Path


def only(paths: Iterable[Path]) -> Path:
    """The one path that there is."""
    (path,) = paths
    return path


def to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "in it").write_text("x")


def to_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere.zip"))
    path.symlink_to(path.with_name("elsewhere.zip"))


def to_fifo(path: Path) -> None:
    """As unreadable as a file can be made for root, too: whoever opens it waits for ever."""
    path.unlink()
    os.mkfifo(path)


def flip(path: Path, *offsets: int) -> None:
    """Turn a bit at each offset, as a disk does: the file's times and size tell of nothing."""
    stat = path.stat()
    scribble(path, *offsets)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def scribble(path: Path, *offsets: int) -> None:
    """Turn a bit at each offset, as a person with an editor does."""
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x10]))
