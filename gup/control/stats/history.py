"""The history: what the counters gained in each minute of a day and each hour of ninety days.

Points add up to the counters, across restarts too: what was counted since the last write is added to the
point that was written last. The wall clock only names points. They are dropped in the order in which they
were begun: a clock that is wrong for an hour adds an hour of misplaced points and removes nothing.
"""

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gup.control.exposition import parse_series
from gup.control.rate_window import RateWindow
from gup.control.stats.database import StatsDatabase
from gup.metrics import CODES_OF_RESULT

_log = logging.getLogger("gup.control.history")

Sums = tuple[int, ...]
"""One number for each row of FIGURES, in that order."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A sum over the series of `metric` with these labels. A dot in the name makes a nested member."""

    name: str
    metric: str
    labels: Mapping[str, str] = field(default_factory=dict)


FIGURES: tuple[Figure, ...] = (
    Figure("client_sent_bytes", "gup_client_sent_bytes_total"),
    Figure("upstream_received_bytes", "gup_upstream_received_bytes_total"),
    Figure("upstream_wasted_bytes", "gup_upstream_wasted_bytes_total"),
    Figure("evicted_bytes", "gup_evicted_bytes_total"),
    Figure("integrity_failures", "gup_integrity_failures_total"),
    *(Figure(f"requests.{result}", "gup_requests_total", {"result": result}) for result in CODES_OF_RESULT),
    *(
        Figure(f"fills.{outcome}", "gup_fills_total", {"outcome": outcome})
        for outcome in ("committed", "failed", "unstorable")
    ),
)
NONE: Sums = (0,) * len(FIGURES)
SENT, RECEIVED = 0, 1
"""Positions in `Sums`."""


class Reader:
    """Sums series up. Remembers which series belong to which figure."""

    def __init__(self) -> None:
        self._figures_of: dict[str, tuple[int, ...]] = {}

    def sums(self, words: Mapping[str, int]) -> Sums:
        """The figures of `words`, which are counters by series name."""
        found = [0] * len(FIGURES)
        for name, value in words.items():
            if not value:
                continue
            figures = self._figures_of.get(name)
            if figures is None:
                figures = self._figures_of[name] = _figures_of(name)
            for position in figures:
                found[position] += value
        return tuple(found)


def _figures_of(name: str) -> tuple[int, ...]:
    metric, labels = parse_series(name)
    return tuple(
        position
        for position, figure in enumerate(FIGURES)
        if figure.metric == metric and figure.labels.items() <= labels.items()
    )


def shown(sums: Sums) -> dict[str, Any]:
    """The figures by name, as the API shows them; `saved_bytes` is sent minus received."""
    members: dict[str, Any] = {"saved_bytes": sums[SENT] - sums[RECEIVED]}
    for figure, value in zip(FIGURES, sums, strict=True):
        outer, _, inner = figure.name.partition(".")
        if inner:
            members.setdefault(outer, {})[inner] = value
        else:
            members[outer] = value
    return members


def by_name(sums: Sums) -> dict[str, int]:
    """The figures that are not 0 by name, as they are stored."""
    return {figure.name: value for figure, value in zip(FIGURES, sums, strict=True) if value}


def from_names(values: Mapping[str, int]) -> Sums:
    """Read what `by_name` gave; unknown figures are ignored."""
    return tuple(int(values.get(figure.name, 0)) for figure in FIGURES)


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


@dataclass(frozen=True, slots=True)
class Gauges:
    """Gauges at one moment. Rates are bytes per second; `wan_limit` is 0 when unlimited."""

    wan_rate: int = 0
    wan_limit: int = 0
    client_rate: int = 0
    entries_bytes: int = 0


@dataclass(slots=True)
class Point:
    """One minute or hour. Only History changes it, while it is the present one.

    `number` is its place in the order in which points of its length were begun. `covered_seconds` is how much
    of it was seen: less than its length at a start, more when the clock was put back.
    """

    step: int
    at: int
    number: int
    covered_seconds: float = 0.0
    sums: Sums = NONE
    wan_peak: int = 0
    wan_limit: int = 0
    client_peak: int = 0
    entries_bytes: int = 0

    def add(self, gained: Sums, seconds: float) -> None:
        self.sums = _plus(self.sums, gained)
        self.covered_seconds += seconds

    def note(self, gauges: Gauges) -> None:
        self.wan_peak = max(self.wan_peak, gauges.wan_rate)
        self.client_peak = max(self.client_peak, gauges.client_rate)
        self.wan_limit = gauges.wan_limit
        self.entries_bytes = gauges.entries_bytes

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "sums"}
        return fields | {"covered_seconds": round(self.covered_seconds, 3), "sums": by_name(self.sums)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Point":
        """Read what `to_json` gave; ValueError."""
        try:
            numbers = {name: int(fields[name]) for name in cls.__slots__ if name not in _NO_INTEGERS}
            return cls(
                **numbers,
                covered_seconds=float(fields["covered_seconds"]),
                sums=from_names(fields["sums"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a point: {error!r}") from error


_NO_INTEGERS = ("covered_seconds", "sums")


@dataclass(frozen=True, slots=True)
class Reached:
    """The counters up to which the points reach, since when they count, and the time (Unix)."""

    sums: Sums
    installed_at: float
    at: float


class History:
    """Points by length and time. Only `begin` and `see` change it, on the event loop."""

    def __init__(self) -> None:
        self._points: dict[int, dict[int, Point]] = {step: {} for step in KEPT}
        self._next = dict.fromkeys(KEPT, 0)
        self._reached: Reached | None = None
        self._seen_steady: float | None = None
        self._dirty: set[tuple[int, int]] = set()

    # --- taking in

    def begin(
        self, points: Iterable[Point], reached: Reached | None, present: Reached, before_start: Sums
    ) -> None:
        """Continue what was stored. Without `reached` nothing was: only the counts since the start are taken.

        `present` is how the counters stand, `before_start` how they stood when the service started. What was
        counted since the last writing belongs to the point written last. Counters that began anew
        (`installed_at` differs) have gained all that they show.
        """
        for point in sorted(points, key=lambda point: (point.step, point.number)):
            if point.step in KEPT:
                self._points[point.step][point.at] = point
                self._next[point.step] = point.number + 1
        self._forget()
        if reached is None:
            self._reached = Reached(before_start, present.installed_at, present.at)
            return
        same = reached.installed_at == present.installed_at
        self._reached = Reached(reached.sums if same else NONE, present.installed_at, reached.at)
        self._catch_up(before_start, present, away_seconds=present.at - reached.at)

    def _catch_up(self, before_start: Sums, present: Reached, *, away_seconds: float) -> None:
        """Add what was counted between the last write and this start."""
        assert self._reached is not None
        if any(self._gain(before_start)):
            until = Reached(before_start, present.installed_at, present.at)
        elif 0 <= away_seconds <= MINUTE:
            until = present
        else:
            return
        self._add(self._reached.at, self._gain(until.sums), min(max(away_seconds, 0.0), MINUTE))
        self._reached = until

    def see(self, sums: Sums, gauges: Gauges, now: float, steady: float) -> None:
        """Take in counters and gauges at `now` (Unix) and `steady` (a monotonic clock); after `begin`."""
        assert self._reached is not None
        elapsed = 0.0 if self._seen_steady is None else steady - self._seen_steady
        self._seen_steady = steady
        self._add(now, self._gain(sums), elapsed)
        for step in KEPT:
            self._point(step, now).note(gauges)
        self._reached = Reached(sums, self._reached.installed_at, now)

    def _gain(self, sums: Sums) -> Sums:
        """The increase since the last look. Counters that lost their last seconds in a power cut gain
        nothing: what was counted before was true.
        """
        assert self._reached is not None
        before = self._reached.sums
        return tuple(max(0, now - then) for now, then in zip(sums, before, strict=True))

    def _add(self, at: float, gained: Sums, seconds: float) -> None:
        for step in KEPT:
            self._point(step, at).add(gained, seconds)

    def _point(self, step: int, now: float) -> Point:
        at = int(now // step) * step
        self._dirty.add((step, at))
        points = self._points[step]
        if at not in points:
            points[at] = Point(step, at, self._next[step])
            self._next[step] += 1
            self._forget()
        return points[at]

    def _forget(self) -> None:
        for step, limit in KEPT.items():
            points = self._points[step]
            while len(points) > limit:
                del points[next(iter(points))]

    # --- writing down

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

    # --- looking

    def series(self, span: str, now: float) -> list[Point]:
        """The points of a span that ends now, the oldest first; none for times when gup did not run."""
        step, length = SPANS[span]
        return list(self.between(step, now - length - step + 1, now))

    def between(self, step: int, since: float, until: float) -> Iterator[Point]:
        """The points of one length that began in this time, the oldest first."""
        points = self._points[step]
        yield from (points[at] for at in sorted(points) if since <= at <= until)


def added(points: Iterable[Point]) -> Sums:
    """The sum of the points."""
    total = NONE
    for point in points:
        total = _plus(total, point.sums)
    return total


def _plus(one: Sums, other: Sums) -> Sums:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def load_points(db: sqlite3.Connection) -> tuple[list[Point], Reached | None]:
    """All stored points, and up to where they reach; no points and None when there are none.

    What can't be read is dropped, all of it: points and the counters up to which they reach belong together.
    """
    rows = db.execute("SELECT fields FROM points").fetchall()
    row = db.execute("SELECT fields FROM reached").fetchone()
    try:
        return [Point.from_json(json.loads(text)) for (text,) in rows], _reached(row[0]) if row else None
    except ValueError as error:
        _log.warning("the history is damaged and is begun anew: %s", error)
        db.execute("DELETE FROM points")
        db.execute("DELETE FROM reached")
    return [], None


def write_points(db: sqlite3.Connection, points: Sequence[Point], reached: Reached) -> None:
    """Store points, in place of their earlier versions."""
    db.executemany(
        "INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?)",
        [(point.step, point.at, point.number, _text(point.to_json())) for point in points],
    )
    for step, kept in KEPT.items():
        db.execute(
            "DELETE FROM points WHERE step = ?1 AND number <= "
            "(SELECT MAX(number) FROM points WHERE step = ?1) - ?2",
            (step, kept),
        )
    fields = {"sums": by_name(reached.sums), "installed_at": reached.installed_at, "at": reached.at}
    db.execute("INSERT OR REPLACE INTO reached VALUES (1, ?)", (_text(fields),))


def _reached(text: str) -> Reached:
    try:
        fields = json.loads(text)
        return Reached(from_names(fields["sums"]), float(fields["installed_at"]), float(fields["at"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not where it reached: {error!r}") from error


def _text(fields: object) -> str:
    return json.dumps(fields, separators=(",", ":"))


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
        self._reader = Reader()

    async def open(self) -> None:
        """Read the stored history; when the disk refuses, it starts empty."""
        try:
            points, reached = await self._database.run(load_points)
        except OSError as error:
            points, reached = [], None
            self._on_written(str(error))
        sums = self._reader.sums(self._totals())
        since_start = self._reader.sums(self._since_start())
        before_start = tuple(max(0, now - own) for now, own in zip(sums, since_start, strict=True))
        self.history.begin(points, reached, Reached(sums, self._installed_at, self._clock()), before_start)

    def look(self, *, wan_limit: int, entries_bytes: int) -> Sums:
        """Take in what the counters gained; to be called once a second and before reading."""
        sums, steady = self._reader.sums(self._totals()), time.monotonic()
        self.wan.see(sums[RECEIVED], steady)
        self.clients.see(sums[SENT], steady)
        if self.history.begun:
            gauges = Gauges(
                self.wan.bytes_per_second(), wan_limit, self.clients.bytes_per_second(), entries_bytes
            )
            self.history.see(sums, gauges, self._clock(), steady)
        return sums

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
