"""What was saved today, in thirty days and in all, from the history's points. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, time, timedelta, tzinfo
from typing import Any

from gup.control.history.figures import RECEIVED, SENT, Sums
from gup.control.history.record import HOUR, MINUTE, History, added

DAYS = 30


@dataclass(frozen=True, slots=True)
class Saved:
    """Bytes to clients and from upstream. Saved is the difference and may be below zero."""

    sent_bytes: int
    received_bytes: int

    @property
    def saved_bytes(self) -> int:
        return self.sent_bytes - self.received_bytes

    @property
    def share(self) -> float | None:
        """Of what clients got, the part that did not cross the WAN; None before anything was sent."""
        return self.saved_bytes / self.sent_bytes if self.sent_bytes else None

    @classmethod
    def of(cls, sums: Sums) -> "Saved":
        return cls(sums[SENT], sums[RECEIVED])


@dataclass(frozen=True, slots=True)
class Savings:
    """`days` are local days by ISO date, the oldest first; those before the first use are missing."""

    today: Saved
    last_30_days: Saved
    since_install: Saved
    days: tuple[tuple[str, Saved], ...]


def savings(history: History, totals: Mapping[str, Any], now: float, zone: tzinfo | None) -> Savings:
    """`totals` are those since installation, as in the status."""
    midnight = _midnight(now, zone, days_back=0)
    today = Saved.of(added(history.between(MINUTE, midnight, now)))
    days: dict[str, list[int]] = {}
    for point in history.between(HOUR, _midnight(now, zone, days_back=DAYS - 1), midnight - 1):
        day = days.setdefault(datetime.fromtimestamp(point.at, zone).date().isoformat(), [0, 0])
        day[0] += point.sums[SENT]
        day[1] += point.sums[RECEIVED]
    rows = [(day, Saved(*both)) for day, both in days.items()]
    rows.append((datetime.fromtimestamp(now, zone).date().isoformat(), today))
    return Savings(
        today,
        Saved(sum(row.sent_bytes for _, row in rows), sum(row.received_bytes for _, row in rows)),
        Saved(totals["client_sent_bytes"], totals["upstream_received_bytes"]),
        tuple(rows),
    )


def _midnight(now: float, zone: tzinfo | None, *, days_back: int) -> float:
    """When the local day began so many days ago."""
    day = datetime.fromtimestamp(now, zone).date() - timedelta(days=days_back)
    return datetime.combine(day, time.min, tzinfo=zone).timestamp()
