"""Entries as an archive: sent out, taken in."""

import asyncio
import logging

from aiohttp import web

from gup.cache.archive import ArchiveError, written
from gup.content.key import ContentKey
from gup.control.api.endpoint import Endpoint
from gup.control.api.entries import Filter, labels_of, matching
from gup.control.api.schemas import Import
from gup.control.archives import import_archive
from gup.control.state import ControlState

_log = logging.getLogger("gup.control.archives")
TAR = "application/x-tar"
_EXPORTS_AT_ONCE = 2
"""Each reads bodies twice, with the threads that all jobs share."""


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
