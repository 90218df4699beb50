"""Looks at the plane for the alarms: gathers a snapshot, hands it to the board. Decides nothing."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from gup.control.alarms import DAMAGE_SECONDS, LATELY_SECONDS, Missed, Snapshot, UpstreamHealth
from gup.control.rate_window import RateWindow
from gup.control.state import Plane, sum_of
from gup.control.traffic import Storm

_LATELY = {
    "restarts": ("gup_worker_restarts_total", LATELY_SECONDS),
    "lost": ("gup_events_lost_total", LATELY_SECONDS),
    "damage": ("gup_integrity_failures_total", DAMAGE_SECONDS),
}


class Watch:
    """Owned by the control plane's service; `look` is a job."""

    def __init__(self, plane: Plane, clock: Callable[[], float] = time.monotonic) -> None:
        self._plane = plane
        self._clock = clock
        self._lately = {what: RateWindow(seconds) for what, (_, seconds) in _LATELY.items()}
        self._evicted, self._malformed = RateWindow(LATELY_SECONDS), RateWindow(LATELY_SECONDS)

    async def look(self) -> None:
        """Once: what is the case now."""
        self._plane.alarms.look(await self._snapshot(), self._clock())

    async def _snapshot(self) -> Snapshot:
        plane, around = self._plane, self._plane.around
        plane.traffic.look()
        disk = await plane.space.measure()
        totals, clock, now = around.totals(), self._clock(), plane.clock()
        grown = {
            what: self._lately[what].see(sum_of(totals, name), clock) for what, (name, _) in _LATELY.items()
        }
        newest_seen = plane.clients.newest(1)
        return Snapshot(
            now=now,
            upstreams=list(self._upstreams()),
            refusals={what: refusal.detail for what, refusal in plane.refusals.rows.items()},
            unstored=self._unstored(now),
            size_bytes=disk.size_bytes,
            limit_bytes=plane.settings.cache.max_size,
            free_bytes=disk.free_bytes,
            min_free_bytes=plane.settings.cache.min_free,
            recent_evicted_lately=self._evicted.see(plane.space.recent_evicted, clock),
            damage=grown["damage"],
            storms=list(self._storms()),
            config_ok=around.config_ok(),
            restarts_lately=grown["restarts"],
            missed=list(self._missed(now)),
            unsure_ends=[
                failure.detail
                for failure in plane.failures
                if failure.problem == "upstream-unsure-end" and now - failure.at < LATELY_SECONDS
            ],
            catalogues=dict(self._catalogues()),
            wan_limit=around.wan_rate(),
            wan_used=plane.history.wan.bytes_per_second(),
            fills_waiting=around.fills_waiting(),
            clients_week=plane.clients.counts(now)["7d"],
            client_last_seen=newest_seen[0][1] if newest_seen else None,
            rejections=list(plane.rejections.standing(now)),
            lost_events_lately=grown["lost"] + self._malformed.see(plane.malformed_events, clock),
        )

    def _unstored(self, now: float) -> str:
        at, detail = self._plane.unstored or (0.0, "")
        return detail if 0 <= now - at < LATELY_SECONDS else ""

    def _upstreams(self) -> Iterable[UpstreamHealth]:
        up, states = self._plane.around.upstreams_up(), self._plane.around.upstream_states()
        for upstream in self._plane.settings.upstream:
            _, detail = self._plane.upstream_errors.get(upstream.name, (0.0, ""))
            state, _ = states.get(upstream.name, ("", None))
            yield UpstreamHealth(upstream.name, up.get(upstream.name, True), detail, state == "doubtful")

    def _storms(self) -> Iterable[tuple[str, Storm]]:
        for storm in self._plane.traffic.standing_storms():
            label = " ".join(self._plane.label(storm.stream))
            nameless = self._plane.settings.reports.addresses == "off"
            yield label, replace(storm, addresses=()) if nameless else storm

    def _catalogues(self) -> Iterable[tuple[str, str]]:
        for name, catalogue in self._plane.around.catalogues().items():
            if catalogue["problem"]:
                yield name, str(catalogue["problem"])

    def _missed(self, now: float) -> Iterable[Missed]:
        held = self._plane.index.newest_held()
        for stream, unmet in self._plane.traffic.demand.missed(now).items():
            label = " ".join(self._plane.label(stream))
            yield Missed(label, unmet.revision, held.get(stream), unmet.first, unmet.last)
