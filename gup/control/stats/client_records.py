"""Client records: who was seen when, and which revision of each stream a client has.

A client has one *standing* in each stream: the revision that it took last, the newest that it asked for, and
the one that it said it came from. News is merged in memory (`Batch`) and written as rows every two seconds.
"""

import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from gup.content.key import Kind, delta_step
from gup.control.events import Part, Take
from gup.control.index import content_revision
from gup.control.traffic import revision_time

MAX_CLIENTS = 100_000
WINDOWS: Mapping[str, float] = {"1h": 3600.0, "1d": 86400.0, "7d": 7 * 86400.0}
"""The windows of `gup_clients_seen`, in seconds, the shortest first."""
_MOST_MOVED = 2000
"""Addresses that leave a window in one call of `counts`; the rest leaves at the next."""


class ClientWindows:
    """How many clients were seen in each window; beyond `limit` the longest unseen are forgotten.

    Each address stands in the shortest window that it was seen in, in the order of being seen; a count moves
    what has become too old to the next longer one. So a count costs what has changed, not what is known.
    """

    def __init__(self, limit: int = MAX_CLIENTS) -> None:
        self._ages: list[OrderedDict[str, float]] = [OrderedDict() for _ in (*WINDOWS, "older")]
        """By window, the last for those seen longer ago; an address is in one of them."""
        self._limit = limit

    def __len__(self) -> int:
        return sum(map(len, self._ages))

    def see(self, addresses: Iterable[str], now: float) -> None:
        """These made a request at `now` (Unix seconds)."""
        youngest, *older = self._ages
        for address in addresses:
            for age in older:
                age.pop(address, None)
            youngest[address] = now
            youngest.move_to_end(address)
        self._forget()

    def _forget(self) -> None:
        for _ in range(len(self) - self._limit):
            next(age for age in reversed(self._ages) if age).popitem(last=False)

    def counts(self, now: float) -> dict[str, int]:
        """How many addresses were seen in each window."""
        for age, older, seconds in zip(self._ages, self._ages[1:], WINDOWS.values(), strict=False):
            gone = [address for address, at in islice(age.items(), _MOST_MOVED) if now - at > seconds]
            for address in gone:
                older[address] = age.pop(address)
        counts, total = {}, 0
        for window, age in zip(WINDOWS, self._ages, strict=False):
            total += len(age)
            counts[window] = total
        return counts

    def newest(self, limit: int) -> list[tuple[str, float]]:
        """The addresses seen last, with their times, newest first."""
        return list(islice(chain.from_iterable(reversed(age.items()) for age in self._ages), limit))

    def restore(self, rows: Sequence[tuple[str, float]]) -> None:
        """Take back addresses and last times, the longest unseen first. Newer sightings stay."""
        newer = [(address, at) for age in reversed(self._ages) for address, at in age.items()]
        self._ages = [OrderedDict() for _ in self._ages]
        last = rows[-1][1] if rows else 0.0
        for address, at in rows:
            self._ages[sum(last - at > seconds for seconds in WINDOWS.values())][address] = at
        for address, at in newer:
            self.see([address], at)
        self._forget()


_Span = tuple[int, int]
_MOST = 20_000
_MOST_PARTS = 64


class ReceivedParts:
    """The parts of bodies that clients were sent; the longest unchanged are forgotten."""

    def __init__(self, most: int = _MOST) -> None:
        self._parts: OrderedDict[tuple[str, str], list[_Span]] = OrderedDict()
        self._most = most

    def add(self, client: str, key: str, start: int, stop: int, length: int) -> bool:
        """A client was sent this part. Returns whether it has the whole body now."""
        parts = joined([*self._parts.pop((client, key), []), (start, stop)])
        if parts == [(0, length)]:
            return True
        self._parts[client, key] = parts[-_MOST_PARTS:]
        while len(self._parts) > self._most:
            self._parts.popitem(last=False)
        return False


def joined(parts: list[_Span]) -> list[_Span]:
    """Overlapping and adjacent parts as one, in order."""
    found: list[_Span] = []
    for start, stop in sorted(parts):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


MAX_PENDING = 100_000
_FIRST_DATE = 946_684_800.0
"""2000-01-01: revisions name the year with two digits."""
_AHEAD_SECONDS = 2 * 86400.0
"""A revision's date may be so far ahead, because of time zones and clocks; one further ahead is ignored."""

StreamId = tuple[str, str, str]


_TOGETHER_SECONDS = 3.0
"""Workers report once a second, so the order of what a client took within this time is unknown."""


def supersedes(revision: str, at: float, other: str, other_at: float) -> bool:
    """Whether a client that took both, at these times, has `revision` now.

    A machine that was set up anew takes an older one: then the last one taken counts.
    """
    if abs(at - other_at) <= _TOGETHER_SECONDS:
        return revision > other
    return at > other_at


@dataclass(slots=True)
class Seen:
    """When a client was seen since the last write, and what it stated ("" for nothing)."""

    first_at: float
    seen_at: float
    version: str = ""
    language: str = ""


@dataclass(slots=True)
class Standing:
    """One client and one stream since the last write: what it took, asked for, and came from."""

    revision: str = ""
    taken_at: float = 0.0
    version_then: str = ""
    asked: str = ""
    asked_at: float = 0.0
    came_from: str = ""
    took: dict[str, float] = field(default_factory=dict)
    """Every revision taken, with the time."""

    def take(self, revision: str, at: float, version: str) -> None:
        self.took[revision] = at
        if revision != self.revision and supersedes(revision, at, self.revision, self.taken_at):
            self.revision, self.taken_at, self.version_then = revision, at, version

    def ask(self, revision: str, at: float, came_from: str) -> None:
        if at >= self.asked_at:
            self.asked_at, self.came_from = at, came_from or self.came_from
        self.asked = max(self.asked, revision)


class Batch:
    """What is new since the last write; bounded by MAX_PENDING."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self.standings: dict[tuple[str, StreamId], Standing] = {}

    def __bool__(self) -> bool:
        return bool(self.seen)

    @property
    def full(self) -> bool:
        return len(self.seen) + len(self.standings) >= MAX_PENDING

    def absorb(self, newer: "Batch") -> None:
        """Add what came after this batch, which could not be written; as much as there is room for."""
        for client, seen in newer.seen.items():
            self.see(client, seen.seen_at, seen.version, seen.language)
        for where, news in newer.standings.items():
            if where not in self.standings and (self.full or where[0] not in self.seen):
                continue
            standing = self.standings.setdefault(where, Standing())
            standing.ask(news.asked, news.asked_at, news.came_from)
            for revision, at in news.took.items():
                standing.take(revision, at, news.version_then)

    def see(self, client: str, at: float, version: str = "", language: str = "") -> None:
        """A client asked for something."""
        seen = self.seen.get(client)
        if seen is None:
            if self.full:
                return
            seen = self.seen[client] = Seen(at, at)
        seen.seen_at = max(seen.seen_at, at)
        seen.version = version or seen.version
        seen.language = language or seen.language

    def add(self, take: Take, at: float, pieces: ReceivedParts) -> None:
        """A client took or asked for a body."""
        self.see(take.client, at, take.version, take.language)
        if isinstance(take.sent, Part):
            whole = pieces.add(take.client, take.key.text, *take.sent)
        else:
            whole = take.sent == 1
        revision = content_revision(kind_of(take), take.key.revision, take.key.file)
        date = revision_time(revision) if revision else None
        if revision is None or date is None or not _FIRST_DATE <= date <= at + _AHEAD_SECONDS:
            return
        where = (take.client, (take.key.version, take.key.language, take.key.stream))
        standing = self.standings.get(where)
        if standing is None:
            if self.full:
                return
            standing = self.standings[where] = Standing()
        step = delta_step(take.key.file)
        standing.ask(revision, at, step.from_revision if step else "")
        if whole:
            standing.take(revision, at, take.version)


def kind_of(take: Take) -> Kind:
    """Full or delta by the file's name; other files have no revision."""
    if delta_step(take.key.file):
        return Kind.DELTA
    return Kind.FULL if take.key.file.lower().startswith("full.") else Kind.OTHER


MAX_STREAMS = 1000
KEPT_REVISIONS = 40
"""Newest revisions of each stream of which it is kept who took them."""


def write_batch(db: sqlite3.Connection, batch: Batch) -> None:
    """Write a batch."""
    ids = {name: _write_client(db, name, seen) for name, seen in batch.seen.items()}
    for (name, stream_id), news in batch.standings.items():
        stream = _stream(db, stream_id)
        if stream is not None:
            _write_standing(db, stream, ids[name], news, batch.seen[name])


def prune_clients(db: sqlite3.Connection, now: float, retention_seconds: float, max_clients: int) -> None:
    """Delete clients unseen for `retention_seconds` or beyond `max_clients`, and old takes."""
    oldest = now - retention_seconds
    db.execute("DELETE FROM clients WHERE seen_at < ?", (oldest,))
    db.execute(
        "DELETE FROM clients WHERE id IN "
        "(SELECT id FROM clients ORDER BY seen_at DESC, id DESC LIMIT -1 OFFSET ?)",
        (max_clients,),
    )
    db.execute("DELETE FROM takes WHERE taken_at < ?", (oldest,))
    _drop_orphans(db)
    for (stream,) in db.execute("SELECT id FROM streams").fetchall():
        db.execute(
            "DELETE FROM takes WHERE stream = ?1 AND revision IN (SELECT DISTINCT revision FROM "
            "takes WHERE stream = ?1 ORDER BY revision DESC LIMIT -1 OFFSET ?2)",
            (stream, KEPT_REVISIONS),
        )
    db.execute("DELETE FROM streams WHERE id NOT IN (SELECT stream FROM standings)")


def rename_clients(db: sqlite3.Connection, new_name: Callable[[str], str]) -> None:
    """Rename clients; where two get one name, the one seen last stays."""
    for number, name in db.execute("SELECT id, name FROM clients ORDER BY seen_at").fetchall():
        other = new_name(name)
        if other != name:
            db.execute("DELETE FROM clients WHERE name = ?", (other,))
            db.execute("UPDATE clients SET name = ? WHERE id = ?", (other, number))
    _drop_orphans(db)


def _drop_orphans(db: sqlite3.Connection) -> None:
    """Delete the rows of clients that were deleted."""
    for table in ("standings", "takes"):
        db.execute(f"DELETE FROM {table} WHERE client NOT IN (SELECT id FROM clients)")  # noqa: S608


def forget_clients(db: sqlite3.Connection) -> None:
    """Delete all clients."""
    for table in ("clients", "standings", "takes", "streams"):
        db.execute(f"DELETE FROM {table}")  # noqa: S608 - names of our own


def newest_clients(db: sqlite3.Connection, most: int) -> list[tuple[str, float]]:
    """Clients and when they were seen last, the longest unseen first."""
    rows = db.execute("SELECT name, seen_at FROM clients ORDER BY seen_at DESC, id DESC LIMIT ?", (most,))
    return rows.fetchall()[::-1]


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
    """The stream's id; None when there are too many streams."""
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
    """The standing after the news. The same revision taken again does not change `version_then`."""
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


_STANDS = "max(s.revision, s.came_from)"
"""The revision that a client has: what it took here or what it came from, whichever is newer."""


@dataclass(frozen=True, slots=True)
class RevisionCount:
    """One revision of a stream: how many clients have it, how many took it here, and when."""

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
    """A client's standing in a stream. `revision` is the one that it has, "" when unknown."""

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
    """A client as it was seen last. `number` orders clients that were seen at the same time."""

    number: int
    name: str
    first_at: float
    seen_at: float
    version: str
    language: str


@dataclass(frozen=True, slots=True)
class Group:
    """How many clients state this version and language."""

    version: str
    language: str
    clients: int


def stream_states(db: sqlite3.Connection) -> list[StreamState]:
    """The streams that clients asked for."""
    rows = db.execute(
        "SELECT t.version, t.language, t.moniker, count(*), max(s.revision), max(s.asked) "
        "FROM standings s JOIN streams t ON t.id = s.stream GROUP BY s.stream"
    )
    return [StreamState((row[0], row[1], row[2]), *row[3:]) for row in rows]


def revision_counts(db: sqlite3.Connection) -> list[RevisionCount]:
    """The revisions that clients have or took."""
    streams = {row[0]: (row[1], row[2], row[3]) for row in db.execute("SELECT * FROM streams")}
    found: dict[tuple[int, str], RevisionCount] = {}
    for stream, revision, clients, first, last in db.execute(
        "SELECT stream, revision, count(*), min(taken_at), max(taken_at) FROM takes GROUP BY stream, revision"
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


def lagging(
    db: sqlite3.Connection, stream: StreamId, newest: str, limit: int
) -> tuple[int, list[ClientState]]:
    """How many clients have an older revision than `newest`, and those furthest behind."""
    where = f"t.version = ? AND t.language = ? AND t.moniker = ? AND {_STANDS} < ?"
    count = db.execute(
        f"SELECT count(*) FROM standings s JOIN streams t ON t.id = s.stream WHERE {where}",  # noqa: S608
        (*stream, newest),
    ).fetchone()[0]
    return count, _client_states(db, f"{where} ORDER BY {_STANDS}, c.name LIMIT ?", (*stream, newest, limit))


def takers(db: sqlite3.Connection, stream: StreamId) -> list[ClientState]:
    """The clients that took anything of a stream, by name."""
    where = "t.version = ? AND t.language = ? AND t.moniker = ? AND s.revision <> '' ORDER BY c.name"
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
    """Which clients to list, newest first: by what they state (None: anything), from a place on."""

    version: str | None = None
    language: str | None = None
    seen_since: float = 0.0
    after: tuple[float, int] | None = None
    limit: int = 100


def clients(db: sqlite3.Connection, wanted: Wanted) -> tuple[int, list[ClientRow]]:
    """How many match, and the rows of one page."""
    where = "seen_at >= ?1 AND (?2 IS NULL OR version = ?2 COLLATE NOCASE) "
    where += "AND (?3 IS NULL OR language = ?3 COLLATE NOCASE)"
    given = (wanted.seen_since, wanted.version, wanted.language)
    seen_at, number = wanted.after or (None, None)
    count = db.execute(f"SELECT count(*) FROM clients WHERE {where}", given).fetchone()[0]  # noqa: S608
    rows = db.execute(
        "SELECT id, name, first_at, seen_at, version, language FROM clients "  # noqa: S608
        f"WHERE {where} AND (?4 IS NULL OR (seen_at, id) < (?4, ?5)) "
        "ORDER BY seen_at DESC, id DESC LIMIT ?6",
        (*given, seen_at, number, wanted.limit),
    )
    return count, [ClientRow(*row) for row in rows]


def groups(db: sqlite3.Connection, limit: int = 1000) -> list[Group]:
    """Clients by what they state, the largest groups first."""
    rows = db.execute(
        "SELECT version, language, count(*) AS n FROM clients GROUP BY version, language "
        "ORDER BY n DESC, version, language LIMIT ?",
        (limit,),
    )
    return [Group(*row) for row in rows]
