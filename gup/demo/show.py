"""One run of the demo between parties that are up: what happens when, and its figures; starts no process."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp

from gup.demo.catalogue import COUNTS_JSON, COUNTS_PATH, PUBLISH_PATH, Counts
from gup.demo.children import ChildError
from gup.demo.clients import CALM_POLL_SECONDS, Crowd, Policy
from gup.demo.screen import Progress, Screen
from gup.demo.summary import Herd, OwnFigures, Summary, agree, own_figures, summarise

PRODUCTS = 9

_SHOW_SECONDS = 0.5
_SETTLE_SECONDS = 10.0
_KEEP_PUBLISH_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be shown."""

    clients: int
    seconds: float
    wan_rate_bytes_per_second: int
    workers: int
    keep: bool
    seed: int

    @property
    def full_bytes(self) -> int:
        """Fulls small enough that the link carries a good number of them in the time: 4 MB by default."""
        rate = self.wan_rate_bytes_per_second or 10_000_000
        return max(50_000, min(4_000_000, round(rate * self.seconds / 75)))


@dataclass(frozen=True, slots=True)
class Moment:
    """When new revisions come out; in a herd, of all streams and known to all clients at once."""

    at_seconds: float
    herd: bool = False


def timeline(seconds: float) -> list[Moment]:
    """A stream every tenth of the time, a herd past the middle, and quiet at the end."""
    tenths = [Moment(seconds * tenth / 10) for tenth in (1, 2, 3, 4, 7.5, 8.5)]
    return sorted([*tenths, Moment(seconds * 0.5, herd=True)], key=lambda moment: moment.at_seconds)


@dataclass(frozen=True, slots=True)
class Urls:
    """Where the parties listen."""

    manager: str
    gup: str
    control: str


class Show:
    """One run between started children. Its figures are the crowd's; it changes only what it publishes."""

    def __init__(self, plan: Plan, urls: Urls, session: aiohttp.ClientSession, screen: Screen) -> None:
        self._plan = plan
        self._urls = urls
        self._session = session
        self._screen = screen
        self._policy = Policy(session, urls.manager)
        self._crowd = Crowd(session, urls.gup, self._policy, count=plan.clients, seed=plan.seed)
        self._begin_seconds = time.monotonic()
        self._herd: Herd | None = None

    async def run(self) -> Summary:
        """Play the timeline, let the clients finish, compare the figures."""
        await self._refresh()
        self._begin_seconds = time.monotonic()
        self._screen.note(f"{self._plan.clients} clients start, a quarter of them up to date")
        async with asyncio.TaskGroup() as tasks:
            showing = tasks.create_task(self._show_progress())
            playing = tasks.create_task(self._play())
            await self._crowd.run()
            await playing
            showing.cancel()
        seconds = self._elapsed()
        counts, own = await self._settle()
        return summarise(
            self._crowd.figures, counts, own, clients=self._plan.clients, seconds=seconds, herd=self._herd
        )

    async def keep(self, stop: asyncio.Event) -> None:
        """Go on calmly until `stop`."""
        self._crowd.poll_seconds = CALM_POLL_SECONDS
        async with asyncio.TaskGroup() as tasks:
            publishing = tasks.create_task(self._publish_calmly())
            running = tasks.create_task(self._crowd.run())
            await stop.wait()
            publishing.cancel()
            running.cancel()

    @property
    def wrong(self) -> int:
        """Wrong bodies so far, also those received since the summary."""
        return self._crowd.figures.wrong

    def _elapsed(self) -> float:
        return time.monotonic() - self._begin_seconds

    async def _play(self) -> None:
        for moment in timeline(self._plan.seconds):
            await asyncio.sleep(moment.at_seconds - self._elapsed())
            if moment.herd:
                await self._play_herd()
            else:
                await self._publish(1)
                self._screen.note(f"{self._elapsed():.1f} s: a stream has a new revision")
        await asyncio.sleep(self._plan.seconds - self._elapsed())
        self._crowd.stop()

    async def _play_herd(self) -> None:
        """Everybody at once; measured until nobody lacks anything, or for a fifth of the run."""
        figures, begin_seconds = self._crowd.figures, self._elapsed()
        downloads, received_bytes = figures.downloads.total(), figures.received_bytes
        wan_bytes = (await self._counts()).sent_bytes
        await self._publish(PRODUCTS)
        await self._refresh()
        self._screen.note(f"{self._elapsed():.1f} s: the herd, all clients learn of new revisions at once")
        self._crowd.ring()
        limit_seconds = self._plan.seconds / 5
        while self._crowd.behind() and self._elapsed() - begin_seconds < limit_seconds:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # clients tell nobody what they have; a look is cheap
        self._herd = Herd(
            self._plan.clients,
            figures.downloads.total() - downloads,
            self._elapsed() - begin_seconds,
            figures.received_bytes - received_bytes,
            (await self._counts()).sent_bytes - wan_bytes,
        )

    async def _refresh(self) -> None:
        with _manager_answers():
            await self._policy.refresh()

    async def _publish(self, streams: int) -> None:
        url = self._urls.manager + PUBLISH_PATH
        with _manager_answers():
            async with self._session.post(url, params={"streams": str(streams)}, raise_for_status=True):
                pass

    async def _publish_calmly(self) -> None:
        while True:
            await asyncio.sleep(_KEEP_PUBLISH_SECONDS)
            await self._publish(1)

    async def _show_progress(self) -> None:
        before_bytes, before_seconds = 0, self._elapsed()
        while True:
            await asyncio.sleep(_SHOW_SECONDS)
            wan_bytes, now_seconds = (await self._counts()).sent_bytes, self._elapsed()
            rate = (wan_bytes - before_bytes) / (now_seconds - before_seconds)
            before_bytes, before_seconds = wan_bytes, now_seconds
            self._screen.show(Progress(now_seconds, self._plan.seconds, self._crowd.figures, wan_bytes, rate))

    async def _counts(self) -> Counts:
        url = self._urls.manager + COUNTS_PATH
        with _manager_answers():
            async with self._session.get(url, raise_for_status=True) as response:
                return COUNTS_JSON.validate_json(await response.read())

    async def _own_figures(self) -> OwnFigures | None:
        try:
            async with self._session.get(self._urls.control + "/metrics", raise_for_status=True) as response:
                return own_figures(await response.text())
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def _settle(self) -> tuple[Counts, OwnFigures | None]:
        """Figures of both sides: fills may still be ending, so ask until they agree, for at most 10 s."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            counts, own = await self._counts(), await self._own_figures()
            settled = own is not None and not counts.sending and agree(own, counts, self._crowd.figures)
            if settled or time.monotonic() >= deadline:
                return counts, own
            await asyncio.sleep(0.2)


@contextlib.contextmanager
def _manager_answers() -> Iterator[None]:
    """Without the management server there is nothing to show."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ChildError(f"the simulated management server does not answer: {error!r}") from error
