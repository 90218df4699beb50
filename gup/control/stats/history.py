"""The history: what the counters gained in each minute of a day, each hour of ninety days, and each day.

All points add up to the counters, across restarts too: a reading adds what was counted since the one before,
in one transaction with the marks that it is compared with. The wall clock only names points. They are dropped
in the order in which they were begun: a clock that is wrong for an hour adds an hour of misplaced points and
removes nothing.
"""

import asyncio
import functools
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gup.control.dependencies import ControlDependencies
from gup.control.rate_window import RateWindow
from gup.control.stats.database import StatsDatabase
from gup.control.stats.savings import FIGURES, Days, Reading, add_reading, days_until, last_reading_at
from gup.metrics import CODES_OF_RESULT, parse_series

SENT, RECEIVED = "client_sent_bytes", "upstream_received_bytes"
MINUTE, HOUR, DAY = 60, 3600, 86400
KEPT = {MINUTE: 26 * 60, HOUR: 90 * 24 + 1}
"""How many points are kept, by their length in seconds; a day has up to 25 hours."""
SPANS = {"hour": (MINUTE, HOUR), "day": (MINUTE, DAY), "week": (HOUR, 7 * DAY), "quarter": (HOUR, 90 * DAY)}
"""The spans that can be asked for: length of a point and of the span, in seconds."""
_RATE_SECONDS = 5.0
"""The window of rates."""


@functools.cache
def _figure(series: str) -> str | None:
    metric, labels = parse_series(series)
    return FIGURES[metric].format(**labels) if metric in FIGURES else None


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
        **{name: sums[name] for name in FIGURES.values() if "." not in name},
        "saved_bytes": sums[SENT] - sums[RECEIVED],
        "requests": {result: sums[f"requests.{result}"] for result in CODES_OF_RESULT},
        "fills": {outcome: sums[f"fills.{outcome}"] for outcome in ("committed", "failed", "unstorable")},
    }


@dataclass(slots=True)
class Gauges:
    """Rates are bytes per second, the highest of a time; the others are the last. `wan_limit` 0: none."""

    wan_peak: int = 0
    client_peak: int = 0
    wan_limit: int = 0
    entries_bytes: int = 0

    def note(self, later: "Gauges") -> None:
        self.wan_peak = max(self.wan_peak, later.wan_peak)
        self.client_peak = max(self.client_peak, later.client_peak)
        self.wan_limit, self.entries_bytes = later.wan_limit, later.entries_bytes


@dataclass(slots=True)
class Point(Gauges):
    """One minute or hour, as it is stored.

    `number` is its place in the order in which points of its length were begun. `covered_seconds` is how much
    of it was seen: less than its length at a start, more when the clock was put back.
    """

    step: int = 0
    at: int = 0
    number: int = 0
    covered_seconds: float = 0.0
    sums: Counter[str] = field(default_factory=Counter)


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


def add_gain(
    db: sqlite3.Connection, now: float, gained: Counter[str], seconds: float, gauges: Gauges
) -> None:
    """Add to the minute and the hour of `now` (Unix) what was counted within so many seconds."""
    for step, kept in KEPT.items():
        at = int(now // step) * step
        (newest,) = db.execute("SELECT max(number) FROM points WHERE step = ?", (step,)).fetchone()
        number = 0 if newest is None else newest + 1
        point = next(iter(points_of(db, step, at, at)), Point(step=step, at=at, number=number))
        # Counters that lost their last seconds in a power cut gain nothing: what was counted before was true.
        point.sums.update(+gained)
        point.covered_seconds += seconds
        point.note(gauges)
        row = (step, at, point.number, _POINT.dump_json(point).decode())
        db.execute("INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?)", row)
        db.execute("DELETE FROM points WHERE step = ? AND number <= ?", (step, number - kept))


class Recorder:
    """Reads the counters: each second for rates (`wan`, `clients`), and now and then for history and savings.

    What the disk refuses to take is counted with the next reading.
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
        self._gauges = Gauges()
        self._writing = asyncio.Lock()
        self._read_at: float | None = None
        """When the last reading was stored, by the monotonic clock; None before the first of this process."""

    def look(self, entries_bytes: int) -> None:
        """Take in rates; to be called once a second."""
        sums, now = sums_of(self._dependencies.totals()), self._monotonic()
        self.wan.see(sums[RECEIVED], now)
        self.clients.see(sums[SENT], now)
        wan, clients = self.wan.bytes_per_second(), self.clients.bytes_per_second()
        self._gauges.note(Gauges(wan, clients, self._dependencies.wan_rate(), entries_bytes))

    async def write(self) -> None:
        """Store what was counted since the last reading."""
        async with self._writing:
            reading, now, own = self._reading(), self._monotonic(), self._dependencies.since_start()
            gauges, self._gauges = self._gauges, Gauges()

            def add(db: sqlite3.Connection) -> None:
                seconds = self._catch_up(db, reading, own) if self._read_at is None else now - self._read_at
                add_gain(db, reading.at, sums_of(add_reading(db, reading)), seconds, gauges)

            if await self._database.store("savings", add):
                self._read_at = now
            else:
                gauges.note(self._gauges)
                self._gauges = gauges

    def _catch_up(self, db: sqlite3.Connection, reading: Reading, own: Mapping[str, int]) -> float:
        """Add what was counted before this start to the minute and the day of the last reading.

        Returns the seconds for which this process was away, if that was only a moment. Without an earlier
        reading nothing is known of when all that was counted.
        """
        at = last_reading_at(db)
        before = {name: value - own.get(name, 0) for name, value in reading.totals.items()}
        earlier = replace(reading, totals=before, at=reading.at if at is None else at)
        gained = add_reading(db, earlier, gains_only=True)
        if at is None:
            return 0.0
        if gained:
            add_gain(db, at, sums_of(gained), 0.0, Gauges())
        return reading.at - at if 0 <= reading.at - at <= MINUTE else 0.0

    def _reading(self) -> Reading:
        process = self._dependencies
        return Reading(process.totals(), self._clock(), process.installed_at, process.settings())

    async def series(self, span: str) -> list[Point]:
        """The points of a span that ends now, the oldest first; none for times when gup did not run."""
        await self.write()
        (step, length), now = SPANS[span], self._clock()
        return await self._database.run(lambda db: points_of(db, step, now - length - step + 1, now))

    async def savings(self) -> tuple[str, Days]:
        """Today's date, and what each day counted, the oldest first: together the present counters."""
        await self.write()
        reading = self._reading()
        try:
            return await self._database.run(lambda db: (reading.today, days_until(db, reading)))
        except OSError:  # what single days counted can't be read now; what all did is known
            return await asyncio.to_thread(lambda: (reading.today, days_until(None, reading)))
