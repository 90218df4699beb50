"""`gup demo`: a simulated management server, a real `gup serve` and a crowd of clients, start to verdict.

Owns the order of things and the children; what they say is judged in `summary`.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import uvloop
from rich.console import Console

from gup.demo.catalogue import COUNTS_PATH
from gup.demo.children import Child, ChildError
from gup.demo.clients import new_session
from gup.demo.screen import Plain, Quiet, Screen, Terminal, print_summary
from gup.demo.show import PRODUCTS, Plan, Show, Urls
from gup.demo.summary import NOT_STARTED, WRONG_BYTE, Summary

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
    arguments = {
        "listen": "127.0.0.1:0",
        "seed": plan.seed,
        "wan_rate_bytes_per_second": plan.wan_rate_bytes_per_second,
        "publish_interval_seconds": 0,
        "products": PRODUCTS,
        "full_bytes": plan.full_bytes,
    }
    return [sys.executable, "-m", "gup.demo.manager", json.dumps(arguments)]


def gup_command(plan: Plan, upstream_url: str, directory: Path) -> list[str]:
    """The real thing, on free ports."""
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
        """Once is enough: a second Ctrl-C must not break the orderly end."""
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
            return Quiet()
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
            status = runner.run(_stage(plan, commands, console, directory, json_output=json_output))
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


async def _stage(
    plan: Plan, commands: Commands, console: Console, directory: Path, *, json_output: bool
) -> int:
    return await Stage(plan, commands, console, json_output=json_output).run(directory)
