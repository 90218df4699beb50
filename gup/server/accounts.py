"""What became of each answer: lines of the access log, and news of who took what. It decides no answer."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gup import config
from gup.addresses import Names
from gup.content.client_identity import NOTHING, Declarations, Stated
from gup.log import ACCESS
from gup.server.hot import HotRow
from gup.server.ranges import Span
from gup.server.request import Request
from gup.server.tally import Tally

log = logging.getLogger(ACCESS)

_NEVER = 1 << 63
_LINES_A_SECOND = 100
"""Of what is no hit, while access is sampled: a flood of refusals must not become one of lines."""
_ROWS = 200
"""Of one event: it fits a datagram."""
_EVENTS_A_SECOND = 10
_MOST_WAITING = 50_000
_TARGET_LETTERS = 300
_MOST_HEADS = 1000
_MOST_PIECES = 2000
"""Of one second and worker: reading what a head states takes 10 µs, and all of it happens in one turn."""

Tell = Callable[[Mapping[str, object]], bool]
Teller = Stated | bytes
"""What a client states, or the head that it stands in: that is read when somebody wants to know."""
_Taken = tuple[str, str, Teller]


@dataclass(slots=True)
class Account:
    """One answer on its way. `start`, `stop` and `length` tell which part of a body it is; without a body of
    content `length` is -1, and None while nobody knows it. Times are the clock's of `Accounts`.
    """

    method: str | None
    result: str
    status: int
    key: str | None = None
    target: str = ""
    stated: Stated = NOTHING
    start: int = 0
    stop: int = 0
    length: int | None = -1
    problem: str | None = None
    began: float = 0.0
    first_byte: float | None = None


@dataclass(slots=True)
class _News:
    """What the controller is to be told: bodies taken whole, parts of bodies, and what was only asked for."""

    pieces: list[tuple[_Taken, tuple[int, int, int]]] = field(default_factory=list)
    asked: set[_Taken] = field(default_factory=set)


class Accounts:
    """One worker's. The hot lane itself uses `every` and `first`: a call costs more than they do.

    A hit is logged when its count leaves `first` over when divided by `every`.
    """

    def __init__(
        self, settings: config.Settings, tally: Tally, names: Names, clock: Callable[[], float]
    ) -> None:
        self.takes: set[_Taken] = set()
        self.every = _NEVER
        self.first = -1
        self.clock = clock
        self.names = names
        self._tally = tally
        self._news = _News()
        self._lines_left = _LINES_A_SECOND
        self._left_out = 0
        self._unnoted = 0
        self._waiting: list[list[object]] = []
        self.apply(settings)

    def apply(self, settings: config.Settings) -> None:
        """New settings, for answers from now on."""
        self._access = settings.log.access
        every = settings.log.access_sample
        self.every, self.first = {
            "off": (_NEVER, -1),
            "sampled": (every, 1 % every),
            "all": (1, 0),
        }[self._access]
        self.declarations = Declarations(settings.rules)
        if self.names.mode != settings.reports.addresses:
            self.names.mode = settings.reports.addresses
            self._waiting.clear()  # by names of the other kind

    # --- one answer

    def of_row(self, row: HotRow, status: int, span: Span, teller: Teller, began: float) -> Account:
        """The account of a ready-made answer, which begins to leave."""
        stated = self.declarations.of_head(teller) if isinstance(teller, bytes) else teller
        return Account(
            "GET",
            "hit",
            status,
            row.key_text,
            stated=stated,
            start=span.start,
            stop=span.stop,
            length=row.length,
            began=began,
            first_byte=self.clock(),
        )

    def taken(self, peer: str, row: HotRow, teller: Teller) -> None:
        """Note a whole body that has left at once; in a flood of clients, who took it, not what it states."""
        takes = self.takes
        takes.add((peer, row.key_text, teller if len(takes) < _MOST_HEADS else NOTHING))

    def part_taken(self, peer: str, row: HotRow, span: Span, teller: Teller) -> None:
        """Note a range that has left at once; in a flood of them, not even that."""
        if len(self._news.pieces) >= _MOST_PIECES:
            self._unnoted += 1
            return
        self._news.pieces.append(((peer, row.key_text, teller), (span.start, span.stop, row.length)))

    def log_hot(self, peer: str, account: Account) -> None:
        """Log a ready-made answer that has left at once."""
        self._line(peer, account, account.stop - account.start, complete=True)

    def end(self, peer: str, account: Account, sent: int, *, complete: bool) -> None:
        """The last of an answer has left, or never will."""
        self._note(peer, account, sent, complete=complete)
        if self._wanted(account):
            self._line(peer, account, sent, complete=complete)

    def left(self, peer: str, request: Request, began: float) -> None:
        """A client has gone before there was an answer."""
        target = _target(request.target)
        account = Account(
            request.method, "gone", 0, None, target, self.declarations.of(request.headers), began=began
        )
        self.end(peer, account, 0, complete=False)

    def _wanted(self, account: Account) -> bool:
        if self._access != "sampled":
            return self._access == "all"
        if account.result == "hit":
            at = self._tally.requests.get(("hit", account.status))
            return at is not None and self._tally.words[at] % self.every == self.first
        if not self._lines_left:
            self._left_out += 1
            return False
        self._lines_left -= 1
        return True

    def _line(self, peer: str, account: Account, sent: int, *, complete: bool) -> None:
        now = self.clock()
        first_byte = account.first_byte
        sampled = account.result == "hit" and self._access == "sampled"
        given: dict[str, Any] = {
            "client": self.names.shown(peer),
            "method": account.method,
            "key": account.key,
            "target": None if account.key else account.target or None,
            "result": account.result,
            "status": account.status or None,
            "bytes": sent,
            "complete": complete,
            "first_byte_seconds": None if first_byte is None else round(first_byte - account.began, 6),
            "seconds": round(now - account.began, 6),
            "version": account.stated.version or None,
            "language": account.stated.language or None,
            "problem": account.problem,
            "one_in": self.every if sampled else None,
        }
        log.info("request", extra=given)

    # --- news for the controller

    def _note(self, peer: str, account: Account, sent: int, *, complete: bool) -> None:
        key = account.key
        if key is None or account.method != "GET":
            return
        who = (peer, key, account.stated)
        length = account.length
        if length == -1 or not sent:
            if account.problem is None or account.problem.startswith("upstream-"):
                self._news.asked.add(who)
        elif complete and account.start == 0 and (length is None or account.stop >= length):
            self.takes.add(who)
        elif length is None:
            self._news.asked.add(who)
        else:
            part = (account.start, min(account.start + sent, account.stop), length)
            self._news.pieces.append((who, part))

    def each_second(self, tell: Tell, now: float, *, all_of_it: bool = False) -> None:
        """Tell what is new; what finds the controller's queue full waits for the next time."""
        if self._left_out:
            log.info("requests left out", extra={"lines": self._left_out})
            self._left_out = 0
        self._lines_left = _LINES_A_SECOND
        takes, self.takes = self.takes, set()
        news, self._news = self._news, _News()
        if self.names.mode == "off":
            self._tally.clients |= {peer for peer, _, _ in takes}
        else:
            self._gather(takes, news)
        for _ in range(_EVENTS_A_SECOND if not all_of_it else _MOST_WAITING // _ROWS):
            rows = self._waiting[:_ROWS]
            if not rows or not tell({"type": "taken", "rows": rows, "at": now}):
                return
            del self._waiting[:_ROWS]

    def _gather(self, takes: set[_Taken], news: _News) -> None:
        rows = self._waiting
        rows += [self._row(taken, 1) for taken in takes]
        rows += [self._row(taken, list(part)) for taken, part in news.pieces]
        rows += [self._row(taken, 0) for taken in news.asked - takes]
        if self._unnoted:
            self._tally.counters.add("gup_events_lost_total", self._unnoted // _ROWS + 1)
            self._unnoted = 0
        if len(rows) > _MOST_WAITING:
            self._tally.counters.add("gup_events_lost_total", (len(rows) - _MOST_WAITING) // _ROWS + 1)
            del rows[: len(rows) - _MOST_WAITING]

    def _row(self, taken: _Taken, what: object) -> list[object]:
        peer, key, teller = taken
        stated = self.declarations.of_head(teller) if isinstance(teller, bytes) else teller
        return [self.names.of(peer), key, stated.version, stated.language, what]


def _target(target: bytes) -> str:
    return target[:_TARGET_LETTERS].decode("latin-1")


def of_problem(request: Request | None, slug: str, result: str, status: int, key: str | None) -> Account:
    """The account of a refusal. Without a request there was none that could be read."""
    if request is None:
        return Account(None, result, status, problem=slug)
    return Account(request.method, result, status, key, _target(request.target), problem=slug)
