"""A child process that says on stderr when it is ready, and its orderly end; never knows what it does."""

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self

from gup.errors import GupError

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
