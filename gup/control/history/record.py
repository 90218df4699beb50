"""The history in memory: two rows of points, and the counters up to which they reach. No I/O, no clock.

A point holds what the counters gained while it lasted, so points add up to the counters, across restarts
too: what was counted since the last writing is added to the point that was written last. The wall clock only
names points. Which of them are forgotten goes by the order in which they were begun: a clock that is wrong
for an hour makes an hour of points in the wrong place, and takes nothing else away.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gup.control.history.figures import NONE, Sums, by_name, from_names

MINUTE = 60
HOUR = 3600
DAY = 86400
KEPT: Mapping[int, int] = {MINUTE: 26 * 60, HOUR: 90 * 24 + 1}
"""Points of each length in seconds; a day has up to 25 hours, and the present point comes on top."""
SPANS: Mapping[str, tuple[int, int]] = {
    "hour": (MINUTE, HOUR),
    "day": (MINUTE, DAY),
    "week": (HOUR, 7 * DAY),
    "quarter": (HOUR, 90 * DAY),
}
"""What can be asked for: the length of its points and of all of it, in seconds."""


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is true at one moment. `wan_limit` is 0 when there is none; rates are bytes per second."""

    wan_rate: int = 0
    wan_limit: int = 0
    client_rate: int = 0
    entries_bytes: int = 0


@dataclass(slots=True)
class Point:
    """One minute or hour. History alone changes it, and only while it is the present one.

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
        """ValueError when `fields` are no point."""
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
    """Up to where the points reach: the counters, since when those count, and when that was (Unix)."""

    sums: Sums
    installed_at: float
    at: float


class History:
    """Points by length and time. Changed by `begin` and `see` only, on the event loop."""

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
        """Go on from what was written; `reached` None: nothing was, and only this start's counts are taken.

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
        """The service was killed: its last counts. Or the controller alone was: what the others counted."""
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
        """The counters and gauges at `now` (Unix) and `steady` (a clock that nobody sets); after `begin`."""
        assert self._reached is not None
        elapsed = 0.0 if self._seen_steady is None else steady - self._seen_steady
        self._seen_steady = steady
        self._add(now, self._gain(sums), elapsed)
        for step in KEPT:
            self._point(step, now).note(gauges)
        self._reached = Reached(sums, self._reached.installed_at, now)

    def _gain(self, sums: Sums) -> Sums:
        """What was gained since the last look. Counters that lost their last seconds in a power cut gain
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
        """The points changed since the last call, and up to where they reach."""
        assert self._reached is not None
        dirty, self._dirty = self._dirty, set()
        points = [self._points[step].get(at) for step, at in sorted(dirty)]
        return [point for point in points if point is not None], self._reached

    def put_back(self, points: Iterable[Point]) -> None:
        """These could not be written: they stay due."""
        self._dirty |= {(point.step, point.at) for point in points}

    # --- looking

    def series(self, span: str, now: float) -> list[Point]:
        """The points of a span that ends now, the oldest first; those in which nothing ran are not there."""
        step, length = SPANS[span]
        return list(self.between(step, now - length - step + 1, now))

    def between(self, step: int, since: float, until: float) -> Iterator[Point]:
        """The points of one length that begin in this time, the oldest first."""
        points = self._points[step]
        yield from (points[at] for at in sorted(points) if since <= at <= until)


def added(points: Iterable[Point]) -> Sums:
    """What the points add up to."""
    total = NONE
    for point in points:
        total = _plus(total, point.sums)
    return total


def _plus(one: Sums, other: Sums) -> Sums:
    return tuple(a + b for a, b in zip(one, other, strict=True))
