"""A replay of the recorded demand through stores of other sizes: which bytes would have crossed the WAN.

Entries are evicted by `plan_evictions`, as in the service. A fetch takes no time here: a body is stored as
soon as it is requested. One walk through the record serves stores of many sizes: the times of use are the
same in all, so that a use of a body which all of them hold costs one step.
"""

import heapq
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gup.config import Cache
from gup.content.key import Kind, content_revision
from gup.control.entry_table import HeldStream, Stream
from gup.control.eviction_plan import MOST_PLANNED, DiskUsage, plan_evictions
from gup.control.stats.demand_files import Key, Line, Op, files, read_keys, read_lines

UNLIMITED_BYTES = 1 << 60
_MOST_SECONDS = 240.0
"""Of processor time, as far as leaving out stores can hold it."""
_TIDY_SECONDS = 600.0
"""How often entries are looked at that are unused for too long."""


class Body:
    """A body of the record; `absent` has a bit for each store that does not hold it."""

    __slots__ = (
        *("absent", "content_revision", "cost_bytes", "key", "kind", "length_bytes", "pinned", "seen"),
        *("stream", "turn", "used_at"),
    )

    def __init__(self, key: Key, absent: int) -> None:
        version, language, stream, revision, file = key.text.split("/", 4)
        self.key = key.text
        self.kind = key.kind
        self.length_bytes = max(0, key.length_bytes)
        self.cost_bytes = 0 if key.local else self.length_bytes
        self.content_revision = content_revision(key.kind, revision, file)
        self.stream: Stream = (version, language, stream)
        self.absent = absent
        self.pinned = False
        self.seen = False
        """Whether it was requested in the time that is counted."""
        self.turn = 0
        """Of its last use; a later use has a higher one."""
        self.used_at = 0.0


class SimulatedStore:
    """A store of one size. What was fetched is in `wan_bytes` and `fetches`, counted while `counts`.

    It is an Evictable. For each class of worth there is a heap by last use, whose items may be outdated: a
    use only sets the body's turn, and its item is put right when it comes up.
    """

    def __init__(self, bit: int, limits: Cache, bodies: Mapping[str, Body]) -> None:
        """`bodies` are all of the record so far, by key."""
        self.bit = bit
        self.limits = limits
        self._for_room = limits.model_copy(update={"max_unused": 0.0})  # `tidy` looks at that
        self._bodies = bodies
        self.total_bytes = 0
        self.peak_bytes = 0
        self.wan_bytes = 0
        self.fetches = 0
        self.spent = 0
        """Fetches, also those that are not counted: they take most of the time."""
        self.left_out = False
        self.counts = True
        self.on_fetch: Callable[[Body, int], None] | None = None
        """Called with the body and the bytes of each fetch, also of those that are not counted."""
        self.may_fetch: Callable[[Body, int], bool] = lambda _body, _times: True
        """Asked before each fetch, with the requests that wait for it; what may not is not there for them."""
        self._streams: defaultdict[Stream, HeldStream] = defaultdict(HeldStream)
        self._of_revision: defaultdict[tuple[Stream, str], dict[Body, None]] = defaultdict(dict)
        self._over: dict[Stream, None] = {}
        """Streams with more revisions than are kept."""
        self._heaps: dict[int, list[tuple[int, Body]]] = defaultdict(list)
        self._places: dict[Body, tuple[int, int]] = {}
        """The class and turn of the one item of each body that counts."""

    # --- what is requested

    def fetch(self, body: Body, times: int, now: float) -> None:
        """Fetch and store it. What can't be stored is fetched for each of `times` requests."""
        cost = body.cost_bytes
        self.spent += 1
        if not self.may_fetch(body, times):
            return
        stored = body.length_bytes > 0 and self._makes_room(body.length_bytes, now)
        self._count(body, cost if stored else cost * times, 1 if stored else times)
        if stored:
            self.put(body)
            self._drop_beyond(now)

    def more(self, body: Body, times: int) -> None:
        """Further requests while it was fetched: they cost nothing unless it can't be stored."""
        if not 0 < body.length_bytes <= self.limits.max_size and self.may_fetch(body, times):
            self._count(body, body.cost_bytes * times, times)

    def place(self, body: Body, now: float) -> None:
        """Store it without fetching."""
        if body.absent & self.bit and body.length_bytes and self._makes_room(body.length_bytes, now):
            self.put(body)

    def _count(self, body: Body, bytes_: int, fetches: int) -> None:
        if self.counts:
            self.wan_bytes += bytes_
            self.fetches += fetches
        if self.on_fetch is not None and bytes_:
            self.on_fetch(body, bytes_)

    # --- what is held

    def put(self, body: Body) -> None:
        body.absent &= ~self.bit
        self.total_bytes += body.length_bytes
        self.peak_bytes = max(self.peak_bytes, self.total_bytes)
        held, newest = self._streams[body.stream], self._streams[body.stream].newest
        held.count(body, 1)
        if body.content_revision is not None:
            self._of_revision[body.stream, body.content_revision][body] = None
            if 0 < self.limits.keep_revisions < len(held.revisions):
                self._over[body.stream] = None
        self._push(body, held)
        self._sort_anew(body.stream, held, newest)

    def remove(self, body: Body) -> None:
        body.absent |= self.bit
        self.total_bytes -= body.length_bytes
        held, newest = self._streams[body.stream], self._streams[body.stream].newest
        held.count(body, -1)
        if body.content_revision is not None:
            bodies = self._of_revision[body.stream, body.content_revision]
            del bodies[body]
            if not bodies:
                del self._of_revision[body.stream, body.content_revision]
        self._places.pop(body, None)
        self._sort_anew(body.stream, held, newest)

    def _push(self, body: Body, held: HeldStream) -> None:
        worth = held.worth(body.kind, body.content_revision)
        self._places[body] = worth, body.turn
        heapq.heappush(self._heaps[worth], (body.turn, body))

    def _sort_anew(self, stream: Stream, held: HeldStream, before: str) -> None:
        """Another revision is the newest now: it and the one before have another worth."""
        if held.newest == before:
            return
        for revision in (held.newest, before):
            for body in self._of_revision.get((stream, revision), ()):
                if body.kind is not Kind.INDEX:
                    self._push(body, held)

    def _makes_room(self, length: int, now: float) -> bool:
        """Evict for a body of this length; whether there is room then."""
        if length > self.limits.max_size:
            return False
        while self.total_bytes + length > self.limits.max_size:
            if not self._evict(now, length):
                return False
        return True

    def _drop_beyond(self, now: float) -> None:
        while self._over and self._evict(now, 0):
            pass

    def tidy(self, now: float) -> None:
        """Evict what was not used for too long."""
        while self._evict(now, 0, self.limits) >= MOST_PLANNED:
            pass

    def _evict(self, now: float, need: int, limits: Cache | None = None) -> int:
        """How many were evicted."""
        disk = DiskUsage((), UNLIMITED_BYTES, self.total_bytes)
        plan = plan_evictions(self, disk, limits or self._for_room, now, need=need)
        for eviction in plan:
            self.remove(self._bodies[eviction.key])
        return len(plan)

    # --- what may be evicted

    def beyond(self, keep: int) -> Iterator[Body]:
        for stream in list(self._over):
            if not (revisions := self._streams[stream].beyond(keep)):
                del self._over[stream]
            for revision in revisions:
                for body in list(self._of_revision[stream, revision]):
                    if not body.pinned:
                        yield body

    def unused_since(self, at: float) -> Iterator[Body]:
        for worth in sorted(self._heaps):
            yield from self._in_order(worth, at)

    def by_worth(self) -> Iterator[Body]:
        for worth in sorted(self._heaps):
            yield from self._in_order(worth, math.inf)

    def _in_order(self, worth: int, before: float) -> Iterator[Body]:
        """The bodies of a class that were used last before then, those of the longest ago first."""
        heap, looked_at = self._heaps[worth], list[tuple[int, Body]]()
        try:
            while heap:
                turn, body = heap[0]
                twice = bool(looked_at) and looked_at[-1][1] is body
                if twice or self._places.get(body) != (worth, turn):
                    heapq.heappop(heap)
                elif body.turn > turn:  # it was used since
                    self._places[body] = worth, body.turn
                    heapq.heapreplace(heap, (body.turn, body))
                elif body.used_at >= before:
                    return
                else:
                    looked_at.append(heapq.heappop(heap))
                    if not body.pinned:
                        yield body
        finally:
            for item in looked_at:
                heapq.heappush(heap, item)


class Replay:
    """Walks through the record once, for a store with each of the given limits.

    What the stores fetch and the figures below are counted from `since` on (Unix seconds); what came before
    fills the stores.
    """

    def __init__(self, limits: Sequence[Cache], since: float = 0.0) -> None:
        self.bodies: dict[str, Body] = {}
        self.stores = [SimulatedStore(1 << n, each, self.bodies) for n, each in enumerate(limits)]
        self._bits = (1 << len(limits)) - 1
        self.since = since
        self.now = 0.0
        self.first_at = 0.0
        """Time of the first line that is counted; 0 when there is none."""
        self.requests = 0
        self.requested_bytes = 0
        self.unknown = 0
        """Requests for bodies whose size is not known."""
        self.failed = 0
        self.distinct_bytes = 0
        self.sent_bytes = 0
        self.received_bytes = 0
        self.background = False
        """Whether a prefetch is replayed at present."""
        self._counts = False
        self._turn = 0
        self._tidy_at = 0.0

    @property
    def counts(self) -> bool:
        """Whether the present line is in the time that is counted."""
        return self._counts

    def run(self, folder: Path, on_line: Callable[[Line], None] | None = None, keeps: int = 0) -> None:
        """`on_line` is called after each line.

        If it would take too long, the stores that fetch most are left out, except the last `keeps`; they are
        `left_out` then.
        """
        known, began = files(folder), time.thread_time()
        for number, path in enumerate(known):
            self._hurry((time.thread_time() - began) * len(known) / max(1, number), keeps)
            starts, first = read_keys(path), True
            for start, line in read_lines(path):
                keys = starts[start] if start < len(starts) else {}
                if not first or number == 0:  # a file begins with what is stored, as later stores know
                    self._take(line, keys)
                    if on_line is not None:
                        on_line(line)
                first = False

    def _hurry(self, seconds: float, keeps: int) -> None:
        """`seconds` is the time that all will take, by the part that is done."""
        most = sorted(self.stores[: len(self.stores) - keeps], key=lambda store: store.spent)
        while seconds > _MOST_SECONDS and most:
            store = most.pop()
            store.left_out = True
            self.stores.remove(store)
            self._bits &= ~store.bit
            for body in self.bodies.values():
                body.absent &= ~store.bit
            seconds *= 1 - store.spent / max(1, store.spent + sum(one.spent for one in self.stores))

    def _take(self, line: Line, keys: Mapping[int, Key]) -> None:
        self.now = now = max(self.now, line.at)
        self._counts = line.at >= self.since
        for store in self.stores:
            store.counts = self._counts
        if self._counts:
            self.first_at = self.first_at or line.at - line.seconds
            self.sent_bytes += line.sent_bytes
            self.received_bytes += line.received_bytes
        if now - self._tidy_at > _TIDY_SECONDS:
            self._tidy_at = now
            for store in self.stores:
                store.tidy(now)
        rows = iter(line.rows)
        for number, op, count in zip(rows, rows, rows, strict=False):
            if (key := keys.get(number)) is not None:
                self._row(self._body(key), op, count)

    def _body(self, key: Key) -> Body:
        body = self.bodies.get(key.text)
        if body is None:
            body = self.bodies[key.text] = Body(key, self._bits)
        elif not body.length_bytes and key.length_bytes > 0:  # known by now; no store has it
            body.length_bytes = key.length_bytes
            body.cost_bytes = 0 if key.local else key.length_bytes
        return body

    def _row(self, body: Body, op: int, count: int) -> None:
        if op in (Op.USE, Op.MORE, Op.FILL) and self._counts:
            self._count(body, count)
        absent = [store for store in self.stores if body.absent & store.bit] if body.absent else ()
        if op == Op.MORE:
            for store in absent:
                store.more(body, count)
            return
        if op in (Op.PURGED, Op.PIN, Op.UNPIN, Op.FAILED):
            self._by_operator(body, op)
            return
        self._turn += 1
        if op != Op.PREFETCH or absent:
            body.turn, body.used_at = self._turn, self.now
        if op == Op.PLACED:
            body.pinned = body.pinned or count == 1
            for store in absent:
                store.place(body, self.now)
        elif op == Op.CHANGED:
            self._change(body, count)
        else:
            self.background = op == Op.PREFETCH
            for store in absent:
                store.fetch(body, count, self.now)
            self.background = False

    def _count(self, body: Body, count: int) -> None:
        self.requests += count
        self.requested_bytes += body.length_bytes * count
        self.unknown += 0 if body.length_bytes else count
        if not body.seen:
            body.seen = True
            self.distinct_bytes += body.length_bytes

    def _change(self, body: Body, length: int) -> None:
        cost = length if body.cost_bytes or not body.length_bytes else 0
        for store in self.stores:
            if not body.absent & store.bit:
                store.remove(body)
        body.length_bytes, body.cost_bytes = length, cost
        for store in self.stores:
            store.fetch(body, 1, self.now)

    def _by_operator(self, body: Body, op: int) -> None:
        if op == Op.FAILED:
            self.failed += self._counts
        elif op in (Op.PIN, Op.UNPIN):
            body.pinned = op == Op.PIN
        else:
            for store in self.stores:
                if not body.absent & store.bit:
                    store.remove(body)


def with_size(limits: Cache, size_bytes: int) -> Cache:
    return limits.model_copy(update={"max_size": size_bytes})


def sizing(folder: Path, limits: Cache, sizes: Sequence[int], since: float, keeps: int = 0) -> dict[str, Any]:
    """What stores of these sizes would have fetched, the last one without a limit; as JSON."""
    replay = Replay([with_size(limits, size) for size in (*sizes, UNLIMITED_BYTES)], since)
    stores = list(replay.stores)
    replay.run(folder, keeps=keeps + 1)
    names = ("first_at", "requests", "requested_bytes", "unknown", "failed", "sent_bytes", "received_bytes")
    shown = [
        {name: getattr(store, name) for name in ("wan_bytes", "fetches", "peak_bytes", "left_out")}
        for store in stores
    ]
    return {name: getattr(replay, name) for name in names} | {"until": replay.now, "stores": shown}


def answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """`folder`, `limits` (of the section `cache`), `sizes`, `since` and `keeps`, as `sizing` has them."""
    limits, began = Cache.model_construct(**asked["limits"]), time.thread_time()
    found = sizing(Path(asked["folder"]), limits, asked["sizes"], asked["since"], asked["keeps"])
    return found | {"seconds": round(time.thread_time() - began, 3)}


def main(answer: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
    """A process of its own, of the lowest priority: what is asked for and the answer are JSON."""
    os.nice(19)
    json.dump(answer(json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main(answer)
