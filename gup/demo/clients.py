"""Simulated clients at work: their downloads, figures, and a crowd of them."""

import asyncio
import contextlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import accumulate
from random import Random
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp
import uvloop

from gup.content.key import Kind
from gup.demo.content import (
    CATALOGUE_PATH,
    Catalogue,
    NoCatalogueError,
    PublishedFile,
    read_catalogue,
)
from gup.demo.machine import TRY_AGAIN, Client, Transfer, WrongBodyError, cache_result
from gup.units import bytes_in_words

MAX_COMPLAINTS = 10
"""Sentences kept about failures; more are only counted."""
POLL_SECONDS = 2.0
"""A client's mean time between polls; a real one's is minutes to hours, and the demo lasts half a minute."""

_POLICY_SECONDS = 1.0
_FINISH_SECONDS = 15.0
_ATTEMPTS = 8
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 3.0


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


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

    def lines(self, clients: int, seconds: float) -> Iterator[str]:
        """The summary for people."""

        def counted(counts: Mapping[Any, int]) -> str:
            return ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items())) or "none"

        first, last = (self.time_to_first_byte.quantile(share) for share in (0.5, 0.99))
        rows = {
            "clients": f"{clients:,} for {seconds:g} s",
            "requests": f"{self.requests:,}; answers by cache result: {counted(self.cache_status)}",
            "received": bytes_in_words(self.received_bytes),
            "downloads": counted(self.downloads),
            "not modified": f"{self.not_modified:,}",
            "resumed": f"{self.resumes:,}",
            "repeated": f"{self.retries:,}",
            "first byte": f"median {milliseconds(first)}, 99 % within {milliseconds(last)}",
            "withdrawn": f"{self.gone:,} files that were gone before they were requested",
            "wrong": f"{self.wrong:,} bodies that differ from what was published",
            "failed": f"{self.failed:,} downloads that were given up",
        }
        yield from (f"{name:14}{value}" for name, value in rows.items())
        yield from self.complaints
        if not self.downloads and not self.complaints:
            yield "Nothing was downloaded: the run was too short, or no client needed anything."

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
    transfer: Transfer = field(init=False)

    def __post_init__(self) -> None:
        self.transfer = Transfer(self.file, self.held_etag)

    async def run(self) -> bool:
        for attempt in range(_ATTEMPTS):
            problem = "it was asked to try again"
            cuts = self.cut_after_bytes
            try:
                done = await self._attempt()
            except WrongBodyError as error:
                return self._ended("wrong", str(error))
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
        headers = {"User-Agent": self.client} | self.transfer.request_fields()
        async with self.session.get(
            self.url + self.file.path, headers=headers, allow_redirects=False
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
                None if response.status in TRY_AGAIN else self._ended("failed", f"status {response.status}")
            )

    async def _receive(self, response: aiohttp.ClientResponse) -> bool | None:
        transfer = self.transfer
        fields = response.headers
        self.figures.resumes += transfer.begin(
            response.status, fields.get("Content-Range"), fields.get("ETag")
        )
        async for piece in response.content.iter_any():
            self.figures.received_bytes += len(piece)
            transfer.add(piece)
            cut = self.cut_after_bytes
            if cut is not None and cut <= transfer.received_bytes < self.file.length:
                self.cut_after_bytes = None
                response.close()
                return None
        transfer.check()
        self.figures.downloads[self.file.kind] += 1
        return True

    def _ended(self, counted: Literal["wrong", "failed"], what: str) -> bool:
        return self.figures.complain(counted, f"{self.file.path}: {what}")


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
            client.content_info_etag = index.transfer.etag or client.content_info_etag
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
        sys.stdout.writelines(f"{line}\n" for line in figures.lines(count, seconds))
    return 0 if figures.right else 1


async def _simulate(url: str, manager_url: str, count: int, seconds: float, seed: int) -> Figures | None:
    async with new_session() as session:

        async def catalogue() -> Catalogue:
            async with session.get(manager_url + CATALOGUE_PATH, raise_for_status=True) as response:
                return read_catalogue(await response.read())

        async def follow(crowd: Crowd) -> None:
            """Once a second for all of them, past the cache; a failure keeps the last catalogue."""
            while True:
                await asyncio.sleep(_POLICY_SECONDS)
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    crowd.catalogue = await catalogue()

        try:
            crowd = Crowd(url, await catalogue(), count=count, seed=seed)
        except (aiohttp.ClientError, TimeoutError, NoCatalogueError) as error:
            sys.stderr.write(
                f"gup: no catalogue at {manager_url}{CATALOGUE_PATH}: {error}; "
                "name the simulated manager (gup simulate manager) with --manager URL\n"
            )
            return None
        asyncio.get_running_loop().call_later(seconds, crowd.stop)
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(follow(crowd))
            await crowd.run()
            following.cancel()
        return crowd.figures
