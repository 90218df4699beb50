"""Client records on disk: who was seen, who took what. Blocking, for one thread; counts nothing for reports.

A client has one standing a stream: the revision it took last, the newest it asked for, the one it last said
that it holds. `takes` has every client that took a revision, of the newest revisions of each stream.
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path

from gup.control.reports.batch import Batch, Seen, Standing, StreamId, supersedes
from gup.control.reports.database import Database

_FORM = 1
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
CREATE INDEX takes_client ON takes(client)
"""
MAX_STREAMS = 1000
KEPT_REVISIONS = 40
"""Of each stream, of which it is kept who took them."""


class Records:
    """The file. `transaction` of its `database` raises OSError when the disk refuses."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder / "clients.db", _SCHEMA, _FORM)

    def write(self, batch: Batch) -> None:
        """All of the batch, or nothing with an OSError."""
        with self.database.transaction() as db:
            ids = {name: _write_client(db, name, seen) for name, seen in batch.seen.items()}
            for (name, stream_id), news in batch.standings.items():
                stream = _stream(db, stream_id)
                if stream is not None:
                    _write_standing(db, stream, ids[name], news, batch.seen[name])

    def prune(self, now: float, retention_seconds: float, max_clients: int) -> None:
        """Forget who was not seen for so long, or is one too many, and who took what so long ago."""
        with self.database.transaction() as db:
            oldest = now - retention_seconds
            db.execute("DELETE FROM clients WHERE seen_at < ?", (oldest,))
            db.execute(
                "DELETE FROM clients WHERE id IN "
                "(SELECT id FROM clients ORDER BY seen_at DESC, id DESC LIMIT -1 OFFSET ?)",
                (max_clients,),
            )
            db.execute("DELETE FROM standings WHERE client NOT IN (SELECT id FROM clients)")
            db.execute(
                "DELETE FROM takes WHERE taken_at < ? OR client NOT IN (SELECT id FROM clients)", (oldest,)
            )
            for (stream,) in db.execute("SELECT id FROM streams").fetchall():
                db.execute(
                    "DELETE FROM takes WHERE stream = ?1 AND revision IN (SELECT DISTINCT revision FROM "
                    "takes WHERE stream = ?1 ORDER BY revision DESC LIMIT -1 OFFSET ?2)",
                    (stream, KEPT_REVISIONS),
                )
            db.execute("DELETE FROM streams WHERE id NOT IN (SELECT stream FROM standings)")
        with self.database.outside() as db:
            db.execute("PRAGMA incremental_vacuum")

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Call clients otherwise; where a name is taken, the one seen last stays."""
        with self.database.transaction() as db:
            rows = db.execute("SELECT id, name FROM clients ORDER BY seen_at").fetchall()
            for number, name in rows:
                other = new_name(name)
                if other != name:
                    db.execute("DELETE FROM clients WHERE name = ?", (other,))
                    db.execute("UPDATE clients SET name = ? WHERE id = ?", (other, number))
            db.execute("DELETE FROM standings WHERE client NOT IN (SELECT id FROM clients)")
            db.execute("DELETE FROM takes WHERE client NOT IN (SELECT id FROM clients)")

    def forget_all(self) -> None:
        """No client is to be remembered."""
        with self.database.transaction() as db:
            for table in ("clients", "standings", "takes", "streams"):
                db.execute(f"DELETE FROM {table}")  # noqa: S608 - names of our own
        with self.database.outside() as db:
            db.execute("PRAGMA incremental_vacuum")


def _write_client(db: sqlite3.Connection, name: str, seen: Seen) -> int:
    db.execute(
        "INSERT INTO clients(name, first_at, seen_at, version, language) VALUES(?, ?, ?, ?, ?) "
        "ON CONFLICT(name) DO UPDATE SET seen_at = max(seen_at, excluded.seen_at), "
        "version = CASE WHEN excluded.version = '' THEN version ELSE excluded.version END, "
        "language = CASE WHEN excluded.language = '' THEN language ELSE excluded.language END",
        (name, seen.first_at, seen.seen_at, seen.version, seen.language),
    )
    return int(db.execute("SELECT id FROM clients WHERE name = ?", (name,)).fetchone()[0])


def _stream(db: sqlite3.Connection, stream: StreamId) -> int | None:
    """The stream's number; None when there are too many."""
    found = db.execute(
        "SELECT id FROM streams WHERE version = ? AND language = ? AND moniker = ?", stream
    ).fetchone()
    if found is not None:
        return int(found[0])
    if db.execute("SELECT count(*) FROM streams").fetchone()[0] >= MAX_STREAMS:
        return None
    made = db.execute("INSERT INTO streams(version, language, moniker) VALUES(?, ?, ?)", stream)
    return made.lastrowid


def _write_standing(db: sqlite3.Connection, stream: int, client: int, news: Standing, seen: Seen) -> None:
    row = db.execute(
        "SELECT revision, taken_at, version_then, asked, asked_at, came_from FROM standings "
        "WHERE stream = ? AND client = ?",
        (stream, client),
    ).fetchone()
    old = Standing(*row) if row is not None else Standing()
    new = merged(old, news, seen.version)
    taken = (new.revision, new.taken_at, new.version_then)
    db.execute(
        "INSERT OR REPLACE INTO standings VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
        (stream, client, *taken, new.asked, new.asked_at, new.came_from),
    )
    db.executemany(
        "INSERT OR IGNORE INTO takes VALUES(?, ?, ?, ?)",
        [(stream, revision, client, at) for revision, at in news.took.items()],
    )


def merged(old: Standing, news: Standing, version_now: str) -> Standing:
    """The standing after the news. The same revision taken again tells nothing new of a restart."""
    revision, taken_at, version_then = old.revision, old.taken_at, old.version_then
    if news.revision != revision and supersedes(news.revision, news.taken_at, revision, taken_at):
        revision, taken_at = news.revision, news.taken_at
        version_then = news.version_then or version_now or version_then
    came_from = news.came_from if news.asked_at >= old.asked_at and news.came_from else old.came_from
    return Standing(
        revision,
        taken_at,
        version_then,
        max(old.asked, news.asked),
        max(old.asked_at, news.asked_at),
        came_from,
    )
