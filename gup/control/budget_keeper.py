"""The WAN's budget in the control plane: reads the counters, tells the workers, and says how it stands."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from functools import partial
from typing import Literal

from gup.cache.budget_gate import CHEAP, COUNTING
from gup.control.api import schemas
from gup.control.dependencies import ControlDependencies
from gup.control.stats.history import Recorder
from gup.control.threads import to_its_end
from gup.control.wan_budget import (
    MOST_NODES,
    SAVE_SECONDS,
    BudgetLedger,
    Counts,
    Forecast,
    cheap_at,
    forecast,
    midnight,
    next_cheap,
    period_of,
    read_node,
    write_node,
)
from gup.metrics import series
from gup.units import bytes_in_words
from gup.upstream.bandwidth import site_time

_log = logging.getLogger("gup.control.budget")
_HELD_TOTAL = "gup_wan_budget_held_back_total"
Held = Literal["background", "full", "delta"]
_CLASSES: tuple[Held, ...] = ("background", "full", "delta")
"""As in gup.metrics.HELD_BACK."""
_EARLY = 0.1
"""Before this share of a period is over, or of the budget used, no alarm foretells its end."""
_DAY_SECONDS = 86400.0


class BudgetKeeper:
    """Only `look` reads the counters, and only `save` writes the file."""

    def __init__(
        self,
        dependencies: ControlDependencies,
        clock: Callable[[], float],
        refusal: Callable[[str | None], None] = lambda _refusal: None,
    ) -> None:
        """Blocks. `refusal` is told how each write went: the disk's error, or None."""
        self._dependencies, self._clock, self._refusal = dependencies, clock, refusal
        self._saved_at, self._saving = time.monotonic(), asyncio.Lock()
        self.on_change: Callable[[], None] = lambda: None
        """Called when other classes are held back than before."""
        self._held: list[Held] = []
        node, now, run = dependencies.settings().cluster.node, clock(), dependencies.store.run
        self.ledger = BudgetLedger(
            run, node, self._counts(dependencies.since_start()), now, dependencies.settings()
        )
        self._publish(now)

    def _counts(self, own: Mapping[str, int] | None = None) -> Counts:
        process = self._dependencies
        return Counts(process.totals(), own or {}, process.started_at, process.installed_at)

    # --- periodic jobs

    async def look(self) -> None:
        """To be called twice a second."""
        self._read()
        if self.ledger.urgent or (self.ledger.changed and time.monotonic() - self._saved_at >= SAVE_SECONDS):
            await self.save()

    def _read(self) -> float:
        now = self._clock()
        self.ledger.look(self._counts(), now, self._dependencies.settings())
        self._publish(now)
        return now

    async def save(self) -> None:
        """Write the file if there is something new; what the disk refuses is tried again."""
        async with self._saving:
            if not self.ledger.changed:
                return
            self._saved_at, text = time.monotonic(), self.ledger.text()
            try:
                await to_its_end(self.ledger.save, text)
            except OSError as error:
                self.ledger.changed = True
                self._refusal(error.strerror or str(error))
            else:
                self._refusal(None)

    async def seed(self, history: Recorder) -> None:
        """After the first start with a version that has budgets: take the days from the savings ledger."""
        if self.ledger.is_new:
            _, days = await history.savings()
            self.ledger.seed(days)
            await self.look()

    def _publish(self, now: float) -> None:
        settings = self._dependencies.settings()
        period = period_of(settings.wan.budget, self._today(now))
        used = self._used(period.first)
        cheap = cheap_at(settings, now)
        ends = [midnight(settings, period.after), *filter(None, [next_cheap(settings, now)])]
        gate = self._dependencies.gate
        gate.publish(CHEAP if cheap else COUNTING, used, self.ledger.counted_bytes, int(min(ends)))
        held = self.held_back()
        if held != self._held:
            what = f"held back now: {', '.join(held)}" if held else "nothing is held back"
            limit = settings.wan.budget.bytes
            words = f"{bytes_in_words(used)} of {bytes_in_words(limit)} used"
            _log.warning("the WAN's budget: %s; %s", words, what)
            self._held = held
            self.on_change()

    def _today(self, now: float) -> date:
        return site_time(self._dependencies.settings(), now).date()

    def _used(self, first: date) -> int:
        found = self.ledger.used(first)
        return max(0, found["all"] - found["cheap"])

    # --- with a cluster

    @property
    def most(self) -> int:
        return MOST_NODES + 1

    def rows(self) -> dict[str, tuple[int, Callable[[], str]]]:
        """For gup.control.cluster."""
        return {row.id: (row.seq, partial(write_node, row)) for row in self.ledger.nodes()}

    def hear(self, texts: Iterable[str | None]) -> dict[str, int]:
        rows = [row for text in texts if (row := read_node(text)) is not None]
        self.ledger.merge(rows)
        return {row.id: row.seq for row in rows}

    # --- how it stands

    def held_back(self) -> list[Held]:
        """The classes of fills that are held back now, but for what an outbreak frees."""
        return [class_ for class_ in _CLASSES if self._dependencies.gate.holds(class_)]

    def standing(self) -> schemas.Budget:
        """As of this moment."""
        process, now = self._dependencies, self._read()
        settings = process.settings()
        budget, today = settings.wan.budget, self._today(now)
        period = period_of(budget, today)
        found, held = self.ledger.used(period.first), self.held_back()
        used, limit = max(0, found["all"] - found["cheap"]), budget.bytes or None
        began, ends = midnight(settings, period.first), midnight(settings, period.after)
        totals, ahead = process.totals(), self._forecast(now)
        runs_out = None
        if ahead.runs_out is not None:
            day, share = ahead.runs_out
            runs_out = midnight(settings, day) + share * _DAY_SECONDS
        cheap = cheap_at(settings, now)
        opens = [ends, *filter(None, [next_cheap(settings, now)])]
        shown = schemas.Budget(
            bytes=limit,
            per=budget.per,
            period_began_at=began,
            period_ends_at=ends,
            used_bytes=used,
            left_bytes=None if limit is None else max(0, limit - used),
            used_share=None if limit is None else used / limit,
            cheap_now=cheap,
            cheap_bytes=found["cheap"],
            by_kind={kind: found[kind] for kind in ("full", "delta", "index", "other")},
            background_bytes=found["background"],
            held_back=held,
            opens_at=min(opens) if held else None,
            held_back_total={name: totals.get(series(_HELD_TOTAL, {"class": name}), 0) for name in _CLASSES},
            forecast=schemas.BudgetForecast(
                expected_bytes=ahead.expected_bytes,
                expected_share=ahead.expected_bytes / limit
                if limit and ahead.expected_bytes is not None
                else None,
                runs_out_at=runs_out,
                basis=ahead.basis,
                days=ahead.days,
            ),
            nodes=[
                schemas.BudgetNode(
                    node=row.node,
                    id=row.id,
                    used_bytes=max(0, gained["all"] - gained["cheap"]),
                    told_at=row.at,
                )
                for row in self.ledger.nodes()
                if (gained := row.gained(period.first))["all"] or row is self.ledger.own
            ],
            saying="",
        )
        shown.saying = self._saying(shown, now)
        return shown

    def _forecast(self, now: float) -> Forecast:
        settings = self._dependencies.settings()
        local = site_time(settings, now)
        today, period = local.date(), period_of(settings.wan.budget, local.date())
        gone = min(1.0, max(0.0, (now - midnight(settings, today)) / _DAY_SECONDS))
        limit = settings.wan.budget.bytes or 1 << 62
        return forecast(limit, self._used(period.first), period, self.ledger.by_day(), today, gone)

    def _saying(self, shown: schemas.Budget, now: float) -> str:
        settings = self._dependencies.settings()
        used = bytes_in_words(shown.used_bytes)
        per = "today" if shown.per == "day" else "this month"
        if shown.bytes is None:
            return f"{used} {per}; no budget is set (wan.budget.bytes)"
        words = f"{used} of {bytes_in_words(shown.bytes)} used {per} ({shown.used_bytes / shown.bytes:.0%})"
        local, ahead = site_time(settings, now), shown.forecast
        if shown.held_back:
            at = site_time(settings, shown.opens_at or now)
            what = " and ".join(_IN_WORDS[class_] for class_ in shown.held_back)
            words += f"; {what} are held back until {at:%H:%M} on the {ordinal(at.day)}"
        if shown.cheap_now:
            words += "; cheap hours: nothing counts"
        if ahead.runs_out_at is not None:
            at = site_time(settings, ahead.runs_out_at)
            if at.date() == local.date():
                return f"{words}; it runs out today at {at:%H:%M}"
            month = "" if (at.year, at.month) == (local.year, local.month) else f" of {at:%B}"
            return f"{words}; it runs out on the {ordinal(at.day)}{month}"
        if ahead.expected_share is not None and shown.used_bytes < shown.bytes:
            return f"{words}; it will be {ahead.expected_share:.0%} at the {shown.per}'s end"
        return words

    def findings(self) -> Iterator[tuple[str, str, str]]:
        """Alarms: name, subject and text of each."""
        shown, now = self.standing(), self._clock()
        if shown.bytes is None:
            return
        until_cheap = self._dependencies.settings().wan.budget.background == 0  # as it was set: no alarm
        if shown.held_back and not (until_cheap and shown.held_back == ["background"]):
            yield "budget-held", "", f"the WAN's budget: {shown.saying}"
            return
        gone = (now - shown.period_began_at) / max(1.0, shown.period_ends_at - shown.period_began_at)
        judged = gone >= _EARLY or shown.used_bytes >= _EARLY * shown.bytes
        if shown.forecast.runs_out_at is not None and judged:
            yield "budget-short", "", f"the WAN's budget runs out before its period ends: {shown.saying}"


_IN_WORDS = {"background": "background fills", "full": "full packages", "delta": "deltas"}


def ordinal(number: int) -> str:
    """Such as 23rd."""
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
