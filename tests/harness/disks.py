"""Small disks that become full: tmpfs mounts. Needs the right to mount, and says so."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.waiting import until


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

    def take_inodes(self, leave: int = 0) -> None:
        """Take all inodes but so many."""
        folder = self.root / "fillers"
        folder.mkdir()
        for number in range(os.statvfs(self.root).f_favail - leave):
            (folder / str(number)).touch()

    def give_inodes(self) -> None:
        for path in (self.root / "fillers").iterdir():
            path.unlink()


@contextlib.contextmanager
def small_disk(folder: Path, size: str, inodes: int = 0) -> Iterator[SmallDisk]:
    """A tmpfs of this size ("8m") and, unless 0, with so many inodes, mounted on a new folder."""
    folder.mkdir(parents=True)
    options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
    tried = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "gup-test", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert tried.returncode == 0, f"this test mounts a small tmpfs and must be root: {tried.stderr.strip()}"
    try:
        yield SmallDisk(folder)
    finally:
        # a killed process is seen to be gone a moment before its files are closed
        until(lambda: subprocess.run(["umount", str(folder)], check=False).returncode == 0, "unmounted")
