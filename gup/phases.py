"""Where the seconds of a fill or of a request went: clocks whose phases add up to the whole, and their split.

All times are monotonic seconds, which all processes of a machine share.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

FILL_PHASES = ("queue", "wan", "head", "receiving", "disk")
"""Of a fill: for a fill slot, or behind clients' fills; for its turn at the WAN's rate; for connections and
heads of upstreams, all tries and the pauses between them; for bytes of the body; for the cache's disk."""
ELSEWHERE = "fill"
"""For a fill that another process leads: split when that process has told its phases."""
REQUEST_PHASES = ("download_queue", *FILL_PHASES, ELSEWHERE, "rate", "client", "sending")
"""Of a request: for a download slot; what the fill did while the request waited for it; for the rate of its
connection or address; for a client that takes no more; gup's own work."""
_MARKED = (*FILL_PHASES, ELSEWHERE)
_STEP_SECONDS = 0.25
MOST_MARKS = 48
_MOST_WAITS = 4
Mark = tuple[float, ...]
"""A time, and the seconds that each of FILL_PHASES, and ELSEWHERE, had taken by then."""
MARK_LENGTH = 1 + len(_MARKED)
Wait = tuple[float, float, float]
"""From when to when there was waiting, and for how many seconds of that time."""


class PhaseClock:
    """Gives all time since `began` to the phase that it was in, so the phases add up to the whole."""

    __slots__ = ("_clock", "_since", "_spent", "began", "phase")

    def __init__(self, clock: Callable[[], float], phase: str, began: float | None = None) -> None:
        self._clock = clock
        self.began = self._since = clock() if began is None else began
        self.phase = phase
        self._spent: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        if phase != self.phase:
            self._leave(self._clock())
            self.phase = phase

    def _leave(self, now: float) -> None:
        """Count the time in the present phase up to now."""
        self._spent[self.phase] = self._spent.get(self.phase, 0.0) + now - self._since
        self._since = now

    @property
    def spent(self) -> dict[str, float]:
        """The seconds in each phase until now."""
        self._leave(self._clock())
        return {phase: seconds for phase, seconds in self._spent.items() if seconds > 0}


class FillClock(PhaseClock):
    """The clock of a fill. Its marks tell later what the fill did at a time.

    A mark is made at both ends of each phase that lasts a quarter of a second. When there are too many, every
    second one goes and the least time between two doubles.
    """

    __slots__ = ("_marks", "_step", "held", "queued", "stopped_at")

    def __init__(self, clock: Callable[[], float], began: float | None = None) -> None:
        super().__init__(clock, "disk", began)
        self._step = _STEP_SECONDS
        self._marks: list[Mark] = [self._mark(self.began)]
        self.queued: tuple[float, float | None] | None = None
        """From when to when it waited for a slot, if it had to; None: it still does."""
        self.held: tuple[float, float | None] | None = None
        """The same of its slot."""
        self.stopped_at: float | None = None

    def _leave(self, now: float) -> None:
        if self.stopped_at is not None:
            return
        is_due = now - self._marks[-1][0] >= self._step
        if is_due and now - self._since >= self._step and self._since > self._marks[-1][0]:
            self._marks.append(self._mark(self._since))
        super()._leave(now)
        if is_due:
            self._marks.append(self._mark(now))
            if len(self._marks) > MOST_MARKS:
                self._marks = [*self._marks[:-1:2], self._marks[-1]]
                self._step *= 2

    def _mark(self, at: float) -> Mark:
        return (at, *(self._spent.get(phase, 0.0) for phase in _MARKED))

    def wait_for_slot(self) -> None:
        self.enter("queue")
        if self.queued is None:
            self.queued = self._since, None

    def end_wait(self, *, given: bool) -> None:
        """Its wait for a slot is over; with a slot, unless it was refused."""
        self.enter("head")
        if self.queued is not None:
            self.queued = self.queued[0], self._since
        if given:
            self.held = self._since, None

    def leave_slot(self) -> None:
        if self.held is not None and self.held[1] is None:
            self.held = self.held[0], self._clock()

    def stop(self) -> None:
        """The fill is over: from now on its clock stands."""
        if self.stopped_at is None:
            now = self._clock()
            self._leave(now)
            if self.queued is not None and self.queued[1] is None:
                self.queued = self.queued[0], now
            self.leave_slot()
            self.stopped_at = now

    @property
    def seconds(self) -> float:
        return (self._clock() if self.stopped_at is None else self.stopped_at) - self.began

    def marks(self) -> list[Mark]:
        """Up to now."""
        now = self._clock() if self.stopped_at is None else self.stopped_at
        self._leave(now)
        return self._marks if self._marks[-1][0] >= now else [*self._marks, self._mark(now)]

    def told(self, *, marks: bool = True) -> dict[str, object]:
        """For an event: see gup.control.events.Timed. Marks are left out of a short one."""
        found: dict[str, object] = {
            "began": round(self.began, 6),
            "seconds": round(self.seconds, 6),
            "phases": rounded(self.spent),
        }
        if self.queued is not None:
            found["queued"] = self.queued
        if self.held is not None:
            found["held"] = self.held
        if marks and self.seconds >= _STEP_SECONDS:
            found["marks"] = [[round(number, 4) for number in mark] for mark in self.marks()]
        return found


class RequestClock(PhaseClock):
    """The clock of a request that has to wait. Its waits for fills are split only if somebody asks."""

    __slots__ = ("_closed", "_fill", "_wait", "behind", "elsewhere", "key")

    def __init__(self, clock: Callable[[], float], phase: str, began: float | None = None) -> None:
        super().__init__(clock, phase, began)
        self._fill: FillClock | None = None
        self._wait: Wait | None = None
        self._closed: list[tuple[FillClock, Wait]] = []
        self.elsewhere: list[Wait] = []
        """The waits for fills of other processes; a few."""
        self.behind: tuple[str, ...] = ()
        """The clients that had the download slots when it queued for one."""
        self.key = ""
        """Of the content, once it is known."""

    def wait_for(self, what: "FillClock | str") -> None:
        """It waits for this fill, or in this phase, until another one is entered."""
        if isinstance(what, str):
            self.enter(what)
            return
        if what is not self._fill:
            self.close_wait()
            self._fill = what
        self.enter(ELSEWHERE)

    def close_wait(self) -> None:
        """The waits for a fill until now are one; later ones are split by what the fill does then."""
        if self._wait is not None and self._fill is not None:
            self._closed.append((self._fill, self._wait))
        self._wait = None

    def _leave(self, now: float) -> None:
        if self.phase == ELSEWHERE:
            start, _, seconds = self._wait or (self._since, 0.0, 0.0)
            self._wait = start, now, seconds + now - self._since
        super()._leave(now)

    def split(self) -> None:
        """Split the time that it has waited for fills by what those did meanwhile."""
        if self.phase == ELSEWHERE:
            self._leave(self._clock())
        self.close_wait()
        closed, self._closed = self._closed, []
        for fill, wait in closed:
            parts = split(fill.marks(), wait)
            self._spent = dict(Counter(self._spent) + Counter(parts))
            self._spent[ELSEWHERE] = max(0.0, self._spent.get(ELSEWHERE, 0.0) - wait[2])
            if (left := parts.get(ELSEWHERE, 0.0)) > 0:
                self._note_elsewhere(*wait[:2], left)

    def _note_elsewhere(self, start: float, stop: float, seconds: float) -> None:
        """What follows at once, or would be one too many, is added to the last one."""
        last = self.elsewhere[-1] if self.elsewhere else None
        if last is not None and (start <= last[1] or len(self.elsewhere) >= _MOST_WAITS):
            self.elsewhere[-1] = last[0], stop, last[2] + seconds
        else:
            self.elsewhere.append((start, stop, seconds))


def split(marks: Sequence[Mark], wait: Wait) -> dict[str, float]:
    """The seconds of a wait for a fill, by what it did in that time; ELSEWHERE where that is unknown."""
    start, stop, seconds = wait
    before, after = _at(marks, start), _at(marks, stop)
    gained = {phase: end - begin for phase, begin, end in zip(_MARKED, before, after, strict=True)}
    total = sum(gained.values())
    if total <= 0:
        return {ELSEWHERE: seconds}
    return {phase: seconds * part / total for phase, part in gained.items() if part > 0}


def _at(marks: Sequence[Mark], time: float) -> Sequence[float]:
    """The seconds of each phase by a time: between two marks, in proportion."""
    index = bisect_left(marks, (time,))
    if index == 0:
        return marks[0][1:]
    if index == len(marks):
        return marks[-1][1:]
    (before, *those), (after, *these) = marks[index - 1], marks[index]
    share = (time - before) / (after - before) if after > before else 1.0
    return [one + share * (other - one) for one, other in zip(those, these, strict=True)]


def rounded(phases: Mapping[str, float]) -> dict[str, float]:
    """To microseconds, without empty ones."""
    return {phase: round(seconds, 6) for phase, seconds in phases.items() if seconds >= 5e-7}
