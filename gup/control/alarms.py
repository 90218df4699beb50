"""Alarms: what an operator must know. A table of conditions, and the board of the present ones.

Each condition is a pure function of a snapshot, which `alarm_collector` takes once a second.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gup.control.api.schemas import Alarm
from gup.control.events import Rejected
from gup.control.traffic import Storm
from gup.units import bytes_in_words, time_in_words

_MOST = 1000
STANDS_SECONDS = 1800.0
"""Twice the longest back-off of a rejected body: clients do not ask for it any more."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A body that an upstream sent and that can't be the content asked for."""

    key: str
    upstream: str
    detail: str
    at: float


class Rejections:
    """The latest thousand rejections. One ends when the file is stored or not asked for any more."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[str, str], Rejection] = OrderedDict()

    def note(self, event: Rejected, now: float) -> None:
        """A body was rejected, or is so still."""
        at = event.key.text, event.upstream
        self._rows[at] = Rejection(event.key.text, event.upstream, event.detail, now)
        self._rows.move_to_end(at)
        while len(self._rows) > _MOST:
            self._rows.popitem(last=False)

    def clear(self, key: str) -> None:
        """The file is stored."""
        for at in [at for at in self._rows if at[0] == key]:
            del self._rows[at]

    def standing(self, now: float) -> Iterator[Rejection]:
        """The present rejections, the latest first."""
        return (row for row in reversed(self._rows.values()) if abs(now - row.at) < STANDS_SECONDS)


Severity = Literal["warning", "critical"]

LATELY_SECONDS = 600.0
"""The window of counts, except that of damage."""
DAMAGE_SECONDS = 3600.0
NEAR_LIMIT = 0.95
"""The share of a limit that counts as reaching it."""
RECENT_USE_SECONDS = 86400.0
"""Entries used within this time should not have been evicted for space."""
MISSED_SECONDS = 300.0
"""A revision that clients ask for in vain for so long is overdue."""
SILENT_SECONDS = 86400.0
REGULARS = 3
"""With so many clients in a week, a day without any is unusual."""


@dataclass(frozen=True, slots=True)
class UpstreamHealth:
    """The health of one upstream."""

    name: str
    up: bool
    last_error: str = ""
    doubtful: bool = False
    """Whether it accepts connections but does not answer, or answers with errors."""


@dataclass(frozen=True, slots=True)
class Missed:
    """A revision that clients asked for in vain, and the newest one that is held."""

    stream: str
    revision: str
    held: str | None
    first: float
    last: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state at one moment. Counts named `lately` cover LATELY_SECONDS, `damage` DAMAGE_SECONDS."""

    now: float
    upstreams: Sequence[UpstreamHealth] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    unstored: str = ""
    """The latest body that a limit of the settings kept from being stored."""
    size_bytes: int = 0
    limit_bytes: int = 1
    free_bytes: int = 1
    min_free_bytes: int = 0
    recent_evicted_lately: int = 0
    """Entries evicted for space that had been used within RECENT_USE_SECONDS."""
    damage: int = 0
    storms: Sequence[tuple[str, Storm]] = ()
    """With the names of their streams."""
    config_ok: bool = True
    restarts_lately: int = 0
    missed: Sequence[Missed] = ()
    unsure_ends: Sequence[str] = ()
    """Descriptions of bodies without a confirmed end, within LATELY_SECONDS."""
    catalogues: Mapping[str, str] = field(default_factory=dict)
    """Problems of catalogues by upstream."""
    wan_limit: int = 0
    wan_used: int = 0
    fills_waiting: int = 0
    clients_week: int = 0
    client_last_seen: float | None = None
    lost_events_lately: int = 0
    rejections: Sequence[Rejection] = ()


Finding = tuple[str, str]
"""Subject ("" for the service itself) and text of an alarm."""


@dataclass(frozen=True, slots=True)
class AlarmType:
    """One row of ALARMS. It begins when found for `after_seconds` and ends when not found for
    `calm_seconds`: nothing flaps.
    """

    name: str
    severity: Severity
    find: Callable[[Snapshot], Iterator[Finding]]
    what_to_do: str
    after_seconds: float = 0.0
    calm_seconds: float = 15.0


def _upstream_down(now: Snapshot) -> Iterator[Finding]:
    if any(upstream.up for upstream in now.upstreams):
        for upstream in now.upstreams:
            if not upstream.up:
                yield upstream.name, f"{upstream.name} is down; others are asked{_because(upstream)}"


def _no_upstream(now: Snapshot) -> Iterator[Finding]:
    if now.upstreams and not any(upstream.up for upstream in now.upstreams):
        names = ", ".join(upstream.name for upstream in now.upstreams)
        why = next((_because(u) for u in now.upstreams if u.last_error), "")
        yield "", f"no upstream answers ({names}): only what is stored can be served{why}"


def _upstream_doubtful(now: Snapshot) -> Iterator[Finding]:
    for upstream in now.upstreams:
        if upstream.doubtful:
            yield upstream.name, f"{upstream.name} takes connections but fails to answer{_because(upstream)}"


def _because(upstream: UpstreamHealth) -> str:
    return f" ({upstream.last_error})" if upstream.last_error else ""


def _bad_content(now: Snapshot) -> Iterator[Finding]:
    for row in now.rejections:
        yield row.key, f"{row.upstream} has no usable {row.key}: {row.detail}"


def _disk_refuses(now: Snapshot) -> Iterator[Finding]:
    for what, detail in now.refusals.items():
        yield what, f"the disk takes no {what}: {detail}"


def _not_stored(now: Snapshot) -> Iterator[Finding]:
    if now.unstored:
        yield "", f"content is passed through and not stored: {now.unstored}"


def _disk_short(now: Snapshot) -> Iterator[Finding]:
    if now.free_bytes < now.min_free_bytes:
        free, least = bytes_in_words(now.free_bytes), bytes_in_words(now.min_free_bytes)
        yield "", f"{free} are free on the cache's disk, less than the {least} of cache.min_free"


def _cache_short(now: Snapshot) -> Iterator[Finding]:
    if now.recent_evicted_lately and now.size_bytes >= NEAR_LIMIT * now.limit_bytes:
        full, gone = bytes_in_words(now.limit_bytes), now.recent_evicted_lately
        yield "", f"the cache is full ({full}), and {gone} entries that were used within a day had to go"


def _damage(now: Snapshot) -> Iterator[Finding]:
    if now.damage:
        yield "", f"damage was found in the store {now.damage} times within the last hour"


def _full_storm(now: Snapshot) -> Iterator[Finding]:
    for label, storm in now.storms:
        yield "/".join(storm.stream), storm_in_words(label, storm)


def storm_in_words(label: str, storm: Storm) -> str:
    """The text of a storm: who asked for how much, and what it costs."""
    shown = ", ".join(storm.addresses[:5])
    others = storm.clients - len(storm.addresses[:5])
    who = f"{storm.clients} clients" if storm.clients else "clients"
    if shown:
        who += f" ({shown}{f' and {others} more' if others > 0 else ''})"
    cost = f"{bytes_in_words(storm.lan_bytes)} over the LAN, {bytes_in_words(storm.wan_bytes)} over the WAN"
    instead = (
        f"; as deltas of {bytes_in_words(storm.delta_bytes)} on average it would be "
        f"{bytes_in_words(storm.fulls * storm.delta_bytes)} over the LAN"
        if storm.delta_bytes
        else ""
    )
    return (
        f"{who} asked for {storm.fulls} full packages of {label}, against "
        f"{storm.deltas} deltas, within 20 minutes: {cost}{instead}"
    )


def _reload_failed(now: Snapshot) -> Iterator[Finding]:
    if not now.config_ok:
        yield "", "the settings could not be read again: those before are in force"


def _restarts(now: Snapshot) -> Iterator[Finding]:
    if now.restarts_lately:
        yield "", f"worker processes died {now.restarts_lately} times within 10 minutes and were replaced"


def _stale_stream(now: Snapshot) -> Iterator[Finding]:
    for missed in now.missed:
        if missed.last - missed.first >= MISSED_SECONDS and (missed.held or "") < missed.revision:
            since = time_in_words(now.now - missed.first)
            held = f"the newest here is {missed.held}" if missed.held else "nothing newer is here"
            yield (
                missed.stream,
                f"clients have asked for {missed.revision} of {missed.stream} for {since} in vain; {held}",
            )


def _unsure_end(now: Snapshot) -> Iterator[Finding]:
    if now.unsure_ends:
        yield "", now.unsure_ends[0]


def _stale_catalogue(now: Snapshot) -> Iterator[Finding]:
    for name, problem in now.catalogues.items():
        yield name, f"the catalogue of {name} can't be read: {problem}"


def _wan_full(now: Snapshot) -> Iterator[Finding]:
    if now.wan_limit and now.fills_waiting and now.wan_used >= NEAR_LIMIT * now.wan_limit:
        rate = f"{bytes_in_words(now.wan_limit)}/s"
        yield "", f"the WAN is full ({rate}), and {now.fills_waiting} fills wait for their turn"


def _silent(now: Snapshot) -> Iterator[Finding]:
    last = now.client_last_seen
    if now.clients_week >= REGULARS and last is not None and now.now - last >= SILENT_SECONDS:
        ago = time_in_words(now.now - last)
        yield "", f"no client has asked for {ago}, where {now.clients_week} did within the last week"


def _events_lost(now: Snapshot) -> Iterator[Finding]:
    if now.lost_events_lately:
        lost = now.lost_events_lately
        yield "", f"{lost} messages from workers were lost within 10 minutes: figures of use are too low"


ALARMS: tuple[AlarmType, ...] = (
    AlarmType(
        "no-upstream",
        "critical",
        _no_upstream,
        "Look whether the WAN stands and the management server runs: curl it from this machine.",
    ),
    AlarmType(
        "upstream-down",
        "warning",
        _upstream_down,
        "Look at that server and the way to it; take it out of the settings if it is gone for good.",
    ),
    AlarmType(
        "upstream-doubtful",
        "warning",
        _upstream_doubtful,
        "Look at that server's own log, and ask it for a file with curl from this machine.",
        after_seconds=60.0,
        calm_seconds=60.0,
    ),
    AlarmType(
        "bad-content",
        "warning",
        _bad_content,
        "Look at that file on that server, and at proxies on the way. It is looked at again at the latest 15 "
        "minutes after the last time, when a client asks for it.",
    ),
    AlarmType(
        "disk-refuses",
        "critical",
        _disk_refuses,
        "Look at the disk of cache.directory: full, read-only, out of inodes, over a quota, or broken.",
    ),
    AlarmType(
        "not-stored",
        "warning",
        _not_stored,
        "Raise cache.max_size, or make room below cache.min_free: until then each client's download of it "
        "crosses the WAN.",
    ),
    AlarmType(
        "disk-short",
        "warning",
        _disk_short,
        "Something else fills the disk: make room, or lower cache.max_size or cache.min_free.",
        after_seconds=30.0,
    ),
    AlarmType(
        "cache-short",
        "warning",
        _cache_short,
        "Raise cache.max_size, or lower cache.keep_revisions or cache.max_unused.",
        calm_seconds=60.0,
    ),
    AlarmType(
        "damage",
        "warning",
        _damage,
        "It was mended where an upstream has the content; `gup cache verify` looks at everything. If it goes "
        "on, look at the disk and its cable (smartctl, dmesg).",
    ),
    AlarmType(
        "full-storm",
        "warning",
        _full_storm,
        "Look why these clients do not take deltas: away for long, a damaged installation, deltas that the "
        "management server does not keep for long enough, or 0-byte deltas there.",
        calm_seconds=60.0,
    ),
    AlarmType(
        "reload-failed",
        "warning",
        _reload_failed,
        "`gup config check` tells what is wrong in the settings; put it right and `gup reload`.",
        calm_seconds=0.0,
    ),
    AlarmType(
        "workers-restarting",
        "warning",
        _restarts,
        "Look into the log for why they ended; if nobody killed them, report it with the log.",
    ),
    AlarmType(
        "stale-stream",
        "warning",
        _stale_stream,
        "Look whether the management server has that revision, and has finished publishing it.",
    ),
    AlarmType(
        "stale-catalogue",
        "warning",
        _stale_catalogue,
        "Look whether the management server has /content/ContentInfo.txt, or name a copy in catalog.file.",
        after_seconds=60.0,
    ),
    AlarmType(
        "unsure-end",
        "warning",
        _unsure_end,
        "Have that server, or the web proxy before it, send Content-Length or chunks (HTTP/1.1): without "
        "them a body that was cut looks like a whole one, so nothing of it is stored.",
        calm_seconds=60.0,
    ),
    AlarmType(
        "wan-full",
        "warning",
        _wan_full,
        "Raise wan.rate if the link carries more; `gup status` tells what is being fetched.",
        after_seconds=60.0,
        calm_seconds=30.0,
    ),
    AlarmType(
        "clients-silent",
        "warning",
        _silent,
        "Over a holiday that is right. Else look whether clients reach this machine's port, and whether "
        "their policy still names it.",
    ),
    AlarmType(
        "events-lost",
        "warning",
        _events_lost,
        "The machine is too busy; look what else runs on it. The figures are put right within ten minutes.",
    ),
)
"""One row for each alarm, the worse ones first."""


_log = logging.getLogger("gup.control.alarms")
MAX_OF_A_TYPE = 50
"""Subjects of one alarm that are shown apart."""


@dataclass(slots=True)
class _Alarm:
    """One alarm about one subject; `since` is None until it begins."""

    text: str
    found_since: float
    found_last: float
    since: float | None = None


class AlarmBoard:
    """The present alarms. `look` is called about once a second with a monotonic clock; the times shown are
    those of the snapshots.
    """

    def __init__(self, types: Sequence[AlarmType] = ALARMS) -> None:
        self._types = types
        self._rows: dict[tuple[str, str], _Alarm] = {}
        self._begun_at: dict[tuple[str, str], float] = {}

    def look(self, snapshot: Snapshot, clock: float) -> None:
        """Begin and end alarms by this snapshot."""
        for type_ in self._types:
            for subject, text in list(type_.find(snapshot))[:MAX_OF_A_TYPE]:
                self._found(type_, subject, text, snapshot.now, clock)
        by_name = {type_.name: type_ for type_ in self._types}
        for (name, subject), alarm in list(self._rows.items()):
            if alarm.found_last < clock:
                self._not_found(by_name[name], subject, alarm, clock)

    def _found(self, type_: AlarmType, subject: str, text: str, now: float, clock: float) -> None:
        alarm = self._rows.setdefault((type_.name, subject), _Alarm(text, clock, clock))
        alarm.text, alarm.found_last = text, clock
        if alarm.since is None and clock - alarm.found_since >= type_.after_seconds:
            alarm.since = clock
            self._begun_at[type_.name, subject] = now
            _log.warning("alarm %s: %s", type_.name, text)

    def _not_found(self, type_: AlarmType, subject: str, alarm: _Alarm, clock: float) -> None:
        if alarm.since is not None and clock - alarm.found_last < type_.calm_seconds:
            return
        del self._rows[type_.name, subject]
        if alarm.since is not None:
            del self._begun_at[type_.name, subject]
            _log.warning("alarm %s is over, after %d s: %s", type_.name, clock - alarm.since, alarm.text)

    def standing(self) -> list[Alarm]:
        """The present alarms, the critical ones first."""
        found = [
            Alarm(
                name=type_.name,
                severity=type_.severity,
                since=self._begun_at[type_.name, subject],
                subject=subject,
                text=alarm.text,
                what_to_do=type_.what_to_do,
            )
            for type_ in self._types
            for (name, subject), alarm in self._rows.items()
            if name == type_.name and alarm.since is not None
        ]
        return sorted(found, key=lambda alarm: alarm.severity != "critical")
