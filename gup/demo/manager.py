"""The simulated management server: serves the content over a simulated WAN link, and counts.

Only `/content/` passes the link and is counted. `/simulation/` stands for policy and bookkeeping, which take
another way in real life.
"""

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Self

import uvloop
from aiohttp import web

from gup.content.key import Kind
from gup.demo.content import (
    CATALOGUE_PATH,
    COUNTS_JSON,
    COUNTS_PATH,
    PUBLISH_PATH,
    Answer,
    Counts,
    FileCounts,
    Shelf,
    ShelvedFile,
    decide,
    streams,
)
from gup.errors import GupError, SettingsError

PIECE_BYTES = 16 * 1024
"""Most that a connection sends in one turn; small, so that connections share the link fairly."""

_SLACK_SECONDS = 0.01
"""How much unused time may be made up for: covers late wake-ups, far too little to be a burst."""


class Link:
    """A link of a fixed rate. Turns are given in the order of asking, so equal askers get equal shares."""

    def __init__(self, rate_bytes_per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`rate_bytes_per_second` 0 is unlimited; `clock` is monotonic seconds."""
        assert rate_bytes_per_second >= 0, rate_bytes_per_second
        self._rate = rate_bytes_per_second
        self._clock = clock
        self._free_at_seconds = clock()

    def reserve(self, size_bytes: int) -> float:
        """Take the link's next free time for `size_bytes`; returns the seconds until they have passed it."""
        if not self._rate:
            return 0.0
        now = self._clock()
        start = max(self._free_at_seconds, now - _SLACK_SECONDS)
        self._free_at_seconds = start + size_bytes / self._rate
        return max(0.0, self._free_at_seconds - now)

    async def pass_through(self, size_bytes: int) -> None:
        """Return when `size_bytes` (at most PIECE_BYTES) have had their time on the link."""
        assert size_bytes <= PIECE_BYTES, size_bytes
        # Also without a wait the loop must turn, or one connection would keep the others from asking.
        await asyncio.sleep(self.reserve(size_bytes))


_READ_BYTES = 256 * 1024
_SHUTDOWN_SECONDS = 2.0
_ABSENT = "no such content\n"
_CONTENT_TYPES = {Kind.FULL: "application/zip", Kind.INDEX: "text/plain"}


class Site:
    """The server's handlers and counts, around a shelf and a link. Used on one event loop alone."""

    def __init__(self, shelf: Shelf, link: Link) -> None:
        self._shelf = shelf
        self._link = link
        self._publishing = asyncio.Lock()
        self._turn = 0
        self.counts = Counts()

    def application(self) -> web.Application:
        """An aiohttp application with everything the simulated server offers."""
        application = web.Application()
        application.router.add_get(CATALOGUE_PATH, self._catalogue)
        application.router.add_get(COUNTS_PATH, self._send_counts)
        application.router.add_post(PUBLISH_PATH, self._publish)
        application.router.add_get("/content/{rest:.*}", self._content)
        return application

    async def publish(self, count: int) -> None:
        """Publish the next revision of the next `count` streams, in turn, all at once."""
        async with self._publishing:
            total = len(self._shelf.streams)
            chosen = [(self._turn + step) % total for step in range(min(count, total))]
            self._turn = (self._turn + len(chosen)) % total
            publications = [
                await asyncio.to_thread(self._shelf.prepare, at, self._shelf.next_ordinal(at))
                for at in chosen
            ]
            withdrawn = self._shelf.publish(publications)
            for file in (file.published for file in self._shelf.files()):
                self.counts.files.setdefault(file.path, FileCounts(file.kind, file.length))
            self._retire(withdrawn)
            await asyncio.to_thread(self._shelf.discard, withdrawn)

    def _retire(self, withdrawn: list[ShelvedFile]) -> None:
        for file in withdrawn:
            self.counts.withdrawn_files += 1
            self.counts.withdrawn_fetched_again += self.counts.files.pop(file.published.path).fetches > 1

    async def _catalogue(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._shelf.catalogue_json, content_type="application/json")

    async def _send_counts(self, _request: web.Request) -> web.Response:
        return web.Response(body=COUNTS_JSON.dump_json(self.counts), content_type="application/json")

    async def _publish(self, request: web.Request) -> web.Response:
        asked = request.query.get("streams", "1")
        if not asked.isascii() or not asked.isdigit():
            raise web.HTTPBadRequest(text="streams is a number")
        await self.publish(int(asked))
        return await self._catalogue(request)

    async def _content(self, request: web.Request) -> web.StreamResponse:
        counts = self.counts
        counts.requests += 1
        file = self._shelf.find(request.path)
        if file is None:
            counts.not_found += 1
            counts.sent_bytes += len(_ABSENT) if request.method == "GET" else 0  # it passes the link too
            raise web.HTTPNotFound(text=_ABSENT)
        answer = decide(request.headers, file.validators, file.published.length)
        tally = counts.files.get(file.published.path) or FileCounts(file.published.kind, 0)
        sends = request.method == "GET" and answer.stop > answer.start
        tally.fetches += sends
        tally.not_modified += answer.status == 304
        tally.other_requests += not sends and answer.status != 304
        response = _head(file, answer)
        # Opened before the head leaves: a file that is withdrawn meanwhile is still sent to its end.
        with await asyncio.to_thread(file.location.open, "rb") as body:
            await response.prepare(request)
            if sends:
                counts.sending += 1
                try:
                    await self._send(response, body, answer, tally)
                finally:
                    counts.sending -= 1
        await response.write_eof()
        return response

    async def _send(
        self, response: web.StreamResponse, body: BinaryIO, answer: Answer, tally: FileCounts
    ) -> None:
        for start in range(answer.start, answer.stop, _READ_BYTES):
            size = min(_READ_BYTES, answer.stop - start)
            block = memoryview(await asyncio.to_thread(os.pread, body.fileno(), size, start))
            assert len(block) == size, "a shelved file is shorter than published"
            for at in range(0, size, PIECE_BYTES):
                piece = block[at : at + PIECE_BYTES]
                await self._link.pass_through(len(piece))
                await response.write(piece)
                tally.sent_bytes += len(piece)
                self.counts.sent_bytes += len(piece)


def _head(file: ShelvedFile, answer: Answer) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status)
    known = file.validators
    response.headers.update({"ETag": str(known.etag), "Last-Modified": str(known.last_modified)})
    response.headers["Accept-Ranges"] = "bytes"
    length = file.published.length
    if answer.status == 416:
        response.headers["Content-Range"] = f"bytes */{length}"
    if answer.status == 206:
        response.headers["Content-Range"] = f"bytes {answer.start}-{answer.stop - 1}/{length}"
    if answer.status != 304:
        response.content_type = _CONTENT_TYPES.get(file.published.kind, "application/octet-stream")
        response.content_length = answer.stop - answer.start
    return response


def simulate_manager(
    *,
    listen: str,
    seed: int,
    wan_rate_bytes_per_second: int,
    publish_interval_seconds: float,
    products: int,
    full_bytes: int,
) -> int:
    """Serve the simulated tree at `listen` ("host:port") until SIGINT or SIGTERM; then returns 0.

    Writes `simulated manager: serving on http://H:P` to stderr when ready. A publish interval of 0 publishes
    only when asked to. GupError when the address can't be had or an argument is out of range.
    """
    _check(listen, wan_rate_bytes_per_second, publish_interval_seconds, products, full_bytes)
    with tempfile.TemporaryDirectory(prefix="gup-manager-") as directory:
        shelf = Shelf(Path(directory), seed, streams(products, full_bytes))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(listen, shelf, wan_rate_bytes_per_second, publish_interval_seconds))
    return 0


def _check(listen: str, rate: int, interval_seconds: float, products: int, full_bytes: int) -> None:
    problems = []
    host, _, port = listen.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        problems.append(f"listen: {listen!r} is not host:port, such as 127.0.0.1:8014")
    if rate < 0 or interval_seconds < 0:
        problems.append("the WAN's rate and the publish interval are 0 or more")
    if products < 1 or full_bytes < 1:
        problems.append("products and the size of a full are 1 or more")
    if problems:
        raise SettingsError(problems)


async def _serve(listen: str, shelf: Shelf, wan_rate_bytes_per_second: int, interval_seconds: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    site = Site(shelf, Link(wan_rate_bytes_per_second))
    await site.publish(len(shelf.streams))
    async with Listening(site, listen) as listening, asyncio.TaskGroup() as tasks:
        publishing = tasks.create_task(_publish_regularly(site, interval_seconds))
        sys.stderr.write(f"simulated manager: serving on {listening.url}\n")
        sys.stderr.flush()
        await stop.wait()
        publishing.cancel()


async def _publish_regularly(site: Site, interval_seconds: float) -> None:
    while interval_seconds > 0:
        await asyncio.sleep(interval_seconds)
        await site.publish(1)


class ListenError(GupError):
    """The address asked for can't be had."""


class Listening:
    """A site while it listens: `async with Listening(site, "127.0.0.1:0") as listening: listening.url`."""

    def __init__(self, site: Site, listen: str) -> None:
        host, _, port = listen.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        # Access logs would be most of the server's work; the counts say more.
        self._runner = web.AppRunner(
            site.application(), access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS, handler_cancellation=True
        )

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ListenError(f"can't listen at {self._host}:{self._port}: {error}") from error
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        """`http://host:port` as bound."""
        host, port = self._runner.addresses[0][:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
