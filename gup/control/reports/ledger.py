"""The savings ledger on disk: what each day added to the durable counters. Blocking, for one thread.

A day is the sum of differences between readings of the counters, so all days together are the counters,
whatever was killed in between: what was counted meanwhile falls to the day of the next reading.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gup.control.reports.database import Database
from gup.metrics import STREAM_WASTED

_FORM = 1
_SCHEMA = """
CREATE TABLE marks(series TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE days(day TEXT NOT NULL, series TEXT NOT NULL, value INTEGER NOT NULL,
  PRIMARY KEY(day, series)) WITHOUT ROWID;
CREATE TABLE about(name TEXT PRIMARY KEY, value REAL NOT NULL)
"""
METRICS = (
    "gup_client_sent_bytes_total",
    "gup_upstream_received_bytes_total",
    "gup_upstream_wasted_bytes_total",
    "gup_stream_sent_bytes_total",
    "gup_stream_received_bytes_total",
    STREAM_WASTED.name,
)
EARLIER = ""
"""The day of all that was counted before single days were kept, or longer ago than they are."""

Counts = dict[str, int]
Days = dict[str, Counts]


@dataclass(frozen=True, slots=True)
class Reading:
    """The counters at one moment, and since when they count. Days are the site's dates (ISO 8601)."""

    totals: Mapping[str, int]
    installed_at: float
    installed_on: str
    today: str


def counted(totals: Mapping[str, int]) -> Counts:
    """Those of the counters that the ledger keeps."""
    return {name: value for name, value in totals.items() if value and name.partition("{")[0] in METRICS}


class Ledger:
    """The file. OSError when the disk refuses: what was not written is in the next reading."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder / "savings.db", _SCHEMA, _FORM)

    def update(self, reading: Reading) -> None:
        """Add what was counted since the last reading to the day of this one."""
        with self.database.transaction() as db:
            since = db.execute("SELECT value FROM about WHERE name = 'installed_at'").fetchone()
        if since is not None and since[0] != reading.installed_at:  # other counters than those of the marks
            self.database.begin_anew("before", "the counters are counted anew")
        with self.database.transaction() as db:
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

    def days(self) -> Days:
        """What each day counted, the oldest first."""
        found: Days = {}
        with self.database.transaction() as db:
            for day, series, value in db.execute("SELECT day, series, value FROM days ORDER BY day"):
                found.setdefault(day, {})[series] = value
        return found

    def prune(self, oldest: str) -> None:
        """Add up the days before `oldest`."""
        with self.database.transaction() as db:
            db.execute(
                "INSERT INTO days SELECT ?1, series, sum(value) FROM days WHERE day < ?2 AND day <> ?1 "
                "GROUP BY series ON CONFLICT(day, series) DO UPDATE SET value = value + excluded.value",
                (EARLIER, oldest),
            )
            db.execute("DELETE FROM days WHERE day < ? AND day <> ?", (oldest, EARLIER))
