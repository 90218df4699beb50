"""`gup demo`: a simulated management server, a real `gup serve` and a crowd of clients."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import uvloop
from rich.console import Console
from rich.live import Live

from gup.demo.clients import Crowd, new_session
from gup.demo.content import COUNTS_PATH, streams
from gup.demo.manager import Link, Manager
from gup.demo.screen import NOT_STARTED, WRONG_BYTE, Summary, print_summary, progress
from gup.errors import GupError

INTERRUPTED = 130
"""Exit status after Ctrl-C before the end, as shells have it."""
PRODUCTS = 9

_READY_SECONDS = 60.0
_READY = re.compile(r"gup: serving on (http://[^\s,]+), control plane on (http://[^\s,]+)")
_COMPLAINT = re.compile(r"^\S+ (warning|error|critical) ")
_KEPT_LINES = 30
_TERMINATE_SECONDS = 15.0
_DRAIN_SECONDS = 2.0
_SHOW_SECONDS = 0.5
_SETTLE_SECONDS = 10.0
_CALM_POLL_SECONDS, _CALM_PUBLISH_SECONDS = 15.0, 20.0
_SETTINGS = {
    "GUP_WAN__RATE": "0",  # the simulated WAN is the limit
    "GUP_CACHE__INDEX_TTL": "5s",  # so that half a minute shows revalidation
    "GUP_CACHE__MIN_FREE": "0",  # a nearly full disk must not evict what is being shown
    "GUP_LISTEN__DRAIN_TIMEOUT": "5s",
    "GUP_LOG__ACCESS": "off",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The demo's parameters."""

    clients: int
    seconds: float
    wan_rate_bytes_per_second: int
    workers: int
    keep: bool
    seed: int

    @property
    def full_bytes(self) -> int:
        """Small enough that the link carries a good number of fulls in the time: 4 MB by default."""
        rate = self.wan_rate_bytes_per_second or 10_000_000
        return max(50_000, min(4_000_000, round(rate * self.seconds / 75)))


Command = Callable[[Plan, str, Path], list[str]]


def gup_command(plan: Plan, upstream_url: str, directory: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "gup", "serve", "--upstream", upstream_url, "--cache-dir", str(directory)),
        *("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--workers", str(plan.workers)),
    ]


def demo(plan: Plan, *, json_output: bool, command: Command = gup_command) -> int:
    """Show gup at work; returns the exit status. `command` starts gup.

    0: every byte was right and no file was fetched twice. 1: a wrong or missing byte. 2: a file was fetched
    twice. 3: gup did not start, or ended early. 4: gup's figures are not the management server's. 130:
    interrupted.
    """
    status = NOT_STARTED
    with tempfile.TemporaryDirectory(prefix="gup-demo-") as directory:
        console = Console(stderr=json_output)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                status = runner.run(_demo(plan, command, Path(directory), console, json_output=json_output))
        except* GupEndedError as group:
            sys.stderr.writelines(f"gup: {error}\n" for error in group.exceptions)
        except* asyncio.CancelledError:
            status = INTERRUPTED
    return status


async def _demo(plan: Plan, command: Command, directory: Path, console: Console, *, json_output: bool) -> int:
    """Start the parties, run the show, report, and end everything in order, also when interrupted."""
    task, stop, keeping = asyncio.current_task(), asyncio.Event(), asyncio.Event()
    assert task is not None

    def interrupt() -> None:
        """A second Ctrl-C does nothing: it must not break the orderly end."""
        if not stop.is_set() and not keeping.is_set():
            task.cancel()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    offered = streams(PRODUCTS, plan.full_bytes)
    manager = Manager(directory / "manager", plan.seed, offered, Link(plan.wan_rate_bytes_per_second))
    await manager.publish()
    async with (
        manager.listening("127.0.0.1", 0) as url,
        serving(command(plan, url, directory / "cache"), directory) as gup,
        new_session() as session,
    ):
        if plan.keep:
            console.print(f"page {gup.control_url}/", highlight=False, soft_wrap=True)
        show = Show(plan, manager, gup, session)
        shown = Console(quiet=True) if json_output else console
        with Live(console=shown, auto_refresh=False, transient=True) as live:
            summary = await show.run(live)
        if json_output:
            sys.stdout.write(json.dumps(summary.document(), indent=2) + "\n")
            sys.stdout.flush()
        else:
            print_summary(console, summary)
        status = summary.status
        if plan.keep:
            keeping.set()
            places = f"content {gup.url}/content/ContentInfo.txt, page {gup.control_url}/"
            words = f"The demo runs until Ctrl-C: {places}, management server {url}{COUNTS_PATH}"
            console.print(words, highlight=False, soft_wrap=True, markup=False)
            await show.keep(stop)
            status = WRONG_BYTE if summary.figures.wrong else status
    if status and gup.complaints:
        sys.stderr.write("\n".join(["what gup complained of:", *gup.complaints, ""]))
    return status


# --- the real gup


class GupEndedError(GupError):
    """gup did not start, or ended early; the text has its last lines."""


class Gup:
    """A running `gup serve`, watched by its standard error."""

    def __init__(self) -> None:
        self.url = self.control_url = ""
        self.complaints: deque[str] = deque(maxlen=_KEPT_LINES)
        """Its last warnings and errors."""
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.ready = asyncio.Event()

    async def read(self, stream: asyncio.StreamReader) -> None:
        while raw := await stream.readline():
            line = raw.decode(errors="replace").rstrip()
            self._lines.append(line)
            if _COMPLAINT.match(line):
                self.complaints.append(line)
            if found := _READY.search(line):
                self.url, self.control_url = found.groups()
                self.ready.set()

    def ended(self, how: str) -> GupEndedError:
        return GupEndedError("\n".join([f"gup serve {how}", *(f"  {line}" for line in self._lines)]))


@contextlib.asynccontextmanager
async def serving(command: list[str], directory: Path) -> AsyncIterator[Gup]:
    """A gup that is ready; GupEndedError, also in the middle of the block, when it fails to start or ends."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment(directory),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 20,
            start_new_session=True,  # Ctrl-C must reach the demo alone: it ends gup after the clients
        )
    except OSError as error:
        raise GupEndedError(f"gup serve can't be started: {error}") from error
    assert process.stderr is not None
    gup = Gup()
    reading = asyncio.create_task(gup.read(process.stderr))

    async def watch() -> None:
        status = await process.wait()
        await asyncio.wait({reading}, timeout=_DRAIN_SECONDS)
        raise gup.ended(f"ended too early, with status {status}")

    try:
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch())
            try:
                async with asyncio.timeout(_READY_SECONDS):
                    await gup.ready.wait()
            except TimeoutError:
                raise gup.ended(f"was not ready after {_READY_SECONDS:g} s") from None
            yield gup
            watching.cancel()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TERMINATE_SECONDS):
                    await process.wait()
        finally:  # not left behind even when the wait itself is cancelled
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            # A child of gup may hold its standard error open.
            await asyncio.wait({reading}, timeout=_DRAIN_SECONDS)
            reading.cancel()


def environment(directory: Path) -> dict[str, str]:
    """The caller's, without its GUP_ settings, which must not change the demo."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GUP_")}
    return kept | _SETTINGS | {"TMPDIR": str(directory)}


# --- the show


def timeline(seconds: float) -> list[tuple[float, int]]:
    """When how many streams get new revisions: one every tenth of the time, all in the middle, then calm."""
    return [(seconds * tenth / 10, PRODUCTS if tenth == 5 else 1) for tenth in (1, 2, 3, 4, 5, 7.5, 8.5)]


class Show:
    """One run between started parties. Its figures are the crowd's; it only changes what is published."""

    def __init__(self, plan: Plan, manager: Manager, gup: Gup, session: aiohttp.ClientSession) -> None:
        self._plan = plan
        self._manager = manager
        self._session = session
        self._crowd = Crowd(gup.url, manager.catalogue, count=plan.clients, seed=plan.seed)
        self._begin_seconds = time.monotonic()
        self.gup = gup

    async def run(self, live: Live) -> Summary:
        live.console.print(f"{self._plan.clients} clients start, a quarter of them up to date")
        async with asyncio.TaskGroup() as tasks:
            showing = tasks.create_task(self._show_progress(live))
            tasks.create_task(self._play(live.console))
            await self._crowd.run()
            showing.cancel()
        summary = replace(self._summary(), own=await self._own_totals())
        deadline = time.monotonic() + _SETTLE_SECONDS
        while (self._manager.counts.sending or not summary.agrees) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)  # fills may still be ending
            summary = replace(summary, own=await self._own_totals())
        return summary

    def _elapsed(self) -> float:
        return time.monotonic() - self._begin_seconds

    def _summary(self) -> Summary:
        return Summary(self._crowd.figures, self._manager.counts, self._plan.clients, self._elapsed())

    async def keep(self, stop: asyncio.Event) -> None:
        self._crowd.poll_seconds = _CALM_POLL_SECONDS
        async with asyncio.TaskGroup() as tasks:
            calm = [tasks.create_task(self._crowd.run()), tasks.create_task(self._publish_calmly())]
            await stop.wait()
            for task in calm:
                task.cancel()

    async def _publish_calmly(self) -> None:
        while True:
            await asyncio.sleep(_CALM_PUBLISH_SECONDS)
            await self._publish(1)

    async def _play(self, console: Console) -> None:
        for at_seconds, count in timeline(self._plan.seconds):
            await asyncio.sleep(at_seconds - self._elapsed())
            await self._publish(count)
            news = "a stream has a new revision"
            if count > 1:
                news = "the herd: every stream has a new revision, and all clients ask at once"
                self._crowd.ring()
            console.print(f"{self._elapsed():.1f} s: {news}", highlight=False)
        await asyncio.sleep(self._plan.seconds - self._elapsed())
        self._crowd.stop()

    async def _publish(self, count: int) -> None:
        await self._manager.publish(count)
        self._crowd.catalogue = self._manager.catalogue

    async def _show_progress(self, live: Live) -> None:
        while True:
            await asyncio.sleep(_SHOW_SECONDS)
            live.update(progress(self._summary(), self._plan.seconds), refresh=True)

    async def _own_totals(self) -> dict[str, int] | None:
        url = self.gup.control_url + "/api/v1/status"
        try:
            async with self._session.get(url, raise_for_status=True) as response:
                totals: dict[str, int] = (await response.json())["totals"]["since_start"]
        except (aiohttp.ClientError, TimeoutError):
            return None
        return totals
