"""The access log, a line a request; request counters; and client records for the controller."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

from gup import config
from gup.cache.fair_shares import networks_of
from gup.client_names import ClientNames
from gup.content.client_identity import NOTHING, Declarations, Stated
from gup.content.key import Kind
from gup.log import ACCESS
from gup.metrics import CODES_OF_RESULT, KINDS, MAX_STREAMS, SOURCES, Counters, stream_series
from gup.phases import ELSEWHERE, RequestClock, rounded
from gup.server.hot_cache import HotRow
from gup.server.ranges import Span
from gup.server.response import Response

log = logging.getLogger(ACCESS)

_NEVER = 1 << 63
_LINES_A_SECOND = 100  # other than hits, while access is sampled: bounds a flood of refusals
_ROWS = 200  # of one event, which has to fit a datagram
_EVENTS_A_SECOND = 10
_MOST_WAITING = 50_000
_TARGET_LETTERS = 300
# Per second and worker: parsing a head takes 10 µs, and all of it happens in one turn of the event loop.
_MOST_HEADS, _MOST_PARTS = 1000, 2000
_MOST_SLOW, _SLOW_ROWS = 1000, 100  # slow requests told per second, and in one event
_MOST_UNDER_WAY = 50
_MOST_REFUSED = 2000
_TRIFLE_SECONDS = 0.001
_MOST_FULLS = 5000  # addresses and keys reported per second; more are possible

Tell = Callable[[Mapping[str, object]], object]
ClientRecord = tuple[str, str, Stated | bytes]
"""A client's address, the key's text, and what the client states, or the head that states it."""


class AccessLog:
    """The access log of one worker. The hot path writes `words` itself: a call costs more than an addition.

    A hit is logged when its count divided by `_every` leaves `_first`.
    """

    def __init__(
        self,
        settings: config.Settings,
        counters: Counters,
        names: ClientNames,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        position = counters.position
        self.words = counters.words
        self.requests = {
            (result, int(code)): position("gup_requests_total", result=result, code=code)
            for result, codes in CODES_OF_RESULT.items()
            for code in codes
        }
        self.hit_at, self.part_hit_at = self.requests["hit", 200], self.requests["hit", 206]
        self.sent = {source: position("gup_client_sent_bytes_total", source=source) for source in SOURCES}
        self.stream = {
            (slot, kind): position(stream_series("sent", slot, kind))
            for slot in range(MAX_STREAMS + 1)
            for kind in KINDS
        }
        self.clock = clock
        self._counters = counters
        self._names = names
        self.connected: set[str] = set()  # clients whose connection was accepted in this second
        self._used, self._missed = Counter[str](), Counter[str]()
        self._missed_after: dict[str, int] = {}
        """How many keys had been used when each was first missed: the order counts for eviction."""
        self._refused = Counter[tuple[str, str, str, str, str]]()
        self._groups = Counter[tuple[str, str, str]]()
        """What clients asked for, by what they state, where nothing else may be told of them."""
        self._fulls = Counter[tuple[str, str]]()
        self._taken: set[ClientRecord] = set()
        self._parts: list[tuple[ClientRecord, tuple[int, int, int]]] = []
        self._asked: set[ClientRecord] = set()
        self._unnoted = 0
        self._waiting: list[list[object]] = []  # rows that did not fit the controller's queue
        self._lines = 0  # other than hits, in this second
        self.waiting: dict[RequestClock, str] = {}
        """The requests that have had to wait, the oldest first, with their clients' addresses."""
        self._slow: list[list[object]] = []
        self.apply(settings)

    def apply(self, settings: config.Settings) -> None:
        self._access, every = settings.log.access, settings.log.access_sample
        samples = {"off": (_NEVER, -1), "sampled": (every, 1 % every), "all": (1, 0)}
        self._every, self._first = samples[self._access]
        self.declarations = Declarations(settings.rules)
        self.slow_seconds = settings.reports.slow
        self._is_shared = networks_of(settings.clients.shared)
        if self._names.mode != settings.reports.addresses:
            self._names.mode = settings.reports.addresses
            self._waiting.clear()  # their names were made in the former mode

    def sent_bytes(self) -> int:
        """Body bytes that this worker has sent to clients."""
        return sum(self.words[at] for at in self.sent.values())

    # --- responses

    def begin(self, peer: str, response: Response) -> None:
        self.words[self.requests[response.result, response.status]] += 1
        response.first_byte = self.clock()
        key = response.key
        if key is None or response.kind is None or not _is_get(response):
            return
        if response.stored:
            self._used[key] += 1
        elif response.kind is not Kind.INDEX:
            if key not in self._missed:
                self._missed_after[key] = len(self._used)
            self._missed[key] += 1
        if response.kind is Kind.FULL and response.body is not None:
            self._took_full(peer, key)
        seconds = response.first_byte - response.began
        self._counters.observe("gup_time_to_first_byte_seconds", seconds, result=response.result)

    def end(
        self, peer: str, response: Response, sent: int, *, complete: bool, times: RequestClock | None = None
    ) -> None:
        """The whole response was sent, or its rest never will be. `times`: it had to wait."""
        self._note(peer, response, sent, complete=complete)
        if response.rule and _is_get(response):
            self._note_refused(peer, response)
        if times is not None and self.clock() - response.began >= self.slow_seconds:
            times.enter("sending")
            if len(self._slow) < _MOST_SLOW:
                row = self._row_of(peer, times)
                what = [response.key or times.key, response.result, response.status, sent, complete]
                self._slow.append([row[0], *what, *row[2:]])
        else:
            times = None
        wanted = self._access == "all"
        if self._access == "sampled" and response.result == "hit":
            wanted = self.words[self.requests["hit", response.status]] % self._every == self._first
        elif self._access == "sampled":
            self._lines += 1
            wanted = self._lines <= _LINES_A_SECOND
        if wanted:
            self._line(peer, response, sent, complete=complete, times=times)

    def _row_of(self, peer: str, times: RequestClock) -> list[object]:
        """Client, key, begin, seconds, phases, waits for fills of other processes, who had what it waited
        for.
        """
        times.split()
        spent = times.spent
        if spent.get(ELSEWHERE, 0.0) < _TRIFLE_SECONDS:  # the moment since the split
            spent["sending"] = spent.get("sending", 0.0) + spent.pop(ELSEWHERE, 0.0)
        seconds = round(sum(spent.values()), 6)
        own = [self._names.of(peer), times.key, round(times.began, 6), seconds, rounded(spent)]
        return [*own, times.elsewhere, [name for client in times.behind if (name := self._sharer(client))]]

    def _sharer(self, client: str) -> str:
        """The name of who shares with others (Connection.client); "" if it has none that may be told."""
        address, _, network = client.split(maxsplit=1)[0].partition("/")
        return (
            ""
            if self._names.mode == "off" or (network and self._names.mode != "full")
            else (self._names.of(address))
        )

    def under_way(self) -> list[list[object]]:
        """Slow requests that are not answered yet, the oldest first: rows of an UnderWay."""
        now = self.clock()
        rows: list[list[object]] = []
        for times, peer in self.waiting.items():
            if len(rows) == _MOST_UNDER_WAY:
                break
            if now - times.began >= self.slow_seconds:
                rows.append(self._row_of(peer, times))
        return rows

    # --- the hot path

    def begin_hot(self, peer: str, row: HotRow, at: int) -> None:
        self.words[at] += 1
        used, key = self._used, row.key_text
        used[key] = used.get(key, 0) + 1
        if row.kind is Kind.FULL:
            self._took_full(peer, key)

    def end_hot(
        self, peer: str, row: HotRow, at: int, span: Span, client: Stated | bytes, began: float
    ) -> None:
        """A ready-made response was sent at once.

        In a flood only the client and the key are noted, without what it states; parts not even that.
        """
        if span is row.whole:
            taken = self._taken
            taken.add((peer, row.key_text, client if len(taken) < _MOST_HEADS else NOTHING))
        elif len(self._parts) < _MOST_PARTS:
            self._parts.append(((peer, row.key_text, client), (span.start, span.stop, row.length)))
        else:
            self._unnoted += 1
        if self.words[at] % self._every == self._first:
            response = self.of_row(row, b"", span, client, began)
            self._line(peer, response, span.stop - span.start, complete=True)

    def of_row(self, row: HotRow, head: bytes, span: Span, client: Stated | bytes, began: float) -> Response:
        return Response(
            200 if span is row.whole else 206,
            head,
            (span,),
            body=row.entry,
            sent_at=row.sent_at,
            stream_at=row.stream_at,
            result="hit",
            key=row.key_text,
            kind=row.kind,
            stored=True,
            client=client,
            began=began,
            first_byte=self.clock(),
        )

    # --- lines

    def _line(
        self, peer: str, response: Response, sent: int, *, complete: bool, times: RequestClock | None = None
    ) -> None:
        now, began, first_byte = self.clock(), response.began, response.first_byte
        request, client = response.request, self._stated(self._client(response))
        sampled = response.result == "hit" and self._access == "sampled"
        target = request.target[:_TARGET_LETTERS].decode("latin-1") if request and not response.key else ""
        fields = {
            "client": self._names.shown(peer),
            "method": request.method if request is not None else "GET" if response.key else None,
            "key": response.key,
            "target": target or None,
            "result": response.result,
            "status": response.status or None,
            "bytes": sent,
            "complete": complete,
            "first_byte_seconds": None if first_byte is None else round(first_byte - began, 6),
            "seconds": round(now - began, 6),
            "version": client.version or None,
            "language": client.language or None,
            "problem": response.problem,
            "one_in": self._every if sampled else None,
        }
        if times is not None:
            fields |= {f"{phase}_seconds": spent for phase, spent in rounded(times.spent).items()}
        log.info("request", extra=fields)

    def _client(self, response: Response) -> Stated | bytes:
        if response.request is not None:
            return self.declarations.of(response.request.headers)
        return response.client

    def _stated(self, client: Stated | bytes) -> Stated:
        return self.declarations.of_head(client) if isinstance(client, bytes) else client

    # --- client records

    def _took_full(self, peer: str, key: str) -> None:
        """The controller reports to the operator which clients cause a storm."""
        who = (peer, key)
        if who in self._fulls or len(self._fulls) < _MOST_FULLS:
            self._fulls[who] = self._fulls.get(who, 0) + 1

    def _note_refused(self, peer: str, response: Response) -> None:
        assert response.request is not None
        parts = response.request.target.decode("latin-1").split("/", 3)
        client = self._stated(self._client(response))
        row = (peer, response.rule, parts[2] if len(parts) > 2 else "", client.version, client.language)
        if row in self._refused or len(self._refused) < _MOST_REFUSED:
            self._refused[row] += 1

    def _note(self, peer: str, response: Response, sent: int, *, complete: bool) -> None:
        """Note what the client has now: a whole body, a part, or nothing."""
        if response.key is None or not _is_get(response):
            return
        who = (peer, response.key, self._client(response))
        spans = [segment for segment in response.segments if isinstance(segment, Span)]
        if response.body is None or len(spans) != 1 or not sent:
            if response.problem is None or response.problem.startswith("upstream-"):
                self._asked.add(who)
            return
        (span,), length = spans, response.body.head.length
        if complete and span.start == 0 and (length is None or span.stop >= length):
            self._taken.add(who)
        elif length is None:
            self._asked.add(who)
        else:
            self._parts.append((who, (span.start, min(span.start + sent, span.stop), length)))

    def each_second(self, tell: Tell, offer: Tell, now: float, *, everything: bool = False) -> None:
        """Send the controller what is new.

        `offer` returns False when the controller's queue is full; client records are then kept and sent
        later, all of them with `everything`, when the worker ends.
        """
        if self._lines > _LINES_A_SECOND:
            log.info("requests left out", extra={"lines": self._lines - _LINES_A_SECOND})
        self._lines = 0
        self._gather()
        for _ in range(_EVENTS_A_SECOND if not everything else _MOST_WAITING // _ROWS):
            rows = self._waiting[:_ROWS]
            if not rows or not offer({"type": "taken", "rows": rows, "at": now}):
                break
            del self._waiting[:_ROWS]
        slow, self._slow = self._slow, []
        for at in range(0, len(slow), _SLOW_ROWS):
            tell({"type": "slow", "rows": slow[at : at + _SLOW_ROWS]})
        names, uses = self._names, self._uses()
        event: dict[str, Sequence[object]] = {
            "fulls": [(names.of(who), key, n) for (who, key), n in self._fulls.items()],
            "refused": [(names.of(who), *what, n) for (who, *what), n in self._refused.items()],
            "groups": [(*what, n) for what, n in self._groups.items()],
            "clients": list({names.of(peer) for peer in self.connected}),
            "shared": list({names.of(peer) for peer in self.connected if self._is_shared(peer)}),
        }
        for gathered in (self._fulls, self._refused, self._groups, self.connected):
            gathered.clear()
        for at in range(max(len(uses), -(-max(map(len, event.values())) // _ROWS))):
            own = slice(at * _ROWS, (at + 1) * _ROWS)
            some = {name: part for name, rows in event.items() if (part := rows[own])}
            tell({"type": "used", "at": now, **(uses[at] if at < len(uses) else {}), **some})

    def tell_uses(self, tell: Tell, now: float) -> None:
        """Tell the controller now what was requested since the last time: it is about to evict."""
        for uses in self._uses():
            tell({"type": "used", "at": now, **uses})

    def _uses(self) -> list[dict[str, list[tuple[object, ...]]]]:
        """What was requested since the last time, in the order of the first requests, in parts."""
        rows = [(number, 1, row) for number, row in enumerate(self._used.items())]
        rows += [(self._missed_after[row[0]], 0, row) for row in self._missed.items()]
        rows.sort(key=itemgetter(0, 1))
        found = []
        for at in range(0, len(rows), _ROWS):
            uses: list[tuple[object, ...]] = []
            asked: list[tuple[object, ...]] = []
            for _, stored, row in rows[at : at + _ROWS]:
                uses.append(row) if stored else asked.append((*row, len(uses)))
            found.append({name: some for name, some in (("uses", uses), ("asked", asked)) if some})
        for gathered in (self._used, self._missed, self._missed_after):
            gathered.clear()
        return found

    def _gather(self) -> None:
        """Put client records into rows that wait to be sent; bounded."""
        records: list[tuple[ClientRecord, object]] = [(who, 1) for who in self._taken]
        records += [*self._parts, *((who, 0) for who in self._asked - self._taken)]
        if self._names.mode == "off":
            self.connected |= {peer for peer, _, _ in self._taken}
            for (_, key, client), _ in records:
                stated = self._stated(client)
                self._groups[key.split("/", 3)[2], stated.version, stated.language] += 1
            records.clear()
            self._unnoted = 0
        for (peer, key, client), what in records:
            stated = self._stated(client)
            self._waiting.append([self._names.of(peer), key, stated.version, stated.language, what])
        excess = max(0, len(self._waiting) - _MOST_WAITING)
        del self._waiting[:excess]
        for lost in (self._unnoted, excess):
            if lost:
                self._counters.add("gup_events_lost_total", lost // _ROWS + 1)
        self._unnoted = 0
        for gathered in (self._taken, self._parts, self._asked):
            gathered.clear()


def _is_get(response: Response) -> bool:
    return response.request is None or response.request.method == "GET"
