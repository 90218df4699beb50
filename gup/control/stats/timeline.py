"""The timeline: each change of a client's revision in a stream, and hourly counts of clients by its age.

A *line* is one client in one stream. Its changes are rows (`changes`) until their day, in UTC, has ended.
Then they are packed: one compressed body for each day and 1024 lines, about 3 bytes a change. Whole days are
kept exactly while they fit in MAX_BYTES; beyond that the oldest keep one change a line, the last of the day.
Beyond `reports.timeline` a line keeps the last change before the kept days (`_BASE`): it is the revision
with which they begin. The work on old days is done in small steps, between which others use the file.

A *state* is a number: twice the revision, plus 1 if the client took it here (else it stated that it has it).
"""

import sqlite3
import struct
import time
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, tzinfo
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

from gup.content.catalog import Stream
from gup.control.eviction import JUMP_SECONDS

DAY, HOUR = 86400, 3600
MAX_BYTES = 512 << 20
"""Of packed days. The file has room for more (`database._MAX_PAGES`)."""
MAX_LINES = 1_000_000
"""Beyond them those unchanged for longest are forgotten."""
MAX_DAILY = 100
"""Changes of a line in a day; a further one replaces the last."""
_CHUNK = 1024
_AT_ONCE = 16
"""Bodies that a step packs or reduces."""
_FORGOTTEN_AT_ONCE = 20_000
_BASE = -1
"""The day of what was before all kept days; its times count from 0."""
_CHUNK_BITS = 20

TABLES = """
CREATE TABLE IF NOT EXISTS known_clients(id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS known_clients_name ON known_clients(name);
CREATE TABLE IF NOT EXISTS known_streams(id INTEGER PRIMARY KEY AUTOINCREMENT, version TEXT NOT NULL,
  language TEXT NOT NULL, moniker TEXT NOT NULL, UNIQUE(version, language, moniker));
CREATE TABLE IF NOT EXISTS lines(id INTEGER PRIMARY KEY AUTOINCREMENT, client INTEGER NOT NULL,
  stream INTEGER NOT NULL, at INTEGER NOT NULL, state INTEGER NOT NULL, UNIQUE(client, stream));
CREATE TABLE IF NOT EXISTS changes(line INTEGER NOT NULL, at INTEGER NOT NULL, state INTEGER NOT NULL,
  PRIMARY KEY(line, at)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS packed(id INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS packed_days(day INTEGER PRIMARY KEY, bytes INTEGER NOT NULL,
  thin INTEGER NOT NULL, next INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS shares(at INTEGER NOT NULL, stream INTEGER NOT NULL, clients INTEGER NOT NULL,
  current INTEGER NOT NULL, d1 INTEGER NOT NULL, d3 INTEGER NOT NULL, d7 INTEGER NOT NULL,
  d30 INTEGER NOT NULL, older INTEGER NOT NULL, unknown INTEGER NOT NULL, newest TEXT NOT NULL,
  held TEXT NOT NULL, PRIMARY KEY(at, stream)) WITHOUT ROWID;
"""
_SEED = (
    """
INSERT OR IGNORE INTO known_streams(version, language, moniker) SELECT version, language, moniker FROM streams
""",
    "INSERT INTO known_clients(name) SELECT name FROM clients",
    """
INSERT OR IGNORE INTO lines(client, stream, at, state)
SELECT k.id, t.id, cast(iif(revision >= came_from, taken_at, asked_at) AS INTEGER),
  2 * max(revision, came_from) + (revision >= came_from)
FROM standings s JOIN clients c ON c.id = s.client JOIN known_clients k ON k.name = c.name
JOIN streams o ON o.id = s.stream JOIN known_streams t
  ON t.version = o.version AND t.language = o.language AND t.moniker = o.moniker
WHERE max(revision, came_from) GLOB :revision
""",
    "INSERT OR IGNORE INTO changes SELECT id, at, state FROM lines",
)
_REVISION = "[0-9]" * 9
_TOUCHED = """
CREATE TEMP TABLE IF NOT EXISTS touched(stream INTEGER, client INTEGER, PRIMARY KEY(stream, client))
WITHOUT ROWID
"""
_CHANGED = """
SELECT * FROM (
  SELECT c.name, k.id AS client, t.id AS stream, o.version, o.language, o.moniker,
    2 * max(s.revision, s.came_from) + (s.revision >= s.came_from) AS state,
    cast(iif(s.revision >= s.came_from, taken_at, asked_at) AS INTEGER) AS at
  FROM temp.touched JOIN standings s USING(stream, client) JOIN clients c ON c.id = s.client
  JOIN streams o ON o.id = s.stream LEFT JOIN known_streams t
    ON t.version = o.version AND t.language = o.language AND t.moniker = o.moniker
  LEFT JOIN known_clients k ON k.id = (SELECT max(id) FROM known_clients WHERE name = c.name)
  WHERE max(s.revision, s.came_from) GLOB :revision) AS now
LEFT JOIN (
  SELECT id AS line, client AS of_client, stream AS of_stream, at AS before, state AS known FROM lines)
  ON of_client = client AND of_stream = stream
WHERE known IS NOT now.state
"""


def begin(db: sqlite3.Connection, now: float) -> float:
    """Since when changes are recorded. At the first call what client records say is taken over."""
    found = db.execute("SELECT value FROM about WHERE name = 'timeline_since'").fetchone()
    if found is not None:
        return float(found[0])
    db.execute("INSERT INTO about VALUES('timeline_since', ?)", (now,))
    for statement in _SEED:
        db.execute(statement, {"revision": _REVISION} if ":revision" in statement else {})
    return now


def note(db: sqlite3.Connection, standings: Iterable[tuple[int, int]], now: float) -> None:
    """Record what has changed in these standings, which are pairs of the ids of stream and client."""
    begin(db, now)
    db.execute(_TOUCHED)
    db.executemany("INSERT OR IGNORE INTO temp.touched VALUES(?, ?)", standings)
    changed = db.execute(_CHANGED, {"revision": _REVISION}).fetchall()
    db.execute("DELETE FROM temp.touched")
    streams: dict[Stream, int] = {}
    clients: dict[str, int] = {}
    rows, new = [], []
    for row in changed:
        stream, client, line, at = row["stream"], row["client"], row["line"], row["at"]
        if line is None:
            what = row["version"], row["language"], row["moniker"]
            if stream is None and (stream := streams.get(what)) is None:
                stream = streams[what] = _insert(db, "known_streams", what)
            if client is None and (client := clients.get(row["name"])) is None:
                client = clients[row["name"]] = _insert(db, "known_clients", (row["name"],))
            new.append((client, stream, at, row["state"]))
            continue
        if at <= row["before"] <= at + JUMP_SECONDS:
            at = row["before"]  # the clock was put back a little: later is later
        elif at // DAY == row["before"] // DAY:
            _make_room(db, line, at // DAY)
        rows.append((at, row["state"], line))
    db.executemany("UPDATE lines SET at = ?, state = ? WHERE id = ?", rows)
    before = db.execute("SELECT max(id) FROM lines").fetchone()[0] or 0
    db.executemany("INSERT INTO lines(client, stream, at, state) VALUES(?, ?, ?, ?)", new)
    db.executemany("INSERT OR REPLACE INTO changes(at, state, line) VALUES(?, ?, ?)", rows)
    db.execute("INSERT OR REPLACE INTO changes SELECT id, at, state FROM lines WHERE id > ?", (before,))


def _insert(db: sqlite3.Connection, table: str, values: tuple[str, ...]) -> int:
    row = db.execute(f"INSERT INTO {table} VALUES(NULL{', ?' * len(values)})", values)
    assert row.lastrowid is not None
    return row.lastrowid


def _make_room(db: sqlite3.Connection, line: int, day: int) -> None:
    """A client that changes all the time keeps the last change of the day, not all of them."""
    count, last = db.execute(
        "SELECT count(*), max(at) FROM changes WHERE line = ? AND at >= ? AND at < ?",
        (line, day * DAY, (day + 1) * DAY),
    ).fetchone()
    if count >= MAX_DAILY:
        db.execute("DELETE FROM changes WHERE line = ? AND at = ?", (line, last))


# --- packed days


class Change(NamedTuple):
    """At `at` (Unix seconds) the line came to this state."""

    line: int
    at: int
    state: int


_HEAD = struct.Struct("<II")
_Rows = Sequence[tuple[int, int, int]]


def pack(rows: _Rows, first_line: int, first_second: int) -> bytes:
    """Rows (line, time, state) in order, by columns: these compress far better than rows."""
    lines = [line - first_line for line, _, _ in rows]
    steps = [lines[0], *(after - before for before, after in pairwise(lines))]
    states = sorted({state for _, _, state in rows})
    numbers = {state: number for number, state in enumerate(states)}
    count = len(rows)
    columns = (
        struct.pack(f"<{count}I", *(at - first_second for _, at, _ in rows)),
        struct.pack(f"<{count}H", *steps),
        struct.pack(f"<{count}I", *(numbers[state] for _, _, state in rows)),
    )
    planes = (
        column[byte :: len(column) // count] for column in columns for byte in range(len(column) // count)
    )
    return zlib.compress(
        _HEAD.pack(count, len(states)) + struct.pack(f"<{len(states)}I", *states) + b"".join(planes)
    )


def unpack(body: bytes, first_line: int, first_second: int) -> list[Change]:
    text = zlib.decompress(body)
    count, known = _HEAD.unpack_from(text)
    states = struct.unpack_from(f"<{known}I", text, _HEAD.size)
    start, columns = _HEAD.size + 4 * known, []
    for width, letter in ((4, "I"), (2, "H"), (4, "I")):
        column = bytearray(width * count)
        for byte in range(width):
            column[byte::width] = text[start : start + count]
            start += count
        columns.append(struct.unpack(f"<{count}{letter}", column))
    seconds, steps, numbers = columns
    lines = accumulate(steps, initial=first_line)
    next(lines)
    return [
        Change(line, first_second + second, states[number])
        for line, second, number in zip(lines, seconds, numbers, strict=True)
    ]


def _id(day: int, chunk: int) -> int:
    return (day << _CHUNK_BITS) + chunk


def _read(db: sqlite3.Connection, day: int, chunk: int) -> list[Change]:
    """The packed changes of a day. A body that can't be read is as none: what it said is lost."""
    found = db.execute("SELECT body FROM packed WHERE id = ?", (_id(day, chunk),)).fetchone()
    if found is None:
        return []
    try:
        return unpack(found[0], chunk * _CHUNK, max(day, 0) * DAY)
    except (zlib.error, struct.error, IndexError, ValueError):
        return []


def _stored_bytes(db: sqlite3.Connection, id_: int) -> int:
    """What a body takes in the file: beyond a page, whole pages."""
    found = db.execute("SELECT length(body) FROM packed WHERE id = ?", (id_,)).fetchone()
    return 0 if found is None else found[0] + 32 if found[0] < 4000 else -(-found[0] // 4096) * 4096


def _write(db: sqlite3.Connection, day: int, chunk: int, rows: _Rows) -> None:
    id_ = _id(day, chunk)
    before = _stored_bytes(db, id_)
    if rows:
        body = pack(rows, chunk * _CHUNK, max(day, 0) * DAY)
        db.execute("INSERT OR REPLACE INTO packed VALUES(?, ?)", (id_, body))
    else:
        db.execute("DELETE FROM packed WHERE id = ?", (id_,))
    db.execute(
        "INSERT INTO packed_days VALUES(?, ?, 0, 0) "
        "ON CONFLICT(day) DO UPDATE SET bytes = bytes + excluded.bytes",
        (day, _stored_bytes(db, id_) - before),
    )


def _last_of_lines(rows: Iterable[Change]) -> list[Change]:
    return list({row.line: row for row in rows}.values())


def pack_some(db: sqlite3.Connection, today: int, from_line: int) -> int | None:
    """Pack what changed before `today` (a day since 1970), of some lines from this one on.

    Returns the line to go on with; None when that was the last one.
    """
    first: int | None = db.execute("SELECT min(line) FROM changes WHERE line >= ?", (from_line,)).fetchone()[
        0
    ]
    if first is None:
        return None
    first -= first % _CHUNK
    after = first + _AT_ONCE * _CHUNK
    lines = (first, after, today * DAY)
    which = "FROM changes WHERE line >= ? AND line < ? AND at < ?"
    rows = db.execute(f"SELECT line, at, state {which} ORDER BY at / {DAY}, line, at", lines).fetchall()
    for (day, chunk), found in groupby(rows, lambda row: (row[1] // DAY, row[0] // _CHUNK)):
        changes = {(row[0], row[1]): row[2] for row in (*_read(db, day, chunk), *found)}
        _write(db, day, chunk, sorted((*at, state) for at, state in changes.items()))
    db.execute(f"DELETE {which}", lines)
    return after


def reduce_some(db: sqlite3.Connection, oldest: int, max_bytes: int = MAX_BYTES) -> bool:
    """Reduce some of what is older than the day `oldest`, or beyond `max_bytes`; whether there is more."""
    days = db.execute("SELECT * FROM packed_days WHERE day >= 0 ORDER BY day").fetchall()
    total = db.execute("SELECT total(bytes) FROM packed_days").fetchone()[0]
    begun = next((row for row in days if row["thin"] and row["next"] >= 0), None)
    if days and days[0]["day"] < oldest:
        _drop_some(db, days[0]["day"])
    elif begun is not None:
        _thin_some(db, begun["day"], begun["next"])
    elif total <= max_bytes:
        return False
    elif (exact := next((row for row in days if not row["thin"]), None)) is not None:
        db.execute("UPDATE packed_days SET thin = 1 WHERE day = ?", (exact["day"],))
    elif days:
        _drop_some(db, days[0]["day"])
    else:
        return False
    return True


def _some(db: sqlite3.Connection, day: int, chunk: int) -> list[int]:
    rows = db.execute(
        "SELECT id FROM packed WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
        (_id(day, chunk), _id(day + 1, 0), _AT_ONCE),
    )
    return [row[0] - _id(day, 0) for row in rows]


def _thin_some(db: sqlite3.Connection, day: int, chunk: int) -> None:
    found = _some(db, day, chunk)
    for each in found:
        _write(db, day, each, _last_of_lines(_read(db, day, each)))
    db.execute("UPDATE packed_days SET next = ? WHERE day = ?", (found[-1] + 1 if found else -1, day))


def _drop_some(db: sqlite3.Connection, day: int) -> None:
    """Remove bodies of a day; each line that is still known keeps its last state."""
    found = _some(db, day, 0)
    for chunk in found:
        lines = db.execute(
            "SELECT id FROM lines WHERE id >= ? AND id < ?", (chunk * _CHUNK, (chunk + 1) * _CHUNK)
        )
        known = {row[0] for row in lines}
        rows = _last_of_lines(
            sorted((*_read(db, _BASE, chunk), *_read(db, day, chunk)), key=lambda row: row.at)
        )
        _write(db, _BASE, chunk, sorted(row for row in rows if row.line in known))
        _write(db, day, chunk, ())
    if not found:
        db.execute("DELETE FROM packed_days WHERE day = ?", (day,))


def forget_some(db: sqlite3.Connection, oldest_at: float, max_lines: int = MAX_LINES) -> bool:
    """Forget lines unchanged since then whose client has no record any more, and those beyond `max_lines`.

    Returns whether there may be more.
    """
    gone = db.execute(
        "DELETE FROM lines WHERE id IN (SELECT l.id FROM lines l JOIN known_clients k ON k.id = client "
        "WHERE at < ? AND NOT EXISTS (SELECT 1 FROM clients c WHERE c.name = k.name) LIMIT ?)",
        (oldest_at, _FORGOTTEN_AT_ONCE),
    ).rowcount
    over = db.execute("SELECT count(*) FROM lines").fetchone()[0] - max_lines
    if over > 0:
        gone += db.execute(
            "DELETE FROM lines WHERE id IN (SELECT id FROM lines ORDER BY at LIMIT ?)",
            (min(over, _FORGOTTEN_AT_ONCE),),
        ).rowcount
    if gone:
        db.execute("DELETE FROM known_clients WHERE id NOT IN (SELECT client FROM lines)")
    return gone >= _FORGOTTEN_AT_ONCE


def forget_clients(db: sqlite3.Connection) -> None:
    """Delete all that is known of single clients."""
    for table in ("known_clients", "lines", "changes", "packed", "packed_days"):
        db.execute(f"DELETE FROM {table}")  # noqa: S608


def rename(db: sqlite3.Connection, names: Mapping[str, str]) -> None:
    """Rename clients. Two may get one name: what is asked of it is told from both."""
    rows = [(after, before) for before, after in names.items()]
    db.executemany("UPDATE known_clients SET name = ? WHERE name = ?", rows)


def names_of(db: sqlite3.Connection) -> list[str]:
    return [row[0] for row in db.execute("SELECT DISTINCT name FROM known_clients")]


def take_back(db: sqlite3.Connection, now: float) -> None:
    """The clock was ahead: of what it recorded in the future, the last state of each line is one of now."""
    today, at = int(now // DAY), int(now)
    for (id_,) in db.execute("SELECT id FROM packed WHERE id >= ?", (_id(today, 0),)).fetchall():
        day, chunk = id_ >> _CHUNK_BITS, id_ - _id(id_ >> _CHUNK_BITS, 0)
        rows = [row for row in _read(db, day, chunk) if row.at <= at]
        db.executemany("INSERT OR IGNORE INTO changes VALUES(?, ?, ?)", rows)
        db.execute("DELETE FROM packed WHERE id = ?", (id_,))
    db.execute("DELETE FROM packed_days WHERE day >= ?", (today,))
    db.execute("DELETE FROM changes WHERE at > ?", (at,))
    db.execute("INSERT OR REPLACE INTO changes SELECT id, ?, state FROM lines WHERE at > ?", (at, at))
    db.execute("UPDATE lines SET at = ? WHERE at > ?", (at, at))
    db.execute("DELETE FROM shares WHERE at > ?", (at,))
    db.execute("UPDATE about SET value = ? WHERE name = 'timeline_since' AND value > ?", (now, now))


# --- questions


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept, in Unix seconds: the first day with changes, and since when all of them are there."""

    since: float
    exact_since: float


def kept(db: sqlite3.Connection, now: float, oldest: int) -> Kept:
    """Days before `oldest` are only there until they are removed."""
    since = max(begin(db, now), oldest * DAY)
    dropped = db.execute("SELECT 1 FROM packed_days WHERE day = ?", (_BASE,)).fetchone()
    first, thin = db.execute(
        "SELECT min(day), max(iif(thin, day, NULL)) FROM packed_days WHERE day >= 0"
    ).fetchone()
    if dropped and first is not None:
        since = max(since, first * DAY)
    since = min(since, now)  # with a timeline of less than a day
    return Kept(since, since if thin is None else max(since, (thin + 1) * DAY))


def lines_of(db: sqlite3.Connection, names: Sequence[str]) -> dict[Stream, list[int]]:
    """The lines of a client, which may have been known by several names, by stream."""
    found: dict[Stream, list[int]] = {}
    places = ",".join("?" * len(names))
    for id_, *stream in db.execute(
        "SELECT l.id, version, language, moniker FROM known_clients k JOIN lines l ON l.client = k.id "  # noqa: S608
        f"JOIN known_streams t ON t.id = l.stream WHERE k.name IN ({places}) "
        "ORDER BY moniker, version, language",
        names,
    ):
        found.setdefault((stream[0], stream[1], stream[2]), []).append(id_)
    return found


@dataclass(frozen=True, slots=True)
class Standing:
    """A line's last change up to a moment, the first after it, and whether none between can be missing."""

    change: Change | None
    after: Change | None
    exact: bool


def _time(change: Change) -> int:
    return change.at


class Reader:
    """Reads lines' changes. For one transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._days = {
            row["day"]: bool(row["thin"]) for row in db.execute("SELECT day, thin FROM packed_days")
        }
        self._order = sorted(self._days)

    def changes(self, lines: Sequence[int], since: float, until: float) -> list[Change]:
        """Those of this time, the oldest first."""
        found: dict[tuple[int, int], Change] = {}
        for line in lines:
            for day in self._order:
                if day >= 0 and since // DAY <= day <= until // DAY:
                    found |= {row[:2]: row for row in self._of_day(line, day)}
            found |= {row[:2]: row for row in self._unpacked(line, "at >= ?", int(since))}
        inside = (row for row in found.values() if since <= row.at <= until)
        return sorted(inside, key=lambda row: (row.at, row.line))

    def at(self, lines: Sequence[int], at: float) -> Standing:
        found = [self._of_line(line, int(at)) for line in lines]
        change = max(
            (one.change for one in found if one.change), key=lambda row: (row.at, row.line), default=None
        )
        after = min(
            (one.after for one in found if one.after), key=lambda row: (row.at, row.line), default=None
        )
        return Standing(change, after, all(one.exact for one in found))

    def _of_line(self, line: int, at: int) -> Standing:
        before = list(self._unpacked(line, "at <= ? ORDER BY at DESC LIMIT 1", at))
        after = list(self._unpacked(line, "at > ? ORDER BY at LIMIT 1", at))
        today = at // DAY
        of_today = self._unpacked(line, "at >= ? AND at < ?", today * DAY, (today + 1) * DAY)
        here = sorted({row.at: row for row in (*self._of_day(line, today), *of_today)}.values())
        place = bisect_right([row.at for row in here], at)
        before += here[:place]
        after += here[place:]
        # A thin day has its last change only, one with too many changes lacks some before the last.
        lacks = self._days.get(today, False) or (len(here) >= MAX_DAILY and place == len(here) - 1)
        exact = not (lacks and place < len(here))
        for day in reversed(self._order[: bisect_left(self._order, today)]):
            if before and max(map(_time, before)) // DAY > day:
                break
            if rows := self._of_day(line, day):
                before.append(rows[-1])
                break
        for day in self._order[bisect_right(self._order, today) :]:
            if after and min(map(_time, after)) // DAY < day:
                break
            if rows := self._of_day(line, day):
                after.append(rows[0])
                break
        return Standing(max(before, key=_time, default=None), min(after, key=_time, default=None), exact)

    def _unpacked(self, line: int, which: str, *values: int) -> Iterator[Change]:
        rows = self._db.execute(
            f"SELECT line, at, state FROM changes WHERE line = ? AND {which}",  # noqa: S608 - constants
            (line, *values),
        )
        return (Change(*row) for row in rows)

    def _of_day(self, line: int, day: int) -> list[Change]:
        if day not in self._days:
            return []
        rows = _read(self._db, day, line // _CHUNK)
        return rows[bisect_left(rows, (line,)) : bisect_left(rows, (line + 1,))]


def revision_of(state: int) -> str:
    return f"{state >> 1:09}"


def is_taken(state: int) -> bool:
    return bool(state & 1)


# --- shares by age

AGES = {"1d": 1, "3d": 3, "7d": 7, "30d": 30}
"""The classes of age, in days since the date in a revision's name; further ones are "older" and "unknown"."""
CLASSES = (*AGES, "older", "unknown")
ACTIVE_SECONDS = 7 * DAY
"""A client is active in a stream if it requested something of it within this time."""
HOURLY_SECONDS = 100 * DAY
"""Points are kept hourly for so long, then the last of each day."""
MAX_STREAMS = 20
_COLUMNS = ("d1", "d3", "d7", "d30", "older", "unknown")
_COUNTS = """
count(*) AS clients, total(current), total(has >= :d1), total(has >= :d3 AND has < :d1),
total(has >= :d7 AND has < :d3), total(has >= :d30 AND has < :d7), total(has <> '' AND has < :d30),
total(has = '')
"""
_ACTIVE = """
SELECT stream, client, max(revision, came_from) AS has, max(revision, came_from) >= n.newest AS current
FROM standings JOIN temp.newest n USING(stream) WHERE asked_at BETWEEN :since AND :until
"""
_OF_CLIENTS = f"""
SELECT {_COUNTS} FROM (SELECT coalesce(min(nullif(has, '')), '') AS has, min(current) AS current
FROM ({_ACTIVE} AND stays) GROUP BY client)
"""  # noqa: S608 - constants of ours
_OF_STREAMS = (
    f"SELECT stream, {_COUNTS} FROM ({_ACTIVE}) GROUP BY stream ORDER BY clients DESC LIMIT {MAX_STREAMS}"  # noqa: S608
)


def count_ages(
    db: sqlite3.Connection, now: float, held: Mapping[Stream, str], left_out: Iterable[Stream]
) -> Counter[str]:
    """Count the active clients by the age of their revision, store it as this hour's, and return it.

    A client counts by the oldest of its known revisions, of streams that are not `left_out`.
    """
    begin(db, now)
    streams = {
        row[0]: ((row[1], row[2], row[3]), row[4])
        for row in db.execute(
            "SELECT t.id, version, language, moniker, max(max(revision, came_from, asked)) "
            "FROM standings JOIN streams t ON t.id = stream GROUP BY stream"
        )
    }
    left_out = set(left_out)
    db.execute(
        "CREATE TEMP TABLE IF NOT EXISTS newest(stream INTEGER PRIMARY KEY, newest TEXT, stays INTEGER)"
    )
    db.execute("DELETE FROM temp.newest")
    newest = {id_: max(known, held.get(stream, "")) for id_, (stream, known) in streams.items()}
    db.executemany(
        "INSERT INTO temp.newest VALUES(?, ?, ?)",
        [(id_, newest[id_], streams[id_][0] not in left_out) for id_ in streams],
    )
    edges = {
        f"d{days}": time.strftime("%y%m%d", time.gmtime(max(now, 0) - days * DAY)) for days in AGES.values()
    }
    asking = {"since": now - ACTIVE_SECONDS, "until": now + JUMP_SECONDS, **edges}
    hour = int(now // HOUR) * HOUR
    site = [int(value) for value in db.execute(_OF_CLIENTS, asking).fetchone()]
    rows = [(hour, 0, *site, "", "")]
    for id_, *counts in db.execute(_OF_STREAMS, asking).fetchall():
        stream = streams[id_][0]
        db.execute("INSERT OR IGNORE INTO known_streams(version, language, moniker) VALUES(?, ?, ?)", stream)
        own = db.execute(
            "SELECT id FROM known_streams WHERE version = ? AND language = ? AND moniker = ?", stream
        ).fetchone()[0]
        rows.append((hour, own, *map(int, counts), newest[id_], held.get(stream, "")))
    db.execute("DELETE FROM shares WHERE at = ?", (hour,))
    db.executemany(f"INSERT INTO shares VALUES({','.join('?' * 12)})", rows)
    return Counter(dict(zip(CLASSES, site[2:], strict=True)))


def prune_shares(db: sqlite3.Connection, now: float, kept_seconds: float) -> None:
    hourly = now - HOURLY_SECONDS
    db.execute("DELETE FROM shares WHERE at < ?", (now - kept_seconds,))
    db.execute(
        "DELETE FROM shares WHERE at < :hourly AND at NOT IN "
        "(SELECT max(at) FROM shares WHERE at < :hourly GROUP BY at / :day)",
        {"hourly": hourly, "day": DAY},
    )
    db.execute(
        "DELETE FROM known_streams WHERE id NOT IN (SELECT stream FROM lines) "
        "AND id NOT IN (SELECT stream FROM shares)"
    )


class Share(NamedTuple):
    """The active clients of an hour; `stream` is None for the whole site. `ages` has the CLASSES."""

    at: int
    stream: Stream | None
    clients: int
    current: int
    ages: dict[str, int]
    newest: str
    held: str


def shares(db: sqlite3.Connection, since: float, until: float) -> list[Share]:
    """The points of this time, the oldest first, the site's before those of its streams."""
    names: dict[int, Any] = {
        row[0]: (row[1], row[2], row[3])
        for row in db.execute("SELECT id, version, language, moniker FROM known_streams")
    }
    rows = db.execute(
        "SELECT * FROM shares WHERE at >= ? AND at <= ? ORDER BY at, stream", (since, until)
    ).fetchall()
    return [
        Share(
            row["at"],
            names[row["stream"]] if row["stream"] else None,
            row["clients"],
            row["current"],
            {age: row[column] for age, column in zip(CLASSES, _COLUMNS, strict=True)},
            row["newest"],
            row["held"],
        )
        for row in rows
        if not row["stream"] or row["stream"] in names
    ]


def last_of_days(found: list[Share], zone: tzinfo | None) -> list[Share]:
    """Of each day in the site's time zone the last hour that was counted; `found` is in order of time."""
    last: dict[date, int] = {}
    for share in found:
        last[datetime.fromtimestamp(share.at, zone).date()] = share.at
    kept = set(last.values())
    return [share for share in found if share.at in kept]
