"""A dry run of settings: the recorded demand of some days under other limits, beside the present ones.

A process of its own. The store is the replay's, with the service's decision on eviction; the WAN is a queue
that empties at the rate of the settings, by their hours. Clients' fetches go before background ones.
"""

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gup.cache.budget_gate import is_spent
from gup.config import Settings
from gup.content.key import Kind
from gup.control.replay import Body, Replay, SimulatedStore, main
from gup.control.stats.demand_files import Line
from gup.control.wan_budget import Period, cheap_at, period_of
from gup.upstream.bandwidth import rate_at, site_time

_STEP_SECONDS = 60.0
_MINUTE, _HOUR = 60, 3600


TRIED = ("cache", "fill", "prefetch", "wan", "clients", "catalog", "rules", "site", "upstream")
"""The sections that a dry run knows. Of upstreams neither headers nor proxies, which may be secret."""
_UPSTREAM = {"name", "url", "kind", "priority", "weight", "version", "language"}


def known_part(settings: Settings) -> dict[str, Any]:
    """The tables that a dry run needs, without secrets."""
    tables = settings.model_dump(mode="json", by_alias=True, include=set(TRIED))
    return tables | {
        "upstream": [{name: row[name] for name in _UPSTREAM} for row in tables["upstream"]],
    }


class Link:
    """The WAN of one set of settings: what waits for it, and for how long."""

    def __init__(self, settings: Settings, replay: Replay, store: SimulatedStore) -> None:
        self._settings, self._replay = settings, replay
        self.budget = Budget(settings, replay, store)
        self._waiting = [0.0, 0.0]
        """Bytes that wait for the WAN: of clients' fetches, of background ones."""
        self._at = 0.0
        self._minute = 0
        self._rate = 0
        self._demand = {_MINUTE: (0, 0), _HOUR: (0, 0)}
        """The present minute and hour, and the bytes that were asked for in it."""
        self.peaks = {_MINUTE: 0, _HOUR: 0}
        self.longest_wait_seconds = 0.0
        self.longest_wait_at = 0.0
        self.late = 0
        """Clients' fetches that would wait longer than `fill.queue_timeout`."""
        self.busy_seconds = 0.0
        store.on_fetch = self._fetch

    def _rate_now(self, at: float) -> int:
        if int(at // _MINUTE) != self._minute:
            self._minute = int(at // _MINUTE)
            self._rate = rate_at(self._settings.wan, site_time(self._settings, at))
        return self._rate

    def advance(self, now: float) -> None:
        """What the WAN carries until then."""
        while self._at < now and any(self._waiting):
            seconds = min(_STEP_SECONDS, now - self._at)
            rate = self._rate_now(self._at)
            if not rate:
                self._waiting = [0.0, 0.0]
                break
            room = rate * seconds
            self.busy_seconds += min(seconds, sum(self._waiting) / rate) if self._replay.counts else 0.0
            for number, waiting in enumerate(self._waiting):
                carried = min(room, waiting)
                self._waiting[number] -= carried
                room -= carried
            self._at += seconds
        self._at = max(self._at, now)

    def _fetch(self, _body: Body, bytes_: int) -> None:
        self.budget.spend(bytes_)
        now = self._replay.now
        self.advance(now)
        rate = self._rate_now(now)
        before = self._waiting[0]
        self._waiting[self._replay.background] += bytes_
        if not self._replay.counts:
            return
        for length, (number, before_this) in self._demand.items():
            at = int(now // length)
            asked = before_this + bytes_ if at == number else bytes_
            self._demand[length] = at, asked
            self.peaks[length] = max(self.peaks[length], asked)
        if rate and not self._replay.background:
            wait = (before + bytes_) / rate
            if wait > self.longest_wait_seconds:
                self.longest_wait_seconds, self.longest_wait_at = wait, now
            self.late += before / rate > self._settings.fill.queue_timeout


class Budget:
    """The WAN's budget of one set of settings, decided as the service does; it begins with the record."""

    def __init__(self, settings: Settings, replay: Replay, store: SimulatedStore) -> None:
        self._settings, self._replay, self._budget = settings, replay, settings.wan.budget
        self._period: Period | None = None
        self._used_bytes = 0
        self._minute, self._cheap = -1, False
        self.held: Counter[str] = Counter()
        """Requests that were not served, and prefetches that were not made, by class."""
        self.held_at = 0.0
        """When the first of them was; 0: there was none."""
        if self._budget.bytes:
            store.may_fetch = self._may_fetch

    def spend(self, bytes_: int) -> None:
        self._turn()
        self._used_bytes += 0 if self._cheap else bytes_

    def _turn(self) -> None:
        """Another minute: the hours may be cheap now, and another period may have begun."""
        now = self._replay.now
        if int(now // _MINUTE) == self._minute:
            return
        self._minute = int(now // _MINUTE)
        self._cheap = cheap_at(self._settings, now)
        period = period_of(self._budget, site_time(self._settings, now).date())
        if period != self._period:
            self._period, self._used_bytes = period, 0

    def _may_fetch(self, body: Body, times: int) -> bool:
        self._turn()
        if body.kind is Kind.INDEX or self._cheap:
            return True
        class_ = "delta" if body.kind is Kind.DELTA else "full"
        class_ = "background" if self._replay.background else class_
        if not is_spent(self._budget, self._used_bytes, class_):
            return True
        if self._replay.counts:
            self.held[class_] += max(1, times)
            self.held_at = self.held_at or self._replay.now
        return False


class Slots:
    """What clients really did at once, beside the limits of one set of settings."""

    def __init__(self, settings: Settings) -> None:
        self._limits = settings.clients
        self.queued_seconds = 0.0
        self.refused_seconds = 0.0
        self.address_lines = 0

    def see(self, line: Line) -> None:
        limits, at_once = self._limits, line.downloads + line.queued
        if limits.max_downloads and at_once > limits.max_downloads:
            self.queued_seconds += line.seconds
            if at_once > limits.max_downloads + limits.queue:
                self.refused_seconds += line.seconds
        if 0 < limits.max_downloads_per_address < line.of_address:
            self.address_lines += 1


def dry_run(folder: Path, every: Mapping[str, Settings], since: float) -> dict[str, Any]:
    """For each of the named settings what would have been fetched, and what would have waited."""
    replay = Replay([settings.cache for settings in every.values()], since)
    links = [
        Link(settings, replay, store) for settings, store in zip(every.values(), replay.stores, strict=True)
    ]
    slots = [Slots(settings) for settings in every.values()]
    really = {"downloads": 0, "queued": 0}
    peak, minute, received = 0, 0, 0
    stores = list(replay.stores)

    def on_line(line: Line) -> None:
        nonlocal peak, minute, received
        for link in links:
            link.advance(replay.now)
        if not replay.counts:
            return
        for one in slots:
            one.see(line)
        at = int(line.at // _MINUTE)
        received = line.received_bytes + (received if at == minute else 0)
        minute, peak = at, max(peak, received)
        really["downloads"] = max(really["downloads"], line.downloads)
        really["queued"] = max(really["queued"], line.queued)

    replay.run(folder, on_line, keeps=len(stores))
    found = {}
    requests = replay.requests
    for name, store, link, slot in zip(every, stores, links, slots, strict=True):
        found[name] = {
            "wan_bytes": store.wan_bytes,
            "fetches": store.fetches,
            "hit_ratio": 1 - min(store.fetches, requests) / requests if requests else None,
            "peak_minute_bytes_per_second": link.peaks[_MINUTE] // _MINUTE,
            "peak_hour_bytes_per_second": link.peaks[_HOUR] // _HOUR,
            "longest_wait_seconds": round(link.longest_wait_seconds, 1),
            "longest_wait_at": link.longest_wait_at or None,
            "late_fetches": link.late,
            "busy_seconds": round(link.busy_seconds, 1),
            "queued_seconds": round(slot.queued_seconds, 1),
            "refused_seconds": round(slot.refused_seconds, 1),
            "address_exceeded": slot.address_lines,
            "held_back": dict(link.budget.held),
            "held_back_at": link.budget.held_at or None,
        }
    names = ("first_at", "requests", "requested_bytes", "unknown", "failed", "sent_bytes", "received_bytes")
    return {
        **{name: getattr(replay, name) for name in names},
        "until": replay.now,
        "settings": found,
        "peak_minute_bytes_per_second": peak // _MINUTE,
        "most_downloads": really["downloads"],
        "most_queued": really["queued"],
    }


def answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """`folder`, `settings` (tables by name) and `since`, as `dry_run` has them."""
    began = time.thread_time()
    every = {name: Settings.model_validate(tables) for name, tables in asked["settings"].items()}
    found = dry_run(Path(asked["folder"]), every, asked["since"])
    return found | {"seconds": round(time.thread_time() - began, 3)}


if __name__ == "__main__":
    main(answer)
