"""One SQLite file of the reports. Blocking, for one thread; knows no table, trusts no page.

What can't be read is moved aside and begun anew: reports are dear, but the service goes on without them.
"""

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger("gup.control.reports")
_BUSY_SECONDS = 5.0
_REFUSALS = frozenset(
    {
        *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY),
        *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM),
    }
)
"""Errors that tell of the disk, or of another process, and not of the file."""
_MOST_PAGES = 1 << 18
"""Of 4 KiB: a gigabyte. What the file may grow to whatever is asked of it."""


class BegunAnewError(OSError):
    """The file was damaged, and was moved aside: the next transaction finds empty tables."""


class Database:
    """The file at `path` with the tables of `schema`; opened when first used, and again after a damage."""

    def __init__(self, path: Path, schema: str, form: int) -> None:
        """`form` is the schema's number: a file of another one is moved aside too."""
        self._path = path
        self._schema = schema
        self._form = form
        self._connection: sqlite3.Connection | None = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done in it is kept, or nothing.

        OSError when the disk refuses for now; BegunAnewError.
        """
        with self.outside() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def outside(self) -> Iterator[sqlite3.Connection]:
        """Outside of a transaction; OSError likewise."""
        try:
            yield self._connection or self._open()
        except sqlite3.Error as error:
            refused = self._refused(error)
            kind = OSError if refused else BegunAnewError
            raise kind(f"{self._path.name}: {error}") from error

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            self._path.chmod(0o600)
            # alone with the file: no shared memory is mapped, which a full disk would make a SIGBUS
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(f"PRAGMA max_page_count={_MOST_PAGES}")
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            self._check(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        """The tables are there, and can be read. sqlite3.DatabaseError when they can't."""
        found = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != ("ok",):
            raise sqlite3.DatabaseError(f"it is damaged: {found}")
        form = connection.execute("PRAGMA user_version").fetchone()[0]
        if form == 0 and not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            connection.executescript(f"BEGIN; {self._schema}; PRAGMA user_version={self._form}; COMMIT;")
        elif form != self._form:
            raise sqlite3.DatabaseError(f"its form is {form}, not {self._form}")

    def _refused(self, error: sqlite3.Error) -> bool:
        """Close after an error. When it is the file's own, move that aside; else the disk refuses: True."""
        code = getattr(error, "sqlite_errorcode", None)
        self.close()
        if code is not None and code & 0xFF in _REFUSALS:
            return True
        self.begin_anew("damaged", str(error))
        return False

    def begin_anew(self, word: str, why: str) -> None:
        """Move the file aside, under a name that ends with `word`; one of before is replaced."""
        self.close()
        aside = self._path.with_name(f"{self._path.name}.{word}")
        for suffix in ("", "-wal"):
            old, new = (path.with_name(path.name + suffix) for path in (self._path, aside))
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
            with contextlib.suppress(FileNotFoundError):
                old.replace(new)
        _log.warning("%s is begun anew: %s; what there was lies in %s", self._path.name, why, aside)

    def close(self) -> None:
        """Until it is used again."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
