"""Entries as an archive: exported and imported while the service runs."""

import asyncio
import logging
import os
import queue
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import IO, Any, TypeVar, cast

from aiohttp import web

from gup.cache.archive import ArchiveError, Custody, Imported, TarError, written
from gup.cache.archive import Import as ArchiveImport
from gup.cache.records import Record
from gup.content.key import ContentKey
from gup.control.api.endpoint import Endpoint
from gup.control.api.entries import Filter, labels_of, matching
from gup.control.api.schemas import Import
from gup.control.eviction import no_room
from gup.control.reconcile import index_again
from gup.control.state import ControlState

_log = logging.getLogger("gup.control.archives")
TAR = "application/x-tar"
_EXPORTS_AT_ONCE = 2
"""Each reads bodies twice, with the threads that all jobs share."""
_PIECES = 8
_TURN_SECONDS = 1.0
_T = TypeVar("_T")


class Archives:
    """Holds back those who export or import while others do."""

    def __init__(self) -> None:
        self._importing = asyncio.Lock()
        self._exporting = asyncio.Semaphore(_EXPORTS_AT_ONCE)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return (
            Endpoint("GET", "/api/v1/export", self.export, media=(TAR,), problems=(409,)),
            Endpoint("POST", "/api/v1/import", self.import_, takes=TAR, problems=(409,)),
        )

    async def export(self, state: ControlState, query: Filter, request: web.Request) -> web.StreamResponse:
        """Entries with their records as a tar archive, each compared with its sums before it is sent."""
        if self._exporting.locked():
            raise web.HTTPConflict(text=f"{_EXPORTS_AT_ONCE} exports are in progress; try again later")
        async with self._exporting:
            rows = list(state.index.rows.values())
            found = await asyncio.to_thread(matching, rows, query, labels_of(state))
            keys = [ContentKey.parse(row.key) for row in sorted(found, key=lambda row: row.key)]
            pieces = written(state.dependencies.store, keys, state.settings.site.name, state.clock())
            response = web.StreamResponse(headers={"Content-Type": TAR})
            response.enable_chunked_encoding()
            await response.prepare(request)
            try:
                while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                    await response.write(piece)
            except (ArchiveError, OSError) as error:  # the head is sent: only a broken connection can tell
                _log.warning("an export broke off: %s", error)
                if request.transport is not None:
                    request.transport.abort()
            return response

    async def import_(self, state: ControlState, request: web.Request) -> Import:
        """Take the entries of an archive; nothing is overwritten or evicted, what is damaged is refused."""
        if not state.index.complete:
            raise web.HTTPServiceUnavailable(text="the index does not cover the whole store yet; try again")
        if self._importing.locked():
            raise web.HTTPConflict(text="an import is in progress")
        async with self._importing:
            return Import.model_validate(await import_archive(state, request.content.iter_any()))


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
        return ArchiveImport(state.dependencies.store, custody, state.clock()).take(cast(IO[bytes], upload))
    finally:
        upload.close()
