"""The statistics database: one SQLite file for clients, savings and history.

A file that can't be read is moved aside and a new one is begun: the service continues without old statistics.
"""

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from gup.control.stats import timeline

_log = logging.getLogger("gup.control.stats")
_T = TypeVar("_T")
_FORMAT = 1
_SCHEMA = """
CREATE TABLE clients(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, first_at REAL NOT NULL,
  seen_at REAL NOT NULL, version TEXT NOT NULL, language TEXT NOT NULL);
CREATE INDEX clients_seen ON clients(seen_at, id);
CREATE TABLE streams(id INTEGER PRIMARY KEY, version TEXT NOT NULL, language TEXT NOT NULL,
  moniker TEXT NOT NULL, UNIQUE(version, language, moniker));
CREATE TABLE standings(stream INTEGER NOT NULL, client INTEGER NOT NULL, revision TEXT NOT NULL,
  taken_at REAL NOT NULL, version_then TEXT NOT NULL, asked TEXT NOT NULL, asked_at REAL NOT NULL,
  came_from TEXT NOT NULL, PRIMARY KEY(stream, client)) WITHOUT ROWID;
CREATE INDEX standings_client ON standings(client);
CREATE TABLE takes(stream INTEGER NOT NULL, revision TEXT NOT NULL, client INTEGER NOT NULL,
  taken_at REAL NOT NULL, PRIMARY KEY(stream, revision, client)) WITHOUT ROWID;
CREATE INDEX takes_client ON takes(client);
CREATE TABLE marks(series TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE days(day TEXT NOT NULL, series TEXT NOT NULL, value INTEGER NOT NULL,
  PRIMARY KEY(day, series)) WITHOUT ROWID;
CREATE TABLE old_days(installed_at REAL NOT NULL, day TEXT NOT NULL, series TEXT NOT NULL,
  value INTEGER NOT NULL);
CREATE TABLE about(name TEXT PRIMARY KEY, value REAL NOT NULL);
CREATE TABLE points(step INTEGER NOT NULL, at INTEGER NOT NULL, number INTEGER NOT NULL, fields TEXT NOT NULL,
  PRIMARY KEY(step, at)) WITHOUT ROWID;
"""
_LATER = (
    timeline.TABLES
    + """
CREATE TABLE IF NOT EXISTS refused_streams(client INTEGER NOT NULL, stream TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY(client, stream)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS slow(id INTEGER PRIMARY KEY, at REAL NOT NULL, what TEXT NOT NULL,
  key TEXT NOT NULL, client TEXT NOT NULL, seconds REAL NOT NULL, told TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS slow_key ON slow(key, id);
CREATE INDEX IF NOT EXISTS slow_client ON slow(client, id);
CREATE INDEX IF NOT EXISTS slow_what ON slow(what, id);
CREATE TABLE IF NOT EXISTS habits(client INTEGER NOT NULL, stream INTEGER NOT NULL,
  full_revision TEXT NOT NULL DEFAULT '', full_times INTEGER NOT NULL DEFAULT 0,
  full_first_at REAL NOT NULL DEFAULT 0, full_last_at REAL NOT NULL DEFAULT 0,
  fulls INTEGER NOT NULL DEFAULT 0, fulls_first_at REAL NOT NULL DEFAULT 0,
  part_key TEXT NOT NULL DEFAULT '', parts INTEGER NOT NULL DEFAULT 0,
  parts_first_at REAL NOT NULL DEFAULT 0, parts_last_at REAL NOT NULL DEFAULT 0,
  PRIMARY KEY(client, stream)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS deltas(stream INTEGER PRIMARY KEY, last_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS visits(client INTEGER PRIMARY KEY, day INTEGER NOT NULL, days INTEGER NOT NULL,
  net TEXT NOT NULL, changes INTEGER NOT NULL DEFAULT 0, changed_at REAL NOT NULL DEFAULT 0,
  shared_at REAL NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS refused(client INTEGER NOT NULL, rule TEXT NOT NULL, stream TEXT NOT NULL,
  times INTEGER NOT NULL, first_at REAL NOT NULL, last_at REAL NOT NULL,
  PRIMARY KEY(client, rule)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS incidents(id TEXT PRIMARY KEY, name TEXT NOT NULL, severity TEXT NOT NULL,
  subject TEXT NOT NULL, began_at REAL NOT NULL, ended_at REAL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS incidents_began ON incidents(began_at);
CREATE TABLE IF NOT EXISTS covered(day TEXT PRIMARY KEY, seconds REAL NOT NULL) WITHOUT ROWID;
"""
)
"""Tables that a file of an earlier version lacks."""
_BUSY_SECONDS = 5.0
_REFUSALS = (
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY),
    *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM),
)
"""Errors of the disk or of another process, not of the file."""
_MAX_PAGES = 3 << 17
"""Of 4 KiB: the file never grows beyond 1.5 GiB, of which the timeline has a third."""


class StatsDatabase:
    """`reports/stats.db` below the cache directory `root`; opened at its first use, and after damage."""

    def __init__(self, root: Path, on_written: Callable[[str, str | None], None]) -> None:
        """`on_written` is called after each `store` with the error, None for success."""
        self.path = root / "reports" / "stats.db"
        self._on_written = on_written
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gup-stats")

    async def run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.transact, work)

    async def store(self, what: str, work: Callable[[sqlite3.Connection], None]) -> bool:
        """`run`; False when the disk refuses."""
        refusal = None
        try:
            await self.run(work)
        except OSError as error:
            refusal = str(error)
        self._on_written(what, refusal)
        return refusal is None

    async def stop(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self.close)
        await asyncio.to_thread(self._thread.shutdown)

    def transact(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do `work` in one transaction: all of it is kept, or nothing. Blocks on the disk.

        OSError when the disk refuses for now. On a damaged file the work is repeated on a new one.
        """
        try:
            try:
                return self._attempt(work)
            except sqlite3.DatabaseError as error:
                self._move_aside(str(error))
                return self._attempt(work)
        except sqlite3.DatabaseError as error:
            raise OSError(f"{self.path.name}: {error}") from error

    def close(self) -> None:
        """Close the file until it is used again."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _attempt(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            self._connection = self._connection or self._open()
            with self._connection:  # ends the transaction
                self._connection.execute("BEGIN IMMEDIATE")
                return work(self._connection)
        except sqlite3.Error as error:
            self.close()
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _REFUSALS:
                raise OSError(f"{self.path.name}: {error}") from error
            raise

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        connection.row_factory = sqlite3.Row
        try:
            self.path.chmod(0o600)
            # One process uses the file: no shared memory is mapped, which a full disk would make a SIGBUS.
            connection.executescript(
                "PRAGMA locking_mode=EXCLUSIVE; PRAGMA auto_vacuum=INCREMENTAL; PRAGMA journal_mode=WAL; "
                f"PRAGMA synchronous=NORMAL; PRAGMA temp_store=MEMORY; PRAGMA max_page_count={_MAX_PAGES};"
            )
            self._check(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        """Make a new file's tables; sqlite3.DatabaseError when a file is damaged or of another format."""
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {found}")
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found == 0 and not connection.execute("SELECT * FROM sqlite_master").fetchall():
            connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_FORMAT}; COMMIT;")
        elif found != _FORMAT:
            raise sqlite3.DatabaseError(f"its format is {found}, not {_FORMAT}")
        connection.executescript(f"BEGIN; {_LATER} COMMIT;")

    def _move_aside(self, why: str) -> None:
        """Rename the file, replacing an earlier renamed one."""
        aside = self.path.with_name(f"{self.path.name}.damaged")
        for suffix in ("", "-wal"):
            old, new = (each.with_name(each.name + suffix) for each in (self.path, aside))
            new.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                old.replace(new)
        _log.warning("%s was replaced by an empty one: %s; the old one is %s", self.path.name, why, aside)
