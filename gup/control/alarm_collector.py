"""Alarm collector: takes a snapshot of the control state for the alarms, once a second."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from gup.control.alarms import DAMAGE_SECONDS, LATELY_SECONDS, Missed, Snapshot, UpstreamHealth
from gup.control.rate_window import RateWindow
from gup.control.state import ControlState, sum_of
from gup.control.traffic import Storm

_LATELY = {
    "restarts": ("gup_worker_restarts_total", LATELY_SECONDS),
    "lost": ("gup_events_lost_total", LATELY_SECONDS),
    "damage": ("gup_integrity_failures_total", DAMAGE_SECONDS),
}


class AlarmCollector:
    """Owned by the service; `look` is a periodic job."""

    def __init__(self, state: ControlState, clock: Callable[[], float] = time.monotonic) -> None:
        self._state = state
        self._clock = clock
        self._lately = {what: RateWindow(seconds) for what, (_, seconds) in _LATELY.items()}
        self._evicted, self._malformed = RateWindow(LATELY_SECONDS), RateWindow(LATELY_SECONDS)

    async def look(self) -> None:
        """Take a snapshot and give it to the alarm board."""
        self._state.alarms.look(await self._snapshot(), self._clock())

    async def _snapshot(self) -> Snapshot:
        state, dependencies = self._state, self._state.dependencies
        state.traffic.look()
        disk = await state.evictor.measure()
        totals, clock, now = dependencies.totals(), self._clock(), state.clock()
        grown = {
            what: self._lately[what].see(sum_of(totals, name), clock) for what, (name, _) in _LATELY.items()
        }
        newest_seen = state.clients.newest(1)
        return Snapshot(
            now=now,
            upstreams=list(self._upstreams()),
            refusals={what: refusal.detail for what, refusal in state.refusals.rows.items()},
            unstored=self._unstored(now),
            size_bytes=disk.size_bytes,
            limit_bytes=state.settings.cache.max_size,
            free_bytes=disk.free_bytes,
            min_free_bytes=state.settings.cache.min_free,
            recent_evicted_lately=self._evicted.see(state.evictor.recent_evicted, clock),
            damage=grown["damage"],
            storms=list(self._storms()),
            config_ok=dependencies.config_ok(),
            restarts_lately=grown["restarts"],
            missed=list(self._missed(now)),
            unsure_ends=[
                failure.detail
                for failure in state.failures
                if failure.problem == "upstream-unsure-end" and now - failure.at < LATELY_SECONDS
            ],
            catalogues=dict(self._catalogues()),
            wan_limit=dependencies.wan_rate(),
            wan_used=state.history.wan.bytes_per_second(),
            fills_waiting=dependencies.fills_waiting(),
            clients_week=state.clients.counts(now)["7d"],
            client_last_seen=newest_seen[0][1] if newest_seen else None,
            rejections=list(state.rejections.standing(now)),
            lost_events_lately=grown["lost"] + self._malformed.see(state.malformed_events, clock),
        )

    def _unstored(self, now: float) -> str:
        at, detail = self._state.unstored or (0.0, "")
        return detail if 0 <= now - at < LATELY_SECONDS else ""

    def _upstreams(self) -> Iterable[UpstreamHealth]:
        up, states = self._state.dependencies.upstreams_up(), self._state.dependencies.upstream_states()
        for upstream in self._state.settings.upstream:
            _, detail = self._state.upstream_errors.get(upstream.name, (0.0, ""))
            state, _ = states.get(upstream.name, ("", None))
            yield UpstreamHealth(upstream.name, up.get(upstream.name, True), detail, state == "doubtful")

    def _storms(self) -> Iterable[tuple[str, Storm]]:
        for storm in self._state.traffic.standing_storms():
            label = " ".join(self._state.label(storm.stream))
            nameless = self._state.settings.reports.addresses == "off"
            yield label, replace(storm, addresses=()) if nameless else storm

    def _catalogues(self) -> Iterable[tuple[str, str]]:
        for name, catalogue in self._state.dependencies.catalogues().items():
            if catalogue["problem"]:
                yield name, str(catalogue["problem"])

    def _missed(self, now: float) -> Iterable[Missed]:
        held = self._state.index.newest_held()
        for stream, unmet in self._state.traffic.demand.missed(now).items():
            label = " ".join(self._state.label(stream))
            yield Missed(label, unmet.revision, held.get(stream), unmet.first, unmet.last)
