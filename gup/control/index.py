"""The index: the controller's view of the store, for listing, eviction and totals.

The records on disk are authoritative. The rows in memory belong to the event loop and change at once; changes
are written once a second, by one thread. A missing or damaged index is rebuilt from the records, and
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import diskcache
from pydantic import AfterValidator, TypeAdapter
from sortedcontainers import SortedList

from gup.cache.store import Store, Stored
from gup.content.key import ContentKey, Kind, delta_step
from gup.control.dependencies import BusyError, ControlDependencies, change
from gup.jsonmodel import Count, InvalidError, Time

_log = logging.getLogger("gup.control.index")
_REVISION = re.compile(r"\d{9}")
_T = TypeVar("_T")

Stream = tuple[str, str, str]
"""Version, language and moniker: revisions are compared within a stream."""
Name = Annotated[str, AfterValidator(sys.intern)]
"""Many rows share a name: interned, it is in memory once."""


def stream_of(key: ContentKey) -> Stream:
    return (key.version, key.language, key.stream)


def content_revision(kind: Kind, revision: str, file: str) -> str | None:
    """The revision that a body brings a client to; None when the names do not state it.

    A delta's folder is its old revision in one source and the newest in another (FIELD.md), so its file name
    decides. Only nine-digit names can be compared.
    """
    step = delta_step(file) if kind is Kind.DELTA else None
    found = step.to_revision if step else revision
    return found if _REVISION.fullmatch(found) else None


@dataclass(frozen=True, slots=True)
class Row:
    """An entry: its record's fields, and hits and bytes, which no record has. Times are Unix seconds."""

    key: str
    version: Name
    language: Name
    stream: Name
    revision: Name
    file: Name
    kind: Kind
    length_bytes: Count
    stored_at: Time
    used_at: Time
    hits: Count = 0
    pinned: bool = False
    sent_bytes: Count = 0
    received_bytes: Count = 0

    @property
    def stream_id(self) -> Stream:
        return (self.version, self.language, self.stream)

    @property
    def content_revision(self) -> str | None:
        return content_revision(self.kind, self.revision, self.file)

    def used(self, count: int, sent_bytes: int, at: float) -> "Row":
        hits, sent_bytes = self.hits + count, self.sent_bytes + sent_bytes
        return replace(self, hits=hits, sent_bytes=sent_bytes, used_at=max(self.used_at, at))


ROW = TypeAdapter(Row)


def read_row(text: str) -> Row:
    """ValueError when it is malformed."""
    row = ROW.validate_json(text, strict=True)
    if ContentKey.parse(row.key).text != "/".join((*row.stream_id, row.revision, row.file)):
        raise InvalidError(f"a row whose names are not those of its key {row.key!r:.60}")
    return row


def make_row(
    key: ContentKey, kind: Kind, length_bytes: int, *, stored_at: float, used_at: float, **more: Any
) -> Row:
    names = (key.version, key.language, key.stream, key.revision, key.file)
    version, language, stream, revision, file = map(sys.intern, names)
    where = (key.text, version, language, stream, revision, file)
    return Row(*where, kind, length_bytes, stored_at, used_at, **more)


def row_of(stored: Stored, known: Row | None = None) -> Row:
    """The row of a body found on disk; hits and totals come from the previous row."""
    record, size_bytes, used_at = stored.record, stored.size_bytes, stored.used_at
    assert record is not None
    more: dict[str, Any] = {"received_bytes": size_bytes}
    if known is not None:
        used_at = max(used_at, known.used_at)
        more = {name: getattr(known, name) for name in ("hits", "sent_bytes", "received_bytes")}
    times = {"stored_at": record.stored_at, "used_at": used_at}
    return make_row(record.key, record.kind, size_bytes, pinned=record.pinned, **times, **more)


Place = tuple[float, str]
"""A row's position in a sorted list: its value and its key."""
ORDERS: dict[str, Callable[[Row], float]] = {
    "key": lambda _: 0,
    "used": lambda row: row.used_at,
    "stored": lambda row: row.stored_at,
    "length": lambda row: row.length_bytes,
    "hits": lambda row: row.hits,
}
"""The orders of listings, with their sort keys."""
ROWS_AT_ONCE = 200
"""A loop over all rows yields to other tasks after this many: some 8 ms."""


@dataclass(slots=True)
class _Held:
    """One stream: keys, entries by revision, the newest revision, deltas."""

    keys: set[str] = field(default_factory=set)
    revisions: Counter[str] = field(default_factory=Counter)
    newest: str = ""
    deltas: int = 0
    delta_bytes: int = 0

    def count(self, row: Row, step: int) -> None:
        if row.kind is Kind.DELTA:
            self.deltas += step
            self.delta_bytes += step * row.length_bytes
        if (revision := row.content_revision) is not None:
            self.revisions[revision] += step
            if self.revisions[revision]:
                self.newest = max(revision, self.newest)
            else:
                del self.revisions[revision]
                self.newest = self.newest if revision != self.newest else max(self.revisions, default="")


class Index:
    """Rows by key, written behind to `folder`. Everything but the file work is on the event loop.

    `complete`: the rows cover the whole store; nothing is evicted before.
    """

    def __init__(
        self, folder: Path, on_damage: Callable[[], None], on_written: Callable[[str | None], None]
    ) -> None:
        """`on_written` is called after each write with the error, None for success."""
        self.rows: dict[str, Row] = {}
        self.total_bytes = 0
        self.opened = False
        self.complete = False
        self._streams: dict[Stream, _Held] = {}
        self._on_damage = on_damage
        self._on_written = on_written
        self._file = IndexFile(folder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gup-index")
        self._dirty: set[str] = set()
        self._sorted = {order: SortedList() for order in ORDERS}
        self.notes: dict[str, Any] = {}
        """Further JSON values that are stored with the index; replaced, never changed."""
        self._written_notes: dict[str, Any] = {}
        self._watchers: list[set[str]] = []
        self._writing = asyncio.Lock()
        self._written_whole = False

    # --- the view

    def put(self, row: Row) -> None:
        self._apply(row.key, row)
        self._dirty.add(row.key)

    def discard(self, key: str) -> None:
        self._apply(key, None)
        self._dirty.add(key)

    def _apply(self, key: str, row: Row | None) -> None:
        before = self.rows.pop(key, None) if row is None else self.rows.get(key)
        if row is not None:
            self.rows[key] = row
            held = self._streams.setdefault(row.stream_id, _Held())
            held.keys.add(key)
            held.count(row, 1)
            self.total_bytes += row.length_bytes
        if before is not None:
            held = self._streams[before.stream_id]
            held.count(before, -1)
            self.total_bytes -= before.length_bytes
            if row is None:
                held.keys.remove(key)
                if not held.keys:
                    del self._streams[before.stream_id]
        for order, value in ORDERS.items():  # some 20 µs with 1e5 rows
            old, new = (None if one is None else (value(one), key) for one in (before, row))
            if old is not None and old != new:
                self._sorted[order].remove(old)
            if new is not None and old != new:
                self._sorted[order].add(new)
        for watcher in self._watchers:
            watcher.add(key)

    def page(
        self, order: str, limit: int, *, descending: bool = False, after: Place | None = None
    ) -> list[Row]:
        """At most `limit` rows in one of ORDERS, ties by key, after a place. Costs what it returns."""
        least, most = (None, after) if descending else (after, None)
        places = self._sorted[order].irange(least, most, inclusive=(False, False), reverse=descending)
        return [self.rows[key] for _, key in islice(places, limit)]

    def streams(self) -> list[Stream]:
        return list(self._streams)

    def of_stream(self, stream: Stream) -> list[Row]:
        return [self.rows[key] for key in self._streams[stream].keys] if stream in self._streams else []

    def newest_held(self) -> Mapping[Stream, str]:
        return {stream: held.newest for stream, held in self._streams.items() if held.newest}

    def deltas(self, stream: Stream) -> tuple[int, int]:
        held = self._streams.get(stream, _Held())
        return held.deltas, held.delta_bytes

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

    async def read_again(self, key: ContentKey, store: Store) -> None:
        """After an entry was repaired or imported."""
        stored = await asyncio.to_thread(store.stored, key)
        if stored is not None and stored.record is not None:
            self.put(row_of(stored, self.rows.get(key.text)))

    # --- the file

    async def open(self) -> None:
        found: Contents | None = None
        with self.watch() as touched:
            try:
                found = await self._in_thread(self._file.load)
            except DamagedIndexError as error:
                await self._start_anew(str(error))
            except OSError as error:
                self._on_written(f"kept in memory only: {error}")
            rows, notes = found or ([], {})
            for number, row in enumerate(rows, 1):
                if row.key not in touched:
                    self._apply(row.key, row)
                if number % ROWS_AT_ONCE == 0:
                    await asyncio.sleep(0)
            self.notes, self._written_notes = notes | self.notes, notes
        self.complete = found is not None
        self.opened = True

    async def _start_anew(self, why: str) -> None:
        _log.warning("the index is damaged and is rebuilt from the records: %s", why)
        self._on_damage()
        try:
            await self._in_thread(self._file.delete)
        except OSError as error:
            _log.warning("the damaged index can't be removed: %s", error)

    async def flush(self) -> None:
        """Write changes. They stay due when the disk refuses; a damaged file is written anew."""
        async with self._writing:
            keys, whole = self._dirty, self.complete
            notes = {n: value for n, value in self.notes.items() if self._written_notes.get(n) != value}
            if not (keys or notes or whole != self._written_whole):
                return
            self._dirty = set()
            rows = [self.rows[key] for key in keys if key in self.rows]
            gone = [key for key in keys if key not in self.rows]
            try:
                await self._in_thread(lambda: self._file.write(rows, gone, notes, whole=whole))
            except DamagedIndexError as error:
                await self._start_anew(str(error))
                self._written_whole, self._written_notes = False, {}
                self._dirty |= set(self.rows)
            except (OSError, asyncio.CancelledError) as error:
                self._dirty |= keys  # writing them twice does no harm
                if isinstance(error, asyncio.CancelledError):
                    raise
                self._on_written(str(error))
            else:
                self._written_whole = whole
                self._written_notes |= notes
                self._on_written(None)

    async def close(self) -> None:
        await self.flush()
        await self._in_thread(self._file.close)
        await asyncio.to_thread(self._thread.shutdown)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


_ENTRY = "entry:"
_NOTE = "note:"
_FORMAT_KEY = "about:format"
_FORMAT = "1"
_MODE_TEXT = 3  # diskcache's mode of a value stored as text in its row
BUSY_SECONDS = 5.0
"""Time limit for another process's lock."""
_UNLIMITED_BYTES = 1 << 62
_REFUSALS = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY}
"""Errors of the disk or of another process, not of the file."""
Contents = tuple[list[Row], dict[str, Any]]


class DamagedIndexError(Exception):
    """The index file is damaged. It can be deleted: it is rebuilt from the records."""


class _TextDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Texts as keys and values; anything else is damage.

    diskcache pickles what is not a plain type, and unpickles what a row's mode column marks so
    (CVE-2025-69872). This class does neither, and makes no side files.
    """

    def put(self, key: object) -> tuple[object, bool]:
        return key, True

    def get(self, key: object, raw: object) -> str:
        if not isinstance(key, str) or not raw:
            raise DamagedIndexError(f"a key is no text: {key!r:.60}")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, object]:  # noqa: ARG002 - diskcache's signature
        return 0, _MODE_TEXT, None, value

    def fetch(self, mode: object, filename: object, value: object, read: object) -> str:
        if mode != _MODE_TEXT or filename is not None or read or not isinstance(value, str):
            raise DamagedIndexError(f"a value is no text but of mode {mode!r:.20}")
        return value


class IndexFile:
    """The index on disk: a diskcache of JSON texts. All methods block and belong to one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: Any = None  # made by `_open`, in the thread that uses it

    def load(self) -> Contents | None:
        """Rows and notes; None when there is no complete index yet.

        DamagedIndexError when it can't be read or is of another format; OSError when it can't be used now.
        """
        try:
            self._open()
            return self._read()
        except OSError:
            raise
        except Exception as error:  # any error of diskcache or sqlite for damaged pages
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if isinstance(error, diskcache.Timeout) or code in _REFUSALS:
                self.close()
                raise OSError(f"the index can't be opened: {_cause(error)}") from error
            raise DamagedIndexError(f"{type(error).__name__}: {error}") from error

    def _read(self) -> Contents | None:
        found = self._cache.get(_FORMAT_KEY)
        if found is None:  # new, or never covered the whole store
            self._cache.clear()
            return None
        if found != _FORMAT:
            raise DamagedIndexError(f"its format is {found!r:.20}")
        rows, notes = [], {}
        for name in self._cache.iterkeys():
            if name.startswith(_NOTE):
                notes[name.removeprefix(_NOTE)] = json.loads(self._cache[name])
            elif name != _FORMAT_KEY:
                rows.append(row := read_row(self._cache[name]))
                if _ENTRY + row.key != name:
                    raise DamagedIndexError(f"a row is stored under another key: {name!r:.60}")
        return rows, notes

    def write(
        self, rows: Iterable[Row], gone: Iterable[str], notes: Mapping[str, Any], *, whole: bool
    ) -> None:
        """Put rows and notes and delete `gone`, in one transaction.

        `whole`: the rows then cover the whole store; only such an index is loaded again. OSError when the
        disk refuses for now, DamagedIndexError when the file is unusable.
        """
        try:
            if self._cache is None:
                self._open()
            with self._cache.transact():  # diskcache's own retry never ends, whatever the error
                for row in rows:
                    self._cache[_ENTRY + row.key] = ROW.dump_json(row).decode()
                for key in gone:
                    self._cache.delete(_ENTRY + key)
                for name, value in notes.items():
                    self._cache[_NOTE + name] = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
                if whole:
                    self._cache[_FORMAT_KEY] = _FORMAT
        except (diskcache.Timeout, sqlite3.OperationalError) as error:  # locked, full, read-only, I/O error
            raise OSError(f"the index can't be written: {_cause(error)}") from error
        except sqlite3.DatabaseError as error:
            raise DamagedIndexError(f"{type(error).__name__}: {error}") from error

    def delete(self) -> None:
        self.close()
        shutil.rmtree(self._folder)

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
    """What is wrong with the index of a stopped service, if anything; `repair` removes a damaged one."""
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


ORPHAN_AGE_SECONDS = 600.0
"""A younger body without a record may belong to a commit that is under way."""


async def reconcile(dependencies: ControlDependencies, index: Index, now: float) -> None:
    """Scan the store and correct the index, except for rows that changed during the scan."""
    store, known = dependencies.store, dict(index.rows)
    with index.watch() as touched:
        changed, keys, orphans = await asyncio.to_thread(_scan, store, known)
        for number, stored in enumerate(changed, 1):
            if stored.key.text not in touched:
                index.put(row_of(stored, index.rows.get(stored.key.text)))
            if number % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
        gone = known.keys() - keys
        for key in gone - touched:
            index.discard(key)
    index.complete = True
    if changed or gone:
        _log.info("the index gained %d entries and lost %d", len(changed), len(gone))
    await asyncio.to_thread(store.prune)
    for orphan in orphans:
        if now - orphan.used_at > ORPHAN_AGE_SECONDS:
            try:
                await _settle_orphan(orphan, dependencies, index)
            except Exception:  # noqa: BLE001 - one entry must not keep the others from being looked at
                _log.exception("could not repair %s", orphan.key.text)


def _scan(store: Store, known: Mapping[str, Row]) -> tuple[list[Stored], set[str], list[Stored]]:
    """Rows that differ from `known`, the keys found, and the bodies whose record is missing or damaged."""
    changed, keys, orphans = [], set(), []
    for stored in store.scan():
        if stored.record is None:
            orphans.append(stored)
            continue
        keys.add(key := stored.key.text)
        if row_of(stored, known.get(key)) != known.get(key):
            changed.append(stored)
    return changed, keys, orphans


async def _settle_orphan(orphan: Stored, dependencies: ControlDependencies, index: Index) -> None:
    """Repair a body that has its record. Remove one without a record, or that no upstream has any more.

    Not while a fill holds its claim, or an interrupted commit waits.
    """
    key, store = orphan.key, dependencies.store
    recorded = orphan.size_bytes > 0 and await asyncio.to_thread(store.load_or_none, key) is not None
    if recorded:
        problem = await dependencies.mend(key, False)
        if problem is None:
            await index.read_again(key, store)
            return
        if problem.status not in (404, 410):
            return  # its sound chunks can be served, and the rest be fetched later
    with contextlib.suppress(BusyError):
        if await change(dependencies.claims, key, lambda: _remove_orphan(key, store), patience_seconds=0.0):
            if not recorded:
                dependencies.counters.add("gup_integrity_failures_total", where="record")
            _log.warning("removed a body without a usable record, or a record without its body: %s", key.text)


def _remove_orphan(key: ContentKey, store: Store) -> bool:
    """Remove what can't be served, under the claim; False when there is nothing, or it is sound by now."""
    record = store.load_or_none(key)
    if (record is not None and store.open_body(record) is not None) or store.state_path(key.id).exists():
        return False
    there = store.body_path(key).exists() or store.record_path(key).exists()
    store.remove(key)
    return there
