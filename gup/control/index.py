"""The index: the controller's view of the store, for listing, eviction and totals.

The records on disk are authoritative. The rows in memory belong to the event loop and change at once; changes
are written once a second, by one thread. A missing or damaged index is rebuilt from the records, and
`reconcile` corrects what lost events left out.
"""

import asyncio
import contextlib
import json
import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import diskcache

from gup.cache.store import Store
from gup.content.key import ContentKey
from gup.control.entry_table import ROW, EntryTable, Row, row_of

_log = logging.getLogger("gup.control.index")
_T = TypeVar("_T")


class Index:
    """Rows by key, written behind to `folder`. Everything but the file work is on the event loop.

    `complete`: the rows cover the whole store; nothing is evicted before.
    """

    def __init__(
        self, folder: Path, on_damage: Callable[[], None], on_written: Callable[[str | None], None]
    ) -> None:
        """`on_written` is called after each write with the error, None for success."""
        self.rows = EntryTable()
        """To be changed by `put` and `discard` alone."""
        self.opened = False
        self.complete = False
        self._on_damage = on_damage
        self._on_written = on_written
        self._file = IndexFile(folder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gup-index")
        self._dirty: dict[str, Row | None] = {}
        """Rows to be written; None for one to be deleted."""
        self._all_dirty = False
        self.notes: dict[str, Any] = {}
        """Further JSON values that are stored with the index; replaced, never changed."""
        self._written_notes: dict[str, Any] = {}
        self._watchers: list[set[str]] = []
        self._writing = asyncio.Lock()
        self._written_whole = False

    # --- the view

    def put(self, row: Row) -> None:
        self.rows.put(row)
        self._changed(row.key, row)

    def discard(self, key: str) -> None:
        self.rows.discard(key)
        self._changed(key, None)

    def _changed(self, key: str, row: Row | None) -> None:
        self._dirty[key] = row
        for watcher in self._watchers:
            watcher.add(key)

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
        notes: dict[str, Any] | None = None
        with self.watch() as touched:
            try:
                notes = await self._in_thread(self._file.load)
                while notes is not None and (rows := await self._in_thread(self._file.read_rows)):
                    for row in rows:
                        if row.key not in touched:
                            self.rows.put(row)
            except DamagedIndexError as error:
                notes = None
                await self._start_anew(str(error))
            except OSError as error:
                notes = None
                self._on_written(f"kept in memory only: {error}")
        if notes is not None:
            self.notes, self._written_notes = notes | self.notes, notes
        self.complete = notes is not None
        self.opened = True

    async def _start_anew(self, why: str) -> None:
        _log.warning("the index is damaged and is rebuilt from the records: %s", why)
        self._on_damage()
        self._all_dirty, self._written_whole, self._written_notes = True, False, {}
        try:
            await self._in_thread(self._file.delete)
        except OSError as error:
            _log.warning("the damaged index can't be removed: %s", error)

    async def flush(self) -> None:
        """Write changes. They stay due when the disk refuses; a damaged file is written anew."""
        async with self._writing:
            changes, whole = self._dirty, self.complete
            notes = {n: value for n, value in self.notes.items() if self._written_notes.get(n) != value}
            if not (changes or notes or self._all_dirty or whole != self._written_whole):
                return
            self._dirty = {}
            try:
                if self._all_dirty:
                    async for rows in self.rows.every():
                        part = {row.key: row for row in rows}
                        await self._in_thread(partial(self._file.write, part, {}, whole=False))
                    self._all_dirty = False
                await self._in_thread(partial(self._file.write, changes, notes, whole=whole))
            except DamagedIndexError as error:
                await self._start_anew(str(error))
            except (OSError, asyncio.CancelledError) as error:
                self._dirty = changes | self._dirty  # writing them twice does no harm
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
        self.rows.close()

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


_ENTRY = "entry:"
_NOTE = "note:"
_FORMAT_KEY = "about:format"
_FORMAT = "1"
_MODE_TEXT = 3  # diskcache's mode of a value stored as text in its row
BUSY_SECONDS = 5.0
"""Time limit for another process's lock."""
_READ_AT_ONCE = 200
_UNLIMITED_BYTES = 1 << 62
_CACHED_PAGES = 256
"""Of 4 KiB. diskcache's 8192 pages would be a third of what 100,000 entries cost; rows are read once."""
_REFUSALS = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY}
"""Errors of the disk or of another process, not of the file."""


class DamagedIndexError(Exception):
    """The index file is damaged. It can be deleted: it is rebuilt from the records."""


_PUT = f"""
INSERT INTO Cache(key, raw, mode, value) VALUES (?, 1, {_MODE_TEXT}, ?) ON CONFLICT (key, raw)
DO UPDATE SET mode = {_MODE_TEXT}, filename = NULL, value = excluded.value
"""  # noqa: S608


class _Texts(diskcache.Cache):  # type: ignore[misc]  # diskcache has no types
    """Texts by text; anything else is damage.

    diskcache pickles what is not a plain type, and unpickles what a row's mode column marks so
    (CVE-2025-69872). This class does neither, and makes no side files. Many rows are read by one statement
    and written by one: diskcache's own methods take four for each row.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        try:
            super().__init__(str(folder), **settings)
        except BaseException:
            self.close()  # diskcache leaves a connection to a damaged file open
            raise

    def texts(self, where: str = "", *values: str) -> Iterator[tuple[str, str]]:
        asked = f"SELECT key, raw, mode, filename, value FROM Cache {where}"  # noqa: S608 - constants of ours
        for key, raw, mode, file, value in self._con.execute(asked, values):
            if not isinstance(key, str) or not raw:
                raise DamagedIndexError(f"a key is no text: {key!r:.60}")
            if mode != _MODE_TEXT or file is not None or not isinstance(value, str):
                raise DamagedIndexError(f"a value is no text but of mode {mode!r:.20}")
            yield key, value

    def put_all(self, values: Iterable[tuple[str, str]]) -> None:
        self._con.executemany(_PUT, values)

    def delete_all(self, keys: Iterable[str]) -> None:
        self._con.executemany("DELETE FROM Cache WHERE key = ? AND raw = 1", ((key,) for key in keys))


class IndexFile:
    """The index on disk: a diskcache of JSON texts. All methods block and belong to one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: Any = None  # made by `_open`, in the thread that uses it
        self._reading: Iterator[Row] = iter(())

    def load(self) -> dict[str, Any] | None:
        """The notes, and `read_rows` has the rows next; None when there is no complete index yet.

        DamagedIndexError when it can't be read or is of another format; OSError when it can't be used now.
        """
        with self._explained():
            self._open()
            chosen = "WHERE key = ? OR (key >= ? AND key < ?)", _FORMAT_KEY, _NOTE, f"{_NOTE[:-1]};"
            texts = dict(self._cache.texts(*chosen))
            found = texts.pop(_FORMAT_KEY, None)
            if found is None:  # new, or never covered the whole store
                self._cache.clear()
                return None
            if found != _FORMAT:
                raise DamagedIndexError(f"its format is {found!r:.20}")
            self._reading = self._rows()
            return {name.removeprefix(_NOTE): json.loads(text) for name, text in texts.items()}

    def read_rows(self) -> list[Row]:
        """Some of the rows; none when all have been read."""
        with self._explained():
            return list(islice(self._reading, _READ_AT_ONCE))

    def _rows(self) -> Iterator[Row]:
        for name, text in self._cache.texts():
            if name == _FORMAT_KEY or name.startswith(_NOTE):
                continue
            row = ROW.validate_json(text, strict=True)
            if _ENTRY + row.key != name:
                raise DamagedIndexError(f"a row is stored under another key: {name!r:.60}")
            yield row

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Tell damage from a disk that refuses for now, when the file is opened and read."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # any error of diskcache or sqlite for damaged pages
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if isinstance(error, diskcache.Timeout) or code in _REFUSALS:
                self.close()
                raise OSError(f"the index can't be opened: {_cause(error)}") from error
            raise DamagedIndexError(f"{type(error).__name__}: {error}") from error

    def write(self, changes: Mapping[str, Row | None], notes: Mapping[str, Any], *, whole: bool) -> None:
        """Put rows and notes, and delete where there is None, in one transaction.

        `whole`: the rows then cover the whole store; only such an index is loaded again. OSError when the
        disk refuses for now, DamagedIndexError when the file is unusable.
        """
        values = [
            (_ENTRY + key, ROW.dump_json(row).decode()) for key, row in changes.items() if row is not None
        ]
        for name, value in notes.items():
            values.append((_NOTE + name, json.dumps(value, ensure_ascii=False, separators=(",", ":"))))
        if whole:
            values.append((_FORMAT_KEY, _FORMAT))
        try:
            if self._cache is None:
                self._open()
            with self._cache.transact():  # diskcache's own retry never ends, whatever the error
                self._cache.put_all(values)
                self._cache.delete_all(_ENTRY + key for key, row in changes.items() if row is None)
        except (diskcache.Timeout, sqlite3.OperationalError) as error:  # locked, full, read-only, I/O error
            raise OSError(f"the index can't be written: {_cause(error)}") from error
        except sqlite3.DatabaseError as error:
            raise DamagedIndexError(f"{type(error).__name__}: {error}") from error

    def delete(self) -> None:
        self.close()
        shutil.rmtree(self._folder)

    def close(self) -> None:
        self._reading = iter(())
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _open(self) -> None:
        self.close()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cache = _Texts(
            self._folder,
            timeout=BUSY_SECONDS,
            eviction_policy="none",
            cull_limit=0,
            size_limit=_UNLIMITED_BYTES,
            statistics=0,
            tag_index=0,
            sqlite_cache_size=_CACHED_PAGES,
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
        if file.load() is not None:
            while file.read_rows():
                pass
    except OSError as error:
        return str(error)
    except DamagedIndexError as error:
        if repair:
            file.delete()
        return f"it is damaged: {error}"
    finally:
        file.close()
    return None
