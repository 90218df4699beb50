"""Where the seconds of fills and slow requests went: what processes told, joined, kept and put into words.

A request that waited for a fill of another process tells only for how long: that time is split here by what
the fill did meanwhile. Slow ones are kept in the statistics database, MOST_KEPT fills and as many requests.
"""

import json
import sqlite3
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gup.content.key import ContentKey
from gup.control.api import schemas
from gup.control.events import (
    Committed,
    Ended,
    Failed,
    RequestUnderWay,
    Slow,
    SlowRequest,
    Timed,
    UnderWay,
)
from gup.control.stats.client_records import Reports
from gup.control.stats.database import StatsDatabase
from gup.metrics import Counters
from gup.phases import ELSEWHERE, rounded, split
from gup.units import bytes_in_words, time_in_words

MOST_KEPT = 5000
_MOST_FILLS, _MOST_LAST = 500, 2000
_MOST_PENDING = 10_000
_MOST_NAMED = 5
SHOWN = 20
_UNDER_WAY_SECONDS = 5.0
"""What a process told is out of date then: it has ended, or hangs."""
_RECENT_SECONDS = 86400.0
_WORDS: Mapping[str, str] = {
    "download_queue": "for a download slot (clients.max_downloads)",
    "queue": "for a fill slot (fill.max)",
    "wan": "for the WAN's rate (wan.rate)",
    "head": "for the upstream's answer",
    "receiving": "receiving from the upstream",
    "disk": "for the disk",
    "fill": "for a fill in another process",
    "rate": "for the client's rate (clients.rate)",
    "client": "for the client to take more",
    "sending": "sending",
}
_KEEP = "INSERT INTO slow(at, what, key, client, seconds, told) VALUES(?, ?, ?, ?, ?, ?)"
_FORGET = """
DELETE FROM slow WHERE what = :what AND id <= (
  SELECT id FROM slow WHERE what = :what ORDER BY id DESC LIMIT 1 OFFSET :most)
"""
_LOOK = "SELECT at, what, key, client, seconds, told FROM slow WHERE {} ORDER BY {} DESC LIMIT ?"


@dataclass(slots=True)
class _Spell:
    """A fill or a request, ended or under way; `began` and the intervals are monotonic."""

    what: str
    key: str
    client: str
    began: float
    seconds: float
    phases: dict[str, float]
    times: Timed | None = None
    """Of a fill."""
    waits: tuple[tuple[float, float, float], ...] = ()
    behind: dict[str, list[str]] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    at: float | None = None
    """Unix seconds of its end; None: it is under way."""

    @property
    def stop(self) -> float:
        return self.began + self.seconds

    def overlaps(self, start: float, stop: float) -> bool:
        return self.began < stop and start < self.stop


class Timings:
    """All methods belong to the event loop."""

    def __init__(
        self,
        database: StatsDatabase,
        reports: Reports,
        counters: Counters,
        clock: Callable[[], float],
        slow_seconds: Callable[[], float],
    ) -> None:
        self._database, self._reports, self._counters = database, reports, counters
        self._clock, self._slow_seconds = clock, slow_seconds
        self._fills: deque[_Spell] = deque(maxlen=_MOST_FILLS)
        """The last ones, whatever they took: others waited behind them."""
        self._last: OrderedDict[str, _Spell] = OrderedDict()
        """The last one of each key."""
        self._pending: deque[_Spell] = deque(maxlen=_MOST_PENDING)
        self._under_way: dict[int, tuple[float, list[_Spell]]] = {}

    # --- what processes tell

    def fill_ended(self, event: Committed | Failed | Ended) -> None:
        spell = _fill(event, event.key)
        spell.at = self._clock()
        spell.told["outcome"] = "stored" if isinstance(event, Committed) else "failed"
        if isinstance(event, Ended):
            spell.told["outcome"] = "not stored"
        if len(self._fills) == _MOST_FILLS and (times := self._fills[0].times) is not None:
            self._fills[0].times = times.model_copy(update={"marks": ()})
        self._fills.append(spell)
        self._last.pop(spell.key, None)
        self._last[spell.key] = spell
        if len(self._last) > _MOST_LAST:
            self._last.popitem(last=False)
        if spell.seconds >= self._slow_seconds():
            self._pending.append(spell)

    def requests_ended(self, event: Slow) -> None:
        for row in event.rows:
            spell = self._request(row)
            spell.at = self._clock()
            names = ("result", "status", "sent_bytes", "complete")
            spell.told = {name: getattr(row, name) for name in names}
            self._pending.append(spell)

    def is_under_way(self, event: UnderWay) -> None:
        fills = [_fill(row, row.key, row.phase) for row in event.fills]
        spells = [*fills, *map(self._request, event.requests)]
        self._under_way[event.process] = time.monotonic(), spells

    def _request(self, row: SlowRequest | RequestUnderWay) -> _Spell:
        key = row.key.text if isinstance(row.key, ContentKey) else ""
        client = self._reports.name_of(row.client) or ""
        behind = list(filter(None, map(self._reports.name_of, row.behind)))
        phases = dict(row.phases)
        return _Spell(
            "request",
            key,
            client,
            row.began,
            row.seconds,
            phases,
            waits=row.waits,
            behind={"download_queue": behind} if behind and phases.get("download_queue") else {},
        )

    # --- joining

    def under_way(self, what: str) -> list[_Spell]:
        """Joined; the longest first."""
        spells, fills = [spell for spell in self._all_under_way() if spell.what == what], self._all_fills()
        for spell in spells:
            self._join(spell, fills)
        return sorted(spells, key=lambda spell: -spell.seconds)

    def _all_under_way(self) -> Iterator[_Spell]:
        now = time.monotonic()
        for process, (at, spells) in list(self._under_way.items()):
            if now - at > _UNDER_WAY_SECONDS:
                del self._under_way[process]
            else:
                yield from spells

    def _all_fills(self) -> dict[str, list[_Spell]]:
        """The last ones and those under way, by key."""
        found: dict[str, list[_Spell]] = {}
        for one in (*self._fills, *(one for one in self._all_under_way() if one.what == "fill")):
            found.setdefault(one.key, []).append(one)
        return found

    def _join(self, spell: _Spell, fills: dict[str, list[_Spell]]) -> None:
        """Split what it waited for fills of other processes, and say behind whom it waited."""
        known = fills.get(spell.key, [])
        own = [one for one in known if one.overlaps(spell.began, spell.stop)]
        if spell.waits:
            self._split(spell, own)
        if spell.phases.get("queue"):
            times = [spell.times] if spell.times is not None else [one.times for one in own]
            queued = [one.queued for one in times if one is not None and one.queued is not None]
            spell.behind["queue"] = _who_held(fills, spell.key, queued)
        if spell.phases.get("wan"):
            held = [one.times.held for one in own if one.times is not None and one.times.held is not None]
            spell.behind["wan"] = _who_held(fills, spell.key, held)
        spell.behind = {phase: names for phase, names in spell.behind.items() if names}

    def _split(self, spell: _Spell, fills: list[_Spell]) -> None:
        waits, spell.waits = spell.waits, ()
        for start, stop, seconds in waits:
            parts: Mapping[str, float] = {ELSEWHERE: seconds}
            for one in fills:
                if one.times is not None and one.times.marks and one.overlaps(start, stop):
                    parts = split(one.times.marks, (start, stop, seconds))
                elif one.overlaps(start, stop):
                    total = sum(one.phases.values())
                    parts = {phase: seconds * part / total for phase, part in one.phases.items()}
            if ELSEWHERE in parts and len(parts) == 1:
                continue
            for phase, part in parts.items():
                spell.phases[phase] = spell.phases.get(phase, 0.0) + part
            spell.phases[ELSEWHERE] = max(0.0, spell.phases.get(ELSEWHERE, 0.0) - seconds)
        spell.phases = rounded(spell.phases)

    # --- keeping

    async def write(self) -> None:
        """Join what has ended, count it, and keep it. What the disk refuses is tried again."""
        if not self._pending:
            return
        spells, fills = list(self._pending), self._all_fills()
        self._pending.clear()
        for spell in spells:
            if not spell.told.get("joined"):
                self._join(spell, fills)
                spell.told["joined"] = True
                if spell.what == "request":
                    for phase, seconds in spell.phases.items():
                        self._counters.observe("gup_request_phase_seconds", seconds, phase=phase)
        rows = [
            (spell.at, spell.what, spell.key, spell.client, spell.seconds, json.dumps(_told(spell)))
            for spell in spells
        ]

        def keep(db: sqlite3.Connection) -> None:
            db.executemany(_KEEP, rows)
            for what in ("fill", "request"):
                db.execute(_FORGET, {"what": what, "most": MOST_KEPT})

        if not await self._database.store("reports", keep):
            self._pending.extendleft(reversed(spells))

    async def kept(
        self, where: str, *values: object, by: str = "id", most: int = SHOWN
    ) -> list[schemas.Spell]:
        """The last ones that a condition of SQL holds for; none when the disk refuses."""
        await self.write()
        try:
            rows = await self._database.run(
                lambda db: db.execute(_LOOK.format(where, by), (*values, most)).fetchall()
            )
        except OSError:
            return []
        return [
            self.shown(
                _Spell(
                    what=row["what"],
                    key=row["key"],
                    client=row["client"],
                    began=0.0,
                    seconds=row["seconds"],
                    at=row["at"],
                    **_read(row["told"]),
                )
            )
            for row in rows
        ]

    # --- what is shown

    async def of_key(self, key: str) -> tuple[schemas.Spell | None, list[schemas.Spell]]:
        """The fill under way or else the last one, and the slow requests."""
        fill = next((one for one in self.under_way("fill") if one.key == key), None)
        if fill is None and (fill := self._last.get(key)) is not None:
            self._join(fill, self._all_fills())
        requests = [self.shown(one) for one in self.under_way("request") if one.key == key][:SHOWN]
        requests += await self.kept("key = ? AND what = 'request'", key)
        if fill is None:
            earlier = await self.kept("key = ? AND what = 'fill'", key, most=1)
            return (earlier[0] if earlier else None), requests
        return self.shown(fill), requests

    async def of_client(self, client: str) -> list[schemas.Spell]:
        now = [self.shown(one) for one in self.under_way("request") if one.client == client][:SHOWN]
        return now + await self.kept("client = ?", client)

    async def slowest(self) -> schemas.Slowest:
        under_way = [*self.under_way("fill")[:SHOWN], *self.under_way("request")[:SHOWN]]
        since = self._clock() - _RECENT_SECONDS
        found = [
            *await self.kept("what = 'fill' AND at >= ?", since, by="seconds"),
            *await self.kept("what = 'request' AND at >= ?", since, by="seconds"),
        ]
        return schemas.Slowest(under_way=[self.shown(one) for one in under_way], slowest=found)

    def shown(self, spell: _Spell) -> schemas.Spell:
        return schemas.Spell(
            what="fill" if spell.what == "fill" else "request",
            key=spell.key or None,
            client=spell.client or None,
            at=spell.at,
            seconds=spell.seconds,
            phases=rounded(spell.phases),
            behind=spell.behind,
            said=self._said(spell),
        )

    def _said(self, spell: _Spell) -> str:
        who = f" by {spell.client}" if spell.client else ""
        of = f" for {spell.key}" if spell.key else ""
        what = f"Fill of {spell.key}" if spell.what == "fill" else f"Request{who}{of}"
        if spell.at is None:
            when = f", under way for {spell.seconds:.1f} s"
        else:
            ago = time_in_words(max(0.0, self._clock() - spell.at))
            when = f", {ago} ago, took {spell.seconds:.1f} s"
        told = spell.told
        if "status" in told:
            ended = "" if told["complete"] else ", broken off"
            when += f" ({told['status']}, {bytes_in_words(told['sent_bytes'])}{ended})"
        elif told.get("outcome"):
            when += f" ({told['outcome']})"
        return f"{what}{when}: {phases_in_words(spell.phases, spell.behind)}."


def phases_in_words(phases: Mapping[str, float], behind: Mapping[str, Iterable[str]]) -> str:
    """The longest first; those below a hundredth of the whole are left out."""
    total = sum(phases.values())
    parts: list[str] = []
    for phase, seconds in sorted(phases.items(), key=lambda item: -item[1]):
        if seconds >= max(total / 100, 0.0005) or not parts:
            whom = ", ".join(behind.get(phase, ()))
            time = f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
            parts.append(f"{time} {_WORDS[phase]}" + (f" behind {whom}" if whom else ""))
    return "; ".join(parts) or "no time at all"


def _fill(event: Timed, key: ContentKey, phase: str = "") -> _Spell:
    told = {"phase": phase} if phase else {}
    return _Spell(
        "fill", key.text, "", event.began, event.seconds, dict(event.phases), times=event, told=told
    )


def _held_within(other: _Spell, interval: tuple[float, float | None] | None) -> bool:
    """Whether a fill had its slot within an interval."""
    if interval is None or other.times is None or other.times.held is None:
        return False
    (taken, left), (start, stop) = other.times.held, interval
    return (stop is None or taken < stop) and (left is None or left > start)


def _who_held(
    fills: dict[str, list[_Spell]], but: str, intervals: Sequence[tuple[float, float | None]]
) -> list[str]:
    """The keys of some other fills that had slots within these intervals, the last ones first."""
    found: list[str] = []
    for key in reversed(fills) if intervals else ():
        if key != but and any(_held_within(one, at) for one in fills[key] for at in intervals):
            found.append(key)
            if len(found) == _MOST_NAMED:
                break
    return found


def _told(spell: _Spell) -> dict[str, Any]:
    return {"phases": rounded(spell.phases), "behind": spell.behind, "told": spell.told}


def _read(text: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(text)
    return {name: told[name] for name in ("phases", "behind", "told")}
