"""Alarm collector: takes a snapshot of the control state for the alarms, once a second."""

import time
from collections.abc import Callable, Iterator

from gup.control.alarms import DAMAGE_SECONDS, LATELY_SECONDS, Missed, Snapshot, UpstreamHealth
from gup.control.rate_window import RateWindow
from gup.control.state import ControlState
from gup.control.traffic import Storm


class AlarmCollector:
    """Owned by the service; `look` is a periodic job."""

    def __init__(self, state: ControlState, clock: Callable[[], float] = time.monotonic) -> None:
        self._state = state
        self._clock = clock
        self._windows: dict[str, RateWindow] = {}

    async def look(self) -> None:
        """Take a snapshot and give it to the alarm board."""
        self._state.alarms.look(await self._snapshot(), self._clock())

    def _lately(self, what: str, counts: int | None = None, seconds: float = LATELY_SECONDS) -> int:
        """The increase of a metric over all its series, or of another counter, within the window."""
        if counts is None:
            totals = self._state.dependencies.totals()
            counts = sum(count for name, count in totals.items() if name.partition("{")[0] == what)
        return self._windows.setdefault(what, RateWindow(seconds)).see(counts, self._clock())

    async def _snapshot(self) -> Snapshot:
        state, dependencies, now = self._state, self._state.dependencies, self._state.clock()
        state.traffic.look()
        disk, limits = await state.evictor.measure(), state.settings.cache
        newest_seen = state.clients.newest(1)
        lost = self._lately("gup_events_lost_total") + self._lately("malformed", state.malformed_events)
        at, unstored = state.unstored or (0.0, "")
        return Snapshot(
            now=now,
            upstreams=list(self._upstreams()),
            refusals={what: refusal.detail for what, refusal in state.refusals.rows.items()},
            unstored=unstored if 0 <= now - at < LATELY_SECONDS else "",
            size_bytes=disk.size_bytes,
            limit_bytes=limits.max_size,
            free_bytes=disk.free_bytes,
            min_free_bytes=limits.min_free,
            recent_evicted_lately=self._lately("evicted", state.evictor.recent_evicted),
            damage=self._lately("gup_integrity_failures_total", seconds=DAMAGE_SECONDS),
            storms=list(self._storms()),
            config_ok=dependencies.config_ok(),
            restarts_lately=self._lately("gup_worker_restarts_total"),
            missed=list(self._missed()),
            unsure_ends=[
                failure.detail
                for failure in state.failures
                if failure.problem == "upstream-unsure-end" and now - failure.at < LATELY_SECONDS
            ],
            catalogues={
                name: str(catalogue["problem"])
                for name, catalogue in dependencies.catalogues().items()
                if catalogue["problem"]
            },
            wan_limit=dependencies.wan_rate(),
            wan_used=state.history.wan.bytes_per_second(),
            fills_waiting=dependencies.fills_waiting(),
            clients_week=state.clients.counts(now)["7d"],
            client_last_seen=newest_seen[0][1] if newest_seen else None,
            rejections=state.rejections(),
            lost_events_lately=lost,
        )

    def _upstreams(self) -> Iterator[UpstreamHealth]:
        up, states = self._state.dependencies.upstreams_up(), self._state.dependencies.upstream_states()
        for upstream in self._state.settings.upstream:
            name = upstream.name
            _, detail = self._state.upstream_errors.get(name, (0.0, ""))
            yield UpstreamHealth(name, up.get(name, True), detail, states.get(name, [""])[0] == "doubtful")

    def _storms(self) -> Iterator[tuple[str, Storm]]:
        nameless = self._state.settings.reports.addresses == "off"
        for storm in self._state.traffic.storms():
            yield (
                " ".join(self._state.label(storm.stream)),
                storm._replace(addresses=()) if nameless else storm,
            )

    def _missed(self) -> Iterator[Missed]:
        held = self._state.index.newest_held()
        for stream, unmet in self._state.traffic.unmet().items():
            label = " ".join(self._state.label(stream))
            yield Missed(label, unmet.revision, held.get(stream), unmet.first, unmet.last)
