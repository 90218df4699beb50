"""Import of an archive into the running service."""

import asyncio
import os
import queue
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import IO, Any, TypeVar, cast

from gup.cache.importing import Custody, Import, Imported
from gup.cache.record import Record
from gup.cache.tar_reader import TarError
from gup.config import Cache
from gup.control.reconcile import index_again
from gup.control.state import ControlState
from gup.units import format_size


def no_room(length_bytes: int, held_bytes: int, free_bytes: int, limits: Cache) -> str:
    """Why so much more can't be imported, "" when it can: an import evicts nothing."""
    if held_bytes + length_bytes > limits.max_size:
        return (
            f"cache.max_size ({format_size(limits.max_size)}) would be exceeded, and an import evicts nothing"
        )
    if free_bytes - length_bytes < limits.min_free:
        return f"the disk would have less than cache.min_free ({format_size(limits.min_free)}) left"
    return ""


_PIECES = 8
_TURN_SECONDS = 1.0
_T = TypeVar("_T")


class Upload:
    """A bounded queue of pieces from the event loop to a thread, which reads them as a file."""

    def __init__(self) -> None:
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_PIECES)
        self._closed = threading.Event()

    def put(self, piece: bytes | None) -> None:
        """Add a piece, b"" at the end, None when the sender is gone; blocks while the queue is full."""
        while not self._closed.is_set():
            try:
                self._pieces.put(piece, timeout=_TURN_SECONDS)
            except queue.Full:
                continue
            return

    def read(self, _size: int = -1) -> bytes:
        """The next piece, b"" at the end. TarError when the sender is gone."""
        piece = self._pieces.get()
        if piece is None:
            raise TarError("the connection broke off")
        if not piece:
            self._pieces.put(piece)
        return piece

    def close(self) -> None:
        """The reader has ended."""
        self._closed.set()


async def import_archive(state: ControlState, pieces: AsyncIterator[bytes]) -> Imported:
    """Import the entries of an archive; ArchiveError when it is none."""
    upload = Upload()
    taking = asyncio.create_task(asyncio.to_thread(_take, state, upload, asyncio.get_running_loop()))
    try:
        async for piece in pieces:
            if piece:
                await asyncio.to_thread(upload.put, piece)
            if taking.done():
                break
        await asyncio.to_thread(upload.put, b"")
    except (asyncio.CancelledError, OSError):  # the sender has gone, or the service stops
        await asyncio.shield(asyncio.to_thread(upload.put, None))
        await asyncio.gather(asyncio.shield(taking), return_exceptions=True)
        raise
    return await taking


def _take(state: ControlState, upload: Upload, loop: asyncio.AbstractEventLoop) -> Imported:
    """The import, in a thread; claims and index are used on the event loop."""

    def on_loop(work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    async def claim(offset: int) -> bool:
        return state.dependencies.claims.try_claim(offset)

    async def release(offset: int) -> None:
        state.dependencies.claims.release(offset)

    async def held() -> int:
        return state.index.total_bytes + state.dependencies.promised_bytes()

    async def taken(record: Record) -> None:
        await index_again(record.key, state.index, state.dependencies.store)
        state.evictor.look_soon()

    def room(length_bytes: int) -> str:
        figures = os.statvfs(state.dependencies.store.root)
        free_bytes = figures.f_bavail * figures.f_frsize
        return no_room(length_bytes, on_loop(held()), free_bytes, state.settings.cache)

    custody = Custody(
        claim=lambda offset: on_loop(claim(offset)),
        release=lambda offset: on_loop(release(offset)),
        room=room,
        taken=lambda record: on_loop(taken(record)),
    )
    try:
        return Import(state.dependencies.store, custody, state.clock()).take(cast(IO[bytes], upload))
    finally:
        upload.close()
