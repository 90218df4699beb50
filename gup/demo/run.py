"""`gup demo`: a simulated management server, a real `gup serve` and a crowd of clients, start to verdict."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
import uvloop
from rich.console import Console

from gup.demo.clients import CALM_POLL_SECONDS, Crowd, Policy, new_session
from gup.demo.content import COUNTS_JSON, COUNTS_PATH, PUBLISH_PATH, Counts
from gup.demo.screen import (
    NOT_STARTED,
    WRONG_BYTE,
    Herd,
    OwnFigures,
    Plain,
    Progress,
    Screen,
    Summary,
    Terminal,
    agree,
    own_figures,
    print_summary,
    summarise,
)
from gup.errors import GupError
from gup.units import format_rate

_KEPT_LINES = 30
_COMPLAINT = re.compile(r"^\S+ (warning|error|critical) ")
_LONGEST_LINE_BYTES = 1 << 20
_TERMINATE_SECONDS = 15.0
_DRAIN_SECONDS = 2.0


class ChildError(GupError):
    """A child process that did not start, or ended before its time; the text has its last lines."""


class Child:
    """One process from start to end: `async with Child(…) as child: match = await child.ready(10)`."""

    def __init__(self, name: str, argv: Sequence[str], environment: Mapping[str, str], ready: str) -> None:
        """`ready` is the pattern of the line on stderr that tells that the child is ready."""
        self.name = name
        self._argv = argv
        self._environment = environment
        self._pattern = re.compile(ready)
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.complaints: deque[str] = deque(maxlen=_KEPT_LINES)
        """The last of the lines of its log that are warnings or worse."""
        self._ready: asyncio.Future[re.Match[str]] = asyncio.get_running_loop().create_future()
        self._process: asyncio.subprocess.Process
        self._reading: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                env=dict(self._environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                limit=_LONGEST_LINE_BYTES,
                # Ctrl-C must reach the demo alone: it ends its children in the right order.
                start_new_session=True,
            )
        except OSError as error:
            raise ChildError(f"{self.name} can't be started: {error}") from error
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._signal(kill=False)
        try:
            async with asyncio.timeout(_TERMINATE_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._signal(kill=True)
            await self._process.wait()
        finally:
            # Not left behind even when the wait itself is cancelled.
            self._signal(kill=True)
            await self._end_reading()

    async def ready(self, timeout_seconds: float) -> re.Match[str]:
        """The match of the ready line; ChildError when the child ends or stays silent instead."""
        either: set[asyncio.Future[Any]] = {self._ready, self._reading}
        done, _ = await asyncio.wait(either, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise ChildError(self._complaint(f"was not ready after {timeout_seconds:g} s"))
        if not self._ready.done():
            raise ChildError(self._complaint(f"ended with status {await self._process.wait()}"))
        return self._ready.result()

    async def watch(self) -> None:
        """Run until the child ends of itself, which is a ChildError."""
        status = await self._process.wait()
        raise ChildError(self._complaint(f"ended too early, with status {status}"))

    def _complaint(self, what: str) -> str:
        return "\n".join([f"{self.name} {what}", *(f"  {line}" for line in self._lines)])

    def _signal(self, *, kill: bool) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                (self._process.kill if kill else self._process.terminate)()

    async def _read(self) -> None:
        assert self._process.stderr is not None
        while True:
            try:
                raw = await self._process.stderr.readline()
            except ValueError:  # a line beyond the limit, which readline has dropped
                continue
            if not raw:
                return
            line = raw.decode(errors="replace").rstrip()
            self._lines.append(line)
            if _COMPLAINT.match(line):
                self.complaints.append(line)
            match = self._pattern.search(line)
            if match is not None and not self._ready.done():
                self._ready.set_result(match)

    async def _end_reading(self) -> None:
        # Something the child started may hold stderr open; that must not keep us.
        done, _ = await asyncio.wait({self._reading}, timeout=_DRAIN_SECONDS)
        if not done:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        self._ready.cancel()


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
    """Turn a failed request to the management server into a ChildError: the run ends."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ChildError(f"the simulated management server does not answer: {error!r}") from error


INTERRUPTED = 130
"""Exit status after Ctrl-C before the end, as shells have it."""

_READY_SECONDS = 60.0
_MANAGER_READY = r"serving on (http://\S+)"
_GUP_READY = r"gup: serving on (http://[^\s,]+), control plane on (http://[^\s,]+)"
_SETTINGS = {
    "GUP_WAN__RATE": "0",  # the simulated WAN is the limit
    "GUP_CACHE__INDEX_TTL": "5s",  # so that half a minute shows revalidation
    "GUP_CACHE__MIN_FREE": "0",  # a nearly full disk must not evict what is being shown
    "GUP_LISTEN__DRAIN_TIMEOUT": "5s",
    "GUP_LOG__ACCESS": "off",
}


@dataclass(frozen=True, slots=True)
class Commands:
    """How the children are started; tests put others in their place."""

    manager: Callable[[Plan], list[str]]
    gup: Callable[[Plan, str, Path], list[str]]


def manager_command(plan: Plan) -> list[str]:
    """The simulated management server on a free port; the demo tells it when to publish."""
    return [
        *(sys.executable, "-m", "gup", "simulate", "manager"),
        *("--listen", "127.0.0.1:0"),
        *("--seed", str(plan.seed)),
        *("--wan-rate", format_rate(plan.wan_rate_bytes_per_second)),
        *("--publish-interval", "0"),
        *("--products", str(PRODUCTS)),
        *("--full-size", str(plan.full_bytes)),
    ]


def gup_command(plan: Plan, upstream_url: str, directory: Path) -> list[str]:
    """A real gup, on free ports."""
    return [
        *(sys.executable, "-m", "gup", "serve"),
        *("--upstream", upstream_url),
        *("--cache-dir", str(directory)),
        *("--listen", "127.0.0.1:0"),
        *("--admin", "127.0.0.1:0"),
        *("--workers", str(plan.workers)),
    ]


COMMANDS = Commands(manager_command, gup_command)


class Stage:
    """Starts the children, runs the show, reports, and ends everything in order, also when interrupted."""

    def __init__(self, plan: Plan, commands: Commands, console: Console, *, json_output: bool) -> None:
        self._plan = plan
        self._commands = commands
        self._console = console
        self._json_output = json_output
        self._stop = asyncio.Event()
        self._keeping = False

    async def run(self, directory: Path) -> int:
        """The exit status. `directory` is empty and the demo's own."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupt, task)
        try:
            return await self._with_manager(directory)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _interrupt(self, task: asyncio.Task[int]) -> None:
        """A second Ctrl-C does nothing: it must not break the orderly end."""
        if self._stop.is_set():
            return
        self._stop.set()
        if not self._keeping:
            task.cancel()

    async def _with_manager(self, directory: Path) -> int:
        environment = _environment(directory)
        async with Child(
            "the simulated management server", self._commands.manager(self._plan), environment, _MANAGER_READY
        ) as manager:
            manager_url = (await manager.ready(_READY_SECONDS))[1]
            command = self._commands.gup(self._plan, manager_url, directory / "cache")
            async with Child("gup serve", command, environment, _GUP_READY) as gup:
                match = await gup.ready(_READY_SECONDS)
                status = await self._watched(Urls(manager_url, match[1], match[2]), manager, gup)
                if status and gup.complaints:
                    sys.stderr.write("\n".join(["what gup complained of:", *gup.complaints, ""]))
                return status

    async def _watched(self, urls: Urls, *children: Child) -> int:
        """The show, ended at once when a child ends."""
        async with asyncio.TaskGroup() as tasks:
            watching = [tasks.create_task(child.watch()) for child in children]
            status = await self._perform(urls)
            for watch in watching:
                watch.cancel()
        return status

    async def _perform(self, urls: Urls) -> int:
        async with new_session(self._plan.clients + 8) as session:
            with self._screen() as screen:
                show = Show(self._plan, urls, session, screen)
                summary = await show.run()
            self._report(summary)
            if self._plan.keep:
                self._keeping = True
                self._console.print(
                    f"The demo goes on until Ctrl-C: content {urls.gup}/content/ContentInfo.txt, "
                    f"page {urls.control}/, management server {urls.manager}{COUNTS_PATH}",
                    highlight=False,
                    soft_wrap=True,
                    markup=False,
                )
                await show.keep(self._stop)
            return WRONG_BYTE if show.wrong else summary.status

    def _screen(self) -> Screen:
        if self._json_output:
            return Screen()
        return Terminal(self._console) if self._console.is_terminal else Plain(self._console)

    def _report(self, summary: Summary) -> None:
        if self._json_output:
            sys.stdout.write(json.dumps(summary.document(), indent=2) + "\n")
            sys.stdout.flush()
        else:
            print_summary(self._console, summary)


def _environment(directory: Path) -> Mapping[str, str]:
    """The caller's, but for its own GUP_ settings, which must not change what is shown."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GUP_")}
    return kept | _SETTINGS | {"TMPDIR": str(directory)}


def demo(
    *,
    clients: int = 200,
    seconds: float = 30.0,
    wan_rate_bytes_per_second: int = 10_000_000,
    workers: int = 2,
    keep: bool = False,
    json_output: bool = False,
    seed: int = 1,
) -> int:
    """Show gup at work; returns the exit status.

    0: every byte was right and no file was fetched twice. 1: a wrong or missing byte. 2: a file was fetched
    twice. 3: gup or the management server did not start, or ended early. 4: gup's figures are not the
    management server's. 130: interrupted.
    """
    plan = Plan(clients, seconds, wan_rate_bytes_per_second, workers, keep, seed)
    return play(plan, COMMANDS, json_output=json_output)


def play(plan: Plan, commands: Commands, *, json_output: bool) -> int:
    """`demo` with any commands."""
    console = Console(stderr=json_output)
    directory = Path(tempfile.mkdtemp(prefix="gup-demo-"))
    status = NOT_STARTED
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            status = runner.run(Stage(plan, commands, console, json_output=json_output).run(directory))
    except* ChildError as group:
        for error in _leaves(group):
            sys.stderr.write(f"gup: {error}\n")
    except* asyncio.CancelledError:
        status = INTERRUPTED
    finally:
        shutil.rmtree(directory)
    return status


def _leaves(group: BaseExceptionGroup[ChildError]) -> Iterator[ChildError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
