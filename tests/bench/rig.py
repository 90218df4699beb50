"""The upstream with its content, and the caches started before it; loads nothing."""

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from harness.clients import RawConnection
from harness.content import Tree, content_path
from harness.processes import until
from harness.upstreams import Nginx

from bench.link import Wan
from bench.servers import GUP_ONE, GUP_PRELOADED, PATH, GupCache, NginxCache, Server, VarnishCache

KIB, MIB = 1 << 10, 1 << 20
_DELTAS = 28
_FULLS = 2
_DISK_BYTES = 48 << 30
"""Of the image, which is sparse."""


def sized_path(size_bytes: int) -> str:
    """The body of that size, under a delta's name: bodies of every size take the same way."""
    return content_path(f"xdelta{size_bytes:09d}_To_260801001.dax")


def put(tree: Tree, path: str, size_bytes: int) -> str:
    """A body of random bytes at `path`, unless it is there."""
    file = tree.file(path)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(random.Random(path).randbytes(size_bytes))
    return path


def mixed(tree: Tree) -> list[str]:
    """Requests as a site makes them: 70 % deltas of 50 KiB to 2 MiB, 25 % index files, 5 % fulls."""
    steps = [50 * KIB + number * (2 * MIB - 50 * KIB) // (_DELTAS - 1) for number in range(_DELTAS)]
    deltas = [
        put(tree, content_path(f"xdelta2607{n:02d}001_To_260801001.dax"), s) for n, s in enumerate(steps)
    ]
    index = put(tree, "/content/ContentInfo.txt", 4 * KIB)
    fulls = [
        put(tree, content_path("full.dax", revision=f"26080{n}001"), 100 * MIB) for n in range(1, 1 + _FULLS)
    ]
    order = random.Random("mix")
    targets = deltas * 5 + [index] * 50 + fulls * 5
    order.shuffle(targets)
    return targets


def disk_kind() -> str:
    """What `fresh_disk` can make here."""
    programs = all(shutil.which(name, path=PATH) for name in ("mkfs.ext4", "losetup"))
    return "fresh ext4 image, loop mount" if os.geteuid() == 0 and programs else "tmpfs (no root)"


@contextmanager
def fresh_disk(folder: Path) -> Iterator[Path]:
    """An ext4 of its own with a journal and inodes enough, or a folder in memory.

    A worn file system takes up to thirty times as long to make an inode.
    """
    folder.mkdir(parents=True)
    if disk_kind().startswith("tmpfs"):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
            yield Path(made)
        return

    def call(*words: str | Path) -> str:
        env = {**os.environ, "PATH": PATH}
        return subprocess.run(words, check=True, capture_output=True, text=True, env=env).stdout.strip()

    image, root = folder / "disk.img", folder / "disk"
    root.mkdir()
    with image.open("wb") as file:
        file.truncate(_DISK_BYTES)
    call("mkfs.ext4", "-q", "-F", "-i", "16384", "-E", "lazy_itable_init=1,nodiscard", image)
    device = call("losetup", "--find", "--show", "--direct-io=on", image)
    try:
        call("mount", "-o", "noinit_itable", device, root)
    finally:
        call("losetup", "--detach", device)  # at the unmount, if it is mounted
    try:
        yield root
    finally:
        until(lambda: subprocess.run(["umount", root], check=False).returncode == 0, "unmounted")
        image.unlink()


@dataclass(slots=True)
class Rig:
    """What is up. `folder` is there for whoever measures."""

    folder: Path
    tree: Tree
    upstream: Nginx
    servers: list[Server]
    wan: Wan | None
    _warmed: set[str] = field(default_factory=set)

    def warm(self, paths: Sequence[str]) -> None:
        """Have every server store every path."""
        fresh = [path for path in dict.fromkeys(paths) if path not in self._warmed]
        self._warmed.update(fresh)
        for server in self.servers:
            for path in fresh:
                fetch(server.port, path)
            if isinstance(server, GupCache):
                for name in {path.rpartition("/")[2] for path in fresh}:
                    server.service.wait_stored(name)


def fetch(port: int, path: str) -> None:
    """One GET whose body is thrown away as it comes."""
    with RawConnection(("127.0.0.1", port), 60) as client:
        client.drop(client.begin(path))


SomeRig = TypeVar("SomeRig", bound=Rig)


@contextmanager
def rig(
    folder: Path,
    servers: Sequence[str] = ("on", "off", "varnish", "gup"),
    *,
    upstream: str = "keepalive_requests 1000000;",
    link: tuple[int, float] | None = None,
    preload: str = "",
    kind: type[SomeRig] = Rig,
) -> Iterator[SomeRig]:
    """An nginx over an empty tree in memory, and the caches before it with their files in `folder`.

    `link`: the caches ask through one of so many bytes a second and so many seconds.
    """
    made: list[Server] = []
    with contextlib.ExitStack() as stack:
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gup-bench-", dir="/dev/shm")))
        tree = Tree(memory / "tree")
        tree.root.mkdir()
        origin = stack.enter_context(Nginx(tree, memory / "upstream", extra=upstream))
        wan = stack.enter_context(Wan(origin.port, *link)) if link else None
        port = wan.port if wan else origin.port
        makers: dict[str, Callable[[], Server]] = {
            "on": lambda: NginxCache(folder, port, nopush=True),
            "off": lambda: NginxCache(folder, port, nopush=False),
            "varnish": lambda: VarnishCache(folder, port),
            "varnish-file": lambda: VarnishCache(folder, port, file=True),
            "gup": lambda: GupCache(folder, port),
            "gup-one": lambda: GupCache(folder, port, GUP_ONE, workers=1),
            "gup-preloaded": lambda: GupCache(folder, port, GUP_PRELOADED, LD_PRELOAD=preload),
        }
        try:
            made += [makers[name]() for name in servers]
            yield kind(folder, tree, origin, made, wan)
        finally:
            for server in made:
                server.stop()
