"""Health of the upstreams, shared by all processes.

There are two kinds of failures. Those that no request can cause (DNS, connection refused or timed out, TLS,
an unreachable web proxy) take the upstream down for all requests. All others (reset, 5xx, silence, an invalid
body) may be due to the requested name or to the client: they count once for each name and client, and make
the upstream doubtful at most; a doubtful upstream is asked after the others.

Each upstream has one 64-bit word, which is read and written at once:

    state 2 bits | marks 10 | since 32 (Unix seconds) | tried 20 (monotonic tenths of a second)

Signs come from requests and from checks, which one process makes for all (gup.upstream.pool).
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from functools import lru_cache
from typing import Self

import xxhash

from gup.upstream.exchange import UpstreamFailure

_LOG = logging.getLogger("gup.upstream")


class State(IntEnum):
    """States of an upstream; the numbers are stored in the shared word, where 0 is a new page's."""

    UNKNOWN = 0
    UP = 1
    DOUBTFUL = 2
    DOWN = 3


TRANSITIONS: dict[State, frozenset[State]] = {
    State.UNKNOWN: frozenset({State.UP, State.DOUBTFUL, State.DOWN}),
    State.UP: frozenset({State.DOUBTFUL, State.DOWN}),
    State.DOUBTFUL: frozenset({State.UP, State.DOWN}),
    State.DOWN: frozenset({State.UP, State.DOUBTFUL}),
}


class Sign(Enum):
    ANSWERED = "answered"
    ERRED = "erred"  # an error of its own, or a body that can't be the content
    BROKE = "broke"  # after connecting it reset, fell silent or violated HTTP
    AWAY = "away"  # there was no connection: no request can be the cause


_SET_BITS = 5
_SET = (1 << _SET_BITS) - 1
EVERY_MARK = _SET << _SET_BITS | _SET
"""Mark of a health check: no client's request is the cause, so one failure makes the upstream doubtful."""
DOUBTFUL_MARKS = 3
"""This many names, requested by this many clients, must have failed without a success in between."""
_TRYING = 1 << 9
_MOST_TRIALS = 63
DOUBT_SECONDS = 5.0
"""How long after its last failure a doubtful upstream is asked after the others."""
_FIRST_TRIAL_SECONDS = 1.0
TRIAL_SECONDS = 5.0
"""Limit of the time between two trials of an upstream that is down."""
RARE_TRIAL_SECONDS = 60.0
"""The same when a client's request makes the trial although another upstream is up."""
_TRIED_MASK = (1 << 20) - 1
_REPORT_SECONDS = 1.0


def mark(name: str, client: str) -> int:
    """The bits that a failure of `name` for `client` adds to `Health.marks`: one in each of two sets.

    Several names or clients may share a bit, so the number of bits is a lower bound.
    """
    digests = (xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogateescape")) for text in (name, client))
    of_name, of_client = (1 << digest % _SET_BITS for digest in digests)
    return of_name << _SET_BITS | of_client


@dataclass(frozen=True, slots=True)
class Health:
    """One upstream's state.

    `marks`: names and clients of failures since the last success, see `mark`; when DOWN the number of trials,
    and whether one is in progress. `since`: Unix seconds when the state began. `tried`: time of the last
    failure or trial, in tenths of a second on the monotonic clock, modulo 2^20 (29 hours).
    """

    state: State = State.UNKNOWN
    marks: int = 0
    since: int = 0
    tried: int = 0

    def encode(self) -> int:
        return self.state << 62 | self.marks << 52 | (self.since & 0xFFFF_FFFF) << 20 | self.tried

    @classmethod
    @lru_cache(64)
    def decode(cls, word: int) -> "Health":
        return cls(State(word >> 62), word >> 52 & EVERY_MARK, word >> 20 & 0xFFFF_FFFF, word & _TRIED_MASK)

    def quiet_seconds(self, now: float) -> float:
        """Time since `tried`. It wraps: after 29 idle hours `tried` seems recent, for one wait."""
        return ((_tenths(now) - self.tried) & _TRIED_MASK) / 10

    def trial_wait_seconds(self, connect_seconds: float, longest_seconds: float = TRIAL_SECONDS) -> float:
        """Time from `tried` to the next trial when DOWN: 1 s, doubled with each trial.

        While a trial is in progress, the next one waits as long as connecting may take.
        """
        if self.marks & _TRYING:
            return connect_seconds + 1.0
        trials = self.marks & _MOST_TRIALS
        return float(min(_FIRST_TRIAL_SECONDS * 2.0 ** min(max(trials - 1, 0), 10), longest_seconds))


def _tenths(now: float) -> int:
    return int(now * 10) & _TRIED_MASK


def after(health: Health, sign: Sign, failed: int, now: float, wall_now: float) -> Health:
    if sign is Sign.ANSWERED:
        return _moved(replace(health, marks=0), State.UP, wall_now)
    if health.state is State.DOWN and sign is not Sign.ERRED:
        # A trial has failed, or a request that began before the upstream went down.
        return replace(health, marks=health.marks & ~_TRYING, tried=_tenths(now))
    if sign is Sign.AWAY:
        return _moved(replace(health, marks=0, tried=_tenths(now)), State.DOWN, wall_now)
    marks = failed if health.state is State.DOWN else health.marks | failed
    least = min((marks >> _SET_BITS).bit_count(), (marks & _SET).bit_count())
    state = State.DOUBTFUL if least >= DOUBTFUL_MARKS else State.UP
    return _moved(replace(health, marks=marks, tried=_tenths(now)), state, wall_now)


def _moved(health: Health, state: State, wall_now: float) -> Health:
    if state is health.state:
        return health
    assert state in TRANSITIONS[health.state], (health.state, state)
    return replace(health, state=state, since=int(wall_now))


def sign_of(failure: UpstreamFailure, kind: str, *, check: bool) -> Sign | None:
    if failure.slug == "overloaded":
        return None  # gup itself has run out of descriptors or connections
    if failure.outcome == "unreachable":
        return Sign.AWAY
    status = failure.status
    if status is None:
        return Sign.ERRED if failure.outcome == "rejected" else Sign.BROKE
    # Another gup passes on failures of its own upstreams, and may still have other content.
    fine = check or kind == "gup" or status < 500 or status in (501, 508)
    return Sign.ANSWERED if fine else Sign.ERRED


class Board:
    """The health of all upstreams, in the shared words from `first` on; beyond `most`, in this process only.

    Any process may change a word, under `locked`. A success of an upstream that is up takes no lock. `tell`
    is called with a name and the failure's detail, at most once a second for each upstream.
    """

    def __init__(
        self,
        names: Sequence[str],
        words: "memoryview[int]",
        first: int,
        most: int,
        locked: Callable[[int], AbstractContextManager[None]],
        tell: Callable[[str, str], None] = lambda _name, _detail: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        # Sorted: after a reload with another order, new processes must find the same words.
        self._at = {name: first + number for number, name in enumerate(sorted(names)[:most])}
        self._words, self._locked, self._tell = words, locked, tell
        self._own: dict[str, int] = {}
        self._clock, self._wall_clock = clock, wall_clock
        self._reported_at: dict[str, float] = {}

    @classmethod
    def private(cls, names: Sequence[str], clock: Callable[[], float] = time.monotonic) -> Self:
        """A board for one process: tests and tools."""
        words = memoryview(bytearray(8 * max(1, len(names)))).cast("Q")
        return cls(names, words, 0, len(names), lambda _word: nullcontext(), clock=clock)

    def get(self, name: str) -> Health:
        at = self._at.get(name)
        return Health.decode(self._own.get(name, 0) if at is None else self._words[at])

    def is_down(self, name: str) -> bool:
        return self.get(name).state is State.DOWN

    def note(self, name: str, sign: Sign, detail: str = "", failed: int = EVERY_MARK) -> None:
        before = self.get(name)
        if sign is Sign.ANSWERED and before.state is State.UP and not before.marks:
            return
        now, wall_now = self._clock(), self._wall_clock()
        if (
            sign is not Sign.ANSWERED
            and detail
            and now - self._reported_at.get(name, -math.inf) >= _REPORT_SECONDS
        ):
            self._reported_at[name] = now
            self._tell(name, detail)
        if after(before, sign, failed, now, wall_now) == before:
            return
        with self._locked(self._at.get(name, 0)):
            before = self.get(name)
            health = after(before, sign, failed, now, wall_now)
            self._set(name, health)
        if health.state is before.state:
            return
        if health.state is State.DOWN:
            _LOG.warning("upstream %s is down: %s", name, detail)
        elif before.state is State.DOWN:
            _LOG.info("upstream %s is up again", name)
        elif health.state is State.DOUBTFUL:
            _LOG.info("upstream %s is doubtful: %s", name, detail)

    def forget(self, name: str) -> None:
        """Called when the upstream's settings have changed."""
        with self._locked(self._at.get(name, 0)):
            self._set(name, Health(since=int(self._wall_clock())))

    def seconds_to_trial(self, name: str, connect_seconds: float, longest: float = TRIAL_SECONDS) -> float:
        """Time until an upstream may be asked, or tried if it is down; 0 for now."""
        if (health := self.get(name)).state is not State.DOWN:
            return 0.0
        wait = health.trial_wait_seconds(connect_seconds, longest)
        return max(0.0, wait - health.quiet_seconds(self._clock()))

    def may_try(self, name: str, connect_seconds: float, longest: float = TRIAL_SECONDS) -> bool:
        """Whether a trial is due. Only the first caller of all processes gets True."""

        def due() -> bool:
            return self.is_down(name) and not self.seconds_to_trial(name, connect_seconds, longest)

        if not due():
            return False
        with self._locked(self._at.get(name, 0)):
            if not due():  # another process has taken it
                return False
            health = self.get(name)
            trials = min((health.marks & _MOST_TRIALS) + 1, _MOST_TRIALS)
            self._set(name, replace(health, marks=_TRYING | trials, tried=_tenths(self._clock())))
            return True

    def doubted(self, name: str) -> bool:
        """Whether other upstreams are asked first."""
        health = self.get(name)
        return health.state is State.DOUBTFUL and health.quiet_seconds(self._clock()) < DOUBT_SECONDS

    def _set(self, name: str, health: Health) -> None:
        at = self._at.get(name)
        if at is None:
            self._own[name] = health.encode()
        else:
            self._words[at] = health.encode()
