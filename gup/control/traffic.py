"""What clients ask for, by stream: newest revisions, unmet demand, storms of full packages."""

import calendar
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

from gup.content.key import ContentKey, Kind, named
from gup.control.index import Index, Stream, stream_of
from gup.metrics import MAX_STREAMS

_log = logging.getLogger("gup.control.traffic")
_Known = TypeVar("_Known")


class LatestStreams(OrderedDict[Stream, _Known], Generic[_Known]):
    """Values by stream; beyond MAX_STREAMS those idle longest are forgotten."""

    def __init__(self, make: Callable[[Stream], _Known]) -> None:
        super().__init__()
        self._make = make

    def met(self, stream: Stream) -> _Known:
        """The stream's value, made at its first use."""
        known = self[stream] = self.pop(stream) if stream in self else self._make(stream)
        while len(self) > MAX_STREAMS:
            self.popitem(last=False)
        return known


WINDOW_SECONDS = 600.0
FULLS = 10
"""A storm: this many fulls of one stream in this window and the last, more than deltas, where deltas exist.
"""
CALM_SECONDS = 60.0
"""A storm ends this long after its condition."""
MAX_ADDRESSES = 1000
"""Addresses counted in a window of one stream; there may be more."""
SHOWN = 20
_UNMET_SECONDS = 1800.0
"""A revision that was not requested for this long is not reported as missing."""
_MAX_UNMET = 8


@dataclass(slots=True)
class _Window:
    """Requests in one window of time; `fulls` by key."""

    number: int = 0
    fulls: Counter[str] = field(default_factory=Counter)
    deltas: int = 0
    addresses: Counter[str] = field(default_factory=Counter)


class Unmet(NamedTuple):
    """A revision that clients requested and no upstream had, with the first and last time (Unix seconds)."""

    revision: str
    first: float
    last: float


def _is_recent(one: Unmet, now: float) -> bool:
    """Not if it lies ahead: the clock was put back since."""
    return abs(now - one.last) <= _UNMET_SECONDS


@dataclass(slots=True)
class _Asked:
    """Requests for a stream in two windows, its storm (begin and last sight), revisions got and unmet."""

    now: _Window = field(default_factory=_Window)
    before: _Window = field(default_factory=_Window)
    since: float | None = None
    last: float = 0.0
    newest: str = ""
    unmet: OrderedDict[str, Unmet] = field(default_factory=OrderedDict)

    def turn(self, now: float) -> None:
        number = int(now // WINDOW_SECONDS)
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


class Storm(NamedTuple):
    """A present storm. Counts cover the last ten to twenty minutes; times are Unix seconds.

    `addresses` are the most frequent ones of `clients` (at least this many). `lan_bytes` is the length of all
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


class Traffic:
    """Demand and storms by stream, from every request for content."""

    def __init__(self, index: Index, clock: Callable[[], float]) -> None:
        self._index = index
        self._clock = clock
        self._streams = LatestStreams(lambda _: _Asked())

    def _asked(self, key: ContentKey) -> _Asked:
        asked = self._streams.met(stream_of(key))
        asked.turn(self._clock())
        return asked

    def sent(self, key: ContentKey, times: int) -> None:
        """`times` responses with this body, from the store or while it was fetched."""
        names = named(key)
        if names is None:
            return
        asked = self._asked(key)
        asked.newest = max(asked.newest, names.revision)
        asked.unmet.pop(names.revision, None)
        if names.kind is Kind.FULL:
            asked.now.fulls[key.text] += times
        else:
            asked.now.deltas += times

    def missed(self, key: ContentKey) -> None:
        """A client requested this, and no upstream had it."""
        names, now = named(key), self._clock()
        if names is None:
            return
        unmet = self._asked(key).unmet
        before = unmet.get(names.revision)
        first = before.first if before is not None and _is_recent(before, now) else now
        unmet[names.revision] = Unmet(names.revision, first, now)
        unmet.move_to_end(names.revision)
        while len(unmet) > _MAX_UNMET:
            unmet.popitem(last=False)

    def note_client(self, key: ContentKey, address: str, times: int) -> None:
        addresses = self._asked(key).now.addresses
        if address in addresses or len(addresses) < MAX_ADDRESSES:
            addresses[address] += times

    def look(self) -> None:
        """Begin and end storms, and log it; to be called about once a second."""
        now = self._clock()
        for stream, asked in self._streams.items():
            asked.turn(now)
            fulls, name = asked.fulls.total(), "/".join(stream)
            if fulls >= FULLS and fulls > asked.deltas and self._index.deltas(stream)[0]:
                asked.last = now
                if asked.since is None:
                    asked.since = now
                    text = "a storm of fulls: %d clients requested %d full packages of %s, where deltas exist"
                    _log.warning(text, len(asked.addresses), fulls, name)
            elif asked.since is not None and not 0 <= now - asked.last < CALM_SECONDS:
                _log.warning("the storm of fulls of %s is over, after %d s", name, asked.last - asked.since)
                asked.since = None

    def flags(self) -> Mapping[Stream, bool]:
        """Whether there is a storm, for every requested stream."""
        return {stream: asked.since is not None for stream, asked in self._streams.items()}

    def storms(self) -> list[Storm]:
        return [
            self._storm(stream, asked, asked.since)
            for stream, asked in self._streams.items()
            if asked.since is not None
        ]

    def _storm(self, stream: Stream, asked: _Asked, since: float) -> Storm:
        fulls, addresses, (deltas, delta_bytes) = asked.fulls, asked.addresses, self._index.deltas(stream)
        rows = {key: self._index.rows.get(key) for key in fulls}
        lengths = {key: row.length_bytes if row is not None else 0 for key, row in rows.items()}
        return Storm(
            stream,
            since,
            fulls.total(),
            asked.deltas,
            len(addresses),
            tuple(address for address, _ in addresses.most_common(SHOWN)),
            sum(times * lengths[key] for key, times in fulls.items()),
            sum(lengths.values()),
            delta_bytes // deltas if deltas else 0,
        )

    def newest(self) -> dict[Stream, str]:
        return {stream: asked.newest for stream, asked in self._streams.items() if asked.newest}

    def unmet(self) -> dict[Stream, Unmet]:
        """By stream, the newest recently requested revision that no upstream had."""
        found, now = {}, self._clock()
        for stream, asked in self._streams.items():
            recent = [one for one in asked.unmet.values() if _is_recent(one, now)]
            if recent:
                found[stream] = max(recent)
        return found


@lru_cache(maxsize=1024)
def revision_time(revision: str) -> float | None:
    """Unix time of the day that a revision (YYMMDDrrr, FIELD.md) begins with; None if it is no date."""
    try:
        return float(calendar.timegm(time.strptime(revision[:6], "%y%m%d")))
    except ValueError:
        return None


def newest_times(
    revisions: Mapping[Stream, str], label: Callable[[Stream], tuple[str, str]]
) -> dict[tuple[str, str], float]:
    """Unix times of the newest revisions by product and language; of at most MAX_STREAMS streams."""
    times: dict[tuple[str, str], float] = {}
    for stream in sorted(revisions)[:MAX_STREAMS]:
        if (at := revision_time(revisions[stream])) is not None:
            times[label(stream)] = max(at, times.get(label(stream), at))
    return times
