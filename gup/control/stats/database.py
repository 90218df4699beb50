"""The statistics database: one SQLite file for clients, savings and history.

A file that can't be read is moved aside and a new one is begun: statistics are worth much, but the service
goes on without them. The files of earlier editions, one for each kind, are taken over at the first opening.
"""

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

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
CREATE TABLE reached(one INTEGER PRIMARY KEY CHECK(one = 1), fields TEXT NOT NULL)
"""
_EARLIER_EDITION = (
    ("reports/clients.db", ("clients", "streams", "standings", "takes")),
    ("reports/savings.db", ("marks", "days", "about")),
    ("run/history.sqlite", ("points", "reached")),
)
"""Files below the cache directory, and their tables, which had the same columns."""
_BUSY_SECONDS = 5.0
_REFUSALS = frozenset(
    {
        *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY),
        *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM),
    }
)
"""Errors of the disk or of another process, not of the file."""
_MAX_PAGES = 1 << 18
"""Of 4 KiB: the file never grows beyond a gigabyte."""


class BegunAnewError(OSError):
    """The file was damaged and was moved aside: the next transaction finds empty tables."""


class StatsDatabase:
    """`reports/stats.db` below the cache directory `root`; opened at its first use, and after damage."""

    def __init__(self, root: Path) -> None:
        self.path = root / "reports" / "stats.db"
        self._root = root
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gup-stats")

    async def run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """`transact` in the database's own thread. After damage the work is done again, on a new file."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self.transact, work)
        except BegunAnewError:
            return await loop.run_in_executor(self._thread, self.transact, work)

    async def stop(self) -> None:
        """Close the file and end the thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.close)
        await asyncio.to_thread(self._thread.shutdown)

    def transact(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do `work` in one transaction: all of it is kept, or nothing. Blocks on the disk.

        OSError when the disk refuses for now; BegunAnewError when the file was damaged.
        """
        try:
            connection = self._connection or self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            self.close()
            if _is_refusal(error):
                raise OSError(f"{self.path.name}: {error}") from error
            _move_aside(self.path, str(error))
            raise BegunAnewError(f"{self.path.name}: {error}") from error
        return result

    def close(self) -> None:
        """Close the file until it is used again."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            self.path.chmod(0o600)
            # One process uses the file: no shared memory is mapped, which a full disk would make a SIGBUS.
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(f"PRAGMA max_page_count={_MAX_PAGES}")
            self._check(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        """Make a new file's tables; sqlite3.DatabaseError when a file is damaged or of another format."""
        if (found := connection.execute("PRAGMA quick_check(1)").fetchone()) != ("ok",):
            raise sqlite3.DatabaseError(f"it is damaged: {found}")
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            self._make(connection)
        elif found != _FORMAT:
            raise sqlite3.DatabaseError(f"its format is {found}, not {_FORMAT}")

    def _make(self, connection: sqlite3.Connection) -> None:
        """Make the tables, with what files of an earlier edition hold: in one transaction."""
        copies = []
        taken = []
        for number, (name, tables) in enumerate(_EARLIER_EDITION):
            path = self._root / name
            if path.exists() and _attach(connection, path, f"old{number}", tables):
                copies += [_copy(table, f"old{number}") for table in tables]
                taken.append(path)
        connection.executescript(
            f"BEGIN; {_SCHEMA}; {''.join(copies)} PRAGMA main.user_version={_FORMAT}; COMMIT;"
        )
        for path in taken:
            _log.info("%s was taken over into %s", path, self.path)
        for number in range(len(_EARLIER_EDITION)):
            with contextlib.suppress(sqlite3.Error):
                connection.execute(f"DETACH old{number}")
        for path in taken:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)


def _copy(table: str, source: str) -> str:
    return f"INSERT INTO main.{table} SELECT * FROM {source}.{table};"  # noqa: S608 - names of our own


def _attach(connection: sqlite3.Connection, path: Path, name: str, tables: tuple[str, ...]) -> bool:
    """Attach a file of an earlier edition; move a damaged one aside. sqlite3.Error: the disk refuses."""
    try:
        connection.execute(f"ATTACH ? AS {name}", (str(path),))
        (found,) = connection.execute(f"PRAGMA {name}.quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {found}")
        for table in tables:
            connection.execute(f"SELECT count(*) FROM {name}.{table}")  # noqa: S608 - names of our own
    except sqlite3.Error as error:
        if _is_refusal(error):
            raise
        with contextlib.suppress(sqlite3.Error):
            connection.execute(f"DETACH {name}")
        _move_aside(path, str(error))
        return False
    return True


def _is_refusal(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _REFUSALS


def _move_aside(path: Path, why: str) -> None:
    """Rename the file; one that was moved aside before is replaced."""
    aside = path.with_name(f"{path.name}.damaged")
    for suffix in ("", "-wal"):
        old, new = (each.with_name(each.name + suffix) for each in (path, aside))
        new.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            old.replace(new)
    _log.warning("%s is begun anew: %s; what there was lies in %s", path.name, why, aside)
