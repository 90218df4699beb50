"""The WAN's budget: what crossed the WAN by day of the site, what is left of a period, and when it runs out.

A reading adds what the counters gained since the one before. Both the days and the counts they were made from
are in one file, run/wan-budget, which is replaced whole: so a process that is killed loses no byte and adds
none twice. Periods are sums of days: another `per` or `begins` finds what was used before. The first part is
pure.
"""

import contextlib
import functools
import json
import logging
import time
import uuid
from calendar import monthrange
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, StringConstraints, TypeAdapter

from gup import config
from gup.config import Settings
from gup.files import FileError, read_file, replace_file
from gup.jsonmodel import Count, InvalidError, Time, parse, read
from gup.metrics import parse_series
from gup.upstream.bandwidth import is_within, site_time

_log = logging.getLogger("gup.control.budget")
FILE = "wan-budget"
"""In run/: what this node counted, and what others of the cluster have told."""
SAVE_SECONDS = 10.0
"""The longest time between two writes of the file: a power cut costs at most what came since."""
MOST_DAYS = 100
"""Of each node; the oldest ones go."""
MOST_NODES = 64
_MOST_BYTES = 4 << 20
_AHEAD_SECONDS = 600.0
"""Days in the future that stay for so long are of a clock that was ahead: then they are added to today."""

# --- periods


@dataclass(frozen=True, slots=True)
class Period:
    """From the midnight of `first` to that of `after`, by the site's clocks."""

    first: date
    after: date


def period_of(budget: config.WanBudget, day: date) -> Period:
    """The period that a day belongs to. A month that has no day `begins` begins on its last one."""
    if budget.per == "day":
        return Period(day, day + timedelta(days=1))

    def begin(months: int) -> date:
        year, month = divmod(12 * day.year + day.month - 1 + months, 12)
        return date(year, month + 1, min(budget.begins, monthrange(year, month + 1)[1]))

    return Period(begin(0), begin(1)) if day >= begin(0) else Period(begin(-1), begin(0))


def midnight(settings: Settings, day: date) -> float:
    """When a day of the site begins, in Unix seconds; where clocks skip midnight, when they do."""
    return _unix(settings, datetime(day.year, day.month, day.day))  # noqa: DTZ001 - `_unix` adds the zone


def _unix(settings: Settings, wall: datetime) -> float:
    zone = ZoneInfo(settings.site.time_zone) if settings.site.time_zone else None
    return wall.replace(tzinfo=zone).timestamp()


def cheap_at(settings: Settings, at: float) -> bool:
    """Whether the bytes of this moment (Unix seconds) do not count."""
    cheap = settings.wan.budget.cheap
    if not cheap:
        return False
    local = site_time(settings, at)
    return any(is_within(hours, local) for hours in cheap)


def next_cheap(settings: Settings, at: float) -> float | None:
    """When cheap hours begin next, in Unix seconds."""
    today = site_time(settings, at).date()
    found = []
    for hours in settings.wan.budget.cheap:
        hour, minute = map(int, hours.from_.split(":"))
        for day in (today + timedelta(days=ahead) for ahead in range(9)):
            if day.strftime("%a").lower() in hours.days:
                wall = datetime(day.year, day.month, day.day) + timedelta(hours=hour, minutes=minute)  # noqa: DTZ001
                found.append(_unix(settings, wall))
    return min((begins for begins in found if begins > at), default=None)


# --- the forecast

_PROFILE_DAYS = 56
_SAMPLES = 2
"""Days of one weekday from which a mean of it is made."""
_LEAST_DAYS = 1 / 24
"""Of a period without a whole day before: earlier there is no forecast."""
Basis = Literal["weekdays", "days", "period", "none"]


@dataclass(frozen=True, slots=True)
class Forecast:
    """`expected_bytes` at the period's end, and the day and the share of it (0 to 1) at which the budget runs
    out. None where it is not known, or does not run out. `days` is how many whole days it is judged by.
    """

    expected_bytes: int | None = None
    runs_out: tuple[date, float] | None = None
    basis: Basis = "none"
    days: int = 0


def forecast(
    limit: int, used: int, period: Period, days: Mapping[date, int], today: date, gone: float
) -> Forecast:
    """From the whole days before today, by weekday where each is known twice, else from this period alone.

    `days` are bytes that counted, `gone` is the share of today that has passed.
    """
    known = min(days, default=today)
    # The first one is not whole: gup was installed in it.
    whole = [today - timedelta(days=ago) for ago in range(1, _PROFILE_DAYS + 1)]
    whole = [day for day in whole if day > known]
    left = [today + timedelta(days=ahead) for ahead in range((period.after - today).days)]
    samples: dict[int, list[int]] = {}
    for day in whole:
        samples.setdefault(day.weekday(), []).append(days.get(day, 0))
    means = {weekday: sum(found) / len(found) for weekday, found in samples.items() if len(found) >= _SAMPLES}
    basis: Basis = "weekdays"
    if not all(day.weekday() in means for day in left):
        if whole:
            basis, mean = "days", sum(days.get(day, 0) for day in whole) / len(whole)
        else:
            since = (today - max(period.first, known)).days + gone
            if since < _LEAST_DAYS:
                return Forecast()
            basis, mean = "period", used / since
        means = dict.fromkeys(range(7), mean)
    total, runs_out = float(used), None
    for day in left:
        from_ = gone if day == today else 0.0
        more = means[day.weekday()] * (1 - from_)
        if runs_out is None and total + more >= limit and more > 0:
            runs_out = day, from_ + (1 - from_) * max(0.0, limit - total) / more
        total += more
    return Forecast(round(total), runs_out if used < limit else None, basis, len(whole))


# --- days

FIGURES = ("all", "cheap", "full", "delta", "index", "other", "background")
"""Bytes of a day: all; those of them in cheap hours, which do not count; by kind; of background fills."""
_KINDS = ("full", "delta", "index", "other")


def _day(text: str) -> str:
    if date.fromisoformat(text).isoformat() != text:
        raise ValueError("must be a date")
    return text


Figures = Annotated[list[Count], AfterValidator(lambda given: given[: len(FIGURES)])]
Day = Annotated[str, StringConstraints(max_length=10), AfterValidator(_day)]
Days = dict[Day, Figures]


@dataclass(slots=True)
class NodeDays:
    """What one node counted since its file was made, which has an `id` of its own.

    `seq` grows with each change by the bytes that were added, so that the later of two is known, whatever was
    lost; `at` is when it was read last.
    """

    node: Annotated[str, StringConstraints(max_length=64)]
    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,32}$")]
    days: Days = field(default_factory=dict)
    at: Time = 0.0
    seq: Count = 0

    def gained(self, first: date | None = None) -> Counter[str]:
        """The sums of the days from `first` on. Those in the future count too: the clock was ahead."""
        found: Counter[str] = Counter()
        for day, figures in self.days.items():
            if first is None or day >= first.isoformat():
                found.update(dict(zip(FIGURES, figures, strict=False)))
        return found

    def add(self, day: str, gained: Mapping[str, int]) -> None:
        figures = self.days.get(day, [0] * len(FIGURES))
        figures += [0] * (len(FIGURES) - len(figures))
        self.days[day] = [n + gained.get(name, 0) for name, n in zip(FIGURES, figures, strict=True)]
        self.seq += sum(gained.values())
        while len(self.days) > MOST_DAYS:
            del self.days[min(self.days)]

    def take_back(self, today: str) -> None:
        """Add what lies in the future to today."""
        for day in [day for day in self.days if day > today]:
            before = self.seq
            self.add(today, dict(zip(FIGURES, self.days.pop(day), strict=False)))
            self.seq = before + 1

    def less(self, days: Days) -> Iterator[tuple[str, dict[str, int]]]:
        """What is here more than in these days."""
        for day, figures in self.days.items():
            before = days.get(day, [])
            more = {
                name: count - (before[at] if at < len(before) else 0)
                for at, (name, count) in enumerate(zip(FIGURES, figures, strict=False))
            }
            yield day, {name: max(0, count) for name, count in more.items()}


@dataclass(slots=True)
class _Stored:
    """The file. `mark` are the counts that are in the days, as they were at `read_at` in the run that began
    at `started_at`; `cheap`: that was in cheap hours; `seeded`: the days of before the file are known.
    """

    own: NodeDays
    mark: dict[str, Count]
    read_at: Time
    started_at: float
    installed_at: float
    cheap: bool = False
    seeded: bool = False
    others: list[NodeDays] = field(default_factory=list)


@functools.cache
def _stored() -> TypeAdapter[_Stored]:
    return TypeAdapter(_Stored)


@functools.cache
def _figures_of(series: str) -> tuple[str, ...]:
    metric, labels = parse_series(series)
    if metric == "gup_upstream_received_bytes_total":
        return ("all", "background") if labels.get("purpose") == "prefetch" else ("all",)
    if metric == "gup_stream_received_bytes_total" and labels.get("kind") in _KINDS:
        return (labels["kind"],)
    return ()


def counted(counts: Mapping[str, int]) -> Counter[str]:
    """The figures but `cheap`, of counters by series."""
    found: Counter[str] = Counter()
    for name, value in counts.items():
        if value:
            for figure in _figures_of(name):
                found[figure] += value
    return found


@dataclass(frozen=True, slots=True)
class Counts:
    """The counters now, and what of them this run of the service has counted. Unix seconds."""

    totals: Mapping[str, int]
    own: Mapping[str, int]
    """Needed by the constructor of BudgetLedger only."""
    started_at: float
    installed_at: float


class BudgetLedger:
    """The days of this node and of others. `look` and `merge` alone change them."""

    def __init__(self, run: Path, node: str, counts: Counts, now: float, settings: Settings) -> None:
        """Blocks."""
        self._path, self._node = run / FILE, node
        stored = self._read()
        new = stored is None
        if stored is None:
            mark = counted(counts.totals)
            mark.subtract(counted(counts.own))
            own = NodeDays(node, uuid.uuid4().hex)
            stored = _Stored(own, dict(mark), now, counts.started_at, counts.installed_at)
        stored.own.node = node
        self._kept = stored
        self.changed = new
        """Since it was last saved."""
        self.urgent = new
        """It should be saved at once: another day or other hours have begun."""
        self._ahead_since: float | None = None
        if stored.started_at != counts.started_at or stored.installed_at != counts.installed_at:
            self._catch_up(counts, settings)
        self._at_start = dict(self.own.days)
        """The days without what came since this start."""
        self.look(counts, now, settings)

    @property
    def is_new(self) -> bool:
        """Nothing is known of the days before there was a file: see `seed`."""
        return not self._kept.seeded

    @property
    def own(self) -> NodeDays:
        return self._kept.own

    @property
    def counted_bytes(self) -> int:
        """What of the counters is in the days."""
        return self._kept.mark.get("all", 0)

    @property
    def others(self) -> list[NodeDays]:
        return self._kept.others

    def _read(self) -> _Stored | None:
        try:
            text = read_file(self._path, _MOST_BYTES)
        except FileError:
            return None
        try:
            return read(_stored(), parse(text, FILE, _MOST_BYTES), FILE)
        except InvalidError as error:
            aside = self._path.with_name(f"{FILE}.damaged")
            with contextlib.suppress(OSError):
                self._path.replace(aside)
            _log.warning("the use of the WAN's budget is not known: %s; the file is now %s", error, aside)
            return None

    def _catch_up(self, counts: Counts, settings: Settings) -> None:
        """Add what the service counted after the last reading and before this start, to that reading's day.

        After a power cut the counters may be lower than they were read: the reading was right.
        """
        kept, before = self._kept, counted(counts.totals)
        before.subtract(counted(counts.own))
        if kept.installed_at == counts.installed_at:
            mark = Counter(kept.mark)
            gained = {name: max(0, before[name] - mark[name]) for name in before}
            if any(gained.values()):
                self._add(site_time(settings, kept.read_at).date().isoformat(), gained, cheap=kept.cheap)
        kept.mark = {name: max(0, count) for name, count in before.items()}
        kept.started_at, kept.installed_at = counts.started_at, counts.installed_at
        self.changed = True

    def _add(self, day: str, gained: Mapping[str, int], *, cheap: bool) -> None:
        self.urgent = self.urgent or day not in self.own.days
        self.own.add(day, {**gained, "cheap": gained.get("all", 0) if cheap else 0})
        self.changed = True

    def look(self, counts: Counts, now: float, settings: Settings, clock: float | None = None) -> None:
        """One reading. Its bytes are cheap when the hours were cheap at the last one, too.

        `clock` is monotonic. Counters that are lower than before, as for a moment during `gup upgrade`, wait.
        """
        kept, clock = self._kept, time.monotonic() if clock is None else clock
        if now < counts.installed_at:  # a clock that is not set yet
            now = max(now, kept.read_at)
        today, newest = site_time(settings, now).date().isoformat(), max(self.own.days, default="")
        if newest > today:
            self._ahead_since = clock if self._ahead_since is None else self._ahead_since
            if clock - self._ahead_since >= _AHEAD_SECONDS:
                _log.warning("the clock was ahead: what the WAN's budget has of days to come is today's")
                self.own.take_back(today)
                self.changed = self.urgent = True
        else:
            self._ahead_since = None
        cheap, mark = cheap_at(settings, now), Counter(kept.mark)
        found = counted(counts.totals)
        gained = {name: count - mark[name] for name, count in found.items() if count > mark[name]}
        if gained:
            self._add(max(today, max(self.own.days, default="")), gained, cheap=cheap and kept.cheap)
            kept.mark = dict(mark | found)
        if cheap != kept.cheap:
            kept.cheap, self.changed, self.urgent = cheap, True, True
        kept.read_at = self.own.at = max(0.0, now)

    def seed(self, days: Mapping[str, Mapping[str, int]]) -> None:
        """Days of before there was this file, from the savings ledger: together the counters of a moment."""
        found = {day: counted(series) for day, series in days.items()}
        total: Counter[str] = Counter()
        for one in found.values():
            total.update(one)
        total.subtract(self._kept.mark)  # not read yet: the next reading adds it
        newest = max(found, default="")
        for day, gained in found.items():
            have = dict(zip(FIGURES, self.own.days.get(day, [0] * len(FIGURES)), strict=True))
            gained.subtract(have)
            if day == newest:
                gained.subtract(total)
            if day and any(count > 0 for count in gained.values()):
                self.own.add(day, {name: max(0, count) for name, count in gained.items()})
        self._kept.seeded = self.changed = True

    # --- what other nodes have told

    def merge(self, rows: Iterable[NodeDays]) -> None:
        """Take what is news. A node that was installed again has another id: both count.

        What this node itself has told, and does not know, was lost with its file: it is taken back.
        """
        known = {row.id: row for row in self.others}
        for row in rows:
            have = self.own if row.id == self.own.id else known.get(row.id)
            if have is not None and have.seq >= row.seq:
                continue
            if have is self.own:
                gained = list(self.own.less(self._at_start))
                self.own.days, self.own.seq = dict(row.days), row.seq
                self._at_start = dict(row.days)
                for day, figures in gained:
                    self.own.add(day, figures)
            else:
                known[row.id] = row
            self.changed = True
        newest = sorted(known.values(), key=lambda row: max(row.days, default=""), reverse=True)
        self._kept.others = newest[:MOST_NODES]

    def nodes(self) -> Iterator[NodeDays]:
        yield self.own
        yield from self.others

    def used(self, first: date) -> Counter[str]:
        """The figures of all nodes from a day on; what counts is `all` less `cheap`."""
        found: Counter[str] = Counter()
        for row in self.nodes():
            found.update(row.gained(first))
        return found

    def by_day(self) -> dict[date, int]:
        """What counted on each day, of all nodes."""
        found: Counter[date] = Counter()
        for row in self.nodes():
            for day, figures in row.days.items():
                bytes_, cheap = (*figures, 0, 0)[:2]
                found[date.fromisoformat(day)] += bytes_ - cheap
        return dict(found)

    # --- the file

    def text(self) -> bytes:
        self.changed = self.urgent = False
        return _stored().dump_json(self._kept)

    def save(self, text: bytes) -> None:
        """OSError. Blocks."""
        replace_file(self._path, text)


_NODE = TypeAdapter(NodeDays)


def write_node(row: NodeDays) -> str:
    return _NODE.dump_json(row).decode()


def read_node(text: str | None) -> NodeDays | None:
    """None for what is none."""
    try:
        given: Any = json.loads(text) if text is not None else None
        return _NODE.validate_python(given) if given is not None else None
    except (ValueError, RecursionError):
        return None
