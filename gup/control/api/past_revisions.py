"""The timeline: which revision a client had when, and the site's shares by age of revision."""

import re
import sqlite3
from collections.abc import Iterator
from datetime import datetime
from ipaddress import ip_address
from typing import Any, Literal
from zoneinfo import ZoneInfo

from aiohttp import web
from pydantic import Field

from gup.client_names import is_hashed
from gup.content.catalog import Stream
from gup.control.api import schemas
from gup.control.api.endpoint import Days, Endpoint, Table, Text
from gup.control.api.statistics import Form
from gup.control.state import ControlState
from gup.control.stats import timeline
from gup.control.stats.timeline import CLASSES, DAY, Change
from gup.control.traffic import revision_time

SAYING = (
    "Taken does not mean installed: gup knows what it sent to a client and what the client asked for, "
    "not what is on the client's disk."
)
_OFF = "reports.addresses is off: there is no record of single clients"
_MOST_STREAMS = 200
MOST_CHANGES = 10_000
_HOURLY_DAYS = 7
"""Up to so many days the site's shares are listed by the hour, else the last of each day."""
_MONTH = 30


class Moment(Form):
    """What to look up. Without a client: the site's shares by age."""

    client: Text | None = Field(None, description="A client's address, or its hash.", max_length=64)
    at: Text | None = Field(
        None,
        description="A time such as 2026-11-20 14:05, in site.time_zone; 2026-11-20T14:05Z; or Unix seconds.",
        max_length=40,
    )
    stream: Text | None = Field(
        None, description="Only streams with this moniker, or with this text in the product's name."
    )
    days: Days | None = Field(None, description="List the changes, or the shares, of so many days.")


def read_moment(text: str, zone: ZoneInfo | None) -> tuple[float, str | None]:
    """The Unix time of a text, and how it was read where that is not plain. ValueError: it is no time."""
    if re.fullmatch(r"[0-9]{9,11}(\.[0-9]+)?", text):
        return float(text), None
    # in a query a plus sign stands for a space
    text = re.sub(r"(:\d\d) (\d\d:?\d\d)$", r"\1+\2", text.strip())
    wall = datetime.fromisoformat(text)
    if wall.tzinfo is not None:
        return wall.timestamp(), None
    first, second = (wall.replace(tzinfo=zone, fold=fold).timestamp() for fold in (0, 1))
    if first < second:
        offsets = [f"{datetime.fromtimestamp(at, zone).astimezone(zone):%z}" for at in (first, second)]
        return first, (
            f"that day the clock showed {wall:%H:%M} twice; the first one is meant. "
            f"For the second, write {wall:%Y-%m-%dT%H:%M}{offsets[1][:3]}:{offsets[1][3:]}"
        )
    if first > second:
        return first, (
            f"that day the clock was put forward and never showed {wall:%H:%M}: "
            f"read as {datetime.fromtimestamp(first, zone):%H:%M}"
        )
    return first, None


def zone_of(state: ControlState) -> ZoneInfo | None:
    name = state.settings.site.time_zone
    return ZoneInfo(name) if name else None  # None: the machine's own


async def look_up(state: ControlState, query: Moment) -> schemas.Timeline:
    """Which revision a client had when; or the site's clients by age of their revision."""
    now, reports = state.clock(), state.settings.reports
    moment, moment_note = None, None
    if query.at is not None:
        try:
            moment, moment_note = read_moment(query.at, zone_of(state))
        except (ValueError, OverflowError, OSError) as error:
            raise web.HTTPBadRequest(
                text=f'at: {query.at!r} is not a time, such as "2026-11-20 14:05" or 2026-11-20T14:05+01:00'
            ) from error
        if moment > now:
            raise web.HTTPBadRequest(text=f"at: {query.at!r} is in the future")
    await state.reports.write_clients()  # stored clients are named by the settings afterwards
    names = () if query.client is None else _names(state, query.client)
    oldest = -int((reports.timeline - now) // DAY)  # the first whole day
    cluster = state.dependencies.cluster

    def answer(db: sqlite3.Connection) -> schemas.Timeline:
        kept = timeline.kept(db, now, oldest)
        found: dict[str, Any] = {"standings": [], "changes": [], "shares": [], "seen_at": None, "note": None}
        if query.client is None:
            found |= _site(state, db, query, moment)
        elif reports.addresses == "off":
            found["note"] = _OFF
        else:
            found |= _client(state, db, query, names, moment)
        return schemas.Timeline(
            at=now,
            addresses=reports.addresses,
            retention_seconds=reports.retention,
            saying=SAYING,
            node=None if cluster is None else cluster.node,
            time_zone=state.settings.site.time_zone,
            kept_seconds=reports.timeline,
            since=kept.since,
            exact_since=kept.exact_since,
            active_seconds=timeline.ACTIVE_SECONDS,
            moment=moment,
            moment_note=moment_note,
            client=names[0] if names and reports.addresses != "off" else None,
            **found,
        )

    return await state.database.run(answer)


def _names(state: ControlState, client: str) -> tuple[str, ...]:
    """The names by which a client may be recorded: its own now, and its hash from an earlier setting."""
    if is_hashed(client):
        return (client,)
    try:
        address = ip_address(client)
    except ValueError as error:
        raise web.HTTPBadRequest(
            text=f"client: {client!r} is neither an address, such as 10.0.0.7, nor a hash, as reports show it"
        ) from error
    return state.reports.names_of(str(getattr(address, "ipv4_mapped", None) or address))


def _is_wanted(state: ControlState, stream: Stream, wanted: str | None) -> bool:
    if wanted is None:
        return True
    label, word = state.dependencies.label_of(stream, ""), wanted.casefold()
    return word == stream[2].casefold() or (label is not None and word in label.product.casefold())


def _named(state: ControlState, stream: Stream) -> dict[str, Any]:
    label = state.dependencies.label_of(stream, "")
    return {
        "product": label.product if label else stream[2],
        "version": (label and label.version) or stream[0],
        "language": (label and label.language) or stream[1],
        "type": label.type if label else None,
        "moniker": stream[2],
    }


def _how(change: Change) -> dict[str, Any]:
    how: Literal["taken", "stated"] = "taken" if timeline.is_taken(change.state) else "stated"
    return {"revision": timeline.revision_of(change.state), "how": how}


def age_days(revision: str, at: float) -> int | None:
    time = revision_time(revision)
    return None if time is None else int(at // DAY - time // DAY)


def _client(
    state: ControlState, db: sqlite3.Connection, query: Moment, names: tuple[str, ...], moment: float | None
) -> dict[str, Any]:
    lines = timeline.lines_of(db, names)
    wanted = {stream: ids for stream, ids in lines.items() if _is_wanted(state, stream, query.stream)}
    seen = db.execute(
        f"SELECT max(seen_at) FROM clients WHERE name IN ({','.join('?' * len(names))})",  # noqa: S608
        names,
    ).fetchone()[0]
    note = None
    if not lines and seen is None:
        note = f"there is no record of {names[0]}"
    elif not lines:
        note = f"{names[0]} was seen, but has neither taken nor stated a revision"
    elif not wanted:
        note = f"no stream of this client is {query.stream!r}: `gup report content` lists the streams"
    reader, until = timeline.Reader(db), state.clock() if moment is None else moment
    found: dict[str, Any] = {"seen_at": seen, "note": note}
    if query.days is not None:
        ids = {id_: stream for stream, of_stream in wanted.items() for id_ in of_stream}
        changes = reader.changes(list(ids), until - query.days * DAY, until)
        found["changes"] = [
            schemas.RevisionChange(
                at=change.at,
                product=_named(state, ids[change.line])["product"],
                moniker=ids[change.line][2],
                **_how(change),
            )
            for change in reversed(changes[-MOST_CHANGES:])
        ]
    if query.days is None or moment is not None:
        found["standings"] = [
            _standing(_named(state, stream), reader.at(ids, until), until)
            for stream, ids in list(wanted.items())[:_MOST_STREAMS]
        ]
    return found


def _standing(named: dict[str, Any], found: timeline.Standing, at: float) -> schemas.TimedRevision:
    before, after = found.change, found.after
    revision = None if before is None else timeline.revision_of(before.state)
    return schemas.TimedRevision(
        **named,
        **(_how(before) if before is not None else {"revision": None, "how": None}),
        age_days=None if revision is None else age_days(revision, at),
        changed_at=None if before is None else before.at,
        next_revision=None if after is None else timeline.revision_of(after.state),
        next_at=None if after is None else after.at,
        exact=found.exact,
    )


def _site(state: ControlState, db: sqlite3.Connection, query: Moment, moment: float | None) -> dict[str, Any]:
    until = state.clock() if moment is None else moment
    one_only = moment is not None and query.days is None
    days = query.days or _MONTH
    found = timeline.shares(db, until - (timeline.HOUR if one_only else days * DAY), until)
    found = [
        share
        for share in found
        if (share.stream is None and query.stream is None)
        or (share.stream is not None and _is_wanted(state, share.stream, query.stream))
    ]
    if one_only:
        latest = max((share.at for share in found), default=None)
        found = [share for share in found if share.at == latest]
    elif days > _HOURLY_DAYS:
        found = timeline.last_of_days(found, zone_of(state))
    note = None
    if not found and moment is not None:
        note = "no clients were counted then: gup was off, or was not yet installed"
    elif not found:
        note = "no clients were counted yet: gup counts them every ten minutes"
    elif state.settings.reports.addresses == "off":
        note = _OFF
    found.reverse()
    return {
        "note": note,
        "shares": [
            schemas.AgeShare(
                at=share.at,
                **{name: value for name, value in named.items() if name != "type"},
                clients=share.clients,
                current=share.current,
                ages=share.ages,
                newest=share.newest or None,
                held=share.held or None,
            )
            for share in found
            for named in [_nobody if share.stream is None else _named(state, share.stream)]
        ],
    }


_nobody: dict[str, Any] = dict.fromkeys(("product", "version", "language", "moniker"))


# --- as a table

_MEANS = {
    "taken": "taken here; not proof of installation",
    "stated": "stated by the client in a request; not proof of installation",
    None: "not known",
}


def _rows(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A line on the record itself, then one for each standing, change or share."""
    client = {"client": report["client"], "moment_at": report["moment"], "node": report["node"]}
    about = "; ".join(filter(None, (SAYING, report["note"], report["moment_note"])))
    yield client | {
        "line": "record",
        "since_at": report["since"],
        "exact_since_at": report["exact_since"],
        "meaning": about,
    }
    for row in report["standings"]:
        yield client | row | {"line": "standing", "meaning": _MEANS[row["how"]]}
    for row in report["changes"]:
        yield client | row | {"line": "change", "changed_at": row["at"], "meaning": _MEANS[row["how"]]}
    for row in report["shares"]:
        ages = {f"age_{age}": count for age, count in row["ages"].items()}
        yield row | ages | {"line": "share", "counted_at": row["at"], "node": report["node"]}


TIMELINE = Table(
    (
        *("line", "node", "client", "moment_at", "product", "version", "language", "moniker", "revision"),
        *("how", "age_days", "changed_at", "next_revision", "next_at", "exact", "meaning"),
        *("counted_at", "clients", "current", *(f"age_{age}" for age in CLASSES), "newest", "held"),
        *("since_at", "exact_since_at"),
    ),
    _rows,
)
ENDPOINTS = (Endpoint("GET", "/api/v1/report/timeline", look_up, csv=TIMELINE),)
