"""The report *Savings*: the ledger's days as sent, fetched, saved and wasted, by stream. Pure."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from typing import Any

from gup.control.exposition import parse_series
from gup.control.reports.ledger import Counts
from gup.metrics import KINDS, PURPOSES, SOURCES, WASTED

StreamLabels = Callable[[int], tuple[str, str]]
"""Product and language of a stream's number."""


def added_up(days: Iterable[Counts]) -> Counts:
    """Several days as one."""
    total: Counter[str] = Counter()
    for counts in days:
        total.update(counts)  # unlike +, this keeps what is below zero
    return dict(total)


def figures(counts: Counts) -> dict[str, Any]:
    """Sent, received, saved and wasted bytes, and how they are made up. Saved is never clipped at zero."""
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
    return {
        "sent_bytes": total_sent,
        "received_bytes": total_received,
        "saved_bytes": total_sent - total_received,
        "wasted_bytes": sum(wasted.values()),
        "sent": dict(sent),
        "received": dict(received),
        "wasted": dict(wasted),
    }


def streams(counts: Counts, label: StreamLabels) -> list[dict[str, Any]]:
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
        {
            "product": product,
            "language": language,
            "kind": kind,
            **rows[product, language, kind],
            "saved_bytes": rows[product, language, kind]["sent_bytes"]
            - rows[product, language, kind]["received_bytes"],
        }
        for product, language, kind in order
    ]


def within(day: str, today: str, days: int) -> bool:
    """Whether `day` is one of the last so many, today among them."""
    if not day or day > today:
        return False
    return (date.fromisoformat(today) - date.fromisoformat(day)).days < days


def completed(days: Mapping[str, Counts], now: Counts, rest_on: str) -> dict[str, Counts]:
    """The days with what the counters have counted since they were written, which falls to `rest_on`."""
    before = added_up(days.values())
    rest = {name: now.get(name, 0) - before.get(name, 0) for name in now.keys() | before}
    rest = {name: value for name, value in rest.items() if value}
    found = dict(days)
    if rest:
        found[rest_on] = added_up([found.get(rest_on, {}), rest])
    return found
