"""Disks for tests: bits that turn, small disks that become full, images cloned as a power cut leaves them.

A clone (FICLONE, ioctl_ficlone(2)) is one moment of the whole device: nothing of the mounted file system is
flushed for it, so what it had not written yet is missing, as after a power cut. The images lie on an xfs of
their own, since few file systems clone. All of it needs root; images need e2fsprogs, xfsprogs, btrfs-progs.
"""

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.processes import until

_FICLONE = 0x40049409
_MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
_SHELF_BYTES = 40 << 30


@contextlib.contextmanager
def _mounted(folder: Path, *how: str) -> Iterator[None]:
    folder.mkdir(parents=True)
    _run("mount", *how, str(folder))
    try:
        yield
    finally:
        # a killed process is seen to be gone a moment before its files are closed
        until(lambda: subprocess.run(["umount", str(folder)], check=False).returncode == 0, "unmounted")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """One mount."""

    root: Path

    def fill(self, leave_bytes: int = 0) -> None:
        """Take all room but so much of it."""
        figures = os.statvfs(self.root)
        with (self.root / "filler").open("wb", buffering=0) as file:
            left = figures.f_bavail * figures.f_frsize - leave_bytes
            with contextlib.suppress(OSError):
                while left > 0:
                    left -= file.write(bytes(min(left, 1 << 16)))

    def free(self) -> None:
        """Give the room back."""
        (self.root / "filler").unlink()

    def take_inodes(self) -> None:
        folder = self.root / "fillers"
        folder.mkdir()
        for number in range(os.statvfs(self.root).f_favail):
            (folder / str(number)).touch()


@contextlib.contextmanager
def small_disk(folder: Path, size: str, inodes: int = 0) -> Iterator[SmallDisk]:
    """A tmpfs of this size ("8m") and, unless 0, with so many inodes, mounted on a new folder."""
    options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
    with _mounted(folder, "-t", "tmpfs", "-o", options, "gup-test"):
        yield SmallDisk(folder)


@dataclass(frozen=True, slots=True)
class Image:
    """One image file with its kind of file system ("ext4", "xfs", "btrfs")."""

    path: Path
    kind: str

    def clone(self, name: str) -> "Image":
        """This moment of the image, as another image beside it."""
        target = self.path.with_name(name)
        with self.path.open("rb") as source, target.open("wb") as copy:
            fcntl.ioctl(copy.fileno(), _FICLONE, source.fileno())
        return Image(target, self.kind)

    @contextlib.contextmanager
    def mounted(self, folder: Path) -> Iterator[Path]:
        """Mount it on a new folder; its journal is replayed as after a crash."""
        with _mounted(folder, "-o", "loop,nouuid" if self.kind == "xfs" else "loop", str(self.path)):
            yield folder


def make_image(path: Path, kind: str, size_bytes: int) -> Image:
    """A new, empty file system in a new sparse file."""
    with path.open("xb") as file:
        os.truncate(file.fileno(), size_bytes)
    _run(*_MAKE[kind], str(path))
    return Image(path, kind)


@contextlib.contextmanager
def shelf(folder: Path) -> Iterator[Path]:
    """A folder whose files can be cloned: an xfs in a sparse file."""
    image = make_image(folder / "shelf.img", "xfs", _SHELF_BYTES)
    with image.mounted(folder / "shelf") as mounted:
        yield mounted
    image.path.unlink()


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
