"""Simulated clients: what each holds, what it wants next, and a crowd of them; never judges the outcome."""

import asyncio
import contextlib
import json
import random
import sys
import time
from dataclasses import dataclass, field

import aiohttp
import uvloop

from gup.demo.catalogue import CATALOGUE_JSON, CATALOGUE_PATH, Catalogue, PublishedFile, PublishedStream
from gup.demo.fetch import Download, Outcome
from gup.demo.figures import Figures
from gup.demo.tree import ALL_LANGUAGES

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
    """What the management server tells clients to have: asked directly, by one poll for all of them."""

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
        """As real clients' heads: the same but for the machine."""
        return f"simulated-client/{self.number:05d}"

    def takes(self, stream: PublishedStream) -> bool:
        """Whether the stream is for this machine: decided once, when it first hears of it."""
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
            if file is not None and await self._download(client, file) is Outcome.RIGHT:
                client.held[stream.moniker] = stream.newest

    async def _poll_index(self, client: Client, content_info: PublishedFile) -> None:
        download = Download(
            self._session,
            self._url,
            content_info,
            self.figures,
            client=client.user_agent,
            held_etag=client.content_info_etag,
        )
        if await download.run() is Outcome.RIGHT:
            client.content_info_etag = download.etag

    async def _download(self, client: Client, file: PublishedFile) -> Outcome:
        return await Download(
            self._session,
            self._url,
            file,
            self.figures,
            client=client.user_agent,
            cut_after_bytes=client.cuts(file),
        ).run()


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
