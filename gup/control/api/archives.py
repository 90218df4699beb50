"""Entries as an archive: exported and imported while the service runs."""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import IO, Any, TypeVar, cast

from aiohttp import StreamReader, web

from gup.cache.archive import ArchiveError, Imported, TarError, written
from gup.cache.archive import Import as ArchiveImport
from gup.cache.records import Record
from gup.content.key import ContentKey, Variant
from gup.content.variant_choice import why_not_for
from gup.control.api.endpoint import Endpoint
from gup.control.api.entries import Filter, Labels, labels_of, matching
from gup.control.api.schemas import Import
from gup.control.entry_table import Row
from gup.control.eviction import no_room
from gup.control.state import ControlState

_log = logging.getLogger("gup.control.archives")
TAR = "application/x-tar"
_EXPORTS_AT_ONCE = 2
"""Each reads bodies twice, with the threads that all jobs share."""
_T = TypeVar("_T")


class Archives:
    """Limits concurrent exports and imports."""

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
        """Entries with their records as a tar archive, each compared with its sums before it is sent.

        version and language mean those of a site: with them go the entries that such a site has a use for,
        what is for all versions or languages too.
        """
        if self._exporting.locked():
            raise web.HTTPConflict(text=f"{_EXPORTS_AT_ONCE} exports are in progress; try again later")
        async with self._exporting:
            rows = [row async for part in state.index.rows.every() for row in part]
            label, now = labels_of(state), state.clock()
            keys, not_wanted = await asyncio.to_thread(chosen, rows, query, label, now)
            pieces = written(state.dependencies.store, keys, state.settings.site.name, now, not_wanted)
            response = web.StreamResponse(headers={"Content-Type": TAR})
            response.enable_chunked_encoding()
            await response.prepare(request)
            try:
                async for piece in pieces:
                    await response.write(piece)
            except (ArchiveError, OSError) as error:  # the head is sent: only closing can report it
                _log.warning("an export broke off: %s", error)
                if request.transport is not None:
                    request.transport.abort()
            return response

    async def import_(self, state: ControlState, request: web.Request) -> Import:
        """Import an archive's entries; nothing is overwritten or evicted, damaged ones are refused."""
        if not state.index.complete:
            raise web.HTTPServiceUnavailable(text="the index does not cover the whole store yet; try again")
        if self._importing.locked():
            raise web.HTTPConflict(text="an import is in progress")
        async with self._importing:
            loop, content = asyncio.get_running_loop(), request.content
            taking = asyncio.create_task(asyncio.to_thread(_take, state, content, loop))
            try:
                return Import(await asyncio.shield(taking))
            except asyncio.CancelledError:  # the service stops: let the thread finish its entry
                content.set_exception(ConnectionResetError("the service stops"))
                await asyncio.gather(taking, return_exceptions=True)
                raise


def chosen(
    rows: Sequence[Row], query: Filter, label: Labels, now: float
) -> tuple[list[ContentKey], Counter[str]]:
    """The keys that the filter and a site's version and language select; reasons for the others, counted."""
    keys: list[ContentKey] = []
    not_wanted: Counter[str] = Counter()
    others = query.model_copy(update={"version": None, "language": None})
    named = ", ".join(sorted(others.model_dump(exclude_none=True)))
    of_that = {row.key for row in matching(rows, others, label, now)}
    for row in rows:
        called = label(row.stream_id, row.file)
        why = why_not_for(Variant(row.version, row.language), query.version, query.language, called)
        if not why and row.key not in of_that:
            why = f"it is not of that {named}"
        if why:
            not_wanted[why] += 1
        else:
            keys.append(ContentKey.parse(row.key))
    return sorted(keys, key=lambda key: key.text), not_wanted


def _take(state: ControlState, content: StreamReader, loop: asyncio.AbstractEventLoop) -> Imported:
    """The import, in a thread. Body and index are used on the event loop."""

    def wait_for(work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    def call(work: Callable[..., _T], *arguments: object) -> _T:
        async def run() -> _T:
            return work(*arguments)

        return wait_for(run())

    class Body:
        """The request's body as a file, read from the connection as fast as it is consumed."""

        def read(self, _size: int = -1) -> bytes:
            try:
                return wait_for(content.readany())
            except Exception as error:  # any error of aiohttp's for a broken connection
                raise TarError("the connection broke off") from error

    async def taken(record: Record) -> None:
        await state.index.read_again(record.key, state.dependencies.store)
        if (row := state.index.rows.get(record.key.text)) is not None:
            state.demand.placed(row)
        state.evictor.look_soon()

    def room(length_bytes: int) -> str:
        held = call(lambda: state.index.rows.total_bytes + state.dependencies.promised_bytes())
        figures = os.statvfs(state.dependencies.store.root)
        return no_room(length_bytes, held, figures.f_bavail * figures.f_frsize, state.settings.cache)

    importing = ArchiveImport(
        state.dependencies.store, state.clock(), room, lambda record: wait_for(taken(record))
    )
    return importing.take(cast(IO[bytes], Body()))
