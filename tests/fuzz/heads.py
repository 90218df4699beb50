"""Request heads: the bytes of a connection, to a data plane with a hot cache and to one without.

`BODIES` are stored: a small one, one that is too large for a message, a download, one whose answer depends on
the client, an index file.
"""

import asyncio
import re
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from itertools import takewhile
from pathlib import Path

from harness.caches import working
from harness.content import INDEX, MONIKER, OTHER_MONIKER, content_path, noise, zip_of
from harness.data_plane import DataPlane, data_plane

from fuzz import Check
from fuzz.endpoints import exchange, upstream
from gup.cache.catalog_cache import Kept, write_kept
from gup.content.catalog import parse_catalog
from gup.content.key import Kind
from gup.server.downloads import is_download

SMALL = content_path("xdelta260731001_To_260801001.dax")
LARGER = content_path("xdelta260730001_To_260801001.dax")
DOWNLOAD = content_path("full.zip")
PATCH = content_path("xdelta260731001_To_260801001.dax", OTHER_MONIKER)
CATALOGUE = (
    f"{MONIKER}: SEPC Virus Definitions Win32 14.3 RU2 - MicroDefsB.CurDefs - SymAllLanguages\r\n"
    f"{OTHER_MONIKER}: SEPC Client Patch 14.3 RU2 - Patch - SymAllLanguages\r\n"
).encode()
BODIES = {
    SMALL: noise("small", 300),
    LARGER: noise("larger", 40_000),
    DOWNLOAD: zip_of("download", 300_000),
    PATCH: noise("patch", 500),
    INDEX: CATALOGUE,
}
_CLOCKS = re.compile(rb"\r\n(Date: [^\r\n]*|Age: [0-9]+)(?=\r\n)")
_ANSWER = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")
_UNREADABLE = (b"400", b"405", b"408", b"414", b"431", b"505")
"""The connection ends. Of a head in pieces less is known when it is refused, so that the words differ."""
_FROM_UPSTREAM = (b"404", b"410", b"500", b"502", b"503", b"504")


@contextmanager
def target() -> Iterator[Check]:
    """The hot cache answers the same bytes as the handler does, however a connection's bytes are cut, and
    each answer is whole HTTP.
    """
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        stack = AsyncExitStack()
        hot, cold = runner.run(_started(stack, Path(folder)))

        def check(given: bytes) -> None:
            runner.run(_check(given, hot, cold))

        try:
            yield check
        finally:
            runner.run(stack.aclose())


def _upstream(request: bytes) -> bytes:
    path = request.split(b" ")[1].decode("latin-1").replace("%7B", "{").replace("%7D", "}")
    body = BODIES.get(path)
    if body is None:
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    modified = b"Last-Modified: Sat, 01 Aug 2026 09:00:00 GMT\r\nDate: Sat, 01 Aug 2026 09:00:09 GMT"
    return b'HTTP/1.1 200 OK\r\nETag: "a"\r\n%b\r\nContent-Length: %d\r\n\r\n%b' % (modified, len(body), body)


async def _started(stack: AsyncExitStack, folder: Path) -> tuple[DataPlane, DataPlane]:
    url = await stack.enter_async_context(upstream(_upstream))
    cache = {"index_ttl": "10d", "negative_ttl": "10d"}
    each = {"version": "14.3 RU2"}
    worker = await stack.enter_async_context(working(folder, [url], cache=cache, each=each))
    write_kept(worker.dependencies.store.run, {"u0": Kept(url, parse_catalog(CATALOGUE))})
    hot = await stack.enter_async_context(data_plane(worker))
    cold = await stack.enter_async_context(data_plane(worker, is_hot=False))
    for path, body in BODIES.items():
        for plane in (hot, cold, hot):
            answer = await exchange(plane.address, _plain(path))
            assert answer.endswith(b"\r\n\r\n" + body)
        found = hot.handler.hot_cache.look_up(_plain(path))
        assert found is not None
        assert (hot.handler.hot_cache.find_target(path.encode()) is None) is (path == PATCH)
        assert cold.handler.hot_cache.find_target(path.encode()) is None
    assert is_download(Kind.FULL, len(BODIES[DOWNLOAD]))
    return hot, cold


def _plain(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: gup\r\n\r\n".encode()


async def _check(given: bytes, hot: DataPlane, cold: DataPlane) -> None:
    first = _timeless(await exchange(cold.address, given))
    answers = _split(first)
    assert b"".join(answers) == first
    assert not any(answer.startswith(b"HTTP/1.1 500") for answer in answers), answers
    for _ in range(2):  # the second time it may be found by all of its bytes
        found = _split(_timeless(await exchange(hot.address, given)))
        _require_same(answers, found, given)
    middle = (len(given) + 1) // 2
    pieces = _split(_timeless(await exchange(hot.address, given[:middle], given[middle:])))
    known = [*takewhile(_is_readable, answers)]
    _require_same(known, [*takewhile(_is_readable, pieces)], given)
    assert (len(known) == len(answers)) is (len(pieces) == len(known))


def _require_same(cold: list[bytes], hot: list[bytes], given: bytes) -> None:
    assert len(cold) == len(hot), (given, cold, hot)
    for one, other in zip(cold, hot, strict=True):
        if _status(one) in _FROM_UPSTREAM:
            assert _status(other) in _FROM_UPSTREAM
        else:
            assert one == other, (given, one[:500], other[:500])


def _timeless(stream: bytes) -> bytes:
    return _CLOCKS.sub(b"\r\n-", stream)


def _status(answer: bytes) -> bytes:
    return answer[9:12]


def _is_readable(answer: bytes) -> bool:
    return _status(answer) not in _UNREADABLE


def _split(stream: bytes) -> list[bytes]:
    """The answers of a connection; a body is the one that its head names, or none."""
    answers = []
    while stream:
        begin = _ANSWER.match(stream)
        assert begin, stream[:300]
        head, _, rest = stream.partition(b"\r\n\r\n")
        found = re.search(rb"\r\nContent-Length: ([0-9]+)", head)
        length = int(found[1]) if found else 0
        if rest.startswith(b"HTTP/1.1 ") or not rest:  # to HEAD
            length = 0
        assert len(rest) >= length, (head, len(rest))
        size = len(head) + 4 + length
        answers.append(stream[:size])
        stream = stream[size:]
    return answers
