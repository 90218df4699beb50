"""What the streams (variant and moniker) tell an operator: newest revisions, had or missed. No I/O."""

import calendar
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gup.control.rows import Stream
from gup.metrics import MAX_STREAMS

_UNMET_SECONDS = 1800.0
"""A revision that nobody asked for in so long is not missed any more."""
_MAX_UNMET = 8


def revision_time(revision: str) -> float | None:
    """Unix time of the day that a revision (YYMMDDrrr, FIELD.md) begins with; None if it is no date."""
    try:
        return float(calendar.timegm(time.strptime(revision[:6], "%y%m%d")))
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Unmet:
    """A revision that clients ask for and that no upstream gives. Unix seconds."""

    revision: str
    first: float
    last: float


@dataclass(slots=True)
class _Demand:
    """What was asked of one stream: the newest revision that was had, and those that were not."""

    newest: str = ""
    unmet: OrderedDict[str, Unmet] = field(default_factory=OrderedDict)


class Demand:
    """What clients ask for, by stream; as many streams as are counted apart, the longest idle forgotten."""

    def __init__(self) -> None:
        self._streams: OrderedDict[Stream, _Demand] = OrderedDict()

    def _demand(self, stream: Stream) -> _Demand:
        demand = self._streams.setdefault(stream, _Demand())
        self._streams.move_to_end(stream)
        while len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        return demand

    def met(self, stream: Stream, revision: str) -> None:
        """Clients are sent what brings them to this revision."""
        demand = self._demand(stream)
        demand.newest = max(demand.newest, revision)
        demand.unmet.pop(revision, None)

    def unmet(self, stream: Stream, revision: str, now: float) -> None:
        """What a client asked for could not be had."""
        unmet = self._demand(stream).unmet
        before = unmet.get(revision)
        known = before is not None and now - before.last <= _UNMET_SECONDS
        unmet[revision] = Unmet(revision, before.first if before is not None and known else now, now)
        unmet.move_to_end(revision)
        while len(unmet) > _MAX_UNMET:
            unmet.popitem(last=False)

    def newest(self) -> dict[Stream, str]:
        """The newest revision asked for of each stream."""
        return {stream: demand.newest for stream, demand in self._streams.items() if demand.newest}

    def missed(self, now: float) -> dict[Stream, Unmet]:
        """Of each stream the newest revision that is asked for lately and could not be had."""
        found = {}
        for stream, demand in self._streams.items():
            lately = [one for one in demand.unmet.values() if now - one.last <= _UNMET_SECONDS]
            if lately:
                found[stream] = max(lately, key=lambda one: one.revision)
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
