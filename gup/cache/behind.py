"""The writes of one fill beside its reading from upstream: one at a time; reads nothing, decides nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from gup.cache.part import PartWriter

_MOST_HELD_BYTES = 2 << 20
"""A disk that is slower than upstream holds the reading up from here on."""


class WriteBehind:
    """Has what `writer` takes written by `write`, a step of it, as long as something is left to write.

    An error of the disk is raised at the next call, or at the end of the `async with` block; `beside` raises
    it at once. When the block has been left, however that came, no write is under way.
    """

    def __init__(self, writer: PartWriter, write: Callable[[], Awaitable[None]]) -> None:
        self._writer = writer
        self._write = write
        self._writing: asyncio.Task[None] | None = None
        self._reader: asyncio.Task[Any] | None = None
        """Who is in `beside`."""
        self._interrupted = False

    async def begin(self, *, wait: bool = False) -> None:
        """Have all that is sure written soon; with `wait`, or when too much is held, return when it is."""
        if self._writing is not None and self._writing.done():
            await self.finish()
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_all())
            self._writing.add_done_callback(self._interrupt)
        if wait or self._writer.unwritten >= _MOST_HELD_BYTES:
            await self.finish()

    async def beside(self, read: Callable[[], Awaitable[bytes]]) -> bytes:
        """What `read` brings. It is cancelled when the disk refuses: upstream may be silent for long.

        `read` must be fit for that: nothing may be lost for whoever reads on. Costs no task of its own.
        """
        if self._writing is not None and self._writing.done():
            await self.finish()
        self._reader = asyncio.current_task()
        try:
            return await read()
        except asyncio.CancelledError:
            if not self._interrupted or self._reader is None or self._reader.uncancel():
                raise
        finally:
            self._reader = None
        await self.finish()
        raise AssertionError("interrupted by a write that did not fail")

    def _interrupt(self, writing: asyncio.Task[None]) -> None:
        if self._reader is not None and not writing.cancelled() and writing.exception() is not None:
            self._interrupted = True
            self._reader.cancel()

    async def finish(self) -> None:
        """Return when nothing is being written."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
            writing, self._writing = self._writing, None
            writing.result()

    async def _write_all(self) -> None:
        while self._writer.unwritten:
            await self._write()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            await self.finish()
        elif self._writing is not None:
            await asyncio.wait([self._writing])
            self._writing.exception()  # taken note of: the other error says what becomes of the fill
