"""Incidents: the alarms of the past, with the times when they began and ended, as the statement needs them.

No texts are kept: they may name clients. MAX_INCIDENTS are kept at most, for `reports.ledger`.
"""

import sqlite3
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gup.control.api.schemas import Alarm
from gup.control.stats.database import StatsDatabase

MAX_INCIDENTS = 20_000
_MOST_PENDING = 1000
_CLOSE = "UPDATE incidents SET ended_at = max(began_at, ?) WHERE ended_at IS NULL"


class Incident(NamedTuple):
    """`ended_at` is None while it lasts. Times are Unix seconds."""

    name: str
    severity: str
    subject: str
    began_at: float
    ended_at: float | None


class Incidents:
    """Records alarms as they begin and end. What the disk refuses is written later."""

    def __init__(self, database: StatsDatabase, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._standing: set[str] | None = None
        """The ids at the last look; None before the first of this process."""
        self._pending: list[tuple[str, tuple[object, ...]]] = []

    async def look(self, alarms: Sequence[Alarm]) -> None:
        """Alarms have the ids that they had before a restart, so what stood then goes on."""
        present, before, now = {alarm.id for alarm in alarms}, self._standing, self._clock()
        if before == present and not self._pending:
            return
        for alarm in alarms:
            if before is None or alarm.id not in before:
                row = (alarm.id, alarm.name, alarm.severity, alarm.subject, alarm.since)
                self._pending.append(("INSERT OR IGNORE INTO incidents VALUES(?, ?, ?, ?, ?, NULL)", row))
        if before is None:
            places = ", ".join("?" * len(present))
            self._pending.append((f"{_CLOSE} AND id NOT IN ({places})", (now, *present)))
            self._pending.append(("INSERT OR IGNORE INTO about VALUES('incidents_since', ?)", (now,)))
        else:
            self._pending += [(f"{_CLOSE} AND id = ?", (now, gone)) for gone in before - present]
        self._standing = present
        pending, self._pending = self._pending[-_MOST_PENDING:], []

        def write(db: sqlite3.Connection) -> None:
            for statement, values in pending:
                db.execute(statement, values)

        if not await self._database.store("incidents", write):
            self._pending = pending + self._pending


def incidents(db: sqlite3.Connection, since: float, until: float) -> list[Incident]:
    """Those that lasted at any time of this span, the oldest first."""
    rows = db.execute(
        "SELECT name, severity, subject, began_at, ended_at FROM incidents "
        "WHERE began_at < ? AND (ended_at IS NULL OR ended_at > ?) ORDER BY began_at, id",
        (until, since),
    )
    return [Incident(*row) for row in rows]


def prune_incidents(db: sqlite3.Connection, oldest_at: float) -> None:
    db.execute("DELETE FROM incidents WHERE ended_at < ?", (oldest_at,))
    db.execute(
        "DELETE FROM incidents WHERE id IN "
        "(SELECT id FROM incidents ORDER BY began_at DESC LIMIT -1 OFFSET ?)",
        (MAX_INCIDENTS,),
    )
