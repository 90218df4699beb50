"""Alarm collector: the conditions of all alarms, looked at in the control state once a second."""

import time
from collections.abc import Callable, Iterator

from gup.control.eviction import DiskUsage
from gup.control.rate_window import RateWindow
from gup.control.state import ControlState
from gup.control.traffic import Storm
from gup.units import bytes_in_words, time_in_words

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
Findings = Iterator[tuple[str, str, str]]
"""Name, subject ("" for the service itself) and text of each alarm that is due."""


class AlarmCollector:
    """Owned by the service; `look` is a periodic job."""

    def __init__(self, state: ControlState, clock: Callable[[], float] = time.monotonic) -> None:
        self._state = state
        self._dependencies = state.dependencies
        self._clock = clock
        self._windows: dict[str, RateWindow] = {}

    async def look(self) -> None:
        """Give the board what is found now."""
        state, disk = self._state, await self._state.evictor.measure()
        state.traffic.look()
        state.alarms.look(self.find(disk), state.clock(), self._clock())

    def find(self, disk: DiskUsage) -> Findings:
        yield from self._of_upstreams()
        yield from self._of_store(disk)
        yield from self._of_content()
        yield from self._of_service()

    def lately(self, what: str, counts: int | None = None, seconds: float = LATELY_SECONDS) -> int:
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
            text = f"no upstream answers ({', '.join(names)}): only what is stored can be served{why}"
            yield "no-upstream", "", text
        for name in names:
            why = f" ({errors[name]})" if errors.get(name) else ""
            if some_up and states.get(name) == "down":
                yield "upstream-down", name, f"{name} is down; others are asked{why}"
            if states.get(name) == "doubtful":
                yield "upstream-doubtful", name, f"{name} takes connections but fails to answer{why}"
        limit, waiting = dependencies.wan_rate(), dependencies.fills_waiting()
        if limit and waiting and state.history.wan.bytes_per_second() >= NEAR_LIMIT * limit:
            rate = f"{bytes_in_words(limit)}/s"
            yield "wan-full", "", f"the WAN is full ({rate}), and {waiting} fills wait for their turn"

    def _of_store(self, disk: DiskUsage) -> Findings:
        state, limits = self._state, self._state.settings.cache
        for what, refusal in state.refusals.rows.items():
            yield "disk-refuses", what, f"the disk takes no {what}: {refusal.detail}"
        at, unstored = state.unstored or (0.0, "")
        if unstored and 0 <= state.clock() - at < LATELY_SECONDS:
            yield "not-stored", "", f"content is passed through and not stored: {unstored}"
        if disk.free_bytes < limits.min_free:
            free, least = bytes_in_words(disk.free_bytes), bytes_in_words(limits.min_free)
            text = f"{free} are free on the cache's disk, less than the {least} of cache.min_free"
            yield "disk-short", "", text
        gone = self.lately("evicted", state.evictor.recent_evicted)
        if gone and disk.size_bytes >= NEAR_LIMIT * limits.max_size:
            full = bytes_in_words(limits.max_size)
            text = f"the cache is full ({full}), and {gone} entries that were used within a day had to go"
            yield "cache-short", "", text
        if damage := self.lately("gup_integrity_failures_total", seconds=DAMAGE_SECONDS):
            yield "damage", "", f"damage was found in the store {damage} times within the last hour"

    def _of_content(self) -> Findings:
        state, held = self._state, self._state.index.newest_held()
        for row in state.rejections():
            yield "bad-content", row.key, f"{row.upstream} has no usable {row.key}: {row.detail}"
        unsure = (failure for failure in state.failures if failure.problem == "upstream-unsure-end")
        for failure in unsure:
            if state.clock() - failure.at < LATELY_SECONDS:
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
                yield "stale-stream", label, f"clients have asked for {what} for {since} in vain; {here}"

    def _of_service(self) -> Findings:
        state, now = self._state, self._state.clock()
        if not self._dependencies.config_ok():
            yield "reload-failed", "", "the settings could not be read again: those before are in force"
        if died := self.lately("gup_worker_restarts_total"):
            text = f"worker processes died {died} times within 10 minutes and were replaced"
            yield "workers-restarting", "", text
        last, week = state.clients.newest(1), state.clients.counts(now)["7d"]
        if week >= REGULARS and last and now - last[0][1] >= SILENT_SECONDS:
            ago = time_in_words(now - last[0][1])
            text = f"no client has asked for {ago}, where {week} did within the last week"
            yield "clients-silent", "", text
        if lost := self.lately("gup_events_lost_total") + self.lately("malformed", state.malformed_events):
            text = f"{lost} messages from workers were lost within 10 minutes: figures of use are too low"
            yield "events-lost", "", text


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
