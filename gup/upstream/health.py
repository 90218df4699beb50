"""Whether an upstream can be expected to answer: one state each, shared by all processes; and the checks.

Two kinds of failure are told apart. What no request can cause (DNS, refused, no connection in time, TLS, a
web proxy that can't be reached) takes the upstream down for all. Every other failure (reset, 5xx, silence, a
body that can't be) may be due to what was asked or to who asked: it counts once for each name and client, and
makes the upstream doubtful at most, which is then asked after the others.

Each upstream has one 64-bit word, so that it is read and written whole:

    state 2 bits | marks 10 | since 32 (Unix seconds) | tried 20 (monotonic tenths of a second)

Signs come from requests (gup.upstream.pool) and from checks (`Checks`, in one process, for all).
"""

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Self

import xxhash

from gup import config
from gup.content.catalog import CATALOG_PATH
from gup.units import parse_http_date
from gup.upstream.connection import Ask, Upstream
from gup.upstream.exchange import UpstreamFailure

if TYPE_CHECKING:
    from gup.upstream.pool import Pool

_LOG = logging.getLogger("gup.upstream")


class State(IntEnum):
    """An upstream's states; the numbers stand in the shared word, 0 is a fresh page's."""

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
"""Where each state can go. From DOWN only an answer leads, of whatever status."""


class Sign(Enum):
    """What one request or check tells."""

    ANSWERED = "answered"
    ERRED = "erred"
    """It answered, with an error of its own or with what can't be the content."""
    BROKE = "broke"
    """It was connected, and reset, fell silent or broke HTTP."""
    AWAY = "away"
    """No connection: no request can be the cause."""


_SET_BITS = 5
_SET = (1 << _SET_BITS) - 1
EVERY_MARK = _SET << _SET_BITS | _SET
"""The mark of a check: no client's request is the cause, so one is enough for doubt."""
DOUBTFUL_MARKS = 3
"""So many names, asked for by so many clients, must have failed with nothing good between."""
_TRYING = 1 << 9
_MOST_TRIALS = 63
DOUBT_SECONDS = 5.0
"""So long after its last failure an upstream in doubt is asked after the others; then it may prove itself."""
_FIRST_TRIAL_SECONDS = 1.0
TRIAL_SECONDS = 5.0
"""The longest time between two trials of an upstream that is down."""
RARE_TRIAL_SECONDS = 60.0
"""The same where a client's request makes the trial although another upstream is up."""
_TRIED_MASK = (1 << 20) - 1
_TOLD_SECONDS = 1.0
LONGEST_RETRY_AFTER_SECONDS = 3600.0


def mark(name: str, client: str) -> int:
    """What a failure of `name`, asked for by `client`, adds to `Health.marks`: one bit in each of two sets.

    Several names or clients may have one bit: so a set never holds more bits than there were.
    """
    return 1 << _SET_BITS + _bit(name) | 1 << _bit(client)


def _bit(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogateescape")) % _SET_BITS


@dataclass(frozen=True, slots=True)
class Health:
    """One upstream's state.

    `marks`: the names and the clients of failures since the last answer, as `mark` puts them; in DOWN the
    number of trials, and whether one is under way. `since`: Unix seconds of the state's begin. `tried`:
    tenths of a second on the machine's monotonic clock, modulo 2^20 (29 hours), of the last failure or trial.
    """

    state: State = State.UNKNOWN
    marks: int = 0
    since: int = 0
    tried: int = 0

    def encode(self) -> int:
        return self.state << 62 | self.marks << 52 | (self.since & 0xFFFF_FFFF) << 20 | self.tried

    @classmethod
    def decode(cls, word: int) -> "Health":
        return cls(State(word >> 62), word >> 52 & EVERY_MARK, word >> 20 & 0xFFFF_FFFF, word & _TRIED_MASK)

    def quiet_seconds(self, now: float) -> float:
        """Time since `tried`. It wraps: after 29 idle hours it looks like a moment ago, for one wait."""
        return ((_tenths(now) - self.tried) & _TRIED_MASK) / 10

    def trial_wait_seconds(self, connect_seconds: float, longest_seconds: float = TRIAL_SECONDS) -> float:
        """Time from `tried` to the next trial of what is down: 1 s, doubled with each.

        While one is under way the next waits for as long as connecting may take: there is one at a time.
        """
        if self.marks & _TRYING:
            return connect_seconds + 1.0
        trials = self.marks & _MOST_TRIALS
        return float(min(_FIRST_TRIAL_SECONDS * 2.0 ** min(max(trials - 1, 0), 10), longest_seconds))


def _tenths(now: float) -> int:
    return int(now * 10) & _TRIED_MASK


def after(health: Health, sign: Sign, failed: int, now: float, wall_now: float) -> Health:
    """The health after a sign; `failed` is the mark of what failed."""
    if sign is Sign.ANSWERED:
        return _moved(replace(health, marks=0), State.UP, wall_now)
    if health.state is State.DOWN and sign is not Sign.ERRED:
        # A trial has ended; failures of requests that began before it went down tell nothing new.
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
    """What a failed request tells of the upstream's health; None: nothing."""
    if failure.slug == "overloaded":
        return None  # it is we that have run out of descriptors
    if failure.outcome == "unreachable":
        return Sign.AWAY
    status = failure.status
    if status is None:
        return Sign.ERRED if failure.outcome == "rejected" else Sign.BROKE
    # A gup passes on what is wrong above it, and may still hold other content.
    fine = check or kind == "gup" or status < 500 or status in (501, 508)
    return Sign.ANSWERED if fine else Sign.ERRED


def retry_after_seconds(text: str | None, date: str | None, wall_now: float) -> float | None:
    """Upstream's Retry-After (RFC 9110 section 10.2.3), an hour at most; None when it says nothing of use.

    A date is reckoned from the answer's own `date`, if it has one: clocks differ.
    """
    if text is None:
        return None
    text = text.strip()
    if re.fullmatch(r"[0-9]{1,12}", text):
        seconds = float(text)
    else:
        at = parse_http_date(text, now=wall_now)
        if at is None:
            return None
        told = parse_http_date(date.strip(), now=wall_now) if date else None
        seconds = at - (wall_now if told is None else told)
    return min(seconds, LONGEST_RETRY_AFTER_SECONDS) if seconds > 0 else None


def rendezvous(key: str, name: str, weight: int) -> float:
    """How much `key` prefers the upstream: of several the largest wins.

    Weighted rendezvous hashing: each upstream gets keys in proportion to its weight, the same key the same
    upstream in every process; one that goes away changes nobody's preference but its own keys'.
    """
    chance = (xxhash.xxh3_64_intdigest(f"{name}\n{key}".encode()) + 0.5) / 2**64
    return -weight / math.log(chance)


class Board:
    """All upstreams' health, kept in the words from `first` on; names beyond the words are kept here alone.

    Any process changes a word, under `locked`; an answer of what is up changes nothing and locks nothing.
    `tell` is called with a name and what went wrong, at most once a second for each.
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
        # Sorted: a reload may bring another order, and a process that starts after it must find its words.
        self._at = {name: first + number for number, name in enumerate(sorted(names)[:most])}
        self._words = words
        self._own: dict[str, int] = {}
        self._locked = locked
        self._tell = tell
        self._clock = clock
        self._wall_clock = wall_clock
        self._told: dict[str, float] = {}

    @classmethod
    def private(cls, names: Sequence[str], clock: Callable[[], float] = time.monotonic) -> Self:
        """A board of this process alone, for tests and tools."""
        words = memoryview(bytearray(8 * max(1, len(names)))).cast("Q")
        return cls(names, words, 0, len(names), lambda _word: nullcontext(), clock=clock)

    def get(self, name: str) -> Health:
        at = self._at.get(name)
        return Health.decode(self._own.get(name, 0) if at is None else self._words[at])

    def is_down(self, name: str) -> bool:
        return self.get(name).state is State.DOWN

    def note(self, name: str, sign: Sign, detail: str = "", failed: int = EVERY_MARK) -> None:
        """Take a sign in; `detail` says what went wrong, `failed` marks what was asked and by whom."""
        if sign is not Sign.ANSWERED:
            self._tell_sometimes(name, detail)
        now, wall_now = self._clock(), self._wall_clock()
        before = self.get(name)
        if after(before, sign, failed, now, wall_now) == before:
            return
        with self._locked(self._at.get(name, 0)):
            before = self.get(name)
            health = after(before, sign, failed, now, wall_now)
            self._set(name, health)
        if health.state is not before.state:
            _log_change(name, before.state, health.state, detail)

    def forget(self, name: str) -> None:
        """Nothing is known of it: its settings changed."""
        with self._locked(self._at.get(name, 0)):
            self._set(name, Health(since=int(self._wall_clock())))

    def seconds_to_trial(
        self, name: str, connect_seconds: float, longest_seconds: float = TRIAL_SECONDS
    ) -> float:
        """Time until an upstream that is down may be tried; 0: now."""
        health = self.get(name)
        wait = health.trial_wait_seconds(connect_seconds, longest_seconds)
        return max(0.0, wait - health.quiet_seconds(self._clock()))

    def may_try(self, name: str, connect_seconds: float, longest_seconds: float = TRIAL_SECONDS) -> bool:
        """Whether a trial of what is down is due. The first to ask, of all processes, gets True."""

        def due() -> bool:
            return self.is_down(name) and not self.seconds_to_trial(name, connect_seconds, longest_seconds)

        if not due():
            return False
        with self._locked(self._at.get(name, 0)):
            if not due():
                return False
            health = self.get(name)
            trials = min((health.marks & _MOST_TRIALS) + 1, _MOST_TRIALS)
            self._set(name, replace(health, marks=_TRYING | trials, tried=_tenths(self._clock())))
            return True

    def doubted(self, name: str) -> bool:
        """Whether others are to be asked before it."""
        health = self.get(name)
        return health.state is State.DOUBTFUL and health.quiet_seconds(self._clock()) < DOUBT_SECONDS

    def _set(self, name: str, health: Health) -> None:
        at = self._at.get(name)
        if at is None:
            self._own[name] = health.encode()
        else:
            self._words[at] = health.encode()

    def _tell_sometimes(self, name: str, detail: str) -> None:
        now = self._clock()
        if detail and now - self._told.get(name, -math.inf) >= _TOLD_SECONDS:
            self._told[name] = now
            self._tell(name, detail)


def _log_change(name: str, before: State, now: State, detail: str) -> None:
    if now is State.DOWN:
        _LOG.warning("upstream %s is down: %s", name, detail)
    elif before is State.DOWN:
        _LOG.info("upstream %s is up again", name)
    elif now is State.DOUBTFUL:
        _LOG.info("upstream %s is doubtful: %s", name, detail)


# --- checks

_TICK_SECONDS = 0.2
_DOUBT_INTERVAL_SECONDS = 1.0
_PATHS = {"manager": CATALOG_PATH, "liveupdate": "/minitri.flg", "gup": "/"}
"""Managers and LiveUpdate are asked for an index file; another gup for what it refuses by itself: an index
file would have it ask upstream, and a gup whose upstream is gone still serves.
"""


def check_path(settings: config.Upstream) -> str:
    """What a check asks for, by HEAD."""
    return settings.health_path or _PATHS[settings.kind]


class Checks:
    """The checks of all upstreams of a pool, each its own task, owned here. `run` goes on until cancelled.

    A check costs a request without a body. Any answer says that the upstream lives.
    """

    def __init__(self, pool: "Pool", clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._clock = clock
        self._began = clock()
        self._last: dict[str, float] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        try:
            while True:
                self._begin_due()
                await asyncio.sleep(_TICK_SECONDS)
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _begin_due(self) -> None:
        for upstream in list(self._pool.upstreams):
            if upstream.name not in self._running and self._is_due(upstream):
                task = asyncio.get_running_loop().create_task(self._check(upstream))
                self._running[upstream.name] = task
                task.add_done_callback(lambda done, name=upstream.name: self._ended(name, done))  # type: ignore[misc]

    def _is_due(self, upstream: Upstream) -> bool:
        name, board, settings = upstream.name, self._pool.board, upstream.settings
        wait = settings.health_interval
        if wait <= 0:
            return False
        state = board.get(name).state
        if state is State.DOWN:
            return board.may_try(name, settings.connect_timeout)
        if state is State.DOUBTFUL:
            wait = min(wait, _DOUBT_INTERVAL_SECONDS)
        return self._clock() - self._last.get(name, self._began) >= wait

    async def _check(self, upstream: Upstream) -> None:
        self._last[upstream.name] = self._clock()
        ask = Ask(path=check_path(upstream.settings), purpose="index", method="HEAD", check=True)
        try:
            await self._pool.ask(upstream, ask)
        except UpstreamFailure as failure:
            _LOG.debug("check of %s: %s", upstream.name, failure.detail)

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        del self._running[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("a check of %s failed by a mistake of ours", name, exc_info=error)
