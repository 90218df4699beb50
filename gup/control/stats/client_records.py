"""Clients: who was seen when, which revision of each stream a client has, and the reports on that.

A client has one *standing* in each stream: the revision that it took last, the newest that it requested, and
the one that it said it came from. News is collected in memory (`Batch`) and written as rows every two
seconds. "Taken" is not "installed": gup knows what was sent and which version a client states, but not what
is on its disk.
"""

import asyncio
import contextlib
import math
import sqlite3
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any, Literal
from urllib.parse import unquote

from sortedcontainers import SortedList

from gup.client_names import ClientNames, is_hashed, read_key
from gup.content.catalog import CLIENT_PATCHES, Stream, normal_moniker
from gup.content.key import Kind, content_revision, delta_step
from gup.content.releases import Releases
from gup.control.api import schemas
from gup.control.dependencies import ControlDependencies
from gup.control.entry_table import stream_of
from gup.control.events import Part, Take, Taken, Usage
from gup.control.eviction import JUMP_SECONDS
from gup.control.stats import timeline
from gup.control.stats.database import StatsDatabase
from gup.control.stats.doctor import OF_CLIENTS, Habits, forget, write_habits
from gup.control.stats.history import prune_days
from gup.control.stats.incidents import prune_incidents
from gup.control.traffic import revision_time
from gup.upstream.bandwidth import site_time

MAX_CLIENTS = 100_000
_PAUSE_SECONDS = 0.02
"""Between the parts of long work: others use the file then."""
WINDOWS: Mapping[str, float] = {"1h": 3600.0, "1d": 86400.0, "7d": 7 * 86400.0}
"""The windows of `gup_clients_seen`, in seconds."""


class ClientWindows:
    """Number of clients seen in each window; beyond `limit` those unseen longest are forgotten."""

    def __init__(self, limit: int = MAX_CLIENTS) -> None:
        self._seen_at: dict[str, float] = {}
        self._by_time = SortedList()  # times and addresses: a count costs a look-up, however many are known
        self._limit = limit

    def __len__(self) -> int:
        return len(self._seen_at)

    def see(self, addresses: Iterable[str], now: float) -> None:
        """`now` is in Unix seconds."""
        for address in addresses:
            before = self._seen_at.get(address)
            if before is not None:
                self._by_time.remove((before, address))
            self._seen_at[address] = now
            self._by_time.add((now, address))
        self._forget()

    def counts(self, now: float) -> dict[str, int]:
        """Addresses seen in each window; one seen by a clock that was ahead counts when it is seen again."""
        until = self._by_time.bisect_left((now + JUMP_SECONDS,))
        return {
            window: max(0, until - self._by_time.bisect_left((now - seconds,)))
            for window, seconds in WINDOWS.items()
        }

    def newest(self, limit: int) -> list[tuple[str, float]]:
        return [(address, at) for at, address in islice(reversed(self._by_time), limit)]

    def restore(self, rows: Sequence[tuple[str, float]]) -> None:
        """Newer sightings stay."""
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
    """The parts of bodies that clients were sent; those unchanged longest are forgotten."""

    def __init__(self, most: int = 20_000) -> None:
        self._parts: OrderedDict[tuple[str, str], list[_Span]] = OrderedDict()
        self._most = most

    def add(self, client: str, key: str, start: int, stop: int, length: int) -> bool:
        """Whether the client has the whole body now."""
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
_DIGITS = 9
_AHEAD_SECONDS = 2 * 86400.0
"""A revision's date may be this far ahead, because of time zones and clocks; a later one is ignored."""


class Batch:
    """What is new since the last write; bounded by MAX_PENDING."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, str, str]] = {}
        """When each client was seen last, and the version and language that it stated ("" for nothing)."""
        self.asked: dict[tuple[str, Stream, str, str, bool], tuple[float, str]] = {}
        """When a client first requested something, and the version that it stated.

        By client, stream, revision, the revision that it came from, and whether it took the body whole.
        """
        self.habits = Habits()
        self.refused: dict[tuple[str, str], float] = {}
        """When a rule refused a client a stream last."""

    @property
    def _full(self) -> bool:
        mine = len(self.seen) + len(self.asked) + len(self.refused)
        return mine + len(self.habits) >= MAX_PENDING

    def absorb(self, newer: "Batch") -> None:
        """Add a newer batch to this one, which could not be written; as far as there is room."""
        for client, seen in newer.seen.items():
            self.see(client, *seen)
        for what, asked in newer.asked.items():
            self._ask(what, asked)
        if not self._full:
            self.habits.absorb(newer.habits)
        for refused, at in newer.refused.items():
            if refused in self.refused or not self._full:
                self.refused[refused] = at

    def see(self, client: str, at: float, version: str = "", language: str = "") -> None:
        if client in self.seen or not self._full:
            before, its_version, its_language = self.seen.get(client, (at, "", ""))
            self.seen[client] = max(before, at), version or its_version, language or its_language

    def add(self, take: Take, at: float, parts: ReceivedParts) -> None:
        self.see(take.client, at, take.version, take.language)
        if isinstance(take.sent, Part):
            whole = parts.add(take.client, take.key.text, *take.sent)
        else:
            whole = take.sent == 1
        step = delta_step(take.key.file)
        kind = Kind.FULL if take.key.file.lower().startswith("full.") else Kind.OTHER
        revision = content_revision(Kind.DELTA if step else kind, take.key.revision, take.key.file)
        if revision is not None and _is_dated(revision, at):
            came_from = step.from_revision if step and _is_dated(step.from_revision, at) else ""
            stream = stream_of(take.key)
            self._ask((take.client, stream, revision, came_from, whole), (at, take.version))
            if take.client in self.seen and not self._full:
                self._note_habits(take, stream, revision, at, kind=kind, is_delta=bool(step), whole=whole)

    def _note_habits(
        self, take: Take, stream: Stream, revision: str, at: float, *, kind: Kind, is_delta: bool, whole: bool
    ) -> None:
        if whole and is_delta:
            self.habits.deltas[take.client, stream] = at
        elif whole and kind is Kind.FULL:
            self.habits.full(take.client, stream, revision, at)
        if isinstance(take.sent, Part) or (whole and (take.client, stream) in self.habits.parts):
            self.habits.part(take.client, stream, take.key.text, at, whole=whole)

    def refuse(self, client: str, rule: str, stream: str, times: int, at: float) -> None:
        self.see(client, at)
        if client in self.seen and not self._full:
            self.habits.refuse(client, rule, stream, times, at)
            self.refused[client, normal_moniker(unquote(stream)) or stream] = at

    def share(self, client: str) -> None:
        """The client's address stands for many."""
        if client in self.seen:
            self.habits.shared.add(client)

    def _ask(self, what: tuple[str, Stream, str, str, bool], asked: tuple[float, str]) -> None:
        if what[0] in self.seen and not self._full:
            self.asked.setdefault(what, asked)


def _is_dated(revision: str, at: float) -> bool:
    date = revision_time(revision) if len(revision) == _DIGITS else None
    return date is not None and _FIRST_DATE <= date <= at + _AHEAD_SECONDS


MAX_STREAMS = 1000
KEPT_REVISIONS = 40
"""Takes are stored for this many newest revisions of each stream."""
_SEE = """
INSERT INTO clients(name, first_at, seen_at, version, language) VALUES(:name, :at, :at, :version, :language)
ON CONFLICT(name) DO UPDATE SET seen_at = max(seen_at, excluded.seen_at),
  version = coalesce(nullif(excluded.version, ''), version),
  language = coalesce(nullif(excluded.language, ''), language)
"""
_NAME_STREAM = """
INSERT OR IGNORE INTO streams(version, language, moniker)
SELECT ?, ?, ? WHERE (SELECT count(*) FROM streams) < ?
"""
# What stands far ahead was stored by a clock that has been put back since: the news is later.
_ASK = f"""
INSERT INTO standings VALUES(:stream, :client, '', 0, '', :revision, :at, :came_from)
ON CONFLICT(stream, client) DO UPDATE SET asked = max(asked, excluded.asked),
  came_from = iif((excluded.asked_at >= asked_at OR asked_at > excluded.asked_at + {JUMP_SECONDS})
    AND excluded.came_from <> '', excluded.came_from, came_from),
  asked_at = iif(asked_at > excluded.asked_at + {JUMP_SECONDS}, excluded.asked_at,
    max(asked_at, excluded.asked_at))
"""
# Workers report once a second: the order of takes within 3 s is unknown, and the newest revision counts.
# Otherwise the last one counts, since a machine that was set up anew takes an older one; what it came from
# before that counts no more.
_STAND = f"""
UPDATE standings SET revision = :revision, taken_at = :at,
  came_from = iif(asked_at > :at AND asked_at <= :at + {JUMP_SECONDS}, came_from, ''),
  version_then = coalesce(nullif(:version, ''),
    nullif((SELECT version FROM clients WHERE id = :client), ''), version_then)
WHERE stream = :stream AND client = :client AND (revision <> :revision OR came_from > :revision)
  AND iif(abs(:at - taken_at) <= 3, :revision > revision,
    :at > taken_at OR taken_at > :at + {JUMP_SECONDS})
"""  # noqa: S608 - a constant of ours
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
    members = ("name", "at", "version", "language")
    known = "SELECT version FROM clients WHERE name = ?"
    naming = [name for name, (_, version, _) in batch.seen.items() if version]
    before = {name: db.execute(known, (name,)).fetchone() for name in naming}
    stated = {name: row[0] for name, row in before.items() if row is not None}
    db.executemany(
        _SEE, [dict(zip(members, (name, *seen), strict=True)) for name, seen in batch.seen.items()]
    )
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
    for statement, written in ((_ASK, asked), (_STAND, taken), (_TAKE, taken)):
        db.executemany(statement, written)
    write_habits(db, batch.habits, batch.seen, clients, streams, stated)
    refused = [(clients[name], stream, at) for (name, stream), at in batch.refused.items()]
    db.executemany("INSERT OR REPLACE INTO refused_streams VALUES(?, ?, ?)", refused)
    if asked:
        timeline.note(db, ((row["stream"], row["client"]) for row in asked), max(row["at"] for row in asked))


def prune(db: sqlite3.Connection, now: float, retention_seconds: float, max_clients: int) -> None:
    """Delete clients unseen for `retention_seconds` or beyond `max_clients`, and old takes."""
    oldest = now - retention_seconds
    db.execute(_FORGET, (oldest, max_clients))
    db.execute("DELETE FROM takes WHERE taken_at < ?", (oldest,))
    db.execute("DELETE FROM refused_streams WHERE at < ?", (oldest,))
    db.execute(_FORGET_TAKES, (KEPT_REVISIONS,))
    forget(db, oldest)
    _drop_orphans(db)


def rename(db: sqlite3.Connection, new_name: Callable[[str], str]) -> None:
    """Rename clients; where two get one name, the one seen last stays."""
    for number, name in db.execute("SELECT id, name FROM clients ORDER BY seen_at").fetchall():
        other = new_name(name)
        if other != name:
            db.execute("DELETE FROM clients WHERE name = ?", (other,))
            db.execute("UPDATE clients SET name = ? WHERE id = ?", (other, number))
    _drop_orphans(db)


def rename_slow(db: sqlite3.Connection, new_name: Callable[[str], str]) -> None:
    """Rename the clients of slow requests; who was in front of a renamed one is forgotten."""
    for (client,) in db.execute("SELECT DISTINCT client FROM slow WHERE client <> ''").fetchall():
        if (other := new_name(client)) != client:
            db.execute(
                "UPDATE slow SET client = ?, told = json_remove(told, '$.behind.download_queue') "
                "WHERE client = ?",
                (other, client),
            )


def _drop_orphans(db: sqlite3.Connection) -> None:
    """Delete the rows of deleted clients, and streams without standings."""
    for table in ("standings", *OF_CLIENTS):
        db.execute(f"DELETE FROM {table} WHERE client NOT IN (SELECT id FROM clients)")  # noqa: S608
    db.execute("DELETE FROM takes WHERE client NOT IN (SELECT id FROM clients)")
    db.execute("DELETE FROM refused_streams WHERE client NOT IN (SELECT id FROM clients)")
    db.execute("DELETE FROM streams WHERE id NOT IN (SELECT stream FROM standings)")


# --- reports

SHOWN = 10_000
"""Rows shown at most, of all streams together."""
LAGGING_SHOWN = 1000
"""Lagging clients shown of one stream."""
SAYING = (
    "Taken does not mean installed: a client listed as pending was sent a client patch and still states its "
    "old build. It may need a restart, or may not have begun to install."
)
_OFF = "reports.addresses is off: there are no client records"
_HAS = "max(revision, came_from)"
"""The revision that a client has: what it took here or what it came from, whichever is newer."""
_CLIENT = "name AS address, seen_at, nullif(version, '') AS version, nullif(language, '') AS language"
_STREAMS = """
SELECT version, language, moniker, t.id, count(*), max(revision), max(asked)
FROM standings JOIN streams t ON t.id = stream GROUP BY stream
"""
_REVISIONS = f"""
SELECT revision, sum(has) AS clients, sum(took) AS took, min(first) AS first_taken_at,
  max(last) AS last_taken_at
FROM (SELECT revision, 0 AS has, count(*) AS took, min(taken_at) AS first, max(taken_at) AS last
      FROM takes WHERE stream = :stream GROUP BY revision
      UNION ALL SELECT {_HAS}, count(*), 0, NULL, NULL FROM standings WHERE stream = :stream GROUP BY 1)
WHERE revision <> '' GROUP BY revision ORDER BY revision DESC
"""  # noqa: S608 - constants of ours
_BEHIND = f"FROM standings JOIN clients ON id = client WHERE stream = :stream AND {_HAS} < :newest"
_LAGGING = f"""
SELECT {_CLIENT}, nullif({_HAS}, '') AS revision, nullif(taken_at, 0) AS taken_at, nullif(asked, '') AS asked,
  nullif(asked_at, 0) AS asked_at {_BEHIND} ORDER BY {_HAS}, name LIMIT :most
"""
_TAKERS = f"""
SELECT {_CLIENT}, nullif(version_then, '') AS version_then, revision, taken_at
FROM standings JOIN clients ON id = client WHERE stream = ? AND revision <> '' ORDER BY name
"""  # noqa: S608
_TAKEN = """
SELECT c.name, taken_at FROM takes JOIN clients c ON c.id = client JOIN streams t ON t.id = stream
WHERE t.version = ? AND t.language = ? AND moniker = ? AND revision = ? ORDER BY taken_at DESC
"""
_TAKERS_SHOWN = 20
_ASKED_SINCE = """
SELECT client, moniker FROM standings JOIN streams ON streams.id = stream WHERE max(asked_at, taken_at) >= ?
UNION SELECT client, stream FROM refused_streams WHERE at >= ?
"""
_ASKERS = f"""
SELECT version, language, moniker, count(*) FROM ({_ASKED_SINCE}) JOIN clients ON clients.id = client
GROUP BY 1, 2, 3
"""  # noqa: S608 - constants of ours
_WANTED = f"""
FROM clients WHERE id IN (SELECT client FROM ({_ASKED_SINCE}) a JOIN clients c ON c.id = a.client
  JOIN wanted w ON w.version = c.version AND w.language = c.language AND w.moniker = a.moniker)
"""  # noqa: S608
_GROUPS = """
SELECT nullif(version, '') AS version, nullif(language, '') AS language, count(*) AS clients
FROM clients GROUP BY 1, 2 ORDER BY clients DESC, version, language LIMIT 1000
"""
_MATCHING = """
FROM clients WHERE seen_at >= :since AND (:version IS NULL OR version = :version COLLATE NOCASE)
AND (:language IS NULL OR language = :language COLLATE NOCASE)
"""
_NEWEST = f"SELECT name, seen_at FROM clients ORDER BY seen_at DESC LIMIT {MAX_CLIENTS}"  # noqa: S608
_PAGE = f"""
SELECT {_CLIENT}, first_at AS first_seen_at, id {_MATCHING}
AND (:seen_at IS NULL OR (seen_at, id) < (:seen_at, :id)) ORDER BY seen_at DESC, id DESC LIMIT :most
"""


class Reports:
    """Stores news of clients, and reports on them.

    All methods belong to the event loop. A write that the disk refuses is retried; no caller waits for it.
    """

    def __init__(
        self,
        dependencies: ControlDependencies,
        database: StatsDatabase,
        clock: Callable[[], float],
        age_clock: Callable[[], float],
        held: Callable[[], Mapping[Stream, str]],
    ) -> None:
        """`age_clock` is the time that ages are measured from, `held` the newest revisions stored."""
        self._dependencies = dependencies
        self._database = database
        self._clock, self._age_clock = clock, age_clock
        self._held = held
        self._batch = Batch()
        self._parts = ReceivedParts()
        self._names: ClientNames | None = None
        self._named_by = ""
        """The mode in which stored clients are named; "" after a start, until they are."""
        self.ages: Counter[str] = Counter()
        """The active clients by age of their revision, as counted last; empty before."""

    # --- news

    @property
    def mode(self) -> str:
        return self._dependencies.settings().reports.addresses

    def see(self, clients: Iterable[str]) -> None:
        for client in clients:
            if (name := self.name_of(client)) is not None:
                self._batch.see(name, self._clock())

    def note(self, usage: Usage) -> None:
        """Clients that were seen, that share an address, or that a rule refused."""
        self.see(usage.clients)
        for client in filter(None, map(self.name_of, usage.shared)):
            self._batch.share(client)
        for refused in usage.refused:
            if (name := self.name_of(refused.client)) is not None:
                self._batch.see(name, self._clock(), refused.version, refused.language)
                self._batch.refuse(name, refused.rule, refused.stream, refused.times, self._clock())

    def take(self, taken: Taken) -> None:
        at = min(taken.at, self._clock())
        for take in taken.rows:
            if (name := self.name_of(take.client)) is not None:
                self._batch.add(take._replace(client=name), at, self._parts)

    def name_of(self, client: str) -> str | None:
        """The name to store, or None; just after a reload workers still send names by the old settings."""
        if self.mode == "full" or (self.mode == "hashed" and is_hashed(client)):
            return client
        return self._names.hashed(client) if self.mode == "hashed" and self._names is not None else None

    def names_of(self, address: str) -> tuple[str, ...]:
        """The names under which a client may be stored: by the settings, and by earlier ones."""
        hashed = () if self._names is None else (self._names.hashed(address),)
        return (address, *hashed) if self.mode == "full" else hashed or (address,)

    async def write_clients(self) -> None:
        await self._rename_clients()
        batch, self._batch = self._batch, Batch()
        if batch.seen and not await self._database.store("reports", lambda db: write_batch(db, batch)):
            self._put_back(batch)

    async def prune(self) -> None:
        settings, now = self._dependencies.settings(), self._age_clock()
        own = settings.reports

        def forget(db: sqlite3.Connection) -> None:
            prune(db, now, own.retention, own.max_clients)
            db.execute("DELETE FROM slow WHERE at < ?", (now - own.retention,))
            oldest = site_time(settings, now) - timedelta(seconds=own.ledger)
            prune_days(db, oldest.date().isoformat())
            timeline.prune_shares(db, now, own.timeline)
            prune_incidents(db, now - own.ledger)
            db.execute("PRAGMA incremental_vacuum").fetchall()

        await self._database.store("reports", forget)
        await self._tend_timeline(own.timeline)

    async def _tend_timeline(self, kept_seconds: float) -> None:
        """Pack the days that have ended and forget what is too old, a little at a time."""
        today, oldest_at, line = int(self._clock() // timeline.DAY), self._age_clock() - kept_seconds, 0
        oldest = math.ceil(oldest_at / timeline.DAY)

        def pack(db: sqlite3.Connection) -> bool:
            nonlocal line
            after = timeline.pack_some(db, today, line)
            line = after or 0
            return after is not None

        for some in (
            pack,
            lambda db: timeline.reduce_some(db, oldest),
            lambda db: timeline.forget_some(db, oldest_at),
        ):
            more = True
            while more:
                more = await self._some_more(some)
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _some_more(self, work: Callable[[sqlite3.Connection], bool]) -> bool:
        """Do a part of something long; whether there is more that can be done now."""
        more = False

        def do(db: sqlite3.Connection) -> None:
            nonlocal more
            more = work(db)

        return await self._database.store("reports", do) and more

    async def count_ages(self) -> None:
        """Count clients by the age of their revision; a periodic job of the service."""
        if self.mode == "off":
            self.ages.clear()
            return
        await self.write_clients()
        held, now = dict(self._held()), self._clock()

        def count(db: sqlite3.Connection) -> None:
            streams = [tuple(row) for row in db.execute("SELECT version, language, moniker FROM streams")]
            labels = {stream: self._dependencies.label_of(stream, "") for stream in streams}
            patches = [stream for stream, label in labels.items() if label and label.type == CLIENT_PATCHES]
            self.ages = timeline.count_ages(db, now, held, patches)

        await self._database.store("reports", count)

    def _put_back(self, batch: Batch) -> None:
        batch.absorb(self._batch)
        self._batch = batch

    async def _rename_clients(self) -> None:
        """After a start or reload, rename the stored clients if the settings forbid their names."""
        mode = self.mode
        if mode == self._named_by:
            return
        if self._names is None:
            path = self._dependencies.store.run / "address-key"
            self._names = ClientNames("hashed", await asyncio.to_thread(read_key, path))
        names = self._names
        by_old_names, self._batch = self._batch, Batch()  # from now on clients are named by the new settings

        def rename_all(db: sqlite3.Connection) -> None:
            write_batch(db, by_old_names)
            db.execute(f"PRAGMA secure_delete={mode != 'full'}")  # old names are overwritten
            if mode == "off":
                rename_slow(db, lambda _name: "")
                prune(db, self._clock(), 0.0, 0)
                timeline.forget_clients(db)
                db.execute("PRAGMA incremental_vacuum").fetchall()
            elif mode == "hashed":
                rename(db, lambda name: name if is_hashed(name) else names.hashed(name))
                rename_slow(db, lambda name: name if is_hashed(name) else names.hashed(name))
                db.execute("UPDATE visits SET net = ''")
                open_names = (name for name in timeline.names_of(db) if not is_hashed(name))
                timeline.rename(db, {name: names.hashed(name) for name in open_names})
            db.execute("PRAGMA secure_delete=FAST")

        if await self._database.store("reports", rename_all):
            self._named_by = mode
        elif mode == "full":
            self._put_back(by_old_names)

    async def name_for(self, address: str) -> str | None:
        """The name under which this client is stored, by its address or by that name; None: none is."""
        await self._rename_clients()
        if is_hashed(address):
            return address if self.mode == "hashed" else None
        names = ClientNames("full", b"") if self.mode == "full" else self._names
        return None if self.mode == "off" or names is None else names.of(address)

    # --- queries

    async def newest_clients(self) -> list[tuple[str, float]]:
        """Stored clients with the time they were seen last; none when the disk refuses."""
        await self._rename_clients()
        try:
            return await self._database.run(lambda db: db.execute(_NEWEST).fetchall())
        except OSError:
            return []

    async def content(self) -> schemas.ContentReport:
        """*Content taken here*."""
        await self.write_clients()
        held = dict(self._held())
        content = await self._database.run(lambda db: list(self._streams(db, held)))
        return schemas.ContentReport(**self.head(), content=content)

    def _streams(self, db: sqlite3.Connection, held: Mapping[Stream, str]) -> Iterator[schemas.StreamReport]:
        """Reports on the streams that clients asked for or that are held."""
        found = {row[:3]: row[3:] for row in db.execute(_STREAMS)}
        left = SHOWN
        for stream in sorted(found.keys() | held.keys()):
            id_, clients, taken, asked = found.get(stream, (None, 0, "", ""))
            here = held.get(stream, "")
            revisions = [schemas.RevisionClients(**row) for row in db.execute(_REVISIONS, {"stream": id_})]
            known = sorted({here, taken, asked, *(row.revision for row in revisions)} - {""})
            newest = known[-1] if known else ""
            asking = {"stream": id_, "newest": newest, "most": min(left, LAGGING_SHOWN)}
            (behind,) = db.execute(f"SELECT count(*) {_BEHIND}", asking).fetchone()
            lagging = list(db.execute(_LAGGING, asking))
            left -= len(lagging)
            label = self._dependencies.label_of(stream, "")
            yield schemas.StreamReport(
                product=label.product if label else stream[2],
                version=(label and label.version) or stream[0],
                language=(label and label.language) or stream[1],
                type=label.type if label else None,
                moniker=stream[2],
                variant=schemas.Variant(version=stream[0], language=stream[1]),
                clients=clients,
                current=clients - behind,
                behind=behind,
                newest_held=here or None,
                newest_taken=taken or None,
                newest_asked=asked or None,
                **_lag(known, here),
                revisions=revisions,
                lagging=[schemas.LaggingClient(**row, **_lag(known, row["revision"])) for row in lagging],
            )

    async def groups(self) -> list[schemas.ClientGroup]:
        """How many clients state what; empty when the disk refuses."""
        await self.write_clients()
        with contextlib.suppress(OSError):
            return await self._database.run(
                lambda db: [schemas.ClientGroup(**row) for row in db.execute(_GROUPS)]
            )
        return []

    async def takers(self, stream: Stream, revision: str) -> tuple[int, list[schemas.SeenClient]]:
        """How many clients took a revision, and the last of them; none when the disk refuses."""
        await self.write_clients()

        def look(db: sqlite3.Connection) -> tuple[int, list[schemas.SeenClient]]:
            taken = db.execute(_TAKEN, (*stream, revision)).fetchall()
            return len(taken), [
                schemas.SeenClient(address=name, seen_at=at) for name, at in taken[:_TAKERS_SHOWN]
            ]

        with contextlib.suppress(OSError):
            return await self._database.run(look)
        return 0, []

    async def askers(self, since: float) -> list[tuple[str, str, str, int]]:
        """How many clients asked for a stream since then, by the version and language that they state."""
        await self.write_clients()
        with contextlib.suppress(OSError):
            return await self._database.run(
                lambda db: [tuple(row) for row in db.execute(_ASKERS, (since, since))]
            )
        return []

    async def asking(
        self, groups: Iterable[tuple[str, str, str]], since: float
    ) -> tuple[int, list[schemas.SeenClient]]:
        """How many different clients are in these groups (version, language, stream), and some of them."""
        wanted = list(groups)

        def look(db: sqlite3.Connection) -> tuple[int, list[schemas.SeenClient]]:
            db.execute("CREATE TEMP TABLE IF NOT EXISTS wanted(version, language, moniker)")
            db.execute("DELETE FROM wanted")
            db.executemany("INSERT INTO wanted VALUES(?, ?, ?)", wanted)
            (count,) = db.execute(f"SELECT count(*) {_WANTED}", (since, since)).fetchone()
            rows = db.execute(
                f"SELECT name, seen_at {_WANTED} ORDER BY seen_at DESC LIMIT 20", (since, since)
            )
            return count, [schemas.SeenClient(address=name, seen_at=at) for name, at in rows]

        with contextlib.suppress(OSError):
            return await self._database.run(look)
        return 0, []

    async def restarts(self) -> schemas.RestartReport:
        """*Restart pending*, and how many clients state what."""
        await self.write_clients()

        def look(db: sqlite3.Connection) -> schemas.RestartReport:
            releases, streams = (
                Releases(self._dependencies.settings().rules.releases),
                db.execute(_STREAMS).fetchall(),
            )
            labels = {row[3]: self._dependencies.label_of(row[:3], "") for row in streams}
            found = [
                schemas.Restart(**row, state=state, product=label.product, moniker=moniker)
                for _, _, moniker, id_, *_ in streams
                if (label := labels[id_]) is not None and label.type == CLIENT_PATCHES
                for row in db.execute(_TAKERS, (id_,))
                if (state := _restart_state(row["version_then"], row["version"], releases)) != "restarted"
            ]
            counts = Counter(row.state for row in found)
            return schemas.RestartReport(
                **self.head(),
                clients=[schemas.ClientGroup(**row) for row in db.execute(_GROUPS)],
                catalogue_known=any(labels.values()),
                pending=counts["pending"],
                unknown=counts["unknown"],
                saying=SAYING,
                restart_pending=found[:SHOWN],
            )

        return await self._database.run(look)

    async def clients(self, most: int, **wanted: Any) -> dict[str, Any]:
        """A page of clients, newest first: members of schemas.Clients.

        `wanted`: those seen `since` then, their `version` and `language` (None: any), and `seen_at` and `id`
        of the last one on the page before (None: the first page).
        """
        await self.write_clients()

        def look(db: sqlite3.Connection) -> dict[str, Any]:
            rows = [dict(row) for row in db.execute(_PAGE, {**wanted, "most": most + 1})]
            places = [(row["seen_at"], row.pop("id")) for row in rows]
            return {
                "known": db.execute("SELECT count(*) FROM clients").fetchone()[0],
                "matching": db.execute(f"SELECT count(*) {_MATCHING}", wanted).fetchone()[0],
                "clients": [schemas.KnownClient(**row) for row in rows[:most]],
                "cursor": places[most - 1] if len(rows) > most else None,
            }

        return await self._database.run(look)

    def head(self) -> dict[str, Any]:
        return {
            "at": self._clock(),
            "addresses": self.mode,
            "retention_seconds": self._dependencies.settings().reports.retention,
            "note": _OFF if self.mode == "off" else None,
        }


def _lag(known: list[str], revision: str | None) -> dict[str, Any]:
    """How far a revision lies behind the newest of those `known`, which are in order.

    In revisions, and in whole days by the dates in them; None where one has no date.
    """
    newest, own = revision_time(known[-1] if known else ""), revision_time(revision or "")
    return {
        "lag_revisions": len(known) - bisect_right(known, revision or ""),
        "lag_seconds": None if newest is None or own is None else max(0.0, newest - own),
    }


def _restart_state(
    version_then: str | None, version_now: str | None, releases: Releases
) -> Literal["pending", "unknown", "restarted"]:
    """The state of a client that took a client patch; one that states no build may run it or not."""
    then, now = releases.version(version_then or ""), releases.version(version_now or "")
    if then is None or now is None:
        return "unknown"
    if then.older_than(now) or (then.release == now.release and then.patch < now.patch):
        return "restarted"
    # A release's name does not change with a patch: it names no build.
    builds = all(version.text.count(".") == 3 or version.patch for version in (then, now))
    return "pending" if builds else "unknown"
