"""Simulated clients: what each has and needs next, its downloads, and a crowd of them."""

import asyncio
import contextlib
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import accumulate
from random import Random
from typing import Literal
from urllib.parse import urlsplit

import aiohttp
import uvloop
import xxhash

from gup.content.key import Kind
from gup.demo.content import ALL_LANGUAGES, CATALOGUE_JSON, Catalogue, PublishedFile, PublishedStream
from gup.demo.manager import CATALOGUE_PATH

MAX_COMPLAINTS = 10
"""Sentences kept about failures; more are only counted."""
POLL_SECONDS = 2.0
"""A client's mean time between polls; a real one's is minutes to hours, and the demo lasts half a minute."""

_POLICY_SECONDS = 1.0
_FINISH_SECONDS = 15.0
_ATTEMPTS = 8
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 3.0
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_LANGUAGES = ("English", "English", "English", "French", "German")
_TAKES_STREAM, _REINSTALLED, _CUT = 0.6, 0.02, 0.05
_HELD_AT_START = ((0.25, 0), (0.75, 1), (0.90, 2), (0.95, 3))
"""Cumulated share of clients by the revisions they are behind at the start; the rest need a full."""


class Latencies:
    """Durations, counted in steps of 2 %: quantiles to within a step, in constant memory."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        self._counts[round(math.log(max(seconds, 1e-5), 1.02))] += 1

    def quantile(self, share: float) -> float | None:
        """Seconds that `share` (0 to 1) of the durations do not exceed; None without any."""
        steps = sorted(self._counts)
        passed = accumulate(self._counts[step] for step in steps)
        wanted = share * self._counts.total()
        return next((1.02**step for step, count in zip(steps, passed, strict=True) if count >= wanted), None)


@dataclass(slots=True)
class Figures:
    """Counts of all clients of one crowd; only they write it, on their event loop.

    `received_bytes` are of bodies. `wrong` are bodies that differ from what the management server published,
    `failed` are downloads given up, `gone` are files that were withdrawn before they were requested.
    """

    requests: int = 0
    received_bytes: int = 0
    downloads: Counter[Kind] = field(default_factory=Counter)
    not_modified: int = 0
    resumes: int = 0
    retries: int = 0
    gone: int = 0
    wrong: int = 0
    failed: int = 0
    cache_status: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    time_to_first_byte: Latencies = field(default_factory=Latencies)

    @property
    def right(self) -> bool:
        return bool(self.downloads) and not self.wrong and not self.failed

    def document(self) -> dict[str, object]:
        plain = {one.name: getattr(self, one.name) for one in fields(self) if "first_byte" not in one.name}
        return plain | {
            "downloads": {str(kind): count for kind, count in sorted(self.downloads.items())},
            "cache_status": dict(sorted(self.cache_status.items())),
            "median_time_to_first_byte_seconds": self.time_to_first_byte.quantile(0.5),
            "p99_time_to_first_byte_seconds": self.time_to_first_byte.quantile(0.99),
        }

    def complain(self, counted: Literal["wrong", "failed"], sentence: str) -> bool:
        """Count a failure, and keep the sentence about it if there is room; returns False."""
        setattr(self, counted, getattr(self, counted) + 1)
        if len(self.complaints) < MAX_COMPLAINTS:
            self.complaints.append(sentence)
        return False

    def answered(self, seconds: float, cache_status: str | None) -> None:
        """Count a response that began after `seconds`, with its Cache-Status field (RFC 9211)."""
        self.cache_status[cache_result(cache_status)] += 1
        self.time_to_first_byte.add(seconds)


def cache_result(cache_status: str | None) -> str:
    """hit, collapsed, miss, or none without a cache."""
    words = [word.strip().partition("=")[0] for word in (cache_status or "").split(";")[1:]]
    known = (("collapsed", "collapsed"), ("hit", "hit"), ("fwd", "miss"))
    return next((result for word, result in known if word in words), "none")


@dataclass(slots=True)
class Download:
    """One client's download of one published file, through `url` (scheme, host and port).

    `client` is the User-Agent. `cut_after_bytes` breaks the first connection there, to resume. `held_etag` is
    the entity tag of the copy that the client has: an unchanged file is not sent again.
    """

    session: aiohttp.ClientSession
    url: str
    file: PublishedFile
    figures: Figures
    client: str = "simulated-client"
    cut_after_bytes: int | None = None
    held_etag: str | None = None
    received_bytes: int = 0
    received_etag: str | None = None
    digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    async def run(self) -> bool:
        for attempt in range(_ATTEMPTS):
            problem = "it was asked to try again"
            cuts = self.cut_after_bytes
            try:
                done = await self._attempt()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                done, problem = None, f"{type(error).__name__}: {error}"
            if done is not None:
                return done
            if cuts == self.cut_after_bytes:  # else the client itself broke off
                self.figures.retries += 1
                await asyncio.sleep(min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2**attempt))
        return self._ended("failed", f"gave up after {_ATTEMPTS} attempts, the last one: {problem}")

    async def _attempt(self) -> bool | None:
        """One request; None when another one should follow."""
        begin = time.perf_counter()
        self.figures.requests += 1
        async with self.session.get(
            self.url + self.file.path, headers=self._asked(), allow_redirects=False
        ) as response:
            self.figures.answered(time.perf_counter() - begin, response.headers.get("Cache-Status"))
            if response.status in (200, 206):
                return await self._receive(response)
            if response.status == 304 and self.held_etag is not None:
                self.figures.not_modified += 1
                return True
            if response.status in (404, 410):
                self.figures.gone += 1
                return False
            return (
                None if response.status in _TRY_AGAIN else self._ended("failed", f"status {response.status}")
            )

    def _asked(self) -> dict[str, str]:
        """Headers for the whole, or for the rest after a break."""
        headers = {"User-Agent": self.client}
        if self.received_etag is not None and 0 < self.received_bytes < self.file.length:
            headers |= {"Range": f"bytes={self.received_bytes}-", "If-Range": self.received_etag}
        elif self.held_etag is not None:
            headers["If-None-Match"] = self.held_etag
        return headers

    async def _receive(self, response: aiohttp.ClientResponse) -> bool | None:
        length = self.file.length
        if response.status == 200:
            self.received_bytes = 0
            self.digest.reset()
        else:  # RFC 9110 section 14.4: the part must be the rest of a body of the published length
            given = response.headers.get("Content-Range")
            if given != f"bytes {self.received_bytes}-{length - 1}/{length}":
                return self._ended("wrong", f"a range that was not asked for: {given}")
            self.figures.resumes += 1
        self.received_etag = response.headers.get("ETag")
        async for piece in response.content.iter_any():
            self.figures.received_bytes += len(piece)
            self.received_bytes += len(piece)
            self.digest.update(piece)
            if self.cut_after_bytes is not None and self.cut_after_bytes <= self.received_bytes < length:
                self.cut_after_bytes = None
                response.close()
                return None
        if self.received_bytes != length:
            return self._ended("wrong", f"{self.received_bytes} bytes instead of {length}")
        if self.digest.hexdigest() != self.file.digest:
            return self._ended("wrong", "other bytes than published")
        self.figures.downloads[self.file.kind] += 1
        return True

    def _ended(self, counted: Literal["wrong", "failed"], what: str) -> bool:
        return self.figures.complain(counted, f"{self.file.path}: {what}")


@dataclass(slots=True)
class Client:
    """One machine: its language, the streams it takes, and the revision it has of each.

    Changed only by its own task, after a download that was right.
    """

    number: int
    chance: Random
    language: str = ""
    held: dict[str, str] = field(default_factory=dict)
    declined: set[str] = field(default_factory=set)
    content_info_etag: str | None = None

    def __post_init__(self) -> None:
        self.language = self.chance.choice(_LANGUAGES)

    @property
    def address(self) -> str:
        """A loopback address of its own, so that a cache on this machine tells the clients apart."""
        return f"127.1.{self.number // 250}.{self.number % 250 + 1}"

    @property
    def user_agent(self) -> str:
        return f"simulated-client/{self.number:05d}"

    def takes(self, stream: PublishedStream) -> bool:
        """Whether the stream is for this machine; decided once, when the stream is first seen."""
        if stream.moniker in self.held:
            return True
        if stream.moniker in self.declined or stream.language not in (ALL_LANGUAGES, self.language):
            return False
        if stream.language == ALL_LANGUAGES and self.chance.random() >= _TAKES_STREAM:
            self.declined.add(stream.moniker)
            return False
        place = self.chance.random()
        behind = next((steps for share, steps in _HELD_AT_START if place < share), len(stream.revisions))
        known = behind < len(stream.revisions)
        self.held[stream.moniker] = stream.revisions[-1 - behind] if known else "none"
        return True

    def wants(self, stream: PublishedStream) -> PublishedFile | None:
        """The file that brings this machine up to date: a delta if there is one, else the full."""
        held = self.held[stream.moniker]
        if held == stream.newest:
            return None
        delta = None if self.chance.random() < _REINSTALLED else stream.delta_from(held)
        return delta or stream.full

    def cuts(self, file: PublishedFile) -> int | None:
        """Where the machine loses its connection, which it does occasionally."""
        if self.chance.random() >= _CUT:
            return None
        return round(file.length * self.chance.uniform(0.2, 0.8))


class Crowd:
    """Clients that poll and update through `url` until told to stop; they share their figures.

    `catalogue` is what the management server has them install; the crowd's owner updates it.
    """

    def __init__(
        self,
        url: str,
        catalogue: Catalogue,
        *,
        count: int,
        seed: int,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """`url` is scheme, host and port of the site's cache."""
        self._url = url
        self._local = (urlsplit(url).hostname or "").startswith("127.")
        self._clients = [
            Client(number, Random(f"{seed}/client/{number}"))  # noqa: S311 - repeatable by design
            for number in range(count)
        ]
        self._bell = asyncio.Event()
        self._stopping = asyncio.Event()
        self.catalogue = catalogue
        self.poll_seconds = poll_seconds
        self.figures = Figures()

    async def run(self) -> None:
        """Until `stop`; the clients finish their downloads, for at most 15 s."""
        self._stopping.clear()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._live(client)) for client in self._clients]
            await self._stopping.wait()
            _, late = await asyncio.wait(tasks, timeout=_FINISH_SECONDS)
            for task in late:
                task.cancel()
                self.figures.complain("failed", f"a client did not finish within {_FINISH_SECONDS:g} s")

    def ring(self) -> None:
        """Make every client poll at once."""
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()

    def stop(self) -> None:
        self._stopping.set()
        self.ring()

    async def _live(self, client: Client) -> None:
        await _rest(client.chance.uniform(0, self.poll_seconds), self._bell)
        async with new_session(client.address if self._local else None) as session:
            while not self._stopping.is_set():
                # Before the poll: a client that is busy when the bell rings polls again at once.
                bell = self._bell
                await self._poll(client, session)
                await _rest(self.poll_seconds * client.chance.uniform(0.5, 1.5), bell)

    async def _poll(self, client: Client, session: aiohttp.ClientSession) -> None:
        """One poll: the index, then whatever is new, in an order of the client's own."""
        catalogue = self.catalogue
        begin = partial(Download, session, self._url, figures=self.figures, client=client.user_agent)
        index = begin(catalogue.content_info, held_etag=client.content_info_etag)
        if await index.run():
            client.content_info_etag = index.received_etag or client.content_info_etag
        streams = [stream for stream in catalogue.streams if client.takes(stream)]
        client.chance.shuffle(streams)
        for stream in streams:
            if self._stopping.is_set():
                return
            file = client.wants(stream)
            if file is not None and await begin(file, cut_after_bytes=client.cuts(file)).run():
                client.held[stream.moniker] = stream.newest


async def _rest(seconds: float, bell: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await bell.wait()


def new_session(address: str | None = None) -> aiohttp.ClientSession:
    """One client's kept-alive connections, from `address` if it has one of its own."""
    local = (address, 0) if address is not None else None
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(keepalive_timeout=60, local_addr=local),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60),
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=128 * 1024,
        headers={"Accept-Encoding": "identity"},
    )


def simulate_clients(
    url: str, manager_url: str, *, count: int, seconds: float, seed: int, json_output: bool
) -> int:
    """Let `count` clients use the cache at `url` for `seconds`, and print the result.

    `manager_url` is where the simulated management server's catalogue is. Returns 0 if every byte was right,
    1 if one was wrong or missing, 3 if the catalogue can't be had.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(_simulate(url.rstrip("/"), manager_url.rstrip("/"), count, seconds, seed))
    if figures is None:
        return 3
    if json_output:
        sys.stdout.write(json.dumps(figures.document(), indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{name}: {value}\n" for name, value in figures.document().items())
    return 0 if figures.right else 1


async def _simulate(url: str, manager_url: str, count: int, seconds: float, seed: int) -> Figures | None:
    async with new_session() as session:

        async def catalogue() -> Catalogue:
            async with session.get(manager_url + CATALOGUE_PATH, raise_for_status=True) as response:
                return CATALOGUE_JSON.validate_json(await response.read())

        async def follow(crowd: Crowd) -> None:
            """Once a second for all of them, past the cache; a failure keeps the last catalogue."""
            while True:
                await asyncio.sleep(_POLICY_SECONDS)
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    crowd.catalogue = await catalogue()

        try:
            crowd = Crowd(url, await catalogue(), count=count, seed=seed)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # ValueError: not a catalogue
            sys.stderr.write(f"gup: no catalogue at {manager_url}{CATALOGUE_PATH}: {error}\n")
            return None
        asyncio.get_running_loop().call_later(seconds, crowd.stop)
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(follow(crowd))
            await crowd.run()
            following.cancel()
        return crowd.figures
