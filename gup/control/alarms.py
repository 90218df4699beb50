"""Alarms: their types, the board of the present ones, and the conditions that raise them.

All conditions are checked in the control state once a second.
"""

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gup.control.api.schemas import Alarm
from gup.control.eviction_plan import DiskUsage
from gup.control.state import ControlState
from gup.control.stats.history import RateWindow
from gup.control.traffic import Storm
from gup.units import bytes_in_words, time_in_words
from gup.upstream.bandwidth import site_time

_log = logging.getLogger("gup.control.alarms")
MAX_OF_A_TYPE = 50
"""Subjects of one alarm that are shown separately."""
RESTORED_SECONDS = 30.0
"""After a restart, upstreams and disk are as unknown as at the first start for so long."""


class AlarmType(NamedTuple):
    """Begins after `after` seconds of its condition and ends `calm` seconds after it: nothing flaps."""

    name: str
    severity: Literal["warning", "critical"]
    after: float
    calm: float
    what_to_do: str


# fmt: off
ALARMS = (
    AlarmType("no-upstream", "critical", 0.0, 15.0,
              "Check the WAN link and the management server: request its URL with curl from this machine."),
    AlarmType("disk-refuses", "critical", 0.0, 15.0, (
              "Check the disk of cache.directory: it is full, read-only, out of inodes, over quota, or "
              "failing.")),
    AlarmType("upstream-down", "warning", 0.0, 15.0,
              "Check that server and the network to it; if it is gone, remove it from the settings."),
    AlarmType("upstream-doubtful", "warning", 60.0, 60.0,
              "Check that server's log, and request a file from it with curl from this machine."),
    AlarmType("bad-content", "warning", 0.0, 15.0, (
              "Check that file on that server, and web proxies on the way. When a client requests it, gup "
              "checks it again after at most 15 minutes.")),
    AlarmType("not-stored", "warning", 0.0, 15.0, (
              "Raise cache.max_size, or free disk space: until then each client's download of it crosses "
              "the WAN.")),
    AlarmType("disk-short", "warning", 30.0, 15.0,
              "Something else fills the disk: free space, or lower cache.max_size."),
    AlarmType("cache-short", "warning", 0.0, 60.0,
              "Raise cache.max_size, or lower cache.keep_revisions or cache.max_unused."),
    AlarmType("damage", "warning", 0.0, 15.0, (
              "gup repairs it from an upstream; `gup cache verify` checks everything. If it happens again, "
              "check the disk and its cable (smartctl, dmesg).")),
    AlarmType("full-storm", "warning", 0.0, 60.0, (
              "Find out why these clients request no deltas: they were off for long, their installation is "
              "damaged, or the management server keeps too few revisions or has deltas of 0 bytes.")),
    AlarmType("reload-failed", "warning", 0.0, 0.0,
              "`gup config check` lists the mistakes; correct them and run `gup reload`."),
    AlarmType("workers-restarting", "warning", 0.0, 15.0,
              "The log says why they ended; unless an administrator killed them, please report it."),
    AlarmType("stale-stream", "warning", 0.0, 15.0,
              "Check that the management server has that revision and has published it completely."),
    AlarmType("stale-catalogue", "warning", 60.0, 15.0, (
              "Check that the management server has /content/ContentInfo.txt, or name a copy in "
              "catalog.file.")),
    AlarmType("unsure-end", "warning", 0.0, 60.0, (
              "Make that server, or the web proxy before it, send Content-Length or chunks (HTTP/1.1): "
              "without them a truncated body looks complete, so the body is not stored.")),
    AlarmType("name-taken", "warning", 0.0, 15.0,
              "Give each gup of the cluster its own cluster.node."),
    AlarmType("engine-away", "warning", 0.0, 15.0, (
              "Check Valkey or Redis and the network to it. Until then nodes fetch with equal parts of "
              "wan.rate, and the list of members holds.")),
    AlarmType("member-unreachable", "warning", 5.0, 15.0,
              "Check the network between both, firewalls, and that member's cluster.address."),
    AlarmType("member-unlike", "warning", 60.0, 15.0,
              "Give all members the same upstreams, and one version of gup."),
    AlarmType("orders-unknown", "warning", 0.0, 15.0, (
              "Start the engine or another member: until then content may be served that was purged while "
              "this one was off.")),
    AlarmType("row-forged", "warning", 0.0, 60.0, (
              "Check that all members have the same secret in cluster.secret_file, and who can write to the "
              "engine.")),
    AlarmType("wan-full", "warning", 60.0, 30.0,
              "Raise wan.rate if the link can carry more; see `gup status`."),
    AlarmType("budget-held", "warning", 0.0, 15.0, (
              "Raise wan.budget.bytes if the provider allows it; `gup outbreak 4h` opens it for definitions. "
              "See `gup budget`.")),
    AlarmType("budget-short", "warning", 60.0, 600.0, (
              "See by `gup budget` what uses it; lower the shares in wan.budget, or set cheap hours.")),
    AlarmType("outbreak", "warning", 0.0, 0.0,
              "It ends by itself; `gup outbreak end` ends it now."),
    AlarmType("clients-silent", "warning", 0.0, 15.0, (
              "This is normal over a holiday. Otherwise check that clients can reach this machine's port, "
              "and that their policy names it.")),
    AlarmType("clients-sick", "warning", 0.0, 600.0, (
              "`gup report clients --sick` names them, with the likely cause and what to do in the "
              "manager.")),
    AlarmType("alarms-unsent", "warning", 60.0, 0.0, (
              "Check the receiver in [alarms] and the way to it, then try it with `gup alarms test`.")),
    AlarmType("events-lost", "warning", 0.0, 15.0, (
              "The machine is overloaded; check what else runs on it. The figures are corrected within ten "
              "minutes.")),
)
# fmt: on
"""In the order in which they are shown: the critical ones first."""


Findings = Iterable[tuple[str, str, str]]
"""Name, subject ("" for the service itself) and text of each alarm that is due."""


@dataclass(slots=True)
class _Found:
    """An alarm about one subject. Times are monotonic; `began` is None until it begins."""

    alarm: Alarm
    calm: float
    first: float
    last: float
    began: float | None = None


class AlarmBoard:
    def __init__(self, types: Sequence[AlarmType] = ALARMS) -> None:
        self._types = {type_.name: type_ for type_ in types}
        self._rows: dict[tuple[str, str], _Found] = {}

    def restore(self, alarms: Iterable[Alarm], clock: float) -> None:
        """Put back those of the last run. They have some time to be found again."""
        for alarm in alarms:
            if (type_ := self._types.get(alarm.name)) is not None:
                row = _Found(alarm, type_.calm, clock, clock + RESTORED_SECONDS, began=clock)
                self._rows[alarm.name, alarm.subject] = row

    def look(self, found: Findings, now: float, clock: float) -> list[Alarm]:
        """Begin and end alarms by those due now, and return them. `now` is shown, `clock` measures."""
        subjects: Counter[str] = Counter()
        for name, subject, text in found:
            subjects[name] += 1
            if subjects[name] > MAX_OF_A_TYPE:
                continue
            type_, row = self._types[name], self._rows.get((name, subject))
            if row is None:
                alarm = Alarm(
                    id=uuid.uuid4().hex,
                    name=name,
                    severity=type_.severity,
                    since=now,
                    subject=subject,
                    text=text,
                    what_to_do=type_.what_to_do,
                )
                row = self._rows[name, subject] = _Found(alarm, type_.calm, clock, clock)
            row.alarm.text, row.last = text, clock
            if row.began is None and clock - row.first >= type_.after:
                row.began, row.alarm.since = clock, now
                _log.warning("alarm %s: %s", name, text)
        for at, row in list(self._rows.items()):
            if row.last < clock and (row.began is None or clock - row.last >= row.calm):
                del self._rows[at]
                if row.began is not None:
                    seconds, alarm = clock - row.began, row.alarm
                    _log.warning("alarm %s is over, after %d s: %s", alarm.name, seconds, alarm.text)
        order = list(self._types)
        standing = [row.alarm for row in self._rows.values() if row.began is not None]
        return sorted(standing, key=lambda alarm: order.index(alarm.name))


WINDOW_SECONDS = 600.0
"""The window of counts, except that of damage."""
DAMAGE_SECONDS = 3600.0
NEAR_LIMIT = 0.95
"""The share of a limit that counts as reaching it."""
MISSED_SECONDS = 300.0
"""A revision that clients request in vain for this long is overdue."""
SILENT_SECONDS = 86400.0
SICK_CLIENTS = 5
"""With fewer, the alarm does not begin, whatever their share."""
REGULARS = 3
"""With this many clients in a week, a day without any is unusual."""


class AlarmCollector:
    """Finds what is due and keeps `alarms` of the control state; `look` is a periodic job of the service."""

    def __init__(self, state: ControlState, clock: Callable[[], float] = time.monotonic) -> None:
        self._state = state
        self._dependencies = state.dependencies
        self._clock = clock
        self._board = AlarmBoard()
        self._windows: dict[str, RateWindow] = {}

    async def restore(self) -> None:
        self._board.restore(await self._state.notifications.open(), self._clock())

    async def look(self) -> None:
        state, disk = self._state, await self._state.evictor.measure()
        state.traffic.look()
        state.alarms = self._board.look(self.find(disk), state.clock(), self._clock())
        await state.notifications.look(state.alarms)
        await state.incidents.look(state.alarms)

    def find(self, disk: DiskUsage) -> Findings:
        yield from self._of_upstreams()
        yield from self._of_store(disk)
        yield from self._of_content()
        yield from self._of_service()
        yield from self._state.budget.findings()
        yield from self._of_outbreak()
        if (cluster := self._dependencies.cluster) is not None:
            yield from cluster.findings()

    def gained(self, what: str, counts: int | None = None, seconds: float = WINDOW_SECONDS) -> int:
        """The increase of a metric over all its series, or of another counter, within the window."""
        if counts is None:
            totals = self._dependencies.totals()
            counts = sum(count for name, count in totals.items() if name.partition("{")[0] == what)
        return self._windows.setdefault(what, RateWindow(seconds)).see(counts, self._clock())

    def _of_upstreams(self) -> Findings:
        state, dependencies = self._state, self._dependencies
        states = {name: known for name, (known, _) in dependencies.upstream_states().items()}
        names = [upstream.name for upstream in state.settings.upstream]
        errors = {name: state.upstream_errors[name][1] for name in names if name in state.upstream_errors}
        some_up = any(states.get(name) != "down" for name in names)
        if names and not some_up:
            why = next((f" ({error})" for error in errors.values() if error), "")
            text = f"no upstream answers ({', '.join(names)}): only stored content is served{why}"
            yield "no-upstream", "", text
        for name in names:
            why = f" ({errors[name]})" if errors.get(name) else ""
            if some_up and states.get(name) == "down":
                yield "upstream-down", name, f"{name} is down; others are asked{why}"
            if states.get(name) == "doubtful":
                yield "upstream-doubtful", name, f"{name} accepts connections but its requests fail{why}"
        limit, waiting = dependencies.wan_rate(), dependencies.fills_waiting()
        if limit and waiting and state.history.wan.bytes_per_second() >= NEAR_LIMIT * limit:
            rate = f"{bytes_in_words(limit)}/s"
            yield "wan-full", "", f"the WAN is full ({rate}), and {waiting} fills wait"

    def _of_store(self, disk: DiskUsage) -> Findings:
        state, limits = self._state, self._state.settings.cache
        for what, refusal in state.refusals.rows.items():
            yield "disk-refuses", what, f"the disk refuses {what}: {refusal.detail}"
        at, unstored = state.unstored or (0.0, "")
        if unstored and 0 <= state.clock() - at < WINDOW_SECONDS:
            yield "not-stored", "", f"content is passed through and not stored: {unstored}"
        if disk.free_bytes < limits.min_free:
            free, least = bytes_in_words(disk.free_bytes), bytes_in_words(limits.min_free)
            text = f"{free} are free on the cache's disk, less than the {least} of cache.min_free"
            yield "disk-short", "", text
        gone = self.gained("evicted", state.evictor.recent_evicted)
        if gone and disk.size_bytes >= NEAR_LIMIT * limits.max_size:
            full = bytes_in_words(limits.max_size)
            text = f"the cache is full ({full}), and {gone} entries used within the last day were evicted"
            yield "cache-short", "", text
        if damage := self.gained("gup_integrity_failures_total", seconds=DAMAGE_SECONDS):
            yield "damage", "", f"damage was found in the store {damage} times within the last hour"

    def _of_content(self) -> Findings:
        state, held = self._state, self._state.index.rows.newest_held()
        for row in state.rejections():
            yield "bad-content", row.key, f"{row.upstream} has no usable {row.key}: {row.detail}"
        unsure = (failure for failure in state.failures if failure.problem == "upstream-unsure-end")
        for failure in unsure:
            if state.clock() - failure.at < WINDOW_SECONDS:
                yield "unsure-end", "", failure.detail
                break
        for name, catalogue in self._dependencies.catalogues().items():
            if problem := catalogue["problem"]:
                yield "stale-catalogue", name, f"the catalogue of {name} can't be read: {problem}"
        nameless = state.settings.reports.addresses == "off"
        for storm in state.traffic.storms():
            shown = storm._replace(addresses=()) if nameless else storm
            text = storm_in_words(" ".join(state.label(storm.stream)), shown)
            yield "full-storm", "/".join(storm.stream), text
        for stream, unmet in state.traffic.unmet().items():
            newest = held.get(stream, "")
            if unmet.last - unmet.first >= MISSED_SECONDS and newest < unmet.revision:
                label, since = " ".join(state.label(stream)), time_in_words(state.clock() - unmet.first)
                what = f"{unmet.revision} of {label}"
                here = f"the newest here is {newest}" if newest else "nothing newer is here"
                yield (
                    "stale-stream",
                    label,
                    f"clients have requested {what} for {since}, but it can't be fetched; {here}",
                )

    def _of_outbreak(self) -> Findings:
        found, until = self._state.outbreak.now, self._state.outbreak.until
        if found is not None and until is not None:
            who, why = found.by or "an operator", found.reason or "no reason was given"
            at = site_time(self._state.settings, until)
            text = f"an outbreak opens the WAN for definitions until {at:%Y-%m-%d %H:%M}, by {who}: {why}"
            yield "outbreak", "", text

    def _of_service(self) -> Findings:
        state, now = self._state, self._state.clock()
        if not self._dependencies.config_ok():
            yield "reload-failed", "", "the last reload failed: the old settings are in force"
        if died := self.gained("gup_worker_restarts_total"):
            text = f"worker processes died {died} times within 10 minutes and were replaced"
            yield "workers-restarting", "", text
        for receiver, problem in state.notifications.problems():
            yield "alarms-unsent", receiver, problem
        last, week = state.clients.newest(1), state.clients.counts(now)["7d"]
        if week >= REGULARS and last and now - last[0][1] >= SILENT_SECONDS:
            ago = time_in_words(now - last[0][1])
            text = f"no client has sent a request for {ago}; {week} did within the last week"
            yield "clients-silent", "", text
        found = state.doctor.found
        least = max(SICK_CLIENTS, state.settings.alarms.sick_share * found.clients / 100)
        if found.sick >= least:
            most = ", ".join(f"{name} {count}" for name, count in found.counts.items() if count)
            text = f"something seems to be wrong with {found.sick} of {found.clients} clients: {most}"
            yield "clients-sick", "", text
        if lost := self.gained("gup_events_lost_total") + self.gained("malformed", state.malformed_events):
            text = f"{lost} messages from workers were lost within 10 minutes: figures of use are too low"
            yield "events-lost", "", text


def storm_in_words(label: str, storm: Storm) -> str:
    shown = storm.addresses[:5]
    who = f"{storm.clients} clients" if storm.clients else "clients"
    if shown:
        more = f" and {storm.clients - len(shown)} more" if storm.clients > len(shown) else ""
        who += f" ({', '.join(shown)}{more})"
    lan, wan, mean = map(bytes_in_words, (storm.lan_bytes, storm.wan_bytes, storm.delta_bytes))
    text = f"{who} requested {storm.fulls} full packages of {label}, against {storm.deltas} deltas, "
    text += f"within 20 minutes: {lan} over the LAN, {wan} over the WAN"
    if storm.delta_bytes:
        instead = bytes_in_words(storm.fulls * storm.delta_bytes)
        text += f"; as deltas of {mean} on average it would be {instead} over the LAN"
    return text
