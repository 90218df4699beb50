"""Simulated clients: what each holds and wants next, its downloads, and a crowd of them."""

import asyncio
import contextlib
import json
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import aiohttp
import uvloop
import xxhash

from gup.content.key import Kind
from gup.demo.content import (
    ALL_LANGUAGES,
    CATALOGUE_JSON,
    CATALOGUE_PATH,
    Catalogue,
    PublishedFile,
    PublishedStream,
)

MAX_COMPLAINTS = 10
"""Sentences kept about failures; more are only counted."""

_SHORTEST_SECONDS = 1e-5
_STEP = 1.02
_STEPS = math.ceil(math.log(600 / _SHORTEST_SECONDS) / math.log(_STEP))


class Latencies:
    """Durations from 10 µs to 10 minutes in steps of 2 %: quantiles to within a step."""

    def __init__(self) -> None:
        self._counts = [0] * (_STEPS + 1)
        self.count = 0

    def add(self, seconds: float) -> None:
        at = math.ceil(math.log(max(seconds, _SHORTEST_SECONDS) / _SHORTEST_SECONDS) / math.log(_STEP))
        self._counts[min(at, _STEPS)] += 1
        self.count += 1

    def quantile(self, share: float) -> float | None:
        """Seconds that `share` (0 to 1) of the durations do not exceed; None without any."""
        if not self.count:
            return None
        wanted = max(1, math.ceil(share * self.count))
        passed = 0
        for at, count in enumerate(self._counts):
            passed += count
            if passed >= wanted:
                return float(_SHORTEST_SECONDS * _STEP**at)
        raise AssertionError("the counts do not add up")


@dataclass(slots=True)
class Figures:
    """Everything that the clients of one crowd counted; they alone write it, on their event loop.

    `received_bytes` are of bodies. `wrong` are bodies that differ from what the management server published,
    `failed` are downloads given up, `gone` are files that were withdrawn before they were asked for.
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
    hit_time_to_first_byte: Latencies = field(default_factory=Latencies)

    def complain(self, sentence: str) -> None:
        """Keep a sentence about a failure, if there is room."""
        if len(self.complaints) < MAX_COMPLAINTS:
            self.complaints.append(sentence)

    def document(self) -> dict[str, object]:
        """The figures as plain values, ready for JSON; times in seconds."""
        return {
            "requests": self.requests,
            "received_bytes": self.received_bytes,
            "downloads": {kind.value: count for kind, count in sorted(self.downloads.items())},
            "not_modified": self.not_modified,
            "resumes": self.resumes,
            "retries": self.retries,
            "gone": self.gone,
            "wrong": self.wrong,
            "failed": self.failed,
            "cache_status": dict(sorted(self.cache_status.items())),
            "median_time_to_first_byte_seconds": self.time_to_first_byte.quantile(0.5),
            "p99_time_to_first_byte_seconds": self.time_to_first_byte.quantile(0.99),
            "complaints": list(self.complaints),
        }

    def answered(self, seconds: float, cache_status: str | None) -> None:
        """Count an answer that began after `seconds`, with its Cache-Status field (RFC 9211)."""
        self.time_to_first_byte.add(seconds)
        word = cache_result(cache_status)
        self.cache_status[word] += 1
        if word == "hit":
            self.hit_time_to_first_byte.add(seconds)


def cache_result(cache_status: str | None) -> str:
    """One word for an answer: hit, collapsed, miss, or none when it went through no cache."""
    words = [word.strip() for word in (cache_status or "").split(";")[1:]]
    if "collapsed" in words:
        return "collapsed"
    if "hit" in words:
        return "hit"
    return "miss" if any(word.startswith("fwd") for word in words) else "none"


_ATTEMPTS = 8
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 3.0
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class Outcome(Enum):
    """How a download ended; counted in the figures already."""

    RIGHT = auto()
    WRONG = auto()
    GONE = auto()
    FAILED = auto()


class Download:
    """One client's download of one published file, through `url` (scheme, host and port)."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        file: PublishedFile,
        figures: Figures,
        *,
        client: str = "",
        cut_after_bytes: int | None = None,
        held_etag: str | None = None,
    ) -> None:
        """`client` is the User-Agent. `cut_after_bytes` breaks the first connection there, to resume.

        `held_etag` is the entity tag of the copy that the client has: an unchanged file is not sent again.
        """
        self._session = session
        self._url = url + file.path
        self._file = file
        self._figures = figures
        self._headers = {"User-Agent": client} if client else {}
        self._cut_after_bytes = cut_after_bytes
        self._was_cut = False
        self._held_etag = held_etag
        self._received_bytes = 0
        self._received_etag: str | None = None
        self._digest = xxhash.xxh3_128()

    @property
    def etag(self) -> str | None:
        """The entity tag of what was received, or of the copy held."""
        return self._received_etag or self._held_etag

    async def run(self) -> Outcome:
        """Fetch it, with as many attempts as a patient client makes."""
        problem = ""
        for attempt in range(_ATTEMPTS):
            self._was_cut = False
            try:
                outcome = await self._attempt()
                problem = "it was asked to try again"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                outcome, problem = None, f"{type(error).__name__}: {error}"
            if outcome is not None:
                return outcome
            if not self._was_cut:
                self._figures.retries += 1
                await asyncio.sleep(min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2**attempt))
        return self._failed(f"gave up after {_ATTEMPTS} attempts, the last one: {problem}")

    async def _attempt(self) -> Outcome | None:
        """One request; None when another one should follow."""
        begin = time.perf_counter()
        self._figures.requests += 1
        async with self._session.get(self._url, headers=self._asked(), allow_redirects=False) as response:
            seconds = time.perf_counter() - begin
            self._figures.answered(seconds, response.headers.get("Cache-Status"))
            if response.status in (200, 206):
                return await self._receive(response)
            if response.status == 304 and self._held_etag is not None:
                self._figures.not_modified += 1
                return Outcome.RIGHT
            if response.status in (404, 410):
                self._figures.gone += 1
                return Outcome.GONE
            if response.status in _TRY_AGAIN:
                return None
            return self._failed(f"status {response.status}")

    def _asked(self) -> dict[str, str]:
        """Headers for the whole, or for the rest if there is something to go on from."""
        if self._received_etag is not None and 0 < self._received_bytes < self._file.length:
            rest = {"Range": f"bytes={self._received_bytes}-", "If-Range": self._received_etag}
            return self._headers | rest
        self._restart()
        return self._headers | ({"If-None-Match": self._held_etag} if self._held_etag else {})

    def _restart(self) -> None:
        self._received_bytes = 0
        self._digest.reset()

    async def _receive(self, response: aiohttp.ClientResponse) -> Outcome | None:
        if response.status == 200:
            self._restart()
        elif not self._continues(response):
            return self._wrong(f"a range that was not asked for: {response.headers.get('Content-Range')}")
        else:
            self._figures.resumes += 1
        self._received_etag = response.headers.get("ETag")
        async for piece in response.content.iter_any():
            self._figures.received_bytes += len(piece)
            self._received_bytes += len(piece)
            self._digest.update(piece)
            if self._cuts_here():
                response.close()
                return None
        return self._compare()

    def _cuts_here(self) -> bool:
        """Whether this client breaks off now: once, and never after the last byte."""
        limit, received = self._cut_after_bytes, self._received_bytes
        if limit is None or not limit <= received < self._file.length:
            return False
        self._cut_after_bytes, self._was_cut = None, True
        return True

    def _continues(self, response: aiohttp.ClientResponse) -> bool:
        """RFC 9110 section 14.4: the part must be the rest of a body of the published length."""
        length = self._file.length
        expected = f"bytes {self._received_bytes}-{length - 1}/{length}"
        return response.headers.get("Content-Range") == expected

    def _compare(self) -> Outcome:
        if self._received_bytes != self._file.length:
            return self._wrong(f"{self._received_bytes} bytes instead of {self._file.length}")
        if self._digest.hexdigest() != self._file.digest:
            return self._wrong("other bytes than published")
        self._figures.downloads[self._file.kind] += 1
        return Outcome.RIGHT

    def _wrong(self, what: str) -> Outcome:
        self._figures.wrong += 1
        self._figures.complain(f"{self._file.path}: {what}")
        return Outcome.WRONG

    def _failed(self, what: str) -> Outcome:
        self._figures.failed += 1
        self._figures.complain(f"{self._file.path}: {what}")
        return Outcome.FAILED


POLL_SECONDS = 2.0
"""A client's mean time between polls; a real one's is minutes to hours, and the demo lasts half a minute."""
CALM_POLL_SECONDS = 15.0

_POLICY_SECONDS = 1.0
_FINISH_SECONDS = 15.0
_TAKES_STREAM = 0.6
_REINSTALLED = 0.02
_CUT = 0.05
_HELD_AT_START = ((0.25, 0), (0.75, 1), (0.90, 2), (0.95, 3))
"""Share of clients, summed up, at most so many revisions behind at the start; the rest need a full."""
_LANGUAGES = ("English", "English", "English", "French", "German")


class Policy:
    """What the management server tells clients to have, polled once for all of them, past the cache."""

    def __init__(self, session: aiohttp.ClientSession, manager_url: str) -> None:
        self._session = session
        self._url = manager_url + CATALOGUE_PATH
        self._raw = b""
        self.catalogue: Catalogue | None = None

    async def refresh(self) -> Catalogue:
        """Ask now; raises aiohttp.ClientError or TimeoutError when the management server does not answer."""
        async with self._session.get(self._url, raise_for_status=True) as response:
            raw = await response.read()
        if raw != self._raw or self.catalogue is None:
            self._raw, self.catalogue = raw, CATALOGUE_JSON.validate_json(raw)
        return self.catalogue

    async def keep_fresh(self) -> None:
        """Ask every second, for good; an answer that does not come leaves the last one standing."""
        while True:
            await asyncio.sleep(_POLICY_SECONDS)
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                await self.refresh()


@dataclass(slots=True)
class Client:
    """One machine: its language, the streams it takes, and the revision it holds of each.

    Changed only by its own task, after a download that was right.
    """

    number: int
    chance: random.Random
    language: str = ""
    held: dict[str, str] = field(default_factory=dict)
    declined: set[str] = field(default_factory=set)
    content_info_etag: str | None = None

    def __post_init__(self) -> None:
        self.language = self.chance.choice(_LANGUAGES)

    @property
    def user_agent(self) -> str:
        """Different for each machine, as real clients' are."""
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
        self.held[stream.moniker] = self._held_at_start(stream)
        return True

    def wants(self, stream: PublishedStream) -> PublishedFile | None:
        """The file that brings this machine up to date: a delta if there is one, else the full."""
        held = self.held[stream.moniker]
        if held == stream.newest:
            return None
        if self.chance.random() < _REINSTALLED:
            return stream.full
        return stream.delta_from(held) or stream.full

    def cuts(self, file: PublishedFile) -> int | None:
        """Now and then: after how many bytes the machine loses its connection."""
        if self.chance.random() >= _CUT:
            return None
        return round(file.length * self.chance.uniform(0.2, 0.8))

    def _held_at_start(self, stream: PublishedStream) -> str:
        place = self.chance.random()
        behind = next((steps for share, steps in _HELD_AT_START if place < share), len(stream.revisions))
        return stream.revisions[-1 - behind] if behind < len(stream.revisions) else "none"


class Crowd:
    """Clients that poll and update through `url` until told to stop; they share a session and figures."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        policy: Policy,
        *,
        count: int,
        seed: int,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """`policy.catalogue` is known already; `url` is scheme, host and port of the site's cache."""
        self._session = session
        self._url = url
        self._policy = policy
        self._clients = [
            Client(number, random.Random(f"{seed}/client/{number}"))  # noqa: S311 - repeatable by design
            for number in range(count)
        ]
        self._bell = asyncio.Event()
        self._stopping = False
        self.poll_seconds = poll_seconds
        self.figures = Figures()

    async def run(self) -> None:
        """Until `stop`; the clients finish what they have begun, for at most 15 s."""
        self._stopping = False
        tasks = [asyncio.create_task(self._live(client)) for client in self._clients]
        policy = asyncio.create_task(self._policy.keep_fresh())
        try:
            await self._watch(tasks, policy)
        finally:
            for task in (policy, *tasks):
                task.cancel()
            await asyncio.gather(policy, *tasks, return_exceptions=True)

    def ring(self) -> None:
        """Make every client poll at once: the herd."""
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()

    def stop(self) -> None:
        """Let the clients finish; `run` returns when they have."""
        self._stopping = True
        self.ring()

    def behind(self) -> int:
        """How many clients lack something that the catalogue tells them to have."""
        catalogue = self._policy.catalogue
        assert catalogue is not None, "clients before policy"
        newest = {stream.moniker: stream.newest for stream in catalogue.streams}
        return sum(
            any(newest[moniker] != held for moniker, held in client.held.items()) for client in self._clients
        )

    async def _watch(self, tasks: list[asyncio.Task[None]], policy: asyncio.Task[None]) -> None:
        """Return when all clients have ended; a client's or the policy's own mistake ends everything."""
        pending: set[asyncio.Task[None]] = {*tasks, policy}
        deadline: float | None = None
        while len(pending) > 1 or policy not in pending:
            wait_seconds = 1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            done, pending = await asyncio.wait(
                pending, timeout=wait_seconds, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()
            if self._stopping and deadline is None:
                deadline = time.monotonic() + _FINISH_SECONDS
            if deadline is not None and time.monotonic() >= deadline:
                self.figures.failed += len(pending) - 1
                self.figures.complain(
                    f"{len(pending) - 1} clients did not finish within {_FINISH_SECONDS:g} s"
                )
                return

    async def _live(self, client: Client) -> None:
        await _rest(client.chance.uniform(0, self.poll_seconds), self._bell)
        while not self._stopping:
            # Taken before the poll: who is busy when the bell rings polls again right afterwards.
            bell = self._bell
            await self._poll(client)
            await _rest(self.poll_seconds * client.chance.uniform(0.5, 1.5), bell)

    async def _poll(self, client: Client) -> None:
        """One poll: the index, then whatever is new, in an order of the client's own."""
        catalogue = self._policy.catalogue
        assert catalogue is not None, "clients before policy"
        await self._poll_index(client, catalogue.content_info)
        streams = [stream for stream in catalogue.streams if client.takes(stream)]
        client.chance.shuffle(streams)
        for stream in streams:
            if self._stopping:
                return
            file = client.wants(stream)
            if file is None:
                continue
            download = self._download(client, file, cut_after_bytes=client.cuts(file))
            if await download.run() is Outcome.RIGHT:
                client.held[stream.moniker] = stream.newest

    async def _poll_index(self, client: Client, content_info: PublishedFile) -> None:
        download = self._download(client, content_info, held_etag=client.content_info_etag)
        if await download.run() is Outcome.RIGHT:
            client.content_info_etag = download.etag

    def _download(self, client: Client, file: PublishedFile, **more: Any) -> Download:
        return Download(self._session, self._url, file, self.figures, client=client.user_agent, **more)


async def _rest(seconds: float, bell: asyncio.Event) -> None:
    """Wait, unless the bell rings."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await bell.wait()


def new_session(connections: int) -> aiohttp.ClientSession:
    """A session for a crowd: as many kept-alive connections as clients, so that none waits for another's."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60),
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=128 * 1024,
        headers={"Accept-Encoding": "identity"},
    )


def simulate_clients(
    *, url: str, count: int, seconds: float, seed: int, json_output: bool, manager_url: str = ""
) -> int:
    """Let `count` clients use the cache at `url` for `seconds`; prints what they got.

    `manager_url` is where the simulated management server's catalogue is (default: `url` itself). Returns 0
    if every byte was right, 1 if one was wrong or missing, 3 if the catalogue can't be had.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(
            _simulate(url.rstrip("/"), (manager_url or url).rstrip("/"), count, seconds, seed, json_output)
        )


async def _simulate(
    url: str, manager_url: str, count: int, seconds: float, seed: int, json_output: bool
) -> int:
    async with new_session(count) as session:
        policy = Policy(session, manager_url)
        try:
            await policy.refresh()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # ValueError: not a catalogue
            sys.stderr.write(f"gup: no catalogue at {manager_url}{CATALOGUE_PATH}: {error}\n")
            return 3
        crowd = Crowd(session, url, policy, count=count, seed=seed)
        asyncio.get_running_loop().call_later(seconds, crowd.stop)
        await crowd.run()
    return _report(crowd.figures, json_output)


def _report(figures: Figures, json_output: bool) -> int:
    document = figures.document()
    if json_output:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{name}: {value}\n" for name, value in document.items())
    right = figures.downloads and not figures.wrong and not figures.failed
    return 0 if right else 1
