"""File systems in image files, cloned while they are in use: what a power cut would leave on the disk.

A clone (FICLONE, ioctl_ficlone(2)) is one moment of the whole device: nothing of the mounted file system is
flushed for it, so what it had not written yet is missing, as after a power cut. The images lie on an xfs of
their own, since few file systems clone. Needs root, and xfsprogs.
"""

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.waiting import until

_FICLONE = 0x40049409
_MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
_OPTIONS = {"xfs": "loop,nouuid"}
_SHELF_BYTES = 40 << 30


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
        folder.mkdir(parents=True)
        _run("mount", "-o", _OPTIONS.get(self.kind, "loop"), str(self.path), str(folder))
        try:
            yield folder
        finally:
            until(lambda: subprocess.run(["umount", str(folder)], check=False).returncode == 0, "unmounted")


@contextlib.contextmanager
def shelf(folder: Path) -> Iterator[Path]:
    """A folder whose files can be cloned: an xfs in a sparse file."""
    file = folder / "shelf.img"
    _sparse(file, _SHELF_BYTES)
    _run(*_MAKE["xfs"], str(file))
    with Image(file, "xfs").mounted(folder / "shelf") as mounted:
        yield mounted
    file.unlink()


def make_image(path: Path, kind: str, size_bytes: int) -> Image:
    """A new, empty file system in a new file."""
    _sparse(path, size_bytes)
    _run(*_MAKE[kind], str(path))
    return Image(path, kind)


def _sparse(path: Path, size_bytes: int) -> None:
    with path.open("xb") as file:
        os.truncate(file.fileno(), size_bytes)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    needs = "root, e2fsprogs, xfsprogs and btrfs-progs"
    assert done.returncode == 0, f"this test needs {needs}: {' '.join(command)}: {done.stderr.strip()}"
