"""Savings: what each day added to the durable counters.

A day is the sum of the differences between readings, so that all days together are the counters, whatever
was killed in between: what was counted meanwhile belongs to the day of the next reading.
"""

import logging
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from gup.config import Settings
from gup.control.api.schemas import StreamTraffic, TrafficByCause
from gup.metrics import KINDS, MAX_STREAMS, PURPOSES, SOURCES, STREAM_WASTED, WASTED, parse_series
from gup.upstream.bandwidth import site_time

_log = logging.getLogger("gup.control.stats")
FIGURES = {
    "gup_client_sent_bytes_total": "client_sent_bytes",
    "gup_upstream_received_bytes_total": "upstream_received_bytes",
    "gup_upstream_wasted_bytes_total": "upstream_wasted_bytes",
    "gup_evictions_total": "evictions.{reason}",
    "gup_evicted_bytes_total": "evicted_bytes",
    "gup_integrity_failures_total": "integrity_failures",
    "gup_requests_total": "requests.{result}",
    "gup_fills_total": "fills.{outcome}",
}
"""What the history keeps: a metric, and the name of its sum, with labels of the series in it."""
METRICS = (*FIGURES, "gup_stream_sent_bytes_total", "gup_stream_received_bytes_total", STREAM_WASTED.name)
"""What a day is made of."""
EARLIER = ""
"""The row of all that was counted before the days that are kept."""

Counts = Mapping[str, int]
"""Counters by series name."""
Days = dict[str, Counts]


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

    def counted(self) -> dict[str, int]:
        """The counters that savings are made of."""
        return {name: n for name, n in self.totals.items() if n and name.partition("{")[0] in METRICS}


def last_reading_at(db: sqlite3.Connection) -> float | None:
    """When the counters were last read; None when never, or when they began anew since."""
    row = db.execute("SELECT value FROM about WHERE name = 'read_at'").fetchone()
    return None if row is None else row[0]


def add_reading(db: sqlite3.Connection, reading: Reading, *, gains_only: bool = False) -> dict[str, int]:
    """Add what was counted since the last reading to the day of this one; returns that.

    `gains_only`: counters below those of the last reading are left as they are.
    """
    since = db.execute("SELECT value FROM about WHERE name = 'installed_at'").fetchone()
    if since is not None and since[0] != reading.installed_at:  # other counters than those of the marks
        db.execute("INSERT INTO old_days SELECT ?, day, series, value FROM days", since)
        db.execute("DELETE FROM days")
        db.execute("DELETE FROM marks")
        _log.warning("the counters are counted anew: savings begin anew, those before are in table old_days")
    about = (reading.installed_at, reading.at)
    db.execute("INSERT OR REPLACE INTO about VALUES('installed_at', ?), ('read_at', ?)", about)
    marks = dict(db.execute("SELECT series, value FROM marks"))
    gained = _difference(reading.counted(), marks)
    if gains_only:
        gained = {name: value for name, value in gained.items() if value > 0}
    installed_on = site_time(reading.settings, reading.installed_at).date().isoformat()
    day = reading.today if marks or installed_on == reading.today else EARLIER
    db.executemany(
        "INSERT INTO days VALUES(?, ?, ?) "
        "ON CONFLICT(day, series) DO UPDATE SET value = value + excluded.value",
        [(day, name, value) for name, value in gained.items()],
    )
    db.executemany(
        "INSERT INTO marks VALUES(?, ?) ON CONFLICT(series) DO UPDATE SET value = value + excluded.value",
        list(gained.items()),
    )
    return gained


def _difference(now: Counts, before: Counts) -> dict[str, int]:
    """What has changed, and by how much."""
    gained = {name: now.get(name, 0) - before.get(name, 0) for name in now.keys() | before.keys()}
    return {name: value for name, value in gained.items() if value}


def days_until(db: sqlite3.Connection | None, reading: Reading) -> Days:
    """What each day counted, the oldest first; what is not stored yet is today's. None: nothing is stored."""
    found: dict[str, dict[str, int]] = {}
    if db is not None:
        for day, series, value in db.execute("SELECT day, series, value FROM days ORDER BY day"):
            found.setdefault(day, {})[series] = value
    rest = _difference(reading.counted(), added_up(found.values()))
    if rest:
        day = EARLIER if db is None else reading.today
        found[day] = dict(added_up([found.get(day, {}), rest]))
    return dict(found)


def prune_days(db: sqlite3.Connection, oldest: str) -> None:
    """Add up the days before `oldest`."""
    db.execute(
        "INSERT INTO days SELECT ?1, series, sum(value) FROM days WHERE day < ?2 AND day <> ?1 "
        "GROUP BY series ON CONFLICT(day, series) DO UPDATE SET value = value + excluded.value",
        (EARLIER, oldest),
    )
    db.execute("DELETE FROM days WHERE day < ? AND day <> ?", (oldest, EARLIER))


def added_up(days: Iterable[Counts]) -> Counter[str]:
    """The sum of several days."""
    total: Counter[str] = Counter()
    for counts in days:
        total.update(counts)  # unlike +, this keeps what is below zero
    return total


_CAUSES = {
    "gup_client_sent_bytes_total": ("sent", "source", SOURCES),
    "gup_upstream_received_bytes_total": ("received", "purpose", PURPOSES),
    "gup_upstream_wasted_bytes_total": ("wasted", "reason", WASTED),
}


def figures(counts: Counts) -> TrafficByCause:
    """Sent, received, saved and wasted bytes with their parts. Saved may be below zero."""
    parts = {way: dict.fromkeys(causes, 0) for way, _, causes in _CAUSES.values()}
    for name, value in counts.items():
        metric, labels = parse_series(name)
        if metric in _CAUSES:
            way, label, _ = _CAUSES[metric]
            parts[way][labels[label]] = parts[way].get(labels[label], 0) + value
    members: dict[str, Any] = {f"{way}_bytes": sum(by_cause.values()) for way, by_cause in parts.items()}
    members["saved_bytes"] = members["sent_bytes"] - members["received_bytes"]
    return TrafficByCause(**members | parts)


def streams(counts: Counts, labels: Sequence[tuple[str, str]]) -> list[StreamTraffic]:
    """Sent, received and wasted bytes by product, language and kind, the most sent first.

    `labels` are product and language of each slot.
    """
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    for name, value in counts.items():
        metric, series = parse_series(name)
        if metric.startswith("gup_stream_") and value:
            product, language = labels[min(int(series["slot"]), MAX_STREAMS)]
            moved = rows.setdefault((product, language, series["kind"]), Counter())
            moved[metric.removeprefix("gup_stream_").removesuffix("_total")] += value
    found = [
        StreamTraffic(
            product=product,
            language=language,
            kind=kind,
            sent_bytes=moved["sent_bytes"],
            received_bytes=moved["received_bytes"],
            saved_bytes=moved["sent_bytes"] - moved["received_bytes"],
            wasted_bytes=moved["wasted_bytes"],
        )
        for (product, language, kind), moved in rows.items()
    ]
    return sorted(found, key=lambda r: (-r.sent_bytes, r.product, r.language, KINDS.index(r.kind)))


def within(day: str, today: str, days: int) -> bool:
    """Whether `day` is one of the last so many, today among them."""
    if not day or day > today:
        return False
    return (date.fromisoformat(today) - date.fromisoformat(day)).days < days
