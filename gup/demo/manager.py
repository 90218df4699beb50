"""The simulated management server: serves the content over a simulated WAN link, and counts.

Only `/content/` passes the link and is counted. `/simulation/` is for policy and bookkeeping, which do not
use the link in real life either.
"""

import asyncio
import contextlib
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import BinaryIO

import uvloop
from aiohttp import web

from gup.content.key import Kind
from gup.demo import content
from gup.demo.content import (
    CATALOGUE_JSON,
    CATALOGUE_PATH,
    COUNTS_PATH,
    DELTA_BYTES,
    FIRST_NEWEST,
    PUBLISH_PATH,
    Catalogue,
    PublishedFile,
    PublishedStream,
    Stream,
)
from gup.errors import GupError
from gup.units import format_http_date

KEEP_PUBLICATIONS = 12
"""Publications of a stream whose files stay; older ones are withdrawn, so a long run fills no disk."""
PIECE_BYTES = 16 * 1024
"""Most that a connection sends in one turn; small, so that connections share the link fairly."""

_READ_BYTES = 256 * 1024
_SLACK_SECONDS = 0.01
"""How much unused time is compensated: covers late wake-ups, far too little to be a burst."""
_ABSENT = "no such content\n"
_CONTENT_TYPES = {Kind.FULL: "application/zip", Kind.INDEX: "text/plain"}


class Link:
    """A link of a fixed rate. Turns are given first come, first served, so equal connections get equal
    shares.
    """

    def __init__(self, rate_bytes_per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`rate_bytes_per_second` 0 is unlimited; `clock` is monotonic seconds."""
        self._rate = rate_bytes_per_second
        self._clock = clock
        self._free_at_seconds = clock()

    def reserve(self, size_bytes: int) -> float:
        """Take the link's next free time for `size_bytes`; returns the seconds until they have passed."""
        if not self._rate:
            return 0.0
        now = self._clock()
        self._free_at_seconds = max(self._free_at_seconds, now - _SLACK_SECONDS) + size_bytes / self._rate
        return max(0.0, self._free_at_seconds - now)

    async def pass_through(self, size_bytes: int, *, first: bool = False) -> None:
        """Return when `size_bytes` (at most PIECE_BYTES) have had their time on the link.

        With `first` they do not queue: an index file of a few kilobytes would time out behind the fulls on a
        slow link.
        """
        wait_seconds = self.reserve(size_bytes)
        # The loop must turn even without a wait, or one connection would keep the others from the link.
        await asyncio.sleep(size_bytes / self._rate if first and self._rate else wait_seconds)


@dataclass(frozen=True, slots=True)
class Faults:
    """What the server does wrong: shares (0 to 1) of the requests for content, and a wait before each answer.

    `errors` are answered with 503, `cuts` break off within the body, `wrong` have one byte of it changed.
    """

    errors: float = 0.0
    cuts: float = 0.0
    wrong: float = 0.0
    delay_seconds: float = 0.0


@dataclass(slots=True)
class FileCounts:
    """What the server sent of one file: `fetches` are GETs answered with bytes (200 or 206)."""

    kind: Kind
    length: int
    fetches: int = 0
    not_modified: int = 0
    sent_bytes: int = 0


@dataclass(slots=True)
class Counts:
    """Everything that went over the simulated WAN since the server started. Byte counts are of bodies.

    Counted when sent. `files` are those published now; `refetched` counts also withdrawn ones. `faults` are
    requests that were answered wrongly on purpose.
    """

    requests: int = 0
    not_found: int = 0
    sent_bytes: int = 0
    sending: int = 0
    refetched: int = 0
    files: dict[str, FileCounts] = field(default_factory=dict)
    faults: int = 0


class Manager:
    """A management server with `offered` streams, its files in `directory`. Used on one event loop alone."""

    def __init__(
        self,
        directory: Path,
        seed: int,
        offered: tuple[Stream, ...],
        link: Link,
        faults: Faults | None = None,
    ) -> None:
        """Only the index file is published before the first `publish`. Blocks on the disk."""
        self._directory = directory
        self._seed = seed
        self._streams = offered
        self._link = link
        self._faults = faults or Faults()
        self._chance = Random(f"{seed}/faults")  # noqa: S311 - repeatable by design
        self._publishing = asyncio.Lock()
        self._turn = 0
        self._publications: list[deque[PublishedStream]] = [deque() for _ in offered]
        self._ordinals = [FIRST_NEWEST - 1] * len(offered)
        self._files: dict[str, PublishedFile] = {}
        self.counts = Counts()
        self.catalogue = Catalogue(0, content.write_content_info(directory, offered), ())
        self._offer(self.catalogue.content_info)

    async def publish(self, count: int = sys.maxsize) -> None:
        """Publish the next revision of the next `count` streams, at most of all, in turn, all at once."""
        async with self._publishing:
            total = len(self._streams)
            chosen = [(self._turn + step) % total for step in range(min(count, total))]
            self._turn = (self._turn + len(chosen)) % total
            withdrawn: list[PublishedFile] = []
            written = {at: await asyncio.to_thread(self._write_next, at) for at in chosen}
            for at, stream in written.items():
                self._publications[at].append(stream)
                for file in stream.files:
                    self._offer(file)
                if len(self._publications[at]) > KEEP_PUBLICATIONS:
                    withdrawn += self._publications[at].popleft().files
            newest = tuple(held[-1] for held in self._publications if held)
            self.catalogue = replace(self.catalogue, serial=self.catalogue.serial + 1, streams=newest)
            for file in withdrawn:
                del self._files[file.path.casefold()], self.counts.files[file.path]
                await asyncio.to_thread((self._directory / file.path[1:]).unlink)

    def _write_next(self, at: int) -> PublishedStream:
        self._ordinals[at] += 1
        return content.write_revision(self._directory, self._seed, self._streams[at], self._ordinals[at])

    def _offer(self, file: PublishedFile) -> None:
        self._files[file.path.casefold()] = file  # monikers are compared without case
        self.counts.files[file.path] = FileCounts(file.kind, file.length)

    @contextlib.asynccontextmanager
    async def listening(self, host: str, port: int) -> AsyncIterator[str]:
        """Serve meanwhile; gives the URL as bound. ListenError when the address can't be had."""
        application = web.Application()
        application.router.add_get(CATALOGUE_PATH, self._send_catalogue)
        application.router.add_get(COUNTS_PATH, self._send_counts)
        application.router.add_post(PUBLISH_PATH, self._publish)
        application.router.add_get("/content/{rest:.*}", self._content)
        # Access logs would be most of the server's work; the counts say more.
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=2.0, handler_cancellation=True)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                raise ListenError(
                    f"can't listen at {host}:{port}: {error}; give another address with --listen"
                ) from error
            bound, port = runner.addresses[0][:2]
            yield f"http://[{bound}]:{port}" if ":" in bound else f"http://{bound}:{port}"
        finally:
            await runner.cleanup()

    async def _send_catalogue(self, _request: web.Request) -> web.Response:
        return web.Response(body=CATALOGUE_JSON.dump_json(self.catalogue), content_type="application/json")

    async def _send_counts(self, _request: web.Request) -> web.Response:
        return web.json_response(asdict(self.counts))

    async def _publish(self, request: web.Request) -> web.Response:
        asked = request.query.get("streams", "1")
        if not asked.isascii() or not asked.isdigit():
            raise web.HTTPBadRequest(text="streams is a number")
        await self.publish(int(asked))
        return await self._send_catalogue(request)

    async def _content(self, request: web.Request) -> web.StreamResponse:
        counts = self.counts
        counts.requests += 1
        await asyncio.sleep(self._faults.delay_seconds)
        if self._happens(self._faults.errors):
            raise web.HTTPServiceUnavailable(text="a simulated fault\n")
        file = self._files.get(request.path.casefold())
        if file is None:
            counts.not_found += 1
            counts.sent_bytes += len(_ABSENT) if request.method == "GET" else 0  # it passes the link too
            raise web.HTTPNotFound(text=_ABSENT)
        status, start, stop = content.decide(request.headers, file.etag, file.modified_at, file.length)
        row = counts.files[file.path]
        sends = request.method == "GET" and stop > start
        row.fetches += sends
        row.not_modified += status == 304
        counts.refetched += sends and row.fetches == 2 and file.kind is not Kind.INDEX
        # Opened at once: a file withdrawn meanwhile is sent to its end; a client that leaves leaks nothing.
        with (self._directory / file.path[1:]).open("rb") as body:
            response = _head(file, status, start, stop)
            await response.prepare(request)
            if sends:
                counts.sending += 1
                try:
                    async for piece in self._pieces(body, start, stop):
                        await self._link.pass_through(len(piece), first=file.kind is Kind.INDEX)
                        await response.write(piece)
                        row.sent_bytes += len(piece)
                        counts.sent_bytes += len(piece)
                except _BrokenOffError:
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                finally:
                    counts.sending -= 1
        await response.write_eof()
        return response

    async def _pieces(self, body: BinaryIO, start: int, stop: int) -> AsyncIterator[bytes | memoryview]:
        """The bytes from `start` to `stop`, with the faults that happen to them."""
        nowhere = stop
        wrong_at = self._chance.randrange(start, stop) if self._happens(self._faults.wrong) else nowhere
        cut_at = self._chance.randrange(start, stop) if self._happens(self._faults.cuts) else nowhere
        body.seek(start)
        while start < stop:
            block = memoryview(await asyncio.to_thread(body.read, min(_READ_BYTES, stop - start)))
            for at in range(0, len(block), PIECE_BYTES):
                piece = block[at : at + PIECE_BYTES]
                begin, end = start + at, start + at + len(piece)
                if begin <= cut_at < end:
                    raise _BrokenOffError
                if begin <= wrong_at < end:
                    changed = bytearray(piece)
                    changed[wrong_at - begin] ^= 1
                    piece = memoryview(changed)
                yield piece
            start += len(block)

    def _happens(self, share: float) -> bool:
        happens = self._chance.random() < share
        self.counts.faults += happens
        return happens


def _head(file: PublishedFile, status: int, start: int, stop: int) -> web.StreamResponse:
    response = web.StreamResponse(status=status)
    response.headers["ETag"] = file.etag
    response.headers["Last-Modified"] = format_http_date(file.modified_at)
    response.headers["Accept-Ranges"] = "bytes"
    if status in (206, 416):
        span = "*" if status == 416 else f"{start}-{stop - 1}"
        response.headers["Content-Range"] = f"bytes {span}/{file.length}"
    if status != 304:
        response.content_type = _CONTENT_TYPES.get(file.kind, "application/octet-stream")
        response.content_length = stop - start
    return response


class _BrokenOffError(Exception):
    """The connection is to be broken off now: a simulated fault."""


class ListenError(GupError):
    """The address asked for can't be had."""


def simulate_manager(
    host: str,
    port: int,
    *,
    seed: int,
    wan_rate_bytes_per_second: int,
    publish_interval_seconds: float,
    products: int,
    full_bytes: int,
    delta_bytes: int = DELTA_BYTES,
    faults: Faults | None = None,
) -> None:
    """Serve the simulated content until SIGINT or SIGTERM.

    Writes `simulated manager: serving on http://H:P` to stderr when ready. A publish interval of 0 publishes
    only when asked to. ListenError when the address can't be had.
    """

    async def serve(directory: Path) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        offered = content.streams(products, full_bytes, delta_bytes)
        manager = Manager(directory, seed, offered, Link(wan_rate_bytes_per_second), faults)
        await manager.publish()
        async with manager.listening(host, port) as url, asyncio.TaskGroup() as tasks:
            publishing = tasks.create_task(publish_regularly(manager))
            sys.stderr.write(f"simulated manager: serving on {url}\n")
            sys.stderr.flush()
            await stop.wait()
            publishing.cancel()

    async def publish_regularly(manager: Manager) -> None:
        while publish_interval_seconds > 0:
            await asyncio.sleep(publish_interval_seconds)
            await manager.publish(1)

    with (
        tempfile.TemporaryDirectory(prefix="gup-manager-") as directory,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(serve(Path(directory)))
