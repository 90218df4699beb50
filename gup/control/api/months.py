"""A month in figures, for the statement: savings, money, time behind, incidents, clients."""

import asyncio
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from datetime import date, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal, localcontext
from typing import NamedTuple
from zoneinfo import ZoneInfo

from aiohttp import web
from pydantic import Field

from gup.content.catalog import CLIENT_PATCHES
from gup.control.api import schemas
from gup.control.api.endpoint import Endpoint, Request, Text
from gup.control.api.past_revisions import zone_of
from gup.control.state import ControlState
from gup.control.stats import timeline
from gup.control.stats.history import added_up, covered_days, traffic, traffic_by_stream
from gup.control.stats.incidents import Incident, incidents
from gup.control.stats.timeline import Share
from gup.units import time_in_words

_STREAMS = 10
_VERSIONS = 10
_NOTABLE = 20
_MISSED_SECONDS = 600.0
"""A day of which less than this was not counted counts as whole."""
PLAIN = {
    "no-upstream": "The management servers could not be reached; clients got what was stored here",
    "upstream-down": "A server could not be reached; others were used",
    "upstream-doubtful": "A server answered with errors",
    "disk-refuses": "The disk of this machine refused to store files",
    "disk-short": "The disk of this machine was nearly full",
    "cache-short": "The space for stored updates was too small",
    "not-stored": "Updates were passed on without being stored, for lack of space",
    "bad-content": "A server sent files that can't be right; they were refused",
    "unsure-end": "A server sent files whose end could not be checked",
    "damage": "Stored files were found damaged, and were replaced",
    "full-storm": "Many machines fetched whole packages instead of small updates",
    "stale-stream": "A newer update was asked for, and could not be fetched",
    "stale-catalogue": "The list of updates could not be read",
    "wan-full": "The link was full, and downloads waited",
    "clients-silent": "No machine asked for updates for a day",
    "reload-failed": "A change of the settings was refused",
    "workers-restarting": "Parts of the service ended and were started again",
    "alarms-unsent": "Messages about problems could not be delivered",
    "events-lost": "This machine was overloaded for a while",
    "name-taken": "Two machines of the group had one name",
    "engine-away": "The machines of the group could not coordinate",
    "member-unreachable": "A machine of the group could not be reached",
    "member-unlike": "The machines of the group had different settings",
    "orders-unknown": "It was not known whether stored updates had been withdrawn",
    "budget-short": "The data allowance of the link will not last until the end of its period",
    "budget-held": "The data allowance of the link was used up, and downloads were held back",
    "outbreak": "Security updates were given priority over the limits of the link",
    "clients-sick": "Something seemed to be wrong with many machines",
    "row-forged": "A machine outside of the group pretended to belong to it",
}
"""What alarms mean, for those who pay the link."""


class MonthRequest(Request):
    """Which month."""

    month: Text | None = Field(
        None, description="Such as 2026-10. Without it the last whole one, or the first.", max_length=20
    )


class Month(NamedTuple):
    """A month of the site's calendar; its edges in Unix seconds."""

    year: int
    number: int
    since: float
    until: float

    @property
    def name(self) -> str:
        return f"{self.year}-{self.number:02}"

    def days(self) -> Iterator[date]:
        day = date(self.year, self.number, 1)
        while day.month == self.number:
            yield day
            day += timedelta(days=1)


def month_of(year: int, number: int, zone: ZoneInfo | None) -> Month:
    after = (year, number + 1) if number < 12 else (year + 1, 1)
    return Month(year, number, day_start(date(year, number, 1), zone), day_start(date(*after, 1), zone))


def day_start(day: date, zone: ZoneInfo | None) -> float:
    return datetime(day.year, day.month, day.day, tzinfo=zone).timestamp()


def last_whole_month(now: float, zone: ZoneInfo | None) -> Month:
    first = datetime.fromtimestamp(now, zone).date().replace(day=1) - timedelta(days=1)
    return month_of(first.year, first.month, zone)


def chosen_month(text: str | None, now: float, installed_at: float, zone: ZoneInfo | None) -> Month:
    """HTTPBadRequest or HTTPNotFound, with an explanation, where there is nothing to tell of."""
    if text is None:
        last = last_whole_month(now, zone)
        if last.until > installed_at:
            return last
        today = datetime.fromtimestamp(now, zone)
        return month_of(today.year, today.month, zone)
    found = re.fullmatch(r"([0-9]{4})-(0[1-9]|1[0-2])", text)
    if found is None or not 1970 <= int(found[1]) < 9999:
        raise web.HTTPBadRequest(text=f"month: {text!r:.40} is not a month such as 2026-10")
    month = month_of(int(found[1]), int(found[2]), zone)
    if month.since > now:
        raise web.HTTPBadRequest(text=f"month: {text} has not begun yet")
    if month.until <= installed_at:
        began = datetime.fromtimestamp(installed_at, zone)
        raise web.HTTPNotFound(
            text=f"month: there is nothing to tell of {text}: gup counts since {began:%-d %B %Y}"
        )
    return month


def money(count_bytes: int, price_per_gb: str) -> Decimal:
    """What so many bytes cost, to the hundredth, half a hundredth rounded away from zero."""
    with localcontext() as exact:
        exact.prec = 60
        return (Decimal(count_bytes) * Decimal(price_per_gb) / 10**9).quantize(
            Decimal("0.01"), rounding=ROUND_HALF_UP
        )


async def month_report(state: ControlState, query: MonthRequest) -> schemas.MonthReport:
    """A month's savings, money, time behind, incidents and clients."""
    now, zone, own = state.clock(), zone_of(state), state.settings.reports
    installed_at = state.dependencies.installed_at
    month = await asyncio.to_thread(chosen_month, query.month, now, installed_at, zone)
    _, ledger = await state.history.savings()
    versions = await state.reports.groups()

    def read(db: sqlite3.Connection) -> tuple[Stored, set[tuple[str, str, str]]]:
        first, covered = covered_days(db, f"{month.name}-01", f"{month.name}-31")
        since = dict(db.execute("SELECT name, value FROM about"))
        found = Stored(
            first,
            covered,
            timeline.shares(db, month.since, min(now, month.until - 1)),
            incidents(db, month.since, month.until),
            since.get("incidents_since"),
        )
        streams = {share.stream for share in found.shares if share.stream is not None}
        labels = {stream: state.dependencies.label_of(stream, "") for stream in streams}
        return found, {at for at, label in labels.items() if label and label.type == CLIENT_PATCHES}

    stored, patches = await state.database.run(read)
    counts = {day: found for day, found in ledger.items() if day.startswith(month.name)}
    total = traffic(added_up(counts.values()))
    calendar = _Calendar(month, zone, now, installed_at)
    cluster = state.dependencies.cluster
    by_day = month.since < now - timeline.HOURLY_SECONDS
    shares = timeline.last_of_days(stored.shares, zone) if by_day else stored.shares
    site = [share for share in shares if share.stream is None]
    asked = sum(share.clients for share in site)
    seen = [share for share in shares if share.stream not in patches]
    days = [
        schemas.MonthDay(
            **{name: getattr(moved, name) for name in schemas.Traffic.model_fields},
            day=day.isoformat(),
            due_seconds=calendar.due_seconds(day),
            covered_seconds=_covered(stored, day, calendar),
            ages=_ages_of(site, day, zone),
        )
        for day in month.days()
        for moved in [traffic(counts.get(day.isoformat(), {}))]
    ]
    hours = _hours(seen)
    report = schemas.MonthReport(
        month=month.name,
        site=state.settings.site.name,
        node=None if cluster is None else cluster.node,
        time_zone=state.settings.site.time_zone,
        since=max(month.since, installed_at),
        until=min(month.until, now),
        so_far=now < month.until,
        made_at=now,
        installed_at=installed_at,
        traffic=total,
        price_per_gb=own.price_per_gb,
        currency=own.currency or None,
        saved_money=None if own.price_per_gb is None else str(money(total.saved_bytes, own.price_per_gb)),
        days=days,
        streams=traffic_by_stream(added_up(counts.values()), state.slot_labels())[:_STREAMS],
        covered_seconds=_sum_or_none(day.covered_seconds for day in days),
        due_seconds=sum(day.due_seconds for day in days),
        clients_most=max((share.clients for share in site), default=None),
        clients_mean=round(asked / len(site)) if site else None,
        versions=versions[:_VERSIONS],
        within_a_day=sum(share.ages["1d"] for share in site) / asked if asked else None,
        at_newest=sum(share.current for share in site) / asked if asked else None,
        counted_by="day" if by_day else "hour",
        counts=len(site),
        counts_behind=len({at for at, behind in hours.items() if behind}),
        behind=list(_behind(state, seen)),
        incidents=_sums(stored.incidents, month, now),
        notable=_notable(stored.incidents, month, now),
        incidents_since=stored.incidents_since,
        reservations=[],
    )
    off, kept_since = state.reports.mode == "off", now - own.ledger
    report.reservations = list(_reservations(report, zone, kept_since, off=off))
    return report


class Stored(NamedTuple):
    """What the statistics database has of a month."""

    covered_since: str | None
    covered: dict[str, float]
    shares: list[Share]
    incidents: list[Incident]
    incidents_since: float | None


class _Calendar(NamedTuple):
    month: Month
    zone: ZoneInfo | None
    now: float
    installed_at: float

    def due_seconds(self, day: date) -> float:
        """For how long gup could count on this day: a day of 23 to 25 hours, as far as it is over."""
        since = max(day_start(day, self.zone), self.installed_at)
        return max(0.0, min(day_start(day + timedelta(days=1), self.zone), self.now) - since)


def _covered(stored: Stored, day: date, calendar: _Calendar) -> float | None:
    if stored.covered_since is None or day.isoformat() < stored.covered_since:
        return None
    return min(stored.covered.get(day.isoformat(), 0.0), calendar.due_seconds(day))


def _sum_or_none(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _ages_of(shares: list[Share], day: date, zone: ZoneInfo | None) -> dict[str, int] | None:
    """All counts of a day added up: shares of them are the day's mean."""
    since, until = day_start(day, zone), day_start(day + timedelta(days=1), zone)
    total: Counter[str] = Counter(dict.fromkeys(timeline.CLASSES, 0))
    for share in shares:
        if since <= share.at < until:
            total.update(share.ages)
    return dict(total) if total.total() else None


def _hours(shares: list[Share]) -> dict[int, bool]:
    """By hour, whether clients knew of something newer than the site had."""
    hours: dict[int, bool] = {}
    for share in shares:
        if share.stream is not None:
            hours[share.at] = hours.get(share.at, False) or share.held < share.newest
    return hours


def _behind(state: ControlState, shares: list[Share]) -> Iterator[schemas.StreamBehind]:
    by_stream = defaultdict(list)
    for share in shares:
        if share.stream is not None:
            by_stream[share.stream].append(share)
    order = sorted(by_stream.items(), key=lambda item: -sum(share.clients for share in item[1]))
    for stream, found in order[:_STREAMS]:
        product, language = state.label(stream)
        clients = sum(share.clients for share in found)
        yield schemas.StreamBehind(
            product=product,
            language=language,
            counts=len(found),
            counts_behind=sum(share.held < share.newest for share in found),
            within_a_day=sum(share.ages["1d"] for share in found) / clients if clients else None,
            at_newest=sum(share.current for share in found) / clients if clients else None,
        )


def _seconds(one: Incident, month: Month, now: float) -> float:
    ended = now if one.ended_at is None else one.ended_at
    return max(0.0, min(ended, month.until, now) - max(one.began_at, month.since))


def _sums(found: list[Incident], month: Month, now: float) -> list[schemas.IncidentSum]:
    """By kind and, of servers, by name; critical ones first, then the longest."""
    by_kind: dict[tuple[str, str, str], list[Incident]] = defaultdict(list)
    for one in found:
        subject = one.subject if one.name.startswith("upstream-") else ""
        by_kind[one.name, one.severity, subject].append(one)
    sums = [
        schemas.IncidentSum(
            name=name,
            said=PLAIN.get(name, name),
            severity=severity,
            subject=subject or None,
            count=len(of_kind),
            seconds=sum(_seconds(one, month, now) for one in of_kind),
            longest_seconds=max(_seconds(one, month, now) for one in of_kind),
            lasts=any(one.ended_at is None for one in of_kind),
        )
        for (name, severity, subject), of_kind in by_kind.items()
    ]
    return sorted(sums, key=lambda row: (row.severity != "critical", -row.seconds, row.name))


def _notable(found: list[Incident], month: Month, now: float) -> list[schemas.PastIncident]:
    """The critical ones, and servers that could not be reached: the longest of them, in order of time."""
    chosen = [one for one in found if one.severity == "critical" or one.name == "upstream-down"]
    chosen.sort(key=lambda one: -_seconds(one, month, now))
    return [
        schemas.PastIncident(
            name=one.name,
            said=PLAIN.get(one.name, one.name),
            subject=one.subject or None,
            began_at=one.began_at,
            ended_at=one.ended_at,
            seconds=_seconds(one, month, now),
        )
        for one in sorted(chosen[:_NOTABLE], key=lambda one: one.began_at)
    ]


# --- what is to be known about the figures


def _reservations(
    report: schemas.MonthReport, zone: ZoneInfo | None, kept_since: float, *, off: bool
) -> Iterator[str]:
    def on(at: float) -> str:
        return f"{datetime.fromtimestamp(at, zone):%-d %B %Y}"

    if report.node is not None:
        yield (
            f"Several machines serve this site together. These are the figures of one, {report.node}: "
            "of the machines that fetched from it, and of what it fetched over the link. Each has its own "
            "statement; their savings may be added up."
        )
    if report.so_far:
        yield "The month is not over: these are the figures so far."
    if report.installed_at >= report.since:
        yield f"gup was installed on {on(report.installed_at)}: there are no figures of the days before."
    if kept_since > report.since:
        yield f"Single days before {on(kept_since)} are not kept any more (reports.ledger)."
    yield from _gaps(report)
    if report.price_per_gb is not None:
        per = " ".join(filter(None, (report.price_per_gb, report.currency)))
        yield f"The amount of money is reckoned at {per} for a gigabyte, the price that is set now."
    if off:
        yield "Clients are not recorded (reports.addresses is off): their number and age are not known."
    elif not report.counts:
        yield "Clients were not counted in this month: how up to date they were is not known."
    if report.incidents_since is None or report.incidents_since > report.since + _MISSED_SECONDS:
        begun = "not yet" if report.incidents_since is None else f"since {on(report.incidents_since)}"
        yield f"Incidents are recorded {begun}: there may have been others before."


def _gaps(report: schemas.MonthReport) -> Iterator[str]:
    """Days of which something is missing, those in a row together."""
    days = [day for day in report.days if day.due_seconds]
    unknown = [day.day for day in days if day.covered_seconds is None]
    if unknown:
        yield (
            f"From {_day(unknown[0])} to {_day(unknown[-1])} it is not known whether gup was switched on all "
            "the time: an earlier version did not record it."
        )
    run: list[schemas.MonthDay] = []
    partly = 0.0
    for day in [*days, None]:
        moved = day is not None and (day.sent_bytes or day.received_bytes)  # counted at the next start
        if day is not None and day.covered_seconds == 0 and day.due_seconds > _MISSED_SECONDS and not moved:
            run.append(day)
            continue
        if run:
            whole = "on" if len(run) == 1 else "from"
            until = "" if len(run) == 1 else f" to {_day(run[-1].day)}"
            yield f"gup was switched off {whole} {_day(run[0].day)}{until}: nothing was counted."
            run = []
        if day is not None and day.covered_seconds is not None:
            missed = day.due_seconds - day.covered_seconds
            partly += missed if missed > _MISSED_SECONDS else 0.0
    if partly:
        yield f"gup was switched off for parts of days, {time_in_words(partly)} in all."


def _day(day: str) -> str:
    return f"{date.fromisoformat(day):%-d %B}"


ENDPOINTS = (Endpoint("GET", "/api/v1/report/month", month_report, problems=(404,)),)
