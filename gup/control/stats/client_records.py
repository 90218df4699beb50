"""Client records: who was seen when, and which revision of each stream a client has.

A client has one *standing* in each stream: the revision that it took last, the newest that it asked for, and
the one that it said it came from. News waits in memory (`Batch`) and becomes rows every two seconds.
"""

import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

from sortedcontainers import SortedList

from gup.content.catalog import Stream
from gup.content.key import Kind, delta_step
from gup.control.events import Part, Take
from gup.control.index import content_revision, stream_of
from gup.control.traffic import revision_time

MAX_CLIENTS = 100_000
WINDOWS: Mapping[str, float] = {"1h": 3600.0, "1d": 86400.0, "7d": 7 * 86400.0}
"""The windows of `gup_clients_seen`, in seconds."""


class ClientWindows:
    """How many clients were seen in each window; beyond `limit` the longest unseen are forgotten."""

    def __init__(self, limit: int = MAX_CLIENTS) -> None:
        self._seen_at: dict[str, float] = {}
        self._by_time = SortedList()  # times and addresses: a count costs a look-up, however many are known
        self._limit = limit

    def __len__(self) -> int:
        return len(self._seen_at)

    def see(self, addresses: Iterable[str], now: float) -> None:
        """These made a request at `now` (Unix seconds)."""
        for address in addresses:
            before = self._seen_at.get(address)
            if before is not None:
                self._by_time.remove((before, address))
            self._seen_at[address] = now
            self._by_time.add((now, address))
        self._forget()

    def counts(self, now: float) -> dict[str, int]:
        """How many addresses were seen in each window."""
        return {
            window: len(self) - self._by_time.bisect_left((now - seconds,))
            for window, seconds in WINDOWS.items()
        }

    def newest(self, limit: int) -> list[tuple[str, float]]:
        """The addresses seen last, with their times, newest first."""
        return [(address, at) for at, address in islice(reversed(self._by_time), limit)]

    def restore(self, rows: Sequence[tuple[str, float]]) -> None:
        """Take back addresses and last times. Newer sightings stay."""
        older = {address: at for address, at in rows if address not in self._seen_at}
        self._seen_at |= older
        self._by_time.update((at, address) for address, at in older.items())
        self._forget()

    def _forget(self) -> None:
        while len(self) > self._limit:
            del self._seen_at[self._by_time.pop(0)[1]]


_Span = tuple[int, int]
_MOST_PARTS = 64


class ReceivedParts:
    """The parts of bodies that clients were sent; the longest unchanged are forgotten."""

    def __init__(self, most: int = 20_000) -> None:
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


class Batch:
    """What is new since the last write; bounded by MAX_PENDING."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, str, str]] = {}
        """When each client was seen last, and the version and language that it stated ("" for nothing)."""
        self.asked: dict[tuple[str, Stream, str, str, bool], tuple[float, str]] = {}
        """When a client first asked for something, and the version that it stated.

        By client, stream, revision, the revision that it came from, and whether it took the body whole.
        """

    @property
    def _full(self) -> bool:
        return len(self.seen) + len(self.asked) >= MAX_PENDING

    def absorb(self, newer: "Batch") -> None:
        """Add what came after this batch, which could not be written; as much as there is room for."""
        for client, seen in newer.seen.items():
            self.see(client, *seen)
        for what, asked in newer.asked.items():
            self._ask(what, asked)

    def see(self, client: str, at: float, version: str = "", language: str = "") -> None:
        """A client asked for something."""
        if client in self.seen or not self._full:
            before, its_version, its_language = self.seen.get(client, (at, "", ""))
            self.seen[client] = max(before, at), version or its_version, language or its_language

    def add(self, take: Take, at: float, parts: ReceivedParts) -> None:
        """A client took or asked for a body."""
        self.see(take.client, at, take.version, take.language)
        if isinstance(take.sent, Part):
            whole = parts.add(take.client, take.key.text, *take.sent)
        else:
            whole = take.sent == 1
        step = delta_step(take.key.file)
        kind = Kind.FULL if take.key.file.lower().startswith("full.") else Kind.OTHER
        revision = content_revision(Kind.DELTA if step else kind, take.key.revision, take.key.file)
        date = revision_time(revision) if revision else None
        if revision is not None and date is not None and _FIRST_DATE <= date <= at + _AHEAD_SECONDS:
            came_from = step.from_revision if step else ""
            self._ask((take.client, stream_of(take.key), revision, came_from, whole), (at, take.version))

    def _ask(self, what: tuple[str, Stream, str, str, bool], asked: tuple[float, str]) -> None:
        if what[0] in self.seen and not self._full:
            self.asked.setdefault(what, asked)


MAX_STREAMS = 1000
KEPT_REVISIONS = 40
"""Newest revisions of each stream of which it is kept who took them."""
_SEE = """
INSERT INTO clients(name, first_at, seen_at, version, language) VALUES(?1, ?2, ?2, ?3, ?4)
ON CONFLICT(name) DO UPDATE SET seen_at = max(seen_at, excluded.seen_at),
  version = coalesce(nullif(excluded.version, ''), version),
  language = coalesce(nullif(excluded.language, ''), language)
"""
_NAME_STREAM = """
INSERT OR IGNORE INTO streams(version, language, moniker)
SELECT ?, ?, ? WHERE (SELECT count(*) FROM streams) < ?
"""
_ASK = """
INSERT INTO standings VALUES(:stream, :client, '', 0, '', :revision, :at, :came_from)
ON CONFLICT(stream, client) DO UPDATE SET asked = max(asked, excluded.asked),
  came_from = iif(excluded.asked_at >= asked_at AND excluded.came_from <> '', excluded.came_from, came_from),
  asked_at = max(asked_at, excluded.asked_at)
"""
# Workers report once a second: of what was taken within 3 s the order is unknown, and the newest revision
# counts. Else the one taken last does, since a machine that was set up anew takes an older one.
_STAND = """
UPDATE standings SET revision = :revision, taken_at = :at, version_then = coalesce(
  nullif(:version, ''), nullif((SELECT version FROM clients WHERE id = :client), ''), version_then)
WHERE stream = :stream AND client = :client AND revision <> :revision
  AND iif(abs(:at - taken_at) <= 3, :revision > revision, :at > taken_at)
"""
_TAKE = "INSERT OR IGNORE INTO takes VALUES(:stream, :revision, :client, :at)"


_FORGET = """
DELETE FROM clients WHERE seen_at < ?
  OR id IN (SELECT id FROM clients ORDER BY seen_at DESC, id DESC LIMIT -1 OFFSET ?)
"""
_FORGET_TAKES = """
DELETE FROM takes WHERE (stream, revision) IN (SELECT stream, revision FROM (
  SELECT stream, revision, row_number() OVER (PARTITION BY stream ORDER BY revision DESC) AS newer
  FROM takes GROUP BY stream, revision) WHERE newer > ?)
"""


def write_batch(db: sqlite3.Connection, batch: Batch) -> None:
    """Write a batch. Streams beyond MAX_STREAMS are left out."""
    db.executemany(_SEE, [(name, *seen) for name, seen in batch.seen.items()])
    named = {stream for _, stream, *_ in batch.asked}
    db.executemany(_NAME_STREAM, [(*stream, MAX_STREAMS) for stream in named])
    streams = {row[1:]: row[0] for row in db.execute("SELECT id, version, language, moniker FROM streams")}
    number = "SELECT id FROM clients WHERE name = ?"
    clients = {name: db.execute(number, (name,)).fetchone()[0] for name in batch.seen}
    names = ("client", "stream", "revision", "came_from", "whole", "at", "version")
    asked = [
        dict(zip(names, (clients[name], streams[stream], *rest, *when), strict=True))
        for (name, stream, *rest), when in batch.asked.items()
        if stream in streams
    ]
    taken = [row for row in asked if row["whole"]]
    for statement, rows in ((_ASK, asked), (_STAND, taken), (_TAKE, taken)):
        db.executemany(statement, rows)


def prune(db: sqlite3.Connection, now: float, retention_seconds: float, max_clients: int) -> None:
    """Delete clients unseen for `retention_seconds` or beyond `max_clients`, and old takes."""
    oldest = now - retention_seconds
    db.execute(_FORGET, (oldest, max_clients))
    db.execute("DELETE FROM takes WHERE taken_at < ?", (oldest,))
    db.execute(_FORGET_TAKES, (KEPT_REVISIONS,))
    _drop_orphans(db)


def rename(db: sqlite3.Connection, new_name: Callable[[str], str]) -> None:
    """Rename clients; where two get one name, the one seen last stays."""
    for number, name in db.execute("SELECT id, name FROM clients ORDER BY seen_at").fetchall():
        other = new_name(name)
        if other != name:
            db.execute("DELETE FROM clients WHERE name = ?", (other,))
            db.execute("UPDATE clients SET name = ? WHERE id = ?", (other, number))
    _drop_orphans(db)


def _drop_orphans(db: sqlite3.Connection) -> None:
    """Delete the rows of clients that were deleted, and the streams that nobody stands in."""
    db.execute("DELETE FROM standings WHERE client NOT IN (SELECT id FROM clients)")
    db.execute("DELETE FROM takes WHERE client NOT IN (SELECT id FROM clients)")
    db.execute("DELETE FROM streams WHERE id NOT IN (SELECT stream FROM standings)")
