"""What is read of the client records for reports: rows as values. Blocking, for the records' thread."""

import sqlite3
from dataclasses import dataclass

from gup.control.reports.batch import StreamId
from gup.control.reports.records import Records

_STANDS = "max(s.revision, s.came_from)"
"""Where a client stands: what it took here, or what it says that it had from elsewhere, whatever is newer."""


@dataclass(frozen=True, slots=True)
class RevisionCount:
    """One revision of one stream: how many clients stand at it, how many took it here, and when."""

    stream: StreamId
    revision: str
    clients: int
    took: int
    first_taken_at: float | None
    last_taken_at: float | None


@dataclass(frozen=True, slots=True)
class StreamState:
    """One stream: its clients, and the newest revision that any of them took or asked for."""

    stream: StreamId
    clients: int
    newest_taken: str
    newest_asked: str


@dataclass(frozen=True, slots=True)
class ClientState:
    """A client, and how it stands with one stream. `revision` is where it stands, "" when nobody knows."""

    stream: StreamId
    name: str
    seen_at: float
    version: str
    language: str
    revision: str
    taken: str
    taken_at: float
    version_then: str
    asked: str
    asked_at: float


@dataclass(frozen=True, slots=True)
class ClientRow:
    """A client as it was seen last. `number` is its place among equals of time."""

    number: int
    name: str
    first_at: float
    seen_at: float
    version: str
    language: str


@dataclass(frozen=True, slots=True)
class Group:
    """How many clients state the same."""

    version: str
    language: str
    clients: int


def stream_states(records: Records) -> list[StreamState]:
    """All streams that clients asked for."""
    with records.database.transaction() as db:
        rows = db.execute(
            "SELECT t.version, t.language, t.moniker, count(*), max(s.revision), max(s.asked) "
            "FROM standings s JOIN streams t ON t.id = s.stream GROUP BY s.stream"
        )
        return [StreamState((row[0], row[1], row[2]), *row[3:]) for row in rows]


def revision_counts(records: Records) -> list[RevisionCount]:
    """All revisions that clients stand at, or took."""
    with records.database.transaction() as db:
        streams = {row[0]: (row[1], row[2], row[3]) for row in db.execute("SELECT * FROM streams")}
        found: dict[tuple[int, str], RevisionCount] = {}
        for stream, revision, clients, first, last in db.execute(
            "SELECT stream, revision, count(*), min(taken_at), max(taken_at) FROM takes "
            "GROUP BY stream, revision"
        ):
            if stream in streams:
                found[stream, revision] = RevisionCount(streams[stream], revision, 0, clients, first, last)
        for stream, revision, clients in db.execute(
            f"SELECT s.stream, {_STANDS} AS stands, count(*) FROM standings s GROUP BY s.stream, stands"  # noqa: S608
        ):
            old = found.get((stream, revision))
            took, times = (old.took, (old.first_taken_at, old.last_taken_at)) if old else (0, (None, None))
            if revision:
                found[stream, revision] = RevisionCount(streams[stream], revision, clients, took, *times)
    return list(found.values())


def lagging(records: Records, stream: StreamId, newest: str, limit: int) -> tuple[int, list[ClientState]]:
    """How many clients stand before `newest`, and those furthest behind."""
    where = f"t.version = ? AND t.language = ? AND t.moniker = ? AND {_STANDS} < ?"
    with records.database.transaction() as db:
        count = db.execute(
            f"SELECT count(*) FROM standings s JOIN streams t ON t.id = s.stream WHERE {where}",  # noqa: S608
            (*stream, newest),
        ).fetchone()[0]
        return count, _client_states(
            db, f"{where} ORDER BY {_STANDS}, c.name LIMIT ?", (*stream, newest, limit)
        )


def takers(records: Records, stream: StreamId) -> list[ClientState]:
    """All clients that took anything of a stream, by name."""
    where = "t.version = ? AND t.language = ? AND t.moniker = ? AND s.revision <> '' ORDER BY c.name"
    with records.database.transaction() as db:
        return _client_states(db, where, stream)


def _client_states(db: sqlite3.Connection, where: str, given: tuple[object, ...]) -> list[ClientState]:
    rows = db.execute(
        "SELECT t.version, t.language, t.moniker, c.name, c.seen_at, c.version, c.language, "  # noqa: S608
        f"{_STANDS}, s.revision, s.taken_at, s.version_then, s.asked, s.asked_at FROM standings s "
        f"JOIN streams t ON t.id = s.stream JOIN clients c ON c.id = s.client WHERE {where}",
        given,
    )
    return [ClientState((row[0], row[1], row[2]), *row[3:]) for row in rows]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which clients to list: those that state these (None: whatever), after a place, newest first."""

    version: str | None = None
    language: str | None = None
    seen_since: float = 0.0
    after: tuple[float, int] | None = None
    limit: int = 100


def clients(records: Records, wanted: Wanted) -> tuple[int, list[ClientRow]]:
    """How many match, and the rows of one page."""
    where = "seen_at >= ?1 AND (?2 IS NULL OR version = ?2 COLLATE NOCASE) "
    where += "AND (?3 IS NULL OR language = ?3 COLLATE NOCASE)"
    given = (wanted.seen_since, wanted.version, wanted.language)
    seen_at, number = wanted.after or (None, None)
    with records.database.transaction() as db:
        count = db.execute(f"SELECT count(*) FROM clients WHERE {where}", given).fetchone()[0]  # noqa: S608
        rows = db.execute(
            "SELECT id, name, first_at, seen_at, version, language FROM clients "  # noqa: S608
            f"WHERE {where} AND (?4 IS NULL OR (seen_at, id) < (?4, ?5)) "
            "ORDER BY seen_at DESC, id DESC LIMIT ?6",
            (*given, seen_at, number, wanted.limit),
        )
        return count, [ClientRow(*row) for row in rows]


def groups(records: Records, limit: int = 1000) -> list[Group]:
    """Clients by what they state, the largest groups first."""
    with records.database.transaction() as db:
        rows = db.execute(
            "SELECT version, language, count(*) AS n FROM clients GROUP BY version, language "
            "ORDER BY n DESC, version, language LIMIT ?",
            (limit,),
        )
        return [Group(*row) for row in rows]
