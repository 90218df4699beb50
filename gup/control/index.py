"""The index: the controller's view of the store, for listing, eviction and totals.

The records on disk are the truth. The rows in memory belong to the event loop and change at once; what
changed is written once a second, by one thread. A missing or damaged index is rebuilt from the records, and
`reconcile` corrects what lost events left out.
"""

import asyncio
import contextlib
import json
import logging
import re
import shutil
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import diskcache
from sortedcontainers import SortedList

from gup.cache.store import Stored
from gup.content.key import ContentKey, Kind, delta_step
from gup.jsonmodel import Members

_REVISION = re.compile(r"\d{9}")

Stream = tuple[str, str, str]
"""Version, language and moniker: revisions are compared within a stream."""


def stream_of(key: ContentKey) -> Stream:
    return (key.version, key.language, key.stream)


def content_revision(kind: Kind, revision: str, file: str) -> str | None:
    """The revision that a body brings a client to; None when the names do not tell.

    A delta's folder is its old revision in one source and the newest in another (FIELD.md), so its file
    name decides. Only nine-digit names can be compared.
    """
    step = delta_step(file) if kind is Kind.DELTA else None
    found = step.to_revision if step else revision
    return found if _REVISION.fullmatch(found) else None


@dataclass(frozen=True, slots=True)
class Row:
    """An entry: what its record says, and hits and bytes, which no record has. Times are Unix seconds."""

    key: str
    version: str
    language: str
    stream: str
    revision: str
    file: str
    kind: Kind
    length_bytes: int
    stored_at: float
    used_at: float
    hits: int = 0
    pinned: bool = False
    sent_bytes: int = 0
    received_bytes: int = 0

    @property
    def stream_id(self) -> Stream:
        return (self.version, self.language, self.stream)

    @property
    def content_revision(self) -> str | None:
        """The revision that the body brings a client to; None when the names do not tell."""
        return content_revision(self.kind, self.revision, self.file)

    def used(self, count: int, sent_bytes: int, at: float) -> "Row":
        return replace(
            self,
            hits=self.hits + count,
            sent_bytes=self.sent_bytes + sent_bytes,
            used_at=max(self.used_at, at),
        )

    def to_json(self) -> dict[str, Any]:
        """All members; `from_json` reads them back."""
        return {name: getattr(self, name) for name in self.__slots__} | {"kind": str(self.kind)}

    @classmethod
    def from_json(cls, fields: object) -> "Row":
        """Read what `to_json` gave; InvalidError."""
        members = Members(fields, "row of the index")
        return make_row(
            ContentKey.parse(members["key"]),
            members.one_of("kind", Kind),
            members.whole("length_bytes"),
            stored_at=members.time("stored_at"),
            used_at=members.time("used_at"),
            hits=members.whole("hits"),
            pinned=members.flag("pinned"),
            sent_bytes=members.whole("sent_bytes"),
            received_bytes=members.whole("received_bytes"),
        )


def make_row(
    key: ContentKey, kind: Kind, length_bytes: int, *, stored_at: float, used_at: float, **more: Any
) -> Row:
    """A row. Names that many rows share are interned, to save memory."""
    return Row(
        key.text,
        sys.intern(key.version),
        sys.intern(key.language),
        sys.intern(key.stream),
        sys.intern(key.revision),
        sys.intern(key.file),
        kind,
        length_bytes,
        stored_at,
        used_at,
        **more,
    )


def row_of(stored: Stored, known: Row | None = None) -> Row:
    """The row of a body found on disk; hits and totals come from the row known before."""
    record = stored.record
    assert record is not None
    return make_row(
        record.key,
        record.kind,
        stored.size_bytes,
        stored_at=record.stored_at,
        used_at=max(stored.used_at, known.used_at if known else 0.0),
        hits=known.hits if known else 0,
        pinned=record.pinned,
        sent_bytes=known.sent_bytes if known else 0,
        received_bytes=known.received_bytes if known else stored.size_bytes,
    )


_log = logging.getLogger("gup.control.index")
_ENTRY = "entry:"
_NOTE = "note:"
_T = TypeVar("_T")
ROWS_AT_ONCE = 1000
"""A loop over all rows yields to other tasks after so many."""


Place = tuple[float, str]
"""Where a row stands in a sorted list: its value and its key."""
ORDERS: dict[str, Callable[[Row], float]] = {
    "key": lambda _: 0,
    "used": lambda row: row.used_at,
    "stored": lambda row: row.stored_at,
    "length": lambda row: row.length_bytes,
    "hits": lambda row: row.hits,
}
"""The orders that rows are listed in, with their sort keys."""
_MANY = 5000
"""When more rows have changed, the sorted lists are rebuilt in a thread."""
_TURN = 100
"""Rows moved in the sorted lists before other tasks get their turn: some 3 ms with 1e5 rows."""


class Index:
    """Rows by key, written behind to `folder`. Everything but the file work is on the event loop.

    `complete` says whether the rows stand for all of the store; nothing is evicted before.
    """

    def __init__(
        self,
        folder: Path,
        on_damage: Callable[[], None],
        on_written: Callable[[str | None], None] = lambda _refusal: None,
    ) -> None:
        """`on_written` is called after each write with the reason of a refusal, None for success."""
        self.rows: dict[str, Row] = {}
        self.total_bytes = 0
        self.opened = False
        self.complete = False
        self._keys: dict[Stream, set[str]] = {}
        self._held: dict[Stream, dict[str, int]] = {}
        self._newest: dict[Stream, str] = {}
        self._deltas: Counter[Stream] = Counter()
        self._delta_bytes: Counter[Stream] = Counter()
        self._on_damage = on_damage
        self._on_written = on_written
        self._file = IndexFile(folder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gup-index")
        self._dirty: set[str] = set()
        self._sorted = _sorted([])
        self._sorting = asyncio.Lock()
        self._moved: dict[str, Row | None] = {}
        """Rows that changed since the sorted lists were updated, as they are in these lists."""
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
        self._moved.setdefault(key, before)
        if before is not None:
            self.total_bytes -= before.length_bytes
            keys = self._keys[before.stream_id]
            keys.discard(key)
            if not keys:
                del self._keys[before.stream_id]
            self._count_revision(before, -1)
        if row is not None:
            self.rows[key] = row
            self.total_bytes += row.length_bytes
            self._keys.setdefault(row.stream_id, set()).add(key)
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

    async def page(
        self, order: str, limit: int, *, descending: bool = False, after: Place | None = None
    ) -> list[Row]:
        """Rows in one of ORDERS, ties by key; those after the place `after`, `limit` at most.

        Costs what it returns, and what has changed since the last call or `flush`; not what is stored.
        """
        await self._sort()
        least, most = (None, after) if descending else (after, None)
        places = self._sorted[order].irange(least, most, inclusive=(False, False), reverse=descending)
        return [self.rows[key] for _, key in islice(places, limit)]

    def of_moniker(self, moniker: str) -> list[Row]:
        """The rows of all streams of this moniker, whatever its case."""
        wanted = moniker.casefold()
        streams = [keys for (_, _, name), keys in self._keys.items() if name.casefold() == wanted]
        return [self.rows[key] for keys in streams for key in keys]

    async def _sort(self) -> None:
        """Update the sorted lists with all changes."""
        async with self._sorting:
            if len(self._moved) > _MANY:
                self._moved = {}  # what changes from here on is relative to the rows as they are now
                self._sorted = await asyncio.to_thread(_sorted, list(self.rows.values()))
            while self._moved:
                changes = [(before, self.rows.get(key)) for key, before in self._moved.items()]
                self._moved = {}
                for at in range(0, len(changes), _TURN):
                    if at:
                        await asyncio.sleep(0)
                    self._move(changes[at : at + _TURN])

    def _move(self, changes: Sequence[tuple[Row | None, Row | None]]) -> None:
        """Move rows from their old places to their new ones."""
        for order, value in ORDERS.items():
            places = self._sorted[order]
            for before, after in changes:
                if before is not None and after is not None and value(before) == value(after):
                    continue
                if before is not None:
                    places.remove((value(before), before.key))
                if after is not None:
                    places.add((value(after), after.key))

    def newest_held(self) -> Mapping[Stream, str]:
        """The newest revision held of each stream; a live view."""
        return self._newest

    def has_deltas(self, stream: Stream) -> bool:
        return self._deltas[stream] > 0

    def mean_delta_bytes(self, stream: Stream) -> int:
        """Mean length of the stream's deltas that are held; 0 without any."""
        count = self._deltas[stream]
        return self._delta_bytes[stream] // count if count else 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[set[str]]:
        """Collects the keys that change meanwhile, which a slow scan of the disk must not overwrite."""
        touched: set[str] = set()
        self._watchers.append(touched)
        try:
            yield touched
        finally:
            # By identity: two watchers may hold equal sets.
            self._watchers = [watcher for watcher in self._watchers if watcher is not touched]

    def note(self, name: str) -> Any:
        """A further JSON value that is stored with the index; None when there is none."""
        return self._notes.get(name)

    def set_note(self, name: str, value: Any) -> None:
        self._notes[name] = value
        self._dirty_notes.add(name)

    def drop_note(self, name: str) -> None:
        if self._notes.pop(name, None) is not None:
            self._dirty_notes.add(name)

    # --- the file

    async def open(self) -> None:
        """Load the stored rows. `complete` is set when they were usable."""
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
        await self._sort()
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
        """Write what changed. What the disk refuses stays due; a damaged file is written anew."""
        await self._sort()
        await self._write()

    async def _write(self) -> None:
        async with self._writing:
            keys, notes = self._dirty, self._dirty_notes
            if not (keys or notes or self.complete != self._written_whole):
                return
            self._dirty, self._dirty_notes = set(), set()
            rows = [self.rows[key] for key in keys if key in self.rows]
            gone = [_ENTRY + key for key in keys if key not in self.rows]
            noted = {_NOTE + name: self._notes[name] for name in notes if name in self._notes}
            gone += [_NOTE + name for name in notes if name not in self._notes]
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
        await self._write()
        await self._in_thread(self._file.close)
        await asyncio.to_thread(self._thread.shutdown)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _sorted(rows: Sequence[Row]) -> dict[str, SortedList]:
    """The places of these rows in each order."""
    return {order: SortedList((value(row), row.key) for row in rows) for order, value in ORDERS.items()}


def _decode(values: Mapping[str, Any]) -> tuple[dict[str, Row] | None, dict[str, Any]]:
    """Rows and notes; no rows (None) when one of them is damaged."""
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


_FORMAT = 1
_FORMAT_KEY = "about:format"
_MODE_TEXT = 3  # diskcache's mode of a value kept as text in its row
BUSY_SECONDS = 5.0
"""How long to wait for another process's lock."""
_UNLIMITED_BYTES = 1 << 62
_REFUSALS = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY}
)
"""Errors of the disk or of another process, not of the file."""


class DamagedIndexError(Exception):
    """The index is not what was written. It can be deleted: it is rebuilt from the records."""


class _TextDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Texts as keys, JSON texts as values; anything else is damage.

    diskcache pickles what is not a plain type, and unpickles what a row's mode column tells it to
    (CVE-2025-69872). This class does neither, and makes no side files.
    """

    def put(self, key: object) -> tuple[str, bool]:
        assert isinstance(key, str)
        return key, True

    def get(self, key: object, raw: object) -> str:
        if not isinstance(key, str) or not raw:
            raise DamagedIndexError(f"a key is no text: {key!r:.60}")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:
        assert not read
        assert key is not None
        return 0, _MODE_TEXT, None, json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def fetch(self, mode: object, filename: object, value: object, read: object) -> Any:
        if mode != _MODE_TEXT or filename is not None or read or not isinstance(value, str):
            raise DamagedIndexError(f"a value is no text but of mode {mode!r:.20}")
        return json.loads(value)


class IndexFile:
    """The index on disk: a diskcache. `load` opens it; all methods block and belong to one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: Any = None  # made by `_open`, in the thread that uses it

    def load(self) -> dict[str, Any] | None:
        """All values by key; None when there is no complete index yet.

        DamagedIndexError when it can't be read or is of another format; OSError when the folder is unusable.
        """
        try:
            self._open()
            return self._read()
        except (OSError, DamagedIndexError):
            raise
        except diskcache.Timeout as error:
            raise OSError(f"the index can't be opened: {_cause(error)}") from error
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in _REFUSALS:
                raise OSError(f"the index can't be opened: {error}") from error
            raise DamagedIndexError(f"{type(error).__name__}: {error}") from error
        except Exception as error:  # whatever diskcache or sqlite make of damaged pages
            raise DamagedIndexError(f"{type(error).__name__}: {error}") from error

    def _read(self) -> dict[str, Any] | None:
        found = self._cache.get(_FORMAT_KEY)
        if found is None:  # new, or never came to stand for the whole store
            self._cache.clear()
            return None
        if found != _FORMAT:
            raise DamagedIndexError(f"its format is {found!r:.20}")
        return {key: self._cache[key] for key in self._cache.iterkeys() if key != _FORMAT_KEY}

    def write(self, values: Mapping[str, Any], gone: Iterable[str], *, whole: bool) -> None:
        """Put `values` in and take `gone` out, in one transaction; opens the file when it is not open.

        `whole` says that the rows then stand for all of the store: only such an index is loaded again.
        OSError when the disk refuses for now, DamagedIndexError when the file is beyond use.
        """
        try:
            if self._cache is None:
                self._open()
            with self._cache.transact():  # a retry of diskcache's has no end, whatever the error
                for key, value in values.items():
                    self._cache[key] = value
                for key in gone:
                    self._cache.delete(key)
                if whole:
                    self._cache[_FORMAT_KEY] = _FORMAT
        except diskcache.Timeout as error:
            raise OSError(f"the index can't be written: {_cause(error)}") from error
        except sqlite3.OperationalError as error:  # full, read-only, I/O error
            raise OSError(f"the index can't be written: {error}") from error
        except sqlite3.DatabaseError as error:
            raise DamagedIndexError(f"{type(error).__name__}: {error}") from error

    def delete(self) -> None:
        """Delete the index; OSError."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=False)

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._cache = diskcache.Cache(
            str(self._folder),
            timeout=BUSY_SECONDS,
            disk=_TextDisk,
            eviction_policy="none",
            cull_limit=0,
            size_limit=_UNLIMITED_BYTES,
            statistics=0,
            tag_index=0,
            sqlite_mmap_size=0,  # a damaged or truncated file is an error to handle, not a SIGBUS
        )


def _cause(error: BaseException) -> BaseException:
    """The error of SQLite: diskcache raises `Timeout` whenever a transaction can't begin."""
    while isinstance(error, diskcache.Timeout) and error.__context__ is not None:
        error = error.__context__
    return error


def check_index(folder: Path, *, repair: bool) -> str | None:
    """What is wrong with the index of a stopped service; None when nothing is.

    `repair` removes a damaged one: it is made anew from the records.
    """
    if not folder.is_dir() or not list(folder.iterdir()):
        return None
    file = IndexFile(folder)
    try:
        file.load()
    except OSError as error:
        return str(error)
    except DamagedIndexError as error:
        if repair:
            file.delete()
        return f"it is damaged: {error}"
    finally:
        file.close()
    return None
