"""The history: what the counters gained in each minute of a day and each hour of ninety days.

Points add up to the counters, across restarts too: what was counted since the last write is added to the
point that was written last. The wall clock only names points. They are dropped in the order in which they
were begun: a clock that is wrong for an hour adds an hour of misplaced points and removes nothing.
"""

import asyncio
import functools
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from gup.control.exposition import parse_series
from gup.control.rate_window import RateWindow
from gup.control.stats.database import StatsDatabase
from gup.metrics import CODES_OF_RESULT

_log = logging.getLogger("gup.control.history")

SENT, RECEIVED = "client_sent_bytes", "upstream_received_bytes"
_FIGURES = {
    "gup_client_sent_bytes_total": SENT,
    "gup_upstream_received_bytes_total": RECEIVED,
    "gup_upstream_wasted_bytes_total": "upstream_wasted_bytes",
    "gup_evicted_bytes_total": "evicted_bytes",
    "gup_integrity_failures_total": "integrity_failures",
    "gup_requests_total": "requests.{result}",
    "gup_fills_total": "fills.{outcome}",
}
"""The sums that are kept: the metric, and the name, which may have labels of the series in it."""


@functools.cache
def _figure(series: str) -> str | None:
    metric, labels = parse_series(series)
    return _FIGURES[metric].format(**labels) if metric in _FIGURES else None


def sums_of(words: Mapping[str, int]) -> Counter[str]:
    """The figures of `words`, which are counters by series name."""
    found: Counter[str] = Counter()
    for name, value in words.items():
        if value and (figure := _figure(name)) is not None:
            found[figure] += value
    return found


def shown(sums: Counter[str]) -> dict[str, Any]:
    """The figures by name, as the API shows them; `saved_bytes` is sent minus received."""
    return {
        **{name: sums[name] for name in _FIGURES.values() if "." not in name},
        "saved_bytes": sums[SENT] - sums[RECEIVED],
        "requests": {result: sums[f"requests.{result}"] for result in CODES_OF_RESULT},
        "fills": {outcome: sums[f"fills.{outcome}"] for outcome in ("committed", "failed", "unstorable")},
    }


MINUTE = 60
HOUR = 3600
DAY = 86400
KEPT: Mapping[int, int] = {MINUTE: 26 * 60, HOUR: 90 * 24 + 1}
"""How many points are kept, by their length in seconds; a day has up to 25 hours."""
SPANS: Mapping[str, tuple[int, int]] = {
    "hour": (MINUTE, HOUR),
    "day": (MINUTE, DAY),
    "week": (HOUR, 7 * DAY),
    "quarter": (HOUR, 90 * DAY),
}
"""The spans that can be asked for: length of a point and of the span, in seconds."""


@dataclass(slots=True)
class Point:
    """One minute or hour. Only History changes it, while it is the present one.

    `number` is its place in the order in which points of its length were begun. `covered_seconds` is how much
    of it was seen: less than its length at a start, more when the clock was put back. Rates are bytes per
    second, the highest of its time; `wan_limit` is 0 when unlimited.
    """

    step: int
    at: int
    number: int
    covered_seconds: float = 0.0
    sums: Counter[str] = field(default_factory=Counter)
    wan_peak: int = 0
    wan_limit: int = 0
    client_peak: int = 0
    entries_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Reached:
    """The counters up to which the points reach, since when they count, and the time (Unix)."""

    sums: Counter[str]
    installed_at: float
    at: float


_POINT, _REACHED = TypeAdapter(Point), TypeAdapter(Reached)


class History:
    """Points by length and time. Only `begin` and `see` change it, on the event loop."""

    def __init__(self) -> None:
        self._points: dict[int, dict[int, Point]] = {step: {} for step in KEPT}
        self._next = dict.fromkeys(KEPT, 0)
        self._reached: Reached | None = None
        self._seen_steady: float | None = None
        self._dirty: set[tuple[int, int]] = set()

    def begin(
        self, points: Iterable[Point], reached: Reached | None, present: Reached, before_start: Counter[str]
    ) -> None:
        """Continue what was stored. Without `reached` nothing was: only the counts since the start are taken.

        `present` is how the counters stand, `before_start` how they stood when the service started. What was
        counted since the last writing belongs to the point written last. Counters that began anew
        (`installed_at` differs) have gained all that they show.
        """
        for point in sorted(points, key=lambda point: point.number):
            self._points[point.step][point.at] = point
            self._next[point.step] = point.number + 1
        self._forget()
        if reached is None:
            self._reached = Reached(before_start, present.installed_at, present.at)
            return
        known = reached.sums if reached.installed_at == present.installed_at else Counter[str]()
        away_seconds = present.at - reached.at
        sums, at = known, reached.at
        if before_start - known:
            sums, at = before_start, present.at
        elif 0 <= away_seconds <= MINUTE:
            sums, at = present.sums, present.at
        if at != reached.at:
            self._add(reached.at, sums - known, min(max(away_seconds, 0.0), MINUTE))
        self._reached = Reached(sums, present.installed_at, at)

    def see(
        self,
        sums: Counter[str],
        now: float,
        steady: float,
        *,
        wan_rate: int = 0,
        wan_limit: int = 0,
        client_rate: int = 0,
        entries_bytes: int = 0,
    ) -> None:
        """Take in counters and gauges at `now` (Unix) and `steady` (a monotonic clock); after `begin`.

        Counters that lost their last seconds in a power cut gain nothing: what was counted before was true.
        """
        assert self._reached is not None
        elapsed = 0.0 if self._seen_steady is None else steady - self._seen_steady
        self._seen_steady = steady
        for point in self._add(now, sums - self._reached.sums, elapsed):
            point.wan_peak = max(point.wan_peak, wan_rate)
            point.client_peak = max(point.client_peak, client_rate)
            point.wan_limit, point.entries_bytes = wan_limit, entries_bytes
        self._reached = Reached(sums, self._reached.installed_at, now)

    def _add(self, now: float, gained: Counter[str], seconds: float) -> list[Point]:
        """Add to the minute and the hour of `now`."""
        found = []
        for step, points in self._points.items():
            at = int(now // step) * step
            self._dirty.add((step, at))
            if at not in points:
                points[at] = Point(step, at, self._next[step])
                self._next[step] += 1
                self._forget()
            points[at].sums.update(gained)
            points[at].covered_seconds += seconds
            found.append(points[at])
        return found

    def _forget(self) -> None:
        for step, limit in KEPT.items():
            while len(self._points[step]) > limit:
                del self._points[step][next(iter(self._points[step]))]

    @property
    def begun(self) -> bool:
        return self._reached is not None

    def due(self) -> tuple[list[Point], Reached]:
        """The points that changed since the last call, and up to where they reach."""
        assert self._reached is not None
        dirty, self._dirty = self._dirty, set()
        points = [self._points[step].get(at) for step, at in sorted(dirty)]
        return [point for point in points if point is not None], self._reached

    def put_back(self, points: Iterable[Point]) -> None:
        """These points could not be written: they stay due."""
        self._dirty |= {(point.step, point.at) for point in points}

    def series(self, span: str, now: float) -> list[Point]:
        """The points of a span that ends now, the oldest first; none for times when gup did not run."""
        step, length = SPANS[span]
        return list(self.between(step, now - length - step + 1, now))

    def between(self, step: int, since: float, until: float) -> Iterator[Point]:
        """The points of one length that began in this time, the oldest first."""
        points = self._points[step]
        yield from (points[at] for at in sorted(points) if since <= at <= until)


def added(points: Iterable[Point]) -> Counter[str]:
    """The sum of the points."""
    total: Counter[str] = Counter()
    for point in points:
        total.update(point.sums)
    return total


def load_points(db: sqlite3.Connection) -> tuple[list[Point], Reached | None]:
    """All stored points, and up to where they reach; no points and None when there are none.

    What can't be read is dropped, all of it: points and the counters up to which they reach belong together.
    """
    rows = db.execute("SELECT fields FROM points").fetchall()
    row = db.execute("SELECT fields FROM reached").fetchone()
    try:
        return [_POINT.validate_json(text) for (text,) in rows], _REACHED.validate_json(
            row[0]
        ) if row else None
    except ValueError as error:
        _log.warning("the history is damaged and is begun anew: %s", error)
        db.execute("DELETE FROM points")
        db.execute("DELETE FROM reached")
    return [], None


def write_points(db: sqlite3.Connection, points: Sequence[Point], reached: Reached) -> None:
    """Store points, in place of their earlier versions."""
    db.executemany(
        "INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?)",
        [(point.step, point.at, point.number, _POINT.dump_json(point).decode()) for point in points],
    )
    for step, kept in KEPT.items():
        db.execute(
            "DELETE FROM points WHERE step = ?1 AND number <= "
            "(SELECT MAX(number) FROM points WHERE step = ?1) - ?2",
            (step, kept),
        )
    db.execute("INSERT OR REPLACE INTO reached VALUES (1, ?)", (_REACHED.dump_json(reached).decode(),))


WRITE_SECONDS = 30.0
_RATE_SECONDS = 5.0
"""The window of rates."""


class HistoryRecorder:
    """Keeps the history; `wan` and `clients` are the present rates."""

    def __init__(
        self,
        database: StatsDatabase,
        on_written: Callable[[str | None], None],
        *,
        totals: Callable[[], Mapping[str, int]],
        since_start: Callable[[], Mapping[str, int]],
        installed_at: float,
        clock: Callable[[], float],
    ) -> None:
        """`totals` and `since_start` as in ControlDependencies; `clock` returns Unix seconds."""
        self.history = History()
        self.wan, self.clients = RateWindow(_RATE_SECONDS), RateWindow(_RATE_SECONDS)
        self._database = database
        self._on_written = on_written
        self._totals, self._since_start = totals, since_start
        self._installed_at = installed_at
        self._clock = clock

    async def open(self) -> None:
        """Read the stored history; when the disk refuses, it starts empty."""
        points: list[Point] = []
        reached = None
        try:
            points, reached = await self._database.run(load_points)
        except OSError as error:
            self._on_written(str(error))
        sums = sums_of(self._totals())
        present = Reached(sums, self._installed_at, self._clock())
        self.history.begin(points, reached, present, sums - sums_of(self._since_start()))

    def look(self, *, wan_limit: int, entries_bytes: int) -> None:
        """Take in what the counters gained; to be called once a second and before reading."""
        sums, steady = sums_of(self._totals()), time.monotonic()
        self.wan.see(sums[RECEIVED], steady)
        self.clients.see(sums[SENT], steady)
        if self.history.begun:
            self.history.see(
                sums,
                self._clock(),
                steady,
                wan_rate=self.wan.bytes_per_second(),
                wan_limit=wan_limit,
                client_rate=self.clients.bytes_per_second(),
                entries_bytes=entries_bytes,
            )

    async def write(self) -> None:
        """Store what changed; what the disk refuses stays due."""
        if not self.history.begun:
            return
        points, reached = self.history.due()
        try:
            await self._database.run(lambda db: write_points(db, points, reached))
        except (OSError, asyncio.CancelledError) as error:
            self.history.put_back(points)
            if isinstance(error, asyncio.CancelledError):
                raise
            self._on_written(str(error))
        else:
            self._on_written(None)
