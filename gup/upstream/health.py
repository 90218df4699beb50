"""Whether an upstream can be expected to answer: one state each, shared by all processes; asks nobody itself.

Each upstream has one 64-bit word, so that it is read and written whole:

    state 4 bits | points 6 | goods 2 | since 32 (Unix seconds) | tried 20 (monotonic tenths of a second)

Signs come from requests (gup.upstream.pool) and from checks (gup.upstream.checks). A request may learn that
an upstream is away, but one bad file must not take an upstream away from everybody: what answers, if only
with errors, counts less than what does not answer.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import Self

import xxhash

_LOG = logging.getLogger("gup.upstream")


class State(IntEnum):
    """An upstream's states; the numbers stand in the shared word, 0 is a fresh page's."""

    UNKNOWN = 0
    UP = 1
    DOUBTFUL = 2
    DOWN = 3
    RECOVERING = 4


TRANSITIONS: dict[State, frozenset[State]] = {
    State.UNKNOWN: frozenset({State.UP, State.DOUBTFUL, State.DOWN}),
    State.UP: frozenset({State.DOUBTFUL, State.DOWN}),
    State.DOUBTFUL: frozenset({State.UP, State.DOWN}),
    State.DOWN: frozenset({State.RECOVERING}),
    State.RECOVERING: frozenset({State.UP, State.DOWN}),
}
"""Where each state can go. From DOWN it goes to UP through RECOVERING only: that keeps it from flapping."""


class Sign(Enum):
    """What one request or check tells."""

    GOOD = "good"
    SLOW = "slow"
    ERRED = "erred"
    FAILED = "failed"


_POINTS = {Sign.SLOW: 1, Sign.ERRED: 1, Sign.FAILED: 2}
DOUBTFUL_POINTS = 2
DOWN_POINTS = 6
"""Three times no answer, or six errors, with nothing good between."""
DOUBT_SECONDS = 5.0
"""So long after its last sign an upstream in doubt is asked after the others; then it may prove itself."""
FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 60.0
_JITTER = 0.2
_GOODS = 2
_GOODS_APART_SECONDS = 0.5
_MOST_POINTS = 63
_TRIED_MASK = (1 << 20) - 1
_TOLD_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Health:
    """One upstream's state.

    `points`: bad signs since the last good one; in DOWN and RECOVERING, the trials since it went down.
    `goods`: good ones in RECOVERING. `since`: Unix seconds of the state's begin. `tried`: tenths of a second
    on the machine's monotonic clock, modulo 2^20 (29 hours), of the last bad sign, trial or counted good one.
    """

    state: State = State.UNKNOWN
    points: int = 0
    goods: int = 0
    since: int = 0
    tried: int = 0

    def encode(self) -> int:
        word = self.state << 60 | self.points << 54 | self.goods << 52
        return word | (self.since & 0xFFFF_FFFF) << 20 | self.tried

    @classmethod
    def decode(cls, word: int) -> "Health":
        return cls(
            State(word >> 60), word >> 54 & 63, word >> 52 & 3, word >> 20 & 0xFFFF_FFFF, word & _TRIED_MASK
        )

    def quiet_seconds(self, now: float) -> float:
        """Time since `tried`. It wraps: after 29 idle hours it looks like a moment ago, for one back-off."""
        return ((_tenths(now) - self.tried) & _TRIED_MASK) / 10


def _tenths(now: float) -> int:
    return int(now * 10) & _TRIED_MASK


def backoff_seconds(name: str, health: Health) -> float:
    """Time between two trials of an upstream that is down: 1 s, doubled up to 60 s, and a jitter.

    The jitter comes from name and trial: every process has the same, and two upstreams have two.
    """
    doubled = FIRST_BACKOFF_SECONDS * 2.0 ** min(max(health.points - 1, 0), 10)
    chance = xxhash.xxh3_64_intdigest(f"{name} {health.points} {health.since}".encode()) / 2**64
    return float(min(doubled, LONGEST_BACKOFF_SECONDS) * (1 + _JITTER * (2 * chance - 1)))


def after(health: Health, sign: Sign, now: float, wall_now: float) -> Health:
    """The health after a sign."""
    if health.state is State.DOWN:
        if sign in (Sign.ERRED, Sign.FAILED):
            return health  # the trial was counted when it began; late failures of older requests tell nothing
        return _moved(replace(health, goods=1, tried=_tenths(now)), State.RECOVERING, wall_now)
    if health.state is State.RECOVERING:
        return _recovering(health, sign, now, wall_now)
    if sign is Sign.GOOD:
        return _moved(replace(health, points=0), State.UP, wall_now)
    points = health.points + _POINTS[sign]
    if sign is Sign.SLOW:
        points = min(points, DOWN_POINTS - 1)  # slow is not away
    if points >= DOWN_POINTS:
        return _moved(replace(health, points=1, goods=0, tried=_tenths(now)), State.DOWN, wall_now)
    state = State.DOUBTFUL if points >= DOUBTFUL_POINTS else State.UP
    return _moved(replace(health, points=points, tried=_tenths(now)), state, wall_now)


def _recovering(health: Health, sign: Sign, now: float, wall_now: float) -> Health:
    """Two good signs, not of one moment, and it is up; a bad one, and its back-off goes on."""
    if sign in (Sign.ERRED, Sign.FAILED):
        points = min(health.points + 1, _MOST_POINTS)
        return _moved(replace(health, points=points, goods=0, tried=_tenths(now)), State.DOWN, wall_now)
    if sign is Sign.SLOW or health.quiet_seconds(now) < _GOODS_APART_SECONDS:
        return health
    if health.goods + 1 < _GOODS:
        return replace(health, goods=health.goods + 1, tried=_tenths(now))
    return _moved(replace(health, points=0, goods=0), State.UP, wall_now)


def _moved(health: Health, state: State, wall_now: float) -> Health:
    if state is health.state:
        return health
    assert state in TRANSITIONS[health.state], (health.state, state)
    return replace(health, state=state, since=int(wall_now))


def rendezvous(key: str, name: str, weight: int) -> float:
    """How much `key` prefers the upstream: of several the largest wins.

    Weighted rendezvous hashing: each upstream gets keys in proportion to its weight, the same key the same
    upstream in every process; one that goes away changes nobody's preference but its own keys'.
    """
    chance = (xxhash.xxh3_64_intdigest(f"{name}\n{key}".encode()) + 0.5) / 2**64
    return -weight / math.log(chance)


class Board:
    """All upstreams' health, kept in the words from `first` on; names beyond the words are kept here alone.

    Any process changes a word, under `locked`; a good sign for what is up changes nothing and locks nothing.
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

    def note(self, name: str, sign: Sign, detail: str = "") -> None:
        """Take a sign in; `detail` says what went wrong."""
        if sign is not Sign.GOOD:
            self._tell_sometimes(name, detail)
        now, wall_now = self._clock(), self._wall_clock()
        before = self.get(name)
        if after(before, sign, now, wall_now) == before:
            return
        with self._locked(self._at.get(name, 0)):
            before = self.get(name)
            health = after(before, sign, now, wall_now)
            self._set(name, health)
        if health.state is not before.state:
            _log_change(name, before.state, health.state, detail)

    def forget(self, name: str) -> None:
        """Nothing is known of it: its settings changed."""
        with self._locked(self._at.get(name, 0)):
            self._set(name, Health(since=int(self._wall_clock())))

    def may_try(self, name: str, after_seconds: float) -> bool:
        """Whether a trial of an upstream that is down is due, `after_seconds` after the last one.

        The first to ask, of all processes, gets True.
        """
        if not self._due(name, after_seconds):
            return False
        with self._locked(self._at.get(name, 0)):
            if not self._due(name, after_seconds):
                return False
            health = self.get(name)
            points = min(health.points + 1, _MOST_POINTS)
            self._set(name, replace(health, points=points, tried=_tenths(self._clock())))
            return True

    def _due(self, name: str, after_seconds: float) -> bool:
        health = self.get(name)
        return health.state is State.DOWN and health.quiet_seconds(self._clock()) >= after_seconds

    def doubted(self, name: str) -> bool:
        """Whether others are to be asked before it."""
        health = self.get(name)
        in_doubt = health.state in (State.DOUBTFUL, State.RECOVERING)
        return in_doubt and health.quiet_seconds(self._clock()) < DOUBT_SECONDS

    def quiet_seconds(self, name: str) -> float:
        """Time since its last bad sign or trial."""
        return self.get(name).quiet_seconds(self._clock())

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
    elif now is State.DOUBTFUL:
        _LOG.info("upstream %s is doubtful: %s", name, detail)
    elif now is State.UP and before is State.RECOVERING:
        _LOG.info("upstream %s is up again", name)
