"""What the streams (variant and moniker) tell an operator: newest revisions, storms of fulls. No I/O."""

import calendar
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gup.content.key import Kind
from gup.control.rows import Row, Stream
from gup.metrics import MAX_STREAMS

STORM_WINDOW_SECONDS = 600.0
STORM_FULLS = 10
"""So many fulls of one stream in a window, and more than deltas, are a storm if a delta is there."""


def revision_time(revision: str) -> float | None:
    """Unix time of the day that a revision (YYMMDDrrr, FIELD.md) begins with; None if it is no date."""
    try:
        return float(calendar.timegm(time.strptime(revision[:6], "%y%m%d")))
    except ValueError:
        return None


@dataclass(slots=True)
class _Demand:
    """What was asked of one stream: the newest revision, and uses by kind in this window and the last."""

    newest: str = ""
    window: int = 0
    now: dict[Kind, int] = field(default_factory=dict)
    before: dict[Kind, int] = field(default_factory=dict)

    def turn(self, window: int) -> None:
        if window != self.window:
            self.before = self.now if window == self.window + 1 else {}
            self.now, self.window = {}, window

    def uses(self, kind: Kind) -> int:
        return self.now.get(kind, 0) + self.before.get(kind, 0)


class Demand:
    """What clients ask for, by stream; as many streams as are counted apart, the longest idle forgotten."""

    def __init__(self) -> None:
        self._streams: OrderedDict[Stream, _Demand] = OrderedDict()

    def count(self, row: Row, uses: int, now: float) -> None:
        """Clients asked `uses` times for the row's body."""
        revision = row.content_revision
        if revision is None:
            return
        demand = self._streams.setdefault(row.stream_id, _Demand())
        self._streams.move_to_end(row.stream_id)
        while len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        demand.turn(int(now // STORM_WINDOW_SECONDS))
        demand.newest = max(demand.newest, revision)
        demand.now[row.kind] = demand.now.get(row.kind, 0) + uses

    def newest(self) -> dict[Stream, str]:
        """The newest revision asked for of each stream."""
        return {stream: demand.newest for stream, demand in self._streams.items()}

    def storms(self, now: float, has_deltas: Callable[[Stream], bool]) -> dict[Stream, bool]:
        """Whether clients ask for fulls of a stream where deltas exist."""
        found = {}
        for stream, demand in self._streams.items():
            demand.turn(int(now // STORM_WINDOW_SECONDS))
            fulls = demand.uses(Kind.FULL)
            found[stream] = fulls >= STORM_FULLS and fulls > demand.uses(Kind.DELTA) and has_deltas(stream)
        return found


Label = Callable[[Stream], tuple[str, str]]


def newest_times(
    held: Mapping[Stream, str], requested: Mapping[Stream, str], label: Label
) -> dict[tuple[str, str, str], float]:
    """Unix times of the newest revisions by product, language and where; at most MAX_STREAMS streams each."""
    times: dict[tuple[str, str, str], float] = {}
    for where, revisions in (("held", held), ("requested", requested)):
        for stream in sorted(revisions)[:MAX_STREAMS]:
            at = revision_time(revisions[stream])
            if at is not None:
                series = (*label(stream), where)
                times[series] = max(at, times.get(series, at))
    return times
