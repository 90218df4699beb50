"""The history on disk: one SQLite file of JSON texts. Blocking, for one thread; decides nothing.

Each writing is one transaction, synced: points and the counters up to which they reach belong together.
"""

import json
import logging
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from gup.control.history.figures import by_name, from_names
from gup.control.history.record import KEPT, Point, Reached

_log = logging.getLogger("gup.control.history")
_FORMAT = 1
_BUSY_SECONDS = 5.0
_REFUSALS = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY}
    | {sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM}
)
"""Errors that tell of the disk, or of another process, and not of the file."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS points (
    step INTEGER NOT NULL, at INTEGER NOT NULL, number INTEGER NOT NULL, fields TEXT NOT NULL,
    PRIMARY KEY (step, at)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reached (one INTEGER PRIMARY KEY CHECK (one = 1), fields TEXT NOT NULL);
"""


class HistoryFile:
    """`load` opens it. A file that can't be read is moved aside and begun anew; every method may block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None

    def load(self) -> tuple[list[Point], Reached | None]:
        """All points, and up to where they reach; None with no points when there is nothing yet.

        OSError when the disk refuses.
        """
        try:
            return self._read()
        except (sqlite3.DatabaseError, ValueError) as error:
            if _is_refusal(error):
                self.close()
                raise OSError(f"the history can't be opened: {error}") from error
            self._move_aside(error)
        try:
            return self._read()
        except (sqlite3.DatabaseError, ValueError) as error:
            self.close()
            raise OSError(f"the history can't be begun: {error}") from error

    def write(self, points: Sequence[Point], reached: Reached) -> None:
        """Put these in the place of what was written of them; OSError when the disk refuses."""
        try:
            database = self._database or self._open()
            with database:
                self._put(database, points, reached)
        except sqlite3.DatabaseError as error:
            self.close()
            if not _is_refusal(error):
                self._move_aside(error)
            raise OSError(f"the history can't be written: {error}") from error

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _put(self, database: sqlite3.Connection, points: Sequence[Point], reached: Reached) -> None:
        database.executemany(
            "INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?)",
            [(point.step, point.at, point.number, _text(point.to_json())) for point in points],
        )
        for step, kept in KEPT.items():
            database.execute(
                "DELETE FROM points WHERE step = ? AND number <= "
                "(SELECT MAX(number) FROM points WHERE step = ?) - ?",
                (step, step, kept),
            )
        fields = {"sums": by_name(reached.sums), "installed_at": reached.installed_at, "at": reached.at}
        database.execute("INSERT OR REPLACE INTO reached VALUES (1, ?)", (_text(fields),))

    def _read(self) -> tuple[list[Point], Reached | None]:
        database = self._open()
        with closing(database.execute("SELECT fields FROM points")) as rows:
            points = [Point.from_json(json.loads(text)) for (text,) in rows]
        row = database.execute("SELECT fields FROM reached").fetchone()
        return points, _reached(row[0]) if row else None

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=_BUSY_SECONDS)
        self._database = database
        (found,) = database.execute("PRAGMA user_version").fetchone()
        if found not in (0, _FORMAT):
            raise ValueError(f"its format is {found}")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")  # a power cut takes no more than was not yet written
        database.executescript(_SCHEMA)
        database.execute(f"PRAGMA user_version = {_FORMAT}")
        return database

    def _move_aside(self, why: Exception) -> None:
        self.close()
        aside = self._path.with_name(self._path.name + ".damaged")
        _log.warning("the history begins anew, it was damaged (%s) and lies in %s", why, aside)
        if self._path.exists():
            self._path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)


def _reached(text: str) -> Reached:
    try:
        fields = json.loads(text)
        return Reached(from_names(fields["sums"]), float(fields["installed_at"]), float(fields["at"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not where it reached: {error!r}") from error


def _is_refusal(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _REFUSALS


def _text(fields: object) -> str:
    return json.dumps(fields, separators=(",", ":"))
