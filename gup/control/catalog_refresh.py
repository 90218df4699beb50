"""Catalogue refresh: reads the catalogues of the upstreams when they are due, and keeps the last good ones.

They come from `catalog.file`, else from each manager: at the start, every `catalog.refresh`, and soon after a
client requested a moniker that none of them lists. They are read through the store, so that clients and
controller share one fetch; after such a moniker and after a reload the upstream is asked itself, since the
store's copy may be `cache.index_ttl` old. A catalogue that can't be read, or that is empty, leaves the last
good one in force.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiofiles.os import wrap

from gup import config
from gup.cache.catalog_cache import Kept, read_kept, write_kept
from gup.content.catalog import (
    CATALOG_PATH,
    MAX_CATALOG_BYTES,
    Catalogues,
    Label,
    Stream,
    StreamTypes,
    parse_catalog,
)
from gup.errors import Problem
from gup.files import FileError, read_file
from gup.upstream.download import Fetched
from gup.upstream.exchange import UpstreamFailure

_log = logging.getLogger("gup.control.catalog_refresh")
Fetch = Callable[[str, str | None, str | None], Awaitable[Fetched]]
"""Asks an upstream by name, with the validators of the last catalogue; raises UpstreamFailure."""
Look = Callable[[str], Awaitable[Fetched]]
"""Reads an upstream's catalogue through the store, as clients do; raises Problem."""

_FIRST_RETRY_SECONDS = 5.0
_LEAST_GAP_SECONDS = 2.0
"""Between two readings because of unlisted monikers, which any client may make up."""
_MOST_UNLISTED = 1000
_NONE = Kept("")


class CatalogRefresher:
    def __init__(
        self,
        run: Path,
        settings: config.Settings,
        look: Look,
        fetch: Fetch,
        publish: Callable[[], None],
        *,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`run` is the folder in the store; `publish` makes workers read what is kept there."""
        self._run = run
        self._settings = settings
        self._look = look
        self._fetch = fetch
        self._publish = publish
        self._wall_clock = wall_clock
        self._clock = clock
        self._wake = asyncio.Event()
        self._asked_for: set[str] = set()
        self._doubted = False
        """The store's copy may be too old: a client asked for a moniker that it does not list."""
        self._failures = 0
        self._kept: dict[str, Kept] = read_kept(run)
        self.catalogues = self._assembled()

    def _assembled(self) -> Catalogues:
        rows = {name: kept.rows for name, kept in self._kept.items() if kept.rows is not None}
        settings = self._settings
        return Catalogues(rows, settings.upstream, StreamTypes(settings.catalog.types))

    # --- events

    def apply(self, settings: config.Settings) -> None:
        self._settings = settings
        self.catalogues = self._assembled()
        self._doubted = True
        self._wake.set()

    def unlisted(self, moniker: str) -> None:
        """A client asked for an unlisted moniker: read the catalogues again, once for each moniker."""
        new = moniker not in self._asked_for and len(self._asked_for) < _MOST_UNLISTED
        if new and self.catalogues.somewhere(moniker) is None:
            self._asked_for.add(moniker)
            self._doubted = True
            self._wake.set()

    def label(self, stream: Stream, file: str = "") -> Label | None:
        return self.catalogues.label(stream, file)  # a reading replaces `catalogues`

    def shown(self) -> Mapping[str, dict[str, Any]]:
        """Each upstream's catalogue for pages: source, number of streams, time of reading, problem."""
        return {
            name: {
                "source": kept.source,
                "streams": None if kept.rows is None else len(kept.rows),
                "read_at": kept.read_at,
                "problem": kept.problem,
            }
            for name, kept in self._kept.items()
        }

    # --- reading

    async def keep(self) -> None:
        while True:
            self._wake.clear()
            began = self._clock()
            await self.read()
            try:
                async with asyncio.timeout(self._pause_seconds()):
                    await self._wake.wait()
            except TimeoutError:
                if not self._failures:
                    self._asked_for.clear()
            else:
                gap = _LEAST_GAP_SECONDS if self._asked_for else 0.0
                await asyncio.sleep(max(0.0, began + gap - self._clock()))

    def _pause_seconds(self) -> float | None:
        """Time until the next reading, sooner after a failed one; None for never."""
        refresh = self._settings.catalog.refresh
        if not refresh:
            return None
        return min(refresh, _FIRST_RETRY_SECONDS * 2.0 ** (self._failures - 1)) if self._failures else refresh

    async def read(self) -> None:
        """Read all catalogues once; keep and publish the new ones."""
        settings = self._settings
        doubted, self._doubted = self._doubted, False
        managers = [upstream for upstream in settings.upstream if upstream.kind != "liveupdate"]
        readings = await asyncio.gather(*(self._read(upstream, doubted=doubted) for upstream in managers))
        kept = {upstream.name: one for upstream, one in zip(managers, readings, strict=True)}
        if settings is not self._settings:
            self._wake.set()  # the settings were changed meanwhile: the result may be of another upstream
            return
        failed = any(one.problem is not None for one in kept.values())
        self._failures = min(self._failures + 1, 16) if failed else 0
        await self._take(kept)

    async def _read(self, upstream: config.Upstream, *, doubted: bool) -> Kept:
        settings = self._settings.catalog
        source = str(settings.file) if settings.file is not None else upstream.url + CATALOG_PATH
        old = self._kept.get(upstream.name)
        if old is None or old.source != source:
            old = Kept(source)  # another server or file: its rows do not belong to this one
        if settings.file is None and not settings.refresh:
            return replace(old, problem=None)
        known = old if old.rows is not None else Kept(source)
        try:
            if settings.file is not None:
                fetched = Fetched(await wrap(read_file)(settings.file, MAX_CATALOG_BYTES))
            elif doubted:
                fetched = await self._fetch(upstream.name, known.etag, known.last_modified)
            else:
                fetched = await self._look(upstream.name)
        except (UpstreamFailure, Problem) as failure:
            return self._failed(old, failure.detail)
        except FileError as error:
            return self._failed(old, f"catalog.file: {error}")
        if fetched.text is None:
            return replace(old, read_at=self._wall_clock(), problem=None)
        rows = parse_catalog(fetched.text)
        if not rows:
            text = f"{source} lists nothing: no line is {{MONIKER}}: product - … - language"
            return self._failed(old, text)
        return Kept(source, rows, self._wall_clock(), None, fetched.etag, fetched.last_modified)

    @staticmethod
    def _failed(old: Kept, problem: str) -> Kept:
        if old.problem != problem:
            have = (
                "the last one stays in force"
                if old.rows is not None
                else "streams are shown by their monikers"
            )
            _log.warning("no catalogue: %s; %s", problem, have)
        return replace(old, problem=problem)

    async def _take(self, kept: dict[str, Kept]) -> None:
        before, self._kept = self._kept, kept
        if kept == before:
            return
        self.catalogues = self._assembled()
        changed = [n for n in kept | before if kept.get(n, _NONE).rows != before.get(n, _NONE).rows]
        for name in changed:
            if (one := kept.get(name, _NONE)).rows is not None:
                _log.info("catalogue of %s: %d streams, from %s", name, len(one.rows), one.source)
        try:
            await wrap(write_kept)(self._run, kept)
        except OSError as error:
            _log.warning("can't write the catalogues: %s", error.strerror or error)
            self._kept = before  # so that the next reading tries again
            return
        if changed or {n: k.source for n, k in kept.items()} != {n: k.source for n, k in before.items()}:
            self._publish()
