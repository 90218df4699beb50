"""What clients ask for, by stream: newest revisions, unmet demand, storms of full packages."""

import calendar
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gup.content.deltas import named
from gup.content.key import ContentKey, Kind
from gup.control.index import Index, Stream, stream_of
from gup.control.prefetch import Prefetcher
from gup.metrics import MAX_STREAMS

_log = logging.getLogger("gup.control.traffic")

WINDOW_SECONDS = 600.0
FULLS = 10
"""A storm: so many fulls of one stream in this window and the last, more than deltas, where deltas exist."""
CALM_SECONDS = 60.0
"""A storm ends when the condition did not hold for so long."""
MAX_ADDRESSES = 1000
"""Addresses counted in a window of one stream; there may be more."""
SHOWN = 20


@dataclass(slots=True)
class _Window:
    """Requests in one window of time; `fulls` by key."""

    number: int = 0
    fulls: Counter[str] = field(default_factory=Counter)
    deltas: int = 0
    addresses: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _StreamCounts:
    """Requests for one stream in this window and the one before; the time and last sight of a storm."""

    now: _Window = field(default_factory=_Window)
    before: _Window = field(default_factory=_Window)
    since: float | None = None
    last: float = 0.0

    def turn(self, number: int) -> None:
        if number != self.now.number:
            self.before = self.now if number == self.now.number + 1 else _Window()
            self.now = _Window(number)

    @property
    def fulls(self) -> Counter[str]:
        return self.now.fulls + self.before.fulls

    @property
    def deltas(self) -> int:
        return self.now.deltas + self.before.deltas

    @property
    def addresses(self) -> Counter[str]:
        return self.now.addresses + self.before.addresses


@dataclass(frozen=True, slots=True)
class Storm:
    """A present storm. Counts cover the last ten to twenty minutes; times are Unix seconds.

    `addresses` are the most frequent ones of `clients` (at least so many). `lan_bytes` is the length of all
    fulls sent, `wan_bytes` that of the different ones, fetched once; `delta_bytes` is the mean delta.
    """

    stream: Stream
    since: float
    fulls: int
    deltas: int
    clients: int
    addresses: tuple[str, ...]
    lan_bytes: int
    wan_bytes: int
    delta_bytes: int


class Storms:
    """Requests for fulls and deltas by stream, the longest idle streams forgotten beyond MAX_STREAMS."""

    def __init__(self) -> None:
        self._streams: OrderedDict[Stream, _StreamCounts] = OrderedDict()

    def _asked(self, stream: Stream, now: float) -> _StreamCounts:
        asked = self._streams.setdefault(stream, _StreamCounts())
        self._streams.move_to_end(stream)
        while len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        asked.turn(int(now // WINDOW_SECONDS))
        return asked

    def count(self, stream: Stream, kind: Kind, key: str, times: int, now: float) -> None:
        """Clients asked so many times for a full or a delta."""
        asked = self._asked(stream, now)
        if kind is Kind.FULL:
            asked.now.fulls[key] += times
        elif kind is Kind.DELTA:
            asked.now.deltas += times

    def note_client(self, stream: Stream, address: str, times: int, now: float) -> None:
        """Note who asked for fulls, and how often."""
        addresses = self._asked(stream, now).now.addresses
        if address in addresses or len(addresses) < MAX_ADDRESSES:
            addresses[address] += times

    def look(self, now: float, has_deltas: Callable[[Stream], bool]) -> None:
        """Begin and end storms, and log it."""
        for stream, asked in self._streams.items():
            asked.turn(int(now // WINDOW_SECONDS))
            fulls = asked.fulls.total()
            if fulls >= FULLS and fulls > asked.deltas and has_deltas(stream):
                asked.last = now
                if asked.since is None:
                    asked.since = now
                    _log.warning(
                        "a storm of fulls: %d clients asked for %d full packages of %s, where deltas exist",
                        len(asked.addresses),
                        fulls,
                        "/".join(stream),
                    )
            elif asked.since is not None and not 0 <= now - asked.last < CALM_SECONDS:
                _log.warning(
                    "the storm of fulls of %s is over, after %d s",
                    "/".join(stream),
                    asked.last - asked.since,
                )
                asked.since = None

    def flags(self) -> Mapping[Stream, bool]:
        """Whether there is a storm, for every stream that was asked for."""
        return {stream: asked.since is not None for stream, asked in self._streams.items()}

    def standing(
        self, length_of: Callable[[str], int], delta_bytes_of: Callable[[Stream], int]
    ) -> list[Storm]:
        """The storms there are. `length_of` a key is 0 while it is unknown."""
        return [
            self._storm(stream, asked, asked.since, length_of, delta_bytes_of(stream))
            for stream, asked in self._streams.items()
            if asked.since is not None
        ]

    @staticmethod
    def _storm(
        stream: Stream, asked: _StreamCounts, since: float, length_of: Callable[[str], int], delta_bytes: int
    ) -> Storm:
        fulls, addresses = asked.fulls, asked.addresses
        return Storm(
            stream,
            since,
            fulls.total(),
            asked.deltas,
            len(addresses),
            tuple(address for address, _ in addresses.most_common(SHOWN)),
            sum(times * length_of(key) for key, times in fulls.items()),
            sum(length_of(key) for key in fulls),
            delta_bytes,
        )


_UNMET_SECONDS = 1800.0
"""A revision that nobody has asked for in so long is not reported as missing."""
_MAX_UNMET = 8


def revision_time(revision: str) -> float | None:
    """Unix time of the day that a revision (YYMMDDrrr, FIELD.md) begins with; None if it is no date."""
    try:
        return float(calendar.timegm(time.strptime(revision[:6], "%y%m%d")))
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Unmet:
    """A revision that clients asked for and no upstream gave, with the first and last time (Unix seconds)."""

    revision: str
    first: float
    last: float


@dataclass(slots=True)
class _Demand:
    """The newest revision of a stream that clients got, and those that they asked for in vain."""

    newest: str = ""
    unmet: OrderedDict[str, Unmet] = field(default_factory=OrderedDict)


class Demand:
    """Demand by stream, the longest idle streams forgotten beyond MAX_STREAMS."""

    def __init__(self) -> None:
        self._streams: OrderedDict[Stream, _Demand] = OrderedDict()

    def _demand(self, stream: Stream) -> _Demand:
        demand = self._streams.setdefault(stream, _Demand())
        self._streams.move_to_end(stream)
        while len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        return demand

    def met(self, stream: Stream, revision: str) -> None:
        """Clients were sent what brings them to this revision."""
        demand = self._demand(stream)
        demand.newest = max(demand.newest, revision)
        demand.unmet.pop(revision, None)

    def unmet(self, stream: Stream, revision: str, now: float) -> None:
        """A client asked for this revision in vain."""
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
        """The newest revision of each stream that was asked for in vain lately."""
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


class Traffic:
    """Demand and storms by stream, told of every request for content."""

    def __init__(self, prefetcher: Prefetcher, index: Index, clock: Callable[[], float]) -> None:
        self.prefetcher = prefetcher
        self.demand = Demand()
        self.storms = Storms()
        self._index = index
        self._clock = clock

    def sent(self, key: ContentKey, times: int) -> None:
        """Clients were sent this so many times, from the store or while it was being fetched."""
        names, stream = named(key), stream_of(key)
        if names is not None:
            self.demand.met(stream, names.revision)
            self.storms.count(stream, names.kind, key.text, times, self._clock())
            self.prefetcher.asked(key)

    def missed(self, key: ContentKey) -> None:
        """A client asked for this, and no upstream gave it."""
        names = named(key)
        if names is not None:
            self.demand.unmet(stream_of(key), names.revision, self._clock())
            self.prefetcher.refused(key)

    def look(self) -> None:
        """Begin and end storms; to be called once a second or so."""
        self.storms.look(self._clock(), self._index.has_deltas)

    def standing_storms(self) -> list[Storm]:
        """The present storms, with what they cost."""

        def length_of(key: str) -> int:
            row = self._index.rows.get(key)
            return row.length_bytes if row is not None else 0

        return self.storms.standing(length_of, self._index.mean_delta_bytes)
