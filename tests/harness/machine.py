"""A machine of its own for what changes one: this Debian, booted by systemd in namespaces.

Its files are this machine's, below a layer in memory that takes every change; its processes, its network
(loopback only) and its control groups are its own. What is done in it is gone afterwards, and nothing outside
notices.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from harness.processes import until

BOOT = """
set -e
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir changes work root
mount -t overlay overlay -o lowerdir=/,upperdir=changes,workdir=work root
cd root
mount -t tmpfs tmpfs run
mkdir run/changes
mount --bind ../changes run/changes
mount -t tmpfs tmpfs tmp
mount -t proc proc proc
mount --bind proc/sys proc/sys  # the kernel is not this machine's alone
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t tmpfs tmpfs sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs dev
mkdir dev/shm dev/pts
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for name in null zero full random urandom tty; do
    touch "dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
ln -s null dev/console
for name in systemd-udevd systemd-modules-load systemd-remount-fs systemd-sysctl; do
    ln -sf /dev/null "etc/systemd/system/$name.service"
done
mkdir old
pivot_root . old  # chroot would not do: it forbids user namespaces, which units may have
umount -l old
rmdir old
exec /lib/systemd/systemd --system --unit=basic.target
"""
UNSHARE = ("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--net", "--uts",
           "--ipc", "--cgroup")  # fmt: skip


class Machine:
    def __init__(self, inside: int) -> None:
        namespaces = ("--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup")
        self._enter = ("nsenter", f"--target={inside}", *namespaces, "--root", "--wdns=/")
        self.root = Path(f"/proc/{inside}/root")
        """Its files, seen from here."""
        self.in_its_network = ("nsenter", f"--net=/proc/{inside}/ns/net")
        """Before a command: it runs here, and its sockets are there."""

    def run(self, *command: str | Path, status: int = 0, timeout_seconds: float = 100) -> str:
        """What a command in the machine says, both streams together; it must end with this status."""
        done = subprocess.run(
            [*self._enter, *map(str, command)],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        assert done.returncode == status, (command, done.returncode, done.stdout)
        return done.stdout

    def put(self, file: Path) -> Path:
        """A copy of this file in the machine, where it says."""
        shutil.copy(file, self.root / "tmp" / file.name)
        return Path("/tmp", file.name)

    def changes(self) -> set[str]:
        """Every path that was made, changed or removed since the machine booted, folders aside."""
        layer = self.root / "run/changes"
        return {
            f"/{path.relative_to(layer)}"
            for path in layer.rglob("*")
            if path.is_symlink() or not path.is_dir()
        }


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """One that has booted; in `folder` it keeps its files."""
    folder.mkdir()
    command = [*UNSHARE, "sh", "-c", BOOT, "sh", str(folder)]
    with (
        (folder.parent / f"{folder.name}.log").open("w") as log,
        subprocess.Popen(
            command,
            env={"PATH": os.environ["PATH"], "container": "test"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            inside = int(until(lambda: children.read_text().split(), "the machine's first process")[0])
            found = Machine(inside)
            until((found.root / "run/systemd/private").exists, "systemd runs")
            found.run("systemctl", "start", "basic.target")  # returns when it is reached
            yield found
        finally:
            process.kill()  # and with it, by --kill-child, everything that runs in the machine
