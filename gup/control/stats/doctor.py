"""The client doctor: which clients' habits show that something is wrong with them, why, and what to do.

Five findings, from a few counters a client and stream (`Habits`, in the statistics database):

- `repeated-full`: it took the same full several times,
- `no-delta`: it takes fulls where its neighbours get deltas,
- `behind`: it is seen daily and falls behind its neighbours,
- `refused`: it asks for what the delivery rules refuse,
- `unfinished`: it resumes a download again and again and never has all of it.

An address that stands for several machines is left out: one in `clients.shared`, and one that states several
versions in turn. What an operator keeps from all clients, by a hold or with client patches off, is no
finding. All times are Unix seconds.
"""

import contextlib
import ipaddress
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import nsmallest
from typing import Any, Literal, NamedTuple

from gup.content.catalog import Stream
from gup.control.stats.database import StatsDatabase
from gup.control.traffic import revision_time
from gup.units import time_in_words

DAY = 86400.0
Name = Literal["repeated-full", "no-delta", "behind", "refused", "unfinished"]


class Finding(NamedTuple):
    """What a finding likely means, and what to do about it in the manager."""

    cause: str
    what_to_do: str


FINDINGS: Mapping[Name, Finding] = {
    "repeated-full": Finding(
        "It can't use what it takes: its definitions are damaged, its disk is full, or something "
        "removes them. Or several machines share the address.",
        "In the manager, look at the client's log and free disk space; clear its definitions, or "
        "repair the client from Add or Remove Programs. If several machines share the address, add it "
        "to clients.shared.",
    ),
    "no-delta": Finding(
        "The revision that it has is older than those that the manager keeps, since it is off for "
        "long; or its definitions are damaged, so that no delta fits.",
        "In the manager, raise the number of content revisions to keep (site properties, LiveUpdate). "
        "If clients of the same group get deltas, clear this client's definitions or repair it.",
    ),
    "behind": Finding(
        "It asks, but does not install: it waits for a restart, its disk is full, or its group has "
        "another LiveUpdate policy, an explicit revision or a schedule.",
        "In the manager, compare the group and the LiveUpdate policy with those of a neighbour; run "
        "the command Update Content for the client, and look at its System log.",
    ),
    "refused": Finding(
        "Its version or language is not what the delivery rules allow, or its policy asks for content "
        "that this site does not serve.",
        "`gup rules explain` tells why. Move the client to the right group or upgrade it in the "
        "manager; if it is right, change [rules] or upstream.version.",
    ),
    "unfinished": Finding(
        "Its connection breaks before the end (VPN, wireless, the time limit of a proxy or firewall), "
        "or its disk is full.",
        "Check the network between client and gup, and the client's free disk space; `gup why "
        "ADDRESS` tells where the seconds of its requests went.",
    ),
}
REPEATS = 3
FULLS = 3
PARTS, PARTS_SECONDS = 10, 3600.0
REFUSALS = 5
BEHIND_SECONDS = 2 * DAY
NEIGHBOURS = 3
"""With fewer in its subnet, the neighbours are the site's clients."""
_RECENT = 14 * DAY
_LAST_DAYS = 0b111
_SEEN_DAYS = 2
_CHANGES = 3
SHOWN = 500
"""Clients shown of one finding."""
_WEEK = 0b111_1111
_TURN_SECONDS, _MOMENT_SECONDS, _REST_FACTOR = 10.0, 1.0, 50

OF_CLIENTS = ("habits", "visits", "refused")
TIMES = (
    *(("habits", "full_first_at"), ("habits", "full_last_at"), ("habits", "fulls_first_at")),
    *(("habits", "parts_first_at"), ("habits", "parts_last_at")),
    ("deltas", "last_at"),
    *(("refused", "first_at"), ("refused", "last_at"), ("visits", "changed_at"), ("visits", "shared_at")),
)

# --- what is written


@dataclass(slots=True)
class Habits:
    """What is new since the last write, by client's name. Its batch bounds it (gup.control.stats)."""

    fulls: dict[tuple[str, Stream, str], list[float]] = field(default_factory=dict)
    """Whole fulls of a revision: how often, and when last."""
    deltas: dict[tuple[str, Stream], float] = field(default_factory=dict)
    """When the last one was taken."""
    parts: dict[tuple[str, Stream], tuple[str, int, float]] = field(default_factory=dict)
    """Requests for parts of one body: its key, how many since it was complete (0: it is), when last."""
    refusals: dict[tuple[str, str], tuple[str, int, float]] = field(default_factory=dict)
    """Of a rule: the stream refused last, how often, when last."""
    shared: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.fulls) + len(self.deltas) + len(self.parts) + len(self.refusals)

    def full(self, client: str, stream: Stream, revision: str, at: float) -> None:
        row = self.fulls.setdefault((client, stream, revision), [0, at])
        row[0] += 1
        row[1] = max(row[1], at)

    def part(self, client: str, stream: Stream, key: str, at: float, *, whole: bool) -> None:
        before, times, _ = self.parts.get((client, stream), ("", 0, at))
        if whole:
            self.parts[client, stream] = (key, 0, at)
        elif before != key:
            self.parts[client, stream] = (key, 1, at)
        elif times:  # else it has just got all of it
            self.parts[client, stream] = (key, times + 1, at)

    def refuse(self, client: str, rule: str, stream: str, times: int, at: float) -> None:
        before = self.refusals.get((client, rule), ("", 0, at))
        self.refusals[client, rule] = (stream, before[1] + times, max(at, before[2]))

    def absorb(self, newer: "Habits") -> None:
        for (client, stream, revision), (times, at) in newer.fulls.items():
            row = self.fulls.setdefault((client, stream, revision), [0, at])
            row[0], row[1] = row[0] + times, max(row[1], at)
        self.deltas |= newer.deltas
        self.parts |= newer.parts
        for (client, rule), (stream_, count, at) in newer.refusals.items():
            self.refuse(client, rule, stream_, count, at)
        self.shared |= newer.shared


# A machine that was set up anew long after takes the same full once more.
_FULL = f"""
INSERT INTO habits(client, stream, full_revision, full_times, full_first_at, full_last_at, fulls,
  fulls_first_at) VALUES(:client, :stream, :revision, :times, :at, :at, 1, :at)
ON CONFLICT(client, stream) DO UPDATE SET
  full_times = iif(full_revision = :revision AND :at - full_last_at < {_RECENT}, full_times, 0) + :times,
  full_first_at = iif(full_revision = :revision AND :at - full_last_at < {_RECENT}, full_first_at, :at),
  fulls_first_at = iif(fulls = 0, :at, fulls_first_at),
  fulls = fulls + (full_revision <> :revision OR fulls = 0), full_revision = :revision, full_last_at = :at
"""
_DELTA = "UPDATE habits SET fulls = 0, fulls_first_at = 0 WHERE client = ? AND stream = ?"
_LAST_DELTA = """
INSERT INTO deltas VALUES(?, ?) ON CONFLICT(stream) DO UPDATE SET last_at = max(last_at, excluded.last_at)
"""
_PART = f"""
INSERT INTO habits(client, stream, part_key, parts, parts_first_at, parts_last_at)
VALUES(:client, :stream, :key, :times, :at, :at)
ON CONFLICT(client, stream) DO UPDATE SET
  parts_first_at = iif(part_key = :key AND parts > 0 AND :times > 0 AND :at - parts_last_at < {_RECENT},
    parts_first_at, :at),
  parts = iif(part_key = :key AND :times > 0 AND :at - parts_last_at < {_RECENT}, parts, 0) + :times,
  part_key = :key, parts_last_at = :at
"""
_REFUSED = f"""
INSERT INTO refused VALUES(:client, :rule, :stream, :times, :at, :at)
ON CONFLICT(client, rule) DO UPDATE SET
  times = iif(:at - last_at < {_RECENT}, times, 0) + :times,
  first_at = iif(:at - last_at < {_RECENT}, first_at, :at), stream = :stream, last_at = :at
"""
# A day that lies ahead was written by a clock that has been put back.
_VISIT = f"""
INSERT INTO visits(client, day, days, net) VALUES(:client, :day, 1, :net)
ON CONFLICT(client) DO UPDATE SET days = iif(:day < day, 1, ((days << min(:day - day, 7)) & {_WEEK}) | 1),
  day = :day, net = :net WHERE day <> :day OR net <> :net
"""
_CHANGED = f"""
UPDATE visits SET changes = iif(:at - changed_at < {7 * DAY}, changes, 0) + 1, changed_at = :at
WHERE client = :client
"""  # noqa: S608 - constants of ours


def write_habits(
    db: sqlite3.Connection,
    habits: Habits,
    seen: Mapping[str, tuple[float, str, str]],
    clients: Mapping[str, int],
    streams: Mapping[Stream, int],
    stated: Mapping[str, str],
) -> None:
    """`clients` and `streams` are their numbers, `stated` the versions that clients stated before."""
    visits = [
        {"client": clients[name], "day": int(at // DAY), "net": subnet(name)}
        for name, (at, *_) in seen.items()
    ]
    db.executemany(_VISIT, visits)
    changed = [
        {"client": clients[name], "at": at}
        for name, (at, version, _) in seen.items()
        if version and stated.get(name) not in (None, "", version)
    ]
    db.executemany(_CHANGED, changed)

    def numbers(client: str, stream: Stream) -> dict[str, Any]:
        return {"client": clients.get(client), "stream": streams.get(stream)}

    fulls = [
        numbers(client, stream) | {"revision": revision, "times": times, "at": at}
        for (client, stream, revision), (times, at) in sorted(habits.fulls.items())
    ]
    parts = [
        numbers(client, stream) | {"key": key, "times": times, "at": at}
        for (client, stream), (key, times, at) in habits.parts.items()
    ]
    for statement, rows in ((_FULL, fulls), (_PART, parts)):
        db.executemany(statement, [row for row in rows if None not in row.values()])
    deltas = {tuple(numbers(*row).values()): at for row, at in habits.deltas.items()}
    db.executemany(_DELTA, [row for row in deltas if None not in row])
    db.executemany(_LAST_DELTA, [(stream, at) for (_, stream), at in deltas.items() if stream is not None])
    refusals = [
        {"client": clients[name], "rule": rule, "stream": stream, "times": times, "at": at}
        for (name, rule), (stream, times, at) in habits.refusals.items()
        if name in clients
    ]
    db.executemany(_REFUSED, refusals)
    shared = [(seen[name][0], clients[name]) for name in habits.shared if name in clients and name in seen]
    db.executemany("UPDATE visits SET shared_at = ? WHERE client = ?", shared)


def forget(db: sqlite3.Connection, oldest: float) -> None:
    """Delete what nothing was added to for so long, and what belongs to no stream any more."""
    for table in ("habits", "deltas"):
        db.execute(f"DELETE FROM {table} WHERE stream NOT IN (SELECT id FROM streams)")  # noqa: S608
    db.execute("DELETE FROM habits WHERE max(full_last_at, parts_last_at) < ?", (oldest,))
    for table in ("refused", "deltas"):
        db.execute(f"DELETE FROM {table} WHERE last_at < ?", (oldest,))  # noqa: S608


@lru_cache(20_000)
def subnet(name: str) -> str:
    """The /24 or /64 of an address; "" for a hash."""
    try:
        ip = ipaddress.ip_address(name)
    except ValueError:
        return ""
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 64), strict=False))


# --- what is found


class Sick(NamedTuple):
    """A finding on one client; `stream` is None where it is about a rule, `what` the body or the rule."""

    client: str
    finding: Name
    stream: Stream | None
    what: str
    times: int
    first_at: float
    last_at: float
    seen: str


@dataclass(frozen=True, slots=True)
class Findings:
    at: float
    clients: int
    """Clients seen within two weeks, those left out included."""
    left_out: int
    """Addresses of several machines."""
    counts: Mapping[str, int]
    """Clients by finding."""
    sick: int
    """Clients with any finding."""
    rows: Sequence[Sick]
    seconds: float
    """What it took to find them."""


_ONE = f"""
NOT EXISTS (SELECT 1 FROM visits v WHERE v.client = c.id AND (v.shared_at > :recent
  OR (v.changes >= {_CHANGES} AND v.changed_at > :recent)))
"""  # noqa: S608 - constants of ours
_STREAM = "t.version AS sv, t.language AS sl, t.moniker AS sm"
_OF_HABITS = "FROM habits h JOIN clients c ON c.id = h.client JOIN streams t ON t.id = h.stream"
_REPEATED = f"""
SELECT c.name, {_STREAM}, full_revision AS what, full_times AS times, full_first_at AS first,
  full_last_at AS last {_OF_HABITS}
WHERE full_times >= {REPEATS} AND full_last_at > :recent AND {_ONE}
"""
_NO_DELTA = f"""
SELECT c.name, {_STREAM}, full_revision AS what, fulls AS times, fulls_first_at AS first,
  full_last_at AS last {_OF_HABITS}
WHERE fulls >= {FULLS} AND full_last_at > :recent AND {_ONE}
AND EXISTS (SELECT 1 FROM deltas d WHERE d.stream = h.stream AND d.last_at > max(:recent, fulls_first_at))
"""  # noqa: S608 - constants of ours
_UNFINISHED = f"""
SELECT c.name, {_STREAM}, part_key AS what, parts AS times, parts_first_at AS first, parts_last_at AS last
{_OF_HABITS}
WHERE parts >= {PARTS} AND parts_last_at - parts_first_at >= {PARTS_SECONDS} AND parts_last_at > :recent
AND {_ONE}
"""
_ASKS_IN_VAIN = f"""
SELECT c.name, r.stream, rule AS what, times, r.first_at AS first, r.last_at AS last
FROM refused r JOIN clients c ON c.id = r.client
WHERE times >= {REFUSALS} AND rule NOT IN ('client_patches_off', 'hold') AND r.last_at > :now - 2 * {DAY}
AND {_ONE}
"""  # noqa: S608 - constants of ours
_HAS = "max(s.revision, s.came_from)"
_STANDINGS = f"""
SELECT {_HAS} AS has, v.net AS net, count(*) AS clients
FROM standings s JOIN clients c ON c.id = s.client JOIN visits v ON v.client = s.client
WHERE s.stream = :stream AND has <> '' AND c.seen_at > :week GROUP BY 1, 2
"""  # noqa: S608 - constants of ours
_BEHIND = f"""
SELECT c.name, {_HAS} AS has, v.net AS net, s.taken_at AS taken, c.seen_at AS last, v.days AS days
FROM standings s JOIN clients c ON c.id = s.client JOIN visits v ON v.client = s.client
WHERE s.stream = :stream AND has <> '' AND has < :common AND s.taken_at < :now - {BEHIND_SECONDS}
AND c.seen_at > :now - {DAY} AND v.day >= :today - 1 AND {_ONE} ORDER BY has LIMIT :most
"""  # noqa: S608 - constants of ours, as above
_MOST_BEHIND = 10_000


def examine(
    db: sqlite3.Connection,
    now: float,
    label: Callable[[Stream], str],
    kept_back: Container[str] = (),
) -> Findings:
    """All findings. Blocks: some tenths of a second with 100,000 clients.

    Clients are redirected to fulls of streams of which something is `kept_back` (monikers): they may take one
    several times.
    """
    began = time.monotonic()
    asked = {"now": now, "recent": now - _RECENT, "week": now - 7 * DAY, "today": int(now // DAY)}
    habits = [row for row in _of_habits(db, asked, label) if row.stream and row.stream[2] not in kept_back]
    rows = [*habits, *_of_rules(db, asked), *_lagging(db, asked, label)]
    clients: dict[str, set[str]] = {name: set() for name in FINDINGS}
    for row in rows:
        clients[row.finding].add(row.client)
    (known,) = db.execute("SELECT count(*) FROM clients WHERE seen_at > :recent", asked).fetchone()
    left_out = f"SELECT count(*) FROM clients c WHERE seen_at > :recent AND NOT {_ONE}"  # noqa: S608
    return Findings(
        at=now,
        clients=known,
        left_out=db.execute(left_out, asked).fetchone()[0],
        counts={name: len(found) for name, found in clients.items()},
        sick=len(set().union(*clients.values())),
        rows=[row for name in FINDINGS for row in _first(name, rows)],
        seconds=time.monotonic() - began,
    )


def _first(name: Name, rows: Sequence[Sick]) -> list[Sick]:
    return nsmallest(
        SHOWN, (row for row in rows if row.finding == name), lambda row: (-row.times, row.client)
    )


def _of_habits(
    db: sqlite3.Connection, asked: Mapping[str, float], label: Callable[[Stream], str]
) -> Iterator[Sick]:
    for row in db.execute(_REPEATED, asked):
        of = f"the full package {row['what']} of {label(_stream(row))}"
        yield _sick("repeated-full", row, f"It took {of} {row['times']} times {_within(row)}.")
    for row in db.execute(_NO_DELTA, asked):
        text = f"It took {row['times']} full packages of {label(_stream(row))} {_within(row)}, and no delta"
        yield _sick("no-delta", row, f"{text}. Other clients got deltas meanwhile.")
    for row in db.execute(_UNFINISHED, asked):
        file = row["what"].rsplit("/", 1)[-1]
        text = f"It requested parts of {file} of {label(_stream(row))} {row['times']} times {_within(row)}"
        yield _sick("unfinished", row, f"{text}, and never had all of it.")


def _of_rules(db: sqlite3.Connection, asked: Mapping[str, float]) -> Iterator[Sick]:
    for row in db.execute(_ASKS_IN_VAIN, asked):
        refused = f"The rule {row['what']} refused it {row['times']} times {_within(row)}"
        text = f"{refused}, last for {row['stream']}."
        yield Sick(row["name"], "refused", None, row["what"], row["times"], row["first"], row["last"], text)


def _lagging(
    db: sqlite3.Connection,
    asked: Mapping[str, float],
    label: Callable[[Stream], str],
) -> Iterator[Sick]:
    """Those whose neighbours have had something newer for days: most of its subnet, or of the site."""
    left = _MOST_BEHIND
    for number, *names in db.execute("SELECT id, version, language, moniker FROM streams").fetchall():
        groups: dict[str, Counter[str]] = {"": Counter()}
        for has, net, count in db.execute(_STANDINGS, {**asked, "stream": number}):
            groups[""][has] += count
            if net:
                groups.setdefault(net, Counter())[has] += count
        if groups[""].total() <= NEIGHBOURS or left <= 0:
            continue
        common = {net: _common(counts) for net, counts in groups.items()}
        most = {**asked, "stream": number, "common": max(common.values()), "most": left}
        for row in db.execute(_BEHIND, most).fetchall():
            left -= 1
            net = row["net"] if groups.get(row["net"], Counter()).total() > NEIGHBOURS else ""
            newer, has = common[net], row["has"]
            then, now_ = revision_time(has), revision_time(newer)
            if then is None or now_ is None or now_ - then < BEHIND_SECONDS:
                continue
            if (row["days"] & _LAST_DAYS).bit_count() < _SEEN_DAYS:
                continue  # it was off, and has just come back
            stream: Stream = (names[0], names[1], names[2])
            ahead = sum(count for revision, count in groups[net].items() if revision >= newer)
            where = f"in {net}" if net else "at this site"
            text = (
                f"It stands at {has} of {label(stream)}; {ahead} of {groups[net].total() - 1} neighbours "
                f"{where} have {newer} or newer, {time_in_words(now_ - then)} newer. It was seen on "
                f"{row['days'].bit_count()} of the last 7 days."
            )
            first = row["taken"] or asked["now"]
            yield Sick(row["name"], "behind", stream, has, 1, first, row["last"], text)


def _common(counts: Counter[str]) -> str:
    """The newest revision that at least half of them have, or a newer one."""
    left, half = 0, counts.total() / 2
    for revision in sorted(counts, reverse=True):
        left += counts[revision]
        if left >= half:
            return revision
    return ""


def _sick(finding: Name, row: sqlite3.Row, text: str) -> Sick:
    return Sick(
        row["name"], finding, _stream(row), row["what"], row["times"], row["first"], row["last"], text
    )


def _stream(row: sqlite3.Row) -> Stream:
    return row["sv"], row["sl"], row["sm"]


def _within(row: sqlite3.Row) -> str:
    return f"within {time_in_words(max(0.0, row['last'] - row['first']))}"


def nothing(now: float) -> Findings:
    """Without client records."""
    return Findings(now, 0, 0, dict.fromkeys(FINDINGS, 0), 0, (), 0.0)


class Doctor:
    """The findings on this site's clients, looked for now and then; all methods belong to the event loop."""

    def __init__(
        self,
        database: StatsDatabase,
        clock: Callable[[], float],
        mode: Callable[[], str],
        write: Callable[[], Awaitable[None]],
        label: Callable[[Stream], tuple[str, str]],
        kept_back: Callable[[], Container[str]],
    ) -> None:
        """`mode` is reports.addresses, `write` stores what is known of clients, `kept_back` are the monikers
        of which a revision is on hold or waits.
        """
        self._database, self._clock, self._mode, self._write = database, clock, mode, write
        self._label, self._kept_back = label, kept_back
        self._next = 0.0
        self.found = nothing(0.0)

    async def turn(self) -> None:
        """To be called every few seconds: looks again after a while, the later the longer it takes."""
        if time.monotonic() >= self._next:
            with contextlib.suppress(OSError):  # whoever writes there says so
                await self.look()

    async def look(self) -> Findings:
        """The findings of now, or of a moment ago if looking takes long."""
        if self._mode() == "off":
            self.found = nothing(self._clock())
        elif time.monotonic() >= self._next - _TURN_SECONDS + _MOMENT_SECONDS:
            await self._write()
            now = self._clock()
            labels: dict[Stream, str] = {}

            def label(stream: Stream) -> str:
                return labels.get(stream) or stream[2]

            streams = await self._database.run(
                lambda db: db.execute("SELECT version, language, moniker FROM streams").fetchall()
            )
            labels |= {(one[0], one[1], one[2]): " ".join(self._label(tuple(one))) for one in streams}
            kept_back = self._kept_back()
            self.found = await self._database.run(lambda db: examine(db, now, label, kept_back))
            self._next = time.monotonic() + _TURN_SECONDS + _REST_FACTOR * self.found.seconds
        return self.found
