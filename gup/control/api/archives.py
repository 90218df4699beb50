"""Entries as an archive: sent out, taken in. Reads and writes no file itself."""

import asyncio
import logging
from dataclasses import asdict

from aiohttp import web
from pydantic import Field

from gup.cache.archive import ArchiveError, written
from gup.content.key import ContentKey, Kind
from gup.control.api.answers import PLANE, answer
from gup.control.api.content import labelling
from gup.control.api.described import Answer, Parameters, asked, describe
from gup.control.api.listing import Listing, matching
from gup.control.archives import import_archive

_log = logging.getLogger("gup.control.archives")
TAR = "application/x-tar"
_EXPORTS_AT_ONCE = 2
"""Each reads bodies twice, with the threads that all jobs share."""
_IMPORTING: web.AppKey[asyncio.Lock] = web.AppKey("importing", asyncio.Lock)
_EXPORTING: web.AppKey[asyncio.Semaphore] = web.AppKey("exporting", asyncio.Semaphore)


class Export(Parameters):
    """Which entries; all of them without any. As in the listing."""

    product: str | None = Field(None, min_length=1, description="Only of this product.")
    version: str | None = Field(None, min_length=1, description="Only of this version.")
    language: str | None = Field(None, min_length=1, description="Only of this language.")
    stream: str | None = Field(None, min_length=1, description="Only of this moniker.")
    revision: str | None = Field(None, min_length=1, description="Only of this revision.")
    kind: Kind | None = Field(None, description="Only files of this kind.")


class NotTaken(Answer):
    """An entry of the archive, and why it was not taken."""

    name: str
    why: str


class ImportDone(Answer):
    """What became of the archive."""

    imported: int
    imported_bytes: int
    present: int = Field(description="Entries that were here already; nothing is overwritten.")
    refused: list[NotTaken]
    complete: bool = Field(description="Whether the archive was read to its last member.")
    problem: str | None = Field(description="Why it was not.")


@describe(None, query=Export, media=(TAR,), problems=(409,))
async def export(request: web.Request) -> web.StreamResponse:
    """Entries with their records as a tar archive, each compared with its sums before it is sent."""
    exporting = request.app[_EXPORTING]
    if exporting.locked():
        raise web.HTTPConflict(text=f"{_EXPORTS_AT_ONCE} exports are under way; try again when one has ended")
    async with exporting:
        return await _sent(request, asked(request, Export))


async def _sent(request: web.Request, chosen: Export) -> web.StreamResponse:
    plane = request.app[PLANE]
    rows = list(plane.index.rows.values())
    query = Listing.model_validate(chosen.model_dump())
    found = await asyncio.to_thread(matching, rows, query, labelling(plane))
    keys = [ContentKey.parse(row.key) for row in sorted(found, key=lambda row: row.key)]
    pieces = written(plane.dependencies.store, keys, plane.settings.site.name, plane.clock())
    response = web.StreamResponse(headers={"Content-Type": TAR})
    response.enable_chunked_encoding()
    await response.prepare(request)
    try:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            await response.write(piece)
    except (ArchiveError, OSError) as error:  # the head is out: only a broken connection can tell
        _log.warning("an export broke off: %s", error)
        if request.transport is not None:
            request.transport.abort()
    return response


@describe(ImportDone, takes=TAR, problems=(409,))
async def import_(request: web.Request) -> web.Response:
    """Take the entries of an archive; nothing is overwritten or evicted, what is damaged is refused."""
    plane, lock = request.app[PLANE], request.app[_IMPORTING]
    if not plane.index.complete:
        raise web.HTTPServiceUnavailable(text="the index does not stand for the whole store yet; try again")
    if lock.locked():
        raise web.HTTPConflict(text="an import is under way")
    async with lock:
        try:
            done = await import_archive(plane, request.content.iter_any())
        except ArchiveError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
    return answer(asdict(done))


def set_up(app: web.Application) -> None:
    """What the handlers share."""
    app[_IMPORTING] = asyncio.Lock()
    app[_EXPORTING] = asyncio.Semaphore(_EXPORTS_AT_ONCE)


routes = [
    web.get("/api/v1/export", export, allow_head=False),
    web.post("/api/v1/import", import_),
]
