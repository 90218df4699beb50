"""Alarms: what an operator must know. Their conditions, and the board of the present ones.

Each condition is a pure function of a snapshot, which `alarm_collector` takes once a second.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

from gup.control.api.schemas import Alarm
from gup.control.traffic import Storm
from gup.units import bytes_in_words, time_in_words

_log = logging.getLogger("gup.control.alarms")
LATELY_SECONDS = 600.0
"""The window of counts, except that of damage."""
DAMAGE_SECONDS = 3600.0
NEAR_LIMIT = 0.95
"""The share of a limit that counts as reaching it."""
MISSED_SECONDS = 300.0
"""A revision that clients ask for in vain for so long is overdue."""
SILENT_SECONDS = 86400.0
REGULARS = 3
"""With so many clients in a week, a day without any is unusual."""
MAX_OF_A_TYPE = 50
"""Subjects of one alarm that are shown apart."""


class UpstreamHealth(NamedTuple):
    """The health of one upstream; `doubtful`: it accepts connections and does not answer, or with errors."""

    name: str
    up: bool
    last_error: str = ""
    doubtful: bool = False


class Rejection(NamedTuple):
    """A body that an upstream sent and that can't be the content asked for."""

    key: str
    upstream: str
    detail: str
    at: float


class Missed(NamedTuple):
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
    """Entries evicted for space that had been used within a day."""
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


Findings = Iterator[tuple[str, str]]
"""Subject ("" for the service itself) and text of each alarm that is due."""
Condition = Callable[[Snapshot], Findings]


@dataclass(frozen=True, slots=True)
class AlarmType:
    """It begins when found for `after` seconds and ends when not found for `calm` seconds: nothing flaps."""

    name: str
    find: Condition
    what_to_do: str
    severity: Literal["warning", "critical"] = "warning"
    after: float = 0.0
    calm: float = 15.0


ALARMS: list[AlarmType] = []
"""All alarms, in the order in which they are shown."""


def _alarm(name: str, what_to_do: str, **more: Any) -> Callable[[Condition], None]:
    """Adds a condition to ALARMS."""
    return lambda find: ALARMS.append(AlarmType(name, find, what_to_do, **more))


def _because(upstream: UpstreamHealth) -> str:
    return f" ({upstream.last_error})" if upstream.last_error else ""


@_alarm(
    "no-upstream",
    "Look whether the WAN stands and the management server runs: curl it from this machine.",
    severity="critical",
)
def _no_upstream(now: Snapshot) -> Findings:
    if now.upstreams and not any(upstream.up for upstream in now.upstreams):
        names = ", ".join(upstream.name for upstream in now.upstreams)
        why = next((_because(u) for u in now.upstreams if u.last_error), "")
        yield "", f"no upstream answers ({names}): only what is stored can be served{why}"


@_alarm(
    "upstream-down", "Look at that server and the way to it; is it gone for good, take it off the settings."
)
def _upstream_down(now: Snapshot) -> Findings:
    if any(upstream.up for upstream in now.upstreams):
        for upstream in now.upstreams:
            if not upstream.up:
                yield upstream.name, f"{upstream.name} is down; others are asked{_because(upstream)}"


@_alarm(
    "upstream-doubtful",
    "Look at that server's own log, and ask it for a file with curl from this machine.",
    after=60.0,
    calm=60.0,
)
def _upstream_doubtful(now: Snapshot) -> Findings:
    for upstream in now.upstreams:
        if upstream.doubtful:
            yield upstream.name, f"{upstream.name} takes connections but fails to answer{_because(upstream)}"


@_alarm(
    "bad-content",
    "Look at that file on that server, and at proxies on the way. It is looked at again at the latest 15 "
    "minutes after the last time, when a client asks for it.",
)
def _bad_content(now: Snapshot) -> Findings:
    for row in now.rejections:
        yield row.key, f"{row.upstream} has no usable {row.key}: {row.detail}"


@_alarm(
    "disk-refuses",
    "Look at the disk of cache.directory: full, read-only, out of inodes, over a quota, or broken.",
    severity="critical",
)
def _disk_refuses(now: Snapshot) -> Findings:
    for what, detail in now.refusals.items():
        yield what, f"the disk takes no {what}: {detail}"


@_alarm(
    "not-stored",
    "Raise cache.max_size, or make room below cache.min_free: until then each client's download of it "
    "crosses the WAN.",
)
def _not_stored(now: Snapshot) -> Findings:
    if now.unstored:
        yield "", f"content is passed through and not stored: {now.unstored}"


@_alarm("disk-short", "Something else fills the disk: make room, or lower cache.max_size.", after=30.0)
def _disk_short(now: Snapshot) -> Findings:
    if now.free_bytes < now.min_free_bytes:
        free, least = bytes_in_words(now.free_bytes), bytes_in_words(now.min_free_bytes)
        yield "", f"{free} are free on the cache's disk, less than the {least} of cache.min_free"


@_alarm("cache-short", "Raise cache.max_size, or lower cache.keep_revisions or cache.max_unused.", calm=60.0)
def _cache_short(now: Snapshot) -> Findings:
    if now.recent_evicted_lately and now.size_bytes >= NEAR_LIMIT * now.limit_bytes:
        full, gone = bytes_in_words(now.limit_bytes), now.recent_evicted_lately
        yield "", f"the cache is full ({full}), and {gone} entries that were used within a day had to go"


@_alarm(
    "damage",
    "It was mended where an upstream has the content; `gup cache verify` looks at everything. If it goes "
    "on, look at the disk and its cable (smartctl, dmesg).",
)
def _damage(now: Snapshot) -> Findings:
    if now.damage:
        yield "", f"damage was found in the store {now.damage} times within the last hour"


@_alarm(
    "full-storm",
    "Look why these clients do not take deltas: away for long, a damaged installation, deltas that the "
    "management server does not keep for long enough, or 0-byte deltas there.",
    calm=60.0,
)
def _full_storm(now: Snapshot) -> Findings:
    for label, storm in now.storms:
        yield "/".join(storm.stream), storm_in_words(label, storm)


def storm_in_words(label: str, storm: Storm) -> str:
    """The text of a storm: who asked for how much, and what it costs."""
    shown = storm.addresses[:5]
    who = f"{storm.clients} clients" if storm.clients else "clients"
    if shown:
        more = f" and {storm.clients - len(shown)} more" if storm.clients > len(shown) else ""
        who += f" ({', '.join(shown)}{more})"
    lan, wan, mean = map(bytes_in_words, (storm.lan_bytes, storm.wan_bytes, storm.delta_bytes))
    text = f"{who} asked for {storm.fulls} full packages of {label}, against {storm.deltas} deltas, "
    text += f"within 20 minutes: {lan} over the LAN, {wan} over the WAN"
    if storm.delta_bytes:
        instead = bytes_in_words(storm.fulls * storm.delta_bytes)
        text += f"; as deltas of {mean} on average it would be {instead} over the LAN"
    return text


@_alarm("reload-failed", "`gup config check` tells what is wrong; put it right and `gup reload`.", calm=0.0)
def _reload_failed(now: Snapshot) -> Findings:
    if not now.config_ok:
        yield "", "the settings could not be read again: those before are in force"


@_alarm("workers-restarting", "Look into the log for why they ended; if nobody killed them, report it.")
def _restarts(now: Snapshot) -> Findings:
    if now.restarts_lately:
        yield "", f"worker processes died {now.restarts_lately} times within 10 minutes and were replaced"


@_alarm("stale-stream", "Look whether the management server has that revision and has published it whole.")
def _stale_stream(now: Snapshot) -> Findings:
    for missed in now.missed:
        if missed.last - missed.first >= MISSED_SECONDS and (missed.held or "") < missed.revision:
            since = time_in_words(now.now - missed.first)
            held = f"the newest here is {missed.held}" if missed.held else "nothing newer is here"
            what = f"{missed.revision} of {missed.stream}"
            yield missed.stream, f"clients have asked for {what} for {since} in vain; {held}"


@_alarm(
    "stale-catalogue",
    "Look whether the management server has /content/ContentInfo.txt, or name a copy in catalog.file.",
    after=60.0,
)
def _stale_catalogue(now: Snapshot) -> Findings:
    for name, problem in now.catalogues.items():
        yield name, f"the catalogue of {name} can't be read: {problem}"


@_alarm(
    "unsure-end",
    "Have that server, or the web proxy before it, send Content-Length or chunks (HTTP/1.1): without them "
    "a body that was cut looks like a whole one, so nothing of it is stored.",
    calm=60.0,
)
def _unsure_end(now: Snapshot) -> Findings:
    if now.unsure_ends:
        yield "", now.unsure_ends[0]


@_alarm("wan-full", "Raise wan.rate if the link carries more; see `gup status`.", after=60.0, calm=30.0)
def _wan_full(now: Snapshot) -> Findings:
    if now.wan_limit and now.fills_waiting and now.wan_used >= NEAR_LIMIT * now.wan_limit:
        rate = f"{bytes_in_words(now.wan_limit)}/s"
        yield "", f"the WAN is full ({rate}), and {now.fills_waiting} fills wait for their turn"


@_alarm(
    "clients-silent",
    "Over a holiday that is right. Else look whether clients reach this machine's port, and whether their "
    "policy still names it.",
)
def _silent(now: Snapshot) -> Findings:
    last = now.client_last_seen
    if now.clients_week >= REGULARS and last is not None and now.now - last >= SILENT_SECONDS:
        ago = time_in_words(now.now - last)
        yield "", f"no client has asked for {ago}, where {now.clients_week} did within the last week"


@_alarm(
    "events-lost",
    "The machine is too busy; look what else runs on it. The figures are put right within ten minutes.",
)
def _events_lost(now: Snapshot) -> Findings:
    if now.lost_events_lately:
        lost = now.lost_events_lately
        yield "", f"{lost} messages from workers were lost within 10 minutes: figures of use are too low"


@dataclass(slots=True)
class _Found:
    """An alarm about one subject. `since` (monotonic) and `began_at` (shown) are None until it begins."""

    type: AlarmType
    text: str
    found_since: float
    found_last: float
    since: float | None = None
    began_at: float = 0.0


class AlarmBoard:
    """The present alarms. `look` is called about once a second with a monotonic clock; the times shown are
    those of the snapshots.
    """

    def __init__(self, types: Sequence[AlarmType] = ALARMS) -> None:
        self._types = types
        self._rows: dict[tuple[str, str], _Found] = {}

    def look(self, snapshot: Snapshot, clock: float) -> None:
        """Begin and end alarms by this snapshot."""
        for type_ in self._types:
            for subject, text in islice(type_.find(snapshot), MAX_OF_A_TYPE):
                row = self._rows.setdefault((type_.name, subject), _Found(type_, text, clock, clock))
                row.text, row.found_last = text, clock
                if row.since is None and clock - row.found_since >= type_.after:
                    row.since, row.began_at = clock, snapshot.now
                    _log.warning("alarm %s: %s", type_.name, text)
        for at, row in list(self._rows.items()):
            if row.found_last < clock and (row.since is None or clock - row.found_last >= row.type.calm):
                del self._rows[at]
                if row.since is not None:
                    seconds = clock - row.since
                    _log.warning("alarm %s is over, after %d s: %s", row.type.name, seconds, row.text)

    def standing(self) -> list[Alarm]:
        """The present alarms, the critical ones first."""
        order = {type_.name: number for number, type_ in enumerate(self._types)}
        found = [
            Alarm(
                name=name,
                severity=row.type.severity,
                since=row.began_at,
                subject=subject,
                text=row.text,
                what_to_do=row.type.what_to_do,
            )
            for (name, subject), row in self._rows.items()
            if row.since is not None
        ]
        return sorted(found, key=lambda alarm: (alarm.severity != "critical", order[alarm.name]))
