"""Traffic with a memory: revisions that age, uneven popularity, scans, bodies that are asked for again.

The size of a body follows from its path, so that every upstream has the same ones.
"""

import random
import zlib
from collections.abc import Iterator
from urllib.parse import unquote

from harness.content import noise, zip_of
from harness.upstreams import RawUpstream, Request, ok


def body_of(path: str, mean_bytes: int) -> bytes:
    """Of some tenth to four times the mean."""
    share = zlib.crc32(path.encode()) % 1000 / 1000
    size = int(mean_bytes * (0.1 + 3.9 * share**3))
    return zip_of(path, max(200, size)) if path.endswith(".zip") else noise(path, size)


class SizedUpstream(RawUpstream):
    """Has every path, with bodies of this size on the average."""

    def __init__(self, mean_bytes: int = 20_000) -> None:
        self.mean_bytes = mean_bytes
        super().__init__()

    def reply(self, request: Request) -> None:
        body = body_of(unquote(request.path), self.mean_bytes)
        request.status, request.body_bytes = 200, len(body)
        request.send(ok(body, f'ETag: "{zlib.crc32(body):x}"') if request.method == "GET" else ok(b""))


def full_of(stream: int, revision: int = 1) -> str:
    return f"/content/{{{stream:08X}-0000-4000-8000-000000000000}}/260101{revision:03d}/full.zip"


def delta_of(stream: int, origin: int, revision: int) -> str:
    folder = f"/content/{{{stream:08X}-0000-4000-8000-000000000000}}/260101{revision:03d}"
    return f"{folder}/xdelta260101{origin:03d}_To_260101{revision:03d}.dax"


def aging(seed: int, requests: int, streams: int = 8, revisions: int = 30) -> Iterator[str]:
    """Revisions appear one after the other; most clients take deltas to the newest, some older ones."""
    chance = random.Random(seed)
    for number in range(requests):
        newest = 10 + number * revisions // requests
        stream = min(streams, int(chance.paretovariate(0.9)))
        revision = newest - min(9, int(chance.expovariate(0.8)))
        if chance.random() < 0.25:
            yield full_of(stream, revision)
        else:
            yield delta_of(stream, revision - 1 - min(6, int(chance.expovariate(0.5))), revision)


def zipf(seed: int, requests: int, keys: int = 400, exponent: float = 0.8) -> Iterator[str]:
    """Independent requests of uneven popularity, for bodies that no revision supersedes."""
    weights = [1 / (rank + 1) ** exponent for rank in range(keys)]
    for rank in random.Random(seed).choices(range(keys), weights, k=requests):
        yield full_of(rank)


def scanned(seed: int, requests: int, keys: int = 400) -> Iterator[str]:
    """As `zipf`, broken by passes over files that are asked for once."""
    chance, seen = random.Random(seed), keys
    for path in zipf(seed, requests, keys):
        yield path
        if chance.random() < 0.01:
            for _ in range(20):
                seen += 1
                yield full_of(seen)


PATTERNS = {"aging": aging, "zipf": zipf, "scanned": scanned}
