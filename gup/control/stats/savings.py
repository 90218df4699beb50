"""Savings: what each day added to the durable counters.

A day is the sum of the differences between readings, so that all days together are the counters, whatever
was killed in between: what was counted meanwhile belongs to the day of the next reading.
"""

import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date

from gup.control.api.schemas import StreamTraffic, TrafficByCause
from gup.control.exposition import parse_series
from gup.metrics import KINDS, PURPOSES, SOURCES, STREAM_WASTED, WASTED

_log = logging.getLogger("gup.control.stats")
METRICS = (
    "gup_client_sent_bytes_total",
    "gup_upstream_received_bytes_total",
    "gup_upstream_wasted_bytes_total",
    "gup_stream_sent_bytes_total",
    "gup_stream_received_bytes_total",
    STREAM_WASTED.name,
)
EARLIER = ""
"""The row of all that was counted before the days that are kept."""

Counts = dict[str, int]
Days = dict[str, Counts]


@dataclass(frozen=True, slots=True)
class Reading:
    """The counters at one moment, and since when they count. Days are dates in the site's time zone."""

    totals: Mapping[str, int]
    installed_at: float
    installed_on: str
    today: str


def counted(totals: Mapping[str, int]) -> Counts:
    """The counters that savings are made of."""
    return {name: value for name, value in totals.items() if value and name.partition("{")[0] in METRICS}


def add_reading(db: sqlite3.Connection, reading: Reading) -> None:
    """Add what was counted since the last reading to the day of this one."""
    since = db.execute("SELECT value FROM about WHERE name = 'installed_at'").fetchone()
    if since is not None and since[0] != reading.installed_at:  # other counters than those of the marks
        db.execute("INSERT INTO old_days SELECT ?, day, series, value FROM days", since)
        db.execute("DELETE FROM days")
        db.execute("DELETE FROM marks")
        _log.warning("the counters are counted anew: savings begin anew, those before are in table old_days")
    db.execute("INSERT OR REPLACE INTO about VALUES('installed_at', ?)", (reading.installed_at,))
    marks: Counts = dict(db.execute("SELECT series, value FROM marks"))
    fresh = not marks and reading.installed_on != reading.today
    day = EARLIER if fresh else reading.today
    now = counted(reading.totals)
    names = [name for name in marks.keys() | now if marks.get(name) != now.get(name)]
    changed = {name: now.get(name, 0) for name in names}
    db.executemany(
        "INSERT INTO days VALUES(?, ?, ?) ON CONFLICT(day, series) "
        "DO UPDATE SET value = value + excluded.value",
        [(day, name, value - marks.get(name, 0)) for name, value in changed.items()],
    )
    db.executemany("INSERT OR REPLACE INTO marks VALUES(?, ?)", list(changed.items()))


def days_counted(db: sqlite3.Connection) -> Days:
    """What each day counted, the oldest first."""
    found: Days = {}
    for day, series, value in db.execute("SELECT day, series, value FROM days ORDER BY day"):
        found.setdefault(day, {})[series] = value
    return found


def prune_days(db: sqlite3.Connection, oldest: str) -> None:
    """Add up the days before `oldest`."""
    db.execute(
        "INSERT INTO days SELECT ?1, series, sum(value) FROM days WHERE day < ?2 AND day <> ?1 "
        "GROUP BY series ON CONFLICT(day, series) DO UPDATE SET value = value + excluded.value",
        (EARLIER, oldest),
    )
    db.execute("DELETE FROM days WHERE day < ? AND day <> ?", (oldest, EARLIER))


StreamLabels = Callable[[int], tuple[str, str]]
"""Product and language of a stream's slot."""


def added_up(days: Iterable[Counts]) -> Counts:
    """The sum of several days."""
    total: Counter[str] = Counter()
    for counts in days:
        total.update(counts)  # unlike +, this keeps what is below zero
    return dict(total)


def figures(counts: Counts) -> TrafficByCause:
    """Sent, received, saved and wasted bytes with their parts. Saved may be below zero."""
    sent: Counter[str] = Counter(dict.fromkeys(SOURCES, 0))
    received: Counter[str] = Counter(dict.fromkeys(PURPOSES, 0))
    wasted: Counter[str] = Counter(dict.fromkeys(WASTED, 0))
    tables: Mapping[str, tuple[Counter[str], str]] = {
        "gup_client_sent_bytes_total": (sent, "source"),
        "gup_upstream_received_bytes_total": (received, "purpose"),
        "gup_upstream_wasted_bytes_total": (wasted, "reason"),
    }
    for name, value in counts.items():
        metric, series = parse_series(name)
        if metric in tables:
            table, label = tables[metric]
            table[series[label]] += value
    total_sent, total_received = sum(sent.values()), sum(received.values())
    return TrafficByCause(
        sent_bytes=total_sent,
        received_bytes=total_received,
        saved_bytes=total_sent - total_received,
        wasted_bytes=sum(wasted.values()),
        sent=dict(sent),
        received=dict(received),
        wasted=dict(wasted),
    )


def streams(counts: Counts, label: StreamLabels) -> list[StreamTraffic]:
    """Sent, received and wasted bytes by product, language and kind, the most sent first."""
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    for name, value in counts.items():
        metric, series = parse_series(name)
        if not metric.startswith("gup_stream_") or not value:
            continue
        where = (*label(int(series["slot"])), series["kind"])
        way = metric.removeprefix("gup_stream_").removesuffix("_total")
        rows.setdefault(where, Counter(sent_bytes=0, received_bytes=0, wasted_bytes=0))[way] += value
    order = sorted(rows, key=lambda where: (-rows[where]["sent_bytes"], where[:2], KINDS.index(where[2])))
    return [
        StreamTraffic(
            product=product,
            language=language,
            kind=kind,
            **rows[product, language, kind],
            saved_bytes=rows[product, language, kind]["sent_bytes"]
            - rows[product, language, kind]["received_bytes"],
        )
        for product, language, kind in order
    ]


def within(day: str, today: str, days: int) -> bool:
    """Whether `day` is one of the last so many, today among them."""
    if not day or day > today:
        return False
    return (date.fromisoformat(today) - date.fromisoformat(day)).days < days


def completed(days: Mapping[str, Counts], now: Counts, rest_on: str) -> dict[str, Counts]:
    """The days, with what was counted since they were stored added to `rest_on`."""
    before = added_up(days.values())
    rest = {name: now.get(name, 0) - before.get(name, 0) for name in now.keys() | before}
    rest = {name: value for name, value in rest.items() if value}
    found = dict(days)
    if rest:
        found[rest_on] = added_up([found.get(rest_on, {}), rest])
    return found
