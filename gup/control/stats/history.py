"""The history: the gains of the counters in each minute of a day, each hour of ninety days, and each day.

All minutes, all hours and all days add up to the counters, across restarts too: a reading adds what was
counted since the one before, in one transaction with the marks that it is compared with. The wall clock only
names points. Minutes and hours are dropped in the order in which they were begun: a clock that is wrong for
an hour adds an hour of misplaced points and removes nothing; when it is put back, `take_back` brings them to
the present. Days are the savings ledger, in the site's zone.
"""

import asyncio
import functools
import logging
import math
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gup.config import Settings
from gup.control.api.schemas import StreamTraffic, TrafficByCause
from gup.control.dependencies import ControlDependencies
from gup.control.eviction import JUMP_SECONDS
from gup.control.stats import doctor, timeline
from gup.control.stats.database import StatsDatabase
from gup.metrics import (
    CODES_OF_RESULT,
    KINDS,
    MAX_STREAMS,
    PURPOSES,
    SOURCES,
    STREAM_WASTED,
    WASTED,
    parse_series,
)
from gup.upstream.bandwidth import site_time

_log = logging.getLogger("gup.control.stats")
SENT, RECEIVED = "client_sent_bytes", "upstream_received_bytes"
FIGURES = {
    "gup_client_sent_bytes_total": SENT,
    "gup_upstream_received_bytes_total": RECEIVED,
    "gup_upstream_wasted_bytes_total": "upstream_wasted_bytes",
    "gup_evictions_total": "evictions.{reason}",
    "gup_evicted_bytes_total": "evicted_bytes",
    "gup_integrity_failures_total": "integrity_failures",
    "gup_requests_total": "requests.{result}",
    "gup_fills_total": "fills.{outcome}",
}
"""The sums of a minute or hour: a metric, and the name of its sum, with labels of the series in it."""
METRICS = (
    *FIGURES,
    "gup_peer_sent_bytes_total",
    "gup_peer_received_bytes_total",
    "gup_stream_sent_bytes_total",
    "gup_stream_received_bytes_total",
    STREAM_WASTED.name,
)
"""The metrics whose series make up a day."""
EARLIER = ""
"""The day of everything counted before the days that are kept."""
MINUTE, HOUR, DAY = 60, 3600, 86400
KEPT = {MINUTE: 26 * 60, HOUR: 90 * 24 + 1}
"""How many points are kept, by their length in seconds; a day has up to 25 hours."""
SPANS = {"hour": (MINUTE, HOUR), "day": (MINUTE, DAY), "week": (HOUR, 7 * DAY), "quarter": (HOUR, 90 * DAY)}
"""The spans that can be asked for: length of a point and of the span, in seconds."""
_RATE_SECONDS = 5.0
"""The window of rates."""
Counts = Mapping[str, int]
"""Counters by series name."""


class RateWindow:
    """The increase of a counter over a time window, from some twenty readings by a monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._marks: deque[tuple[float, int]] = deque()
        self._last = (0.0, 0)

    def see(self, total: int, now: float) -> int:
        """The increase of the counter within the window (0 at the first call)."""
        if not self._marks or now - self._marks[-1][0] >= self._seconds / 20:
            self._marks.append((now, total))
        while len(self._marks) > 1 and self._marks[1][0] <= now - self._seconds:
            self._marks.popleft()
        self._last = now, total
        return max(0, total - self._marks[0][1])

    def per_second(self) -> float | None:
        """None until there are two readings."""
        if not self._marks or self._last[0] <= self._marks[0][0]:
            return None
        (then, before), (now, after) = self._marks[0], self._last
        return max(0.0, (after - before) / (now - then))

    def bytes_per_second(self) -> int:
        """0 until there are two readings."""
        return round(self.per_second() or 0)


# --- figures


@functools.cache
def _figure(series: str) -> str | None:
    metric, labels = parse_series(series)
    return FIGURES[metric].format(**labels) if metric in FIGURES else None


def sums_of(counts: Counts) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, value in counts.items():
        if value and (figure := _figure(name)) is not None:
            found[figure] += value
    return found


def shown(sums: Counter[str]) -> dict[str, Any]:
    """The figures by name, as the API shows them; `saved_bytes` is sent minus received."""
    return {
        **{name: sums[name] for name in FIGURES.values() if "." not in name},
        "saved_bytes": sums[SENT] - sums[RECEIVED],
        "requests": {result: sums[f"requests.{result}"] for result in CODES_OF_RESULT},
        "fills": {outcome: sums[f"fills.{outcome}"] for outcome in ("committed", "failed", "unstorable")},
    }


def added_up(counts: Iterable[Counts]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)  # unlike +, this keeps what is below zero
    return total


_CAUSES = {
    "gup_client_sent_bytes_total": ("sent", "source", SOURCES),
    "gup_upstream_received_bytes_total": ("received", "purpose", PURPOSES),
    "gup_upstream_wasted_bytes_total": ("wasted", "reason", WASTED),
}


def traffic(counts: Counts) -> TrafficByCause:
    """Sent, received, saved and wasted bytes with their parts. Saved may be below zero."""
    parts = {way: dict.fromkeys(causes, 0) for way, _, causes in _CAUSES.values()}
    for name, value in counts.items():
        metric, labels = parse_series(name)
        if metric in _CAUSES:
            way, label, _ = _CAUSES[metric]
            parts[way][labels[label]] = parts[way].get(labels[label], 0) + value
    sent, received, wasted = (sum(by_cause.values()) for by_cause in parts.values())
    return TrafficByCause.of(sent, received, wasted, **parts)


def traffic_by_stream(counts: Counts, labels: Sequence[tuple[str, str]]) -> list[StreamTraffic]:
    """By product, language and kind, the most sent first. `labels` are product and language of each slot."""
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    for name, value in counts.items():
        metric, series = parse_series(name)
        if metric.startswith("gup_stream_") and value:
            at = (*labels[min(int(series["slot"]), MAX_STREAMS)], series["kind"])
            rows.setdefault(at, Counter())[metric.split("_")[2]] += value
    found = [
        StreamTraffic.of(
            *(moved[way] for way in ("sent", "received", "wasted")),
            product=product,
            language=language,
            kind=kind,
        )
        for (product, language, kind), moved in rows.items()
    ]
    return sorted(found, key=lambda r: (-r.sent_bytes, r.product, r.language, KINDS.index(r.kind)))


def within(day: str, today: str, days: int) -> bool:
    """Whether `day` is one of the last `days`, today included."""
    if not day or day > today:
        return False
    return (date.fromisoformat(today) - date.fromisoformat(day)).days < days


# --- readings and days


@dataclass(frozen=True, slots=True)
class Reading:
    """The counters at one moment, and since when they count (Unix seconds)."""

    totals: Counts
    at: float
    installed_at: float
    settings: Settings

    @property
    def today(self) -> str:
        """The date in the site's time zone, whose file is read when it is first used."""
        return site_time(self.settings, self.at).date().isoformat()

    def gained_since(self, before: Counts) -> dict[str, int]:
        """The changes of the series that days are made of."""
        now = {name: n for name, n in self.totals.items() if n and name.partition("{")[0] in METRICS}
        gained = {name: now.get(name, 0) - before.get(name, 0) for name in now.keys() | before.keys()}
        return {name: value for name, value in gained.items() if value}


_ADD_TO_DAY = "ON CONFLICT(day, series) DO UPDATE SET value = value + excluded.value"


def add_reading(db: sqlite3.Connection, reading: Reading, *, gains_only: bool = False) -> dict[str, int]:
    """Add what was counted since the last reading to the day of this one; returns that.

    `gains_only`: counters below those of the last reading are left as they are.
    """
    since = db.execute("SELECT value FROM about WHERE name = 'installed_at'").fetchone()
    if since is not None and since[0] != reading.installed_at:  # other counters than those of the marks
        db.execute("INSERT INTO old_days SELECT ?, day, series, value FROM days", since)
        db.execute("DELETE FROM days")
        db.execute("DELETE FROM marks")
        _log.warning("the counters were reset: savings begin at zero, the old ones are in table old_days")
        since = None
    read = db.execute("SELECT value FROM about WHERE name = 'read_at'").fetchone()
    known = since is not None and read is not None and read[0] < reading.at
    about = (reading.installed_at, reading.at)
    db.execute("INSERT OR REPLACE INTO about VALUES('installed_at', ?), ('read_at', ?)", about)
    marks = dict(db.execute("SELECT series, value FROM marks"))
    gained = reading.gained_since(marks)
    if gains_only:
        gained = {name: value for name, value in gained.items() if value > 0}
    began_today = replace(reading, at=reading.installed_at).today == reading.today
    day = reading.today if marks or known or began_today else EARLIER
    rows = [(day, name, value) for name, value in gained.items()]
    db.executemany(f"INSERT INTO days VALUES(?, ?, ?) {_ADD_TO_DAY}", rows)
    db.executemany(
        "INSERT INTO marks VALUES(?, ?) ON CONFLICT(series) DO UPDATE SET value = value + excluded.value",
        list(gained.items()),
    )
    return gained


def days_until(db: sqlite3.Connection | None, reading: Reading) -> dict[str, Counts]:
    """What each day counted, the oldest first; what is not stored yet is today's. None: nothing is stored."""
    found: dict[str, dict[str, int]] = {}
    if db is not None:
        for day, series, value in db.execute("SELECT day, series, value FROM days ORDER BY day"):
            found.setdefault(day, {})[series] = value
    rest = reading.gained_since(added_up(found.values()))
    if rest:
        day = EARLIER if db is None else reading.today
        found[day] = dict(added_up([found.get(day, {}), rest]))
    return dict(found)


def add_covered(db: sqlite3.Connection, day: str, seconds: float) -> None:
    """Of this day gup has counted for so many seconds more."""
    db.execute(
        "INSERT INTO covered VALUES(?, ?) "
        "ON CONFLICT(day) DO UPDATE SET seconds = seconds + excluded.seconds",
        (day, seconds),
    )


def covered_days(db: sqlite3.Connection, since: str, until: str) -> tuple[str | None, dict[str, float]]:
    """The first day of which it is known how long gup counted; and for how many seconds on these days."""
    (first,) = db.execute("SELECT min(day) FROM covered").fetchone()
    return first, dict(
        db.execute("SELECT day, seconds FROM covered WHERE day >= ? AND day <= ?", (since, until)).fetchall()
    )


def prune_days(db: sqlite3.Connection, oldest: str) -> None:
    """Add up the days before `oldest`."""
    db.execute("DELETE FROM covered WHERE day < ?", (oldest,))
    old = {"earlier": EARLIER, "oldest": oldest}
    db.execute(
        "INSERT INTO days SELECT :earlier, series, sum(value) FROM days "  # noqa: S608
        "WHERE day < :oldest AND day <> :earlier "
        f"GROUP BY series {_ADD_TO_DAY}",
        old,
    )
    db.execute("DELETE FROM days WHERE day < :oldest AND day <> :earlier", old)


# --- minutes and hours


@dataclass(slots=True)
class Point:
    """One minute or hour, as it is stored.

    Peaks are the highest rates, in bytes per second; `wan_limit` (0: none) and `entries_bytes` the last
    values. `number` counts the points of its length in the order in which they were begun. `covered_seconds`
    is the observed time: less than its length at a start, more when the clock was put back.
    """

    wan_peak: int = 0
    client_peak: int = 0
    wan_limit: int = 0
    entries_bytes: int = 0
    step: int = 0
    at: int = 0
    number: int = 0
    covered_seconds: float = 0.0
    sums: Counter[str] = field(default_factory=Counter)

    def note(self, later: "Point") -> None:
        self.wan_peak = max(self.wan_peak, later.wan_peak)
        self.client_peak = max(self.client_peak, later.client_peak)
        self.wan_limit, self.entries_bytes = later.wan_limit, later.entries_bytes


_POINT = TypeAdapter(Point)


def points_of(db: sqlite3.Connection, step: int, since: float, until: float) -> list[Point]:
    """The points of one length that began in this time, the oldest first; unreadable ones are left out."""
    found = []
    for (text,) in db.execute(
        "SELECT fields FROM points WHERE step = ? AND at >= ? AND at <= ? ORDER BY at", (step, since, until)
    ):
        try:
            found.append(_POINT.validate_json(text))
        except ValidationError:
            continue
    return found


def add_gain(db: sqlite3.Connection, now: float, gained: Counter[str], seconds: float, gauges: Point) -> None:
    """Add what was counted within this many seconds to the minute and the hour of `now` (Unix)."""
    for step, kept in KEPT.items():
        # Counters that lost their last seconds in a power cut gain nothing: the earlier count was right.
        number = _add_to_point(db, step, now, +gained, seconds, gauges)
        db.execute("DELETE FROM points WHERE step = ? AND number <= ?", (step, number - kept))


def _add_to_point(
    db: sqlite3.Connection, step: int, now: float, gained: Counter[str], seconds: float, gauges: Point
) -> int:
    """Returns the number of the next point of this length."""
    at = int(now // step) * step
    (newest,) = db.execute("SELECT max(number) FROM points WHERE step = ?", (step,)).fetchone()
    number = 0 if newest is None else newest + 1
    point = next(iter(points_of(db, step, at, at)), Point(step=step, at=at, number=number))
    point.sums.update(gained)
    point.covered_seconds += seconds
    point.note(gauges)
    row = (step, at, point.number, _POINT.dump_json(point).decode())
    db.execute("INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?)", row)
    return number


_TIMES = (
    *(("clients", "first_at"), ("clients", "seen_at")),
    ("slow", "at"),
    *doctor.TIMES,
    *(("standings", "taken_at"), ("standings", "asked_at"), ("takes", "taken_at")),
    *(("incidents", "began_at"), ("incidents", "ended_at")),
)


def take_back(db: sqlite3.Connection, reading: Reading) -> None:
    """Bring all that lies in the future of this reading to its time: the clock was ahead when it was written.

    Days and points are added to the present ones, so that they still add up to the counters.
    """
    for table, column in _TIMES:
        db.execute(f"UPDATE {table} SET {column} = :at WHERE {column} > :at", {"at": reading.at})  # noqa: S608
    db.execute(
        "INSERT INTO days SELECT :today, series, sum(value) FROM days WHERE day > :today "  # noqa: S608
        f"GROUP BY series {_ADD_TO_DAY}",
        {"today": reading.today},
    )
    db.execute("DELETE FROM days WHERE day > ?", (reading.today,))
    timeline.take_back(db, reading.at)
    db.execute("DELETE FROM covered WHERE day > ?", (reading.today,))
    for step in KEPT:
        ahead = points_of(db, step, int(reading.at) + 1, math.inf)
        db.execute("DELETE FROM points WHERE step = ? AND at > ?", (step, reading.at))
        for point in ahead:
            _add_to_point(db, step, reading.at, point.sums, point.covered_seconds, point)


class Recorder:
    """Reads the counters: each second for rates (`wan`, `clients`), and from time to time for history and
    savings.

    A reading that the disk refuses is counted with the next one.
    """

    def __init__(
        self,
        dependencies: ControlDependencies,
        database: StatsDatabase,
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.wan, self.clients = RateWindow(_RATE_SECONDS), RateWindow(_RATE_SECONDS)
        self._dependencies = dependencies
        self._database = database
        self._clock, self._monotonic = clock, monotonic
        self._gauges = Point()
        self._writing = asyncio.Lock()
        self._read_at: float | None = None
        """When the last reading was stored, by the monotonic clock; None before the first of this process."""

    def look(self, entries_bytes: int) -> None:
        sums, now = sums_of(self._dependencies.totals()), self._monotonic()
        self.wan.see(sums[RECEIVED], now)
        self.clients.see(sums[SENT], now)
        wan, clients = self.wan.bytes_per_second(), self.clients.bytes_per_second()
        self._gauges.note(Point(wan, clients, self._dependencies.site_rate(), entries_bytes))

    async def write(self) -> None:
        async with self._writing:
            reading, now, own = self._reading(), self._monotonic(), self._dependencies.since_start()
            gauges, self._gauges = self._gauges, Point()

            def add(db: sqlite3.Connection) -> None:
                seconds = self._catch_up(db, reading, own) if self._read_at is None else now - self._read_at
                add_covered(db, reading.today, seconds)
                before = db.execute("SELECT value FROM about WHERE name = 'read_at'").fetchone()
                add_gain(db, reading.at, sums_of(add_reading(db, reading)), seconds, gauges)
                # A clock before the installation is wrong itself: perhaps one without a battery, not yet set.
                if before is not None and reading.installed_at <= reading.at < before[0] - JUMP_SECONDS:
                    _log.warning("the clock was set back: times in the future are moved to the present")
                    take_back(db, reading)

            if await self._database.store("savings", add):
                self._read_at = now
            else:
                gauges.note(self._gauges)
                self._gauges = gauges

    def _catch_up(self, db: sqlite3.Connection, reading: Reading, own: Counts) -> float:
        """Add what was counted before this start to the minute and the day of the last reading.

        Returns the seconds for which this process was away, if that was only a moment. Without an earlier
        reading the times of these counts are unknown.
        """
        read = db.execute("SELECT value FROM about WHERE name = 'read_at'").fetchone()
        at = reading.at if read is None else read[0]
        before = {name: value - own.get(name, 0) for name, value in reading.totals.items()}
        gained = add_reading(db, replace(reading, totals=before, at=at), gains_only=True)
        if read is None:
            return 0.0
        if gained:
            add_gain(db, at, sums_of(gained), 0.0, Point())
        return reading.at - at if 0 <= reading.at - at <= MINUTE else 0.0

    def _reading(self) -> Reading:
        process = self._dependencies
        return Reading(process.totals(), self._clock(), process.installed_at, process.settings())

    async def series(self, span: str) -> list[Point]:
        """The points of a span that ends now, the oldest first; none for times when gup did not run."""
        await self.write()
        (step, length), now = SPANS[span], self._clock()
        return await self._database.run(lambda db: points_of(db, step, now - length - step + 1, now))

    async def savings(self) -> tuple[str, dict[str, Counts]]:
        """Today's date, and what each day counted, the oldest first: together the present counters."""
        await self.write()
        reading = self._reading()
        try:
            return await self._database.run(lambda db: (reading.today, days_until(db, reading)))
        except OSError:  # single days can't be read now; their total is known
            return await asyncio.to_thread(lambda: (reading.today, days_until(None, reading)))
