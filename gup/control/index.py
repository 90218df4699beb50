"""The index: the controller's view of the store for listing, eviction and totals. Never the truth.

The event loop owns the rows in memory and changes them at once; what changed is written behind, a
transaction a second, by the one thread that the database lives in. Records on disk are the truth: a missing
or damaged index is rebuilt from them, and `gup.control.reconcile` heals whatever events were lost.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from gup.content.key import Kind
from gup.control.index_file import DamagedIndexError, IndexFile
from gup.control.rows import Row, Stream

_log = logging.getLogger("gup.control.index")
_ENTRY = "entry:"
_NOTE = "note:"
_T = TypeVar("_T")
ROWS_AT_ONCE = 1000
"""Where all rows are taken over, others get their turn after so many."""


class Index:
    """Rows by key, written behind to `folder`. Everything but the file work happens on the event loop.

    `complete` says whether the rows stand for all of the store; nothing is evicted before.
    """

    def __init__(
        self,
        folder: Path,
        on_damage: Callable[[], None],
        on_written: Callable[[str | None], None] = lambda _refusal: None,
    ) -> None:
        """`on_written` is told after each try to write why the disk refused, None when it did not."""
        self.rows: dict[str, Row] = {}
        self.total_bytes = 0
        self.opened = False
        self.complete = False
        self._held: dict[Stream, dict[str, int]] = {}
        self._newest: dict[Stream, str] = {}
        self._deltas: Counter[Stream] = Counter()
        self._delta_bytes: Counter[Stream] = Counter()
        self._on_damage = on_damage
        self._on_written = on_written
        self._file = IndexFile(folder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gup-index")
        self._dirty: set[str] = set()
        self._notes: dict[str, Any] = {}
        self._dirty_notes: set[str] = set()
        self._watchers: list[set[str]] = []
        self._writing = asyncio.Lock()
        self._written_whole = False

    # --- the view

    def put(self, row: Row) -> None:
        """Add or replace a row."""
        self._apply(row.key, row)
        self._dirty.add(row.key)

    def discard(self, key: str) -> None:
        """Drop a row, if there is one."""
        self._apply(key, None)
        self._dirty.add(key)

    def _apply(self, key: str, row: Row | None) -> None:
        before = self.rows.pop(key, None) if row is None else self.rows.get(key)
        if before is not None:
            self.total_bytes -= before.length_bytes
            self._count_revision(before, -1)
        if row is not None:
            self.rows[key] = row
            self.total_bytes += row.length_bytes
            self._count_revision(row, 1)
        for watcher in self._watchers:
            watcher.add(key)

    def _count_revision(self, row: Row, step: int) -> None:
        revision, stream = row.content_revision, row.stream_id
        if row.kind is Kind.DELTA:
            self._deltas[stream] += step
            self._delta_bytes[stream] += step * row.length_bytes
            if not self._deltas[stream]:
                del self._deltas[stream], self._delta_bytes[stream]
        if revision is None:
            return
        counts = self._held.setdefault(stream, {})
        counts[revision] = counts.get(revision, 0) + step
        if counts[revision]:
            self._newest[stream] = max(revision, self._newest.get(stream, ""))
            return
        del counts[revision]
        if not counts:
            del self._held[stream], self._newest[stream]
        elif revision == self._newest[stream]:
            self._newest[stream] = max(counts)

    def newest_held(self) -> Mapping[Stream, str]:
        """The newest revision held of each stream, as it is kept up to date; to look at only."""
        return self._newest

    def has_deltas(self, stream: Stream) -> bool:
        return self._deltas[stream] > 0

    def mean_delta_bytes(self, stream: Stream) -> int:
        """What a delta of the stream that is held takes on average; 0 without any."""
        count = self._deltas[stream]
        return self._delta_bytes[stream] // count if count else 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[set[str]]:
        """The keys put or discarded meanwhile: what a slow look at the disk must not overrule."""
        touched: set[str] = set()
        self._watchers.append(touched)
        try:
            yield touched
        finally:
            # By identity: two watchers may hold equal sets.
            self._watchers = [watcher for watcher in self._watchers if watcher is not touched]

    def note(self, name: str) -> Any:
        """A further JSON value kept with the index, None when there is none."""
        return self._notes.get(name)

    def set_note(self, name: str, value: Any) -> None:
        self._notes[name] = value
        self._dirty_notes.add(name)

    # --- the file

    async def open(self) -> None:
        """Load what the last run left. `complete` is set when that could be used."""
        with self.watch() as touched:
            values = await self._load()
            rows, notes = await self._in_thread(lambda: _decode(values or {}))
            if rows is None:
                await self._start_anew("a row is not what was written")
            for number, (key, row) in enumerate((rows or {}).items(), 1):
                if key not in touched:
                    self._apply(key, row)
                if number % ROWS_AT_ONCE == 0:
                    await asyncio.sleep(0)
            self._notes = {**notes, **self._notes}
        self.complete = values is not None and rows is not None
        self.opened = True

    async def _load(self) -> dict[str, Any] | None:
        try:
            return await self._in_thread(self._file.load)
        except DamagedIndexError as error:
            await self._start_anew(str(error))
        except OSError as error:
            self._on_written(f"kept in memory only: {error}")
            await self._in_thread(self._file.close)
        return None

    async def _start_anew(self, why: str) -> None:
        _log.warning("the index is damaged and is made anew from the records: %s", why)
        self._on_damage()
        try:
            await self._in_thread(self._file.delete)
        except OSError as error:
            _log.warning("the damaged index can't be removed: %s", error)

    async def flush(self) -> None:
        """Write what changed. What the disk refuses stays due; a damaged file is replaced whole."""
        async with self._writing:
            keys, notes = self._dirty, self._dirty_notes
            if not (keys or notes or self.complete != self._written_whole):
                return
            self._dirty, self._dirty_notes = set(), set()
            rows = [self.rows[key] for key in keys if key in self.rows]
            gone = [_ENTRY + key for key in keys if key not in self.rows]
            noted = {_NOTE + name: self._notes[name] for name in notes}
            whole = self.complete

            def write() -> None:
                values = {_ENTRY + row.key: row.to_json() for row in rows}
                self._file.write(values | noted, gone, whole=whole)

            try:
                await self._in_thread(write)
                self._written_whole = whole
                self._on_written(None)
            except DamagedIndexError as error:
                await self._start_anew(str(error))
                self._written_whole = False
                self._dirty |= set(self.rows)
                self._dirty_notes |= set(self._notes)
            except (OSError, asyncio.CancelledError) as error:
                self._dirty |= keys  # writing them twice does no harm
                self._dirty_notes |= notes
                if isinstance(error, asyncio.CancelledError):
                    raise
                self._on_written(str(error))

    async def close(self) -> None:
        """Write what is due and end the thread."""
        await self.flush()
        await self._in_thread(self._file.close)
        await asyncio.to_thread(self._thread.shutdown)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _decode(values: Mapping[str, Any]) -> tuple[dict[str, Row] | None, dict[str, Any]]:
    """Rows and notes; rows None when one of them is damaged."""
    rows: dict[str, Row] = {}
    notes: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith(_NOTE):
            notes[key.removeprefix(_NOTE)] = value
            continue
        try:
            row = Row.from_json(value)
        except ValueError:
            return None, notes
        if _ENTRY + row.key != key:
            return None, notes
        rows[row.key] = row
    return rows, notes
