"""The upstream with its content, and the caches started before it; loads nothing."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness.clients import RawConnection
from harness.content import Tree, content_path
from harness.upstreams import Nginx

from bench.servers import GupCache, NginxCache, Server, VarnishCache

KIB, MIB = 1 << 10, 1 << 20
_DELTAS = 28
_FULLS = 2
_PIECE_BYTES = 8 * MIB


def sized_path(size_bytes: int) -> str:
    """The body of that size, under a delta's name: bodies of every size take the same way."""
    return content_path(f"xdelta{size_bytes:09d}_To_260801001.dax")


def put(tree: Tree, path: str, size_bytes: int) -> str:
    """A body of random bytes at `path`, written piece by piece unless it is there."""
    file = tree.file(path)
    if file.exists():
        return path
    file.parent.mkdir(parents=True, exist_ok=True)
    source = random.Random(path)
    with file.open("wb") as out:
        for at in range(0, size_bytes, _PIECE_BYTES):
            out.write(source.randbytes(min(_PIECE_BYTES, size_bytes - at)))
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


@dataclass(slots=True)
class Rig:
    """What is up. `folder` is there for whoever measures."""

    folder: Path
    tree: Tree
    upstream: Nginx
    servers: list[Server]
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


@contextmanager
def rig(folder: Path, *, servers: Sequence[str] = ("on", "off", "varnish", "gup")) -> Iterator[Rig]:
    """An nginx over an empty tree, and the caches before it."""
    tree = Tree(folder / "tree")
    tree.root.mkdir(parents=True)
    made: list[Server] = []
    with Nginx(tree, folder / "upstream", extra="keepalive_requests 1000000;") as upstream:
        try:
            makers: dict[str, Callable[[], Server]] = {
                "on": lambda: NginxCache(folder, upstream.port, nopush=True),
                "off": lambda: NginxCache(folder, upstream.port, nopush=False),
                "varnish": lambda: VarnishCache(folder, upstream.port),
                "gup": lambda: GupCache(folder, upstream.port),
            }
            made += [make() for name, make in makers.items() if name in servers]
            yield Rig(folder, tree, upstream, made)
        finally:
            for server in made:
                server.stop()
