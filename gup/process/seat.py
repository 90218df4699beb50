"""A child's place: its phases, when it is started again, when it must be killed; no I/O, starts nothing."""

from dataclasses import dataclass, field
from enum import Enum, auto

from gup.process.child import Child, Role

READY_SECONDS = 30.0
"""Within which a child must say that it is ready."""
BEAT_SECONDS = 30.0
"""Without a heartbeat, after which a child counts as hung."""
CLOSING_SECONDS = 2.0
"""Between the end of the control channel and the end of the process."""
QUICK_SECONDS = 5.0
"""A life shorter than this is a sign that the next one will be too."""
_FIRST_DELAY_SECONDS = 0.1
_LAST_DELAY_SECONDS = 5.0


class Phase(Enum):
    """Of a seat."""

    WAITING = auto()  # for the time to start
    STARTING = auto()
    READY = auto()
    DOOMED = auto()  # killed, not yet gone
    GONE = auto()  # for good: the service ends


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.STARTING, Phase.WAITING, Phase.GONE}),
    Phase.STARTING: frozenset({Phase.READY, Phase.DOOMED, Phase.WAITING, Phase.GONE}),
    Phase.READY: frozenset({Phase.DOOMED, Phase.WAITING, Phase.GONE}),
    Phase.DOOMED: frozenset({Phase.WAITING, Phase.GONE}),
    Phase.GONE: frozenset(),
}


def delay_seconds(quick_deaths: int) -> float:
    """Before the next start, after so many short lives in a row: 0, 0, 0.1, 0.2, … 5."""
    if quick_deaths < 2:
        return 0.0
    return float(min(_FIRST_DELAY_SECONDS * 2 ** min(quick_deaths - 2, 10), _LAST_DELAY_SECONDS))


@dataclass(slots=True)
class Seat:
    """The supervisor alone changes it. Times are monotonic seconds."""

    role: Role
    slot: int
    block: int
    phase: Phase = Phase.WAITING
    child: Child | None = None
    generation: int = 0
    start_at: float = 0.0
    started_at: float = 0.0
    ready_at: float = 0.0
    closed_at: float | None = None
    quick_deaths: int = field(default=0)

    @property
    def name(self) -> str:
        return f"worker {self.slot}" if self.role == "worker" else self.role

    def move(self, phase: Phase) -> None:
        assert phase in TRANSITIONS[self.phase], (self.phase, phase)
        self.phase = phase

    def start(self, now: float) -> None:
        """A child is about to be started; `child` is set once it is there."""
        self.move(Phase.STARTING)
        self.generation += 1
        self.started_at = now
        self.closed_at = None

    def ready(self, now: float) -> None:
        """The child said that it is ready; a late word of one that was killed changes nothing."""
        if self.phase is Phase.STARTING:
            self.move(Phase.READY)
            self.ready_at = now

    def died(self, now: float, *, again: bool) -> None:
        """The child is gone; `again`: another is to follow."""
        self.child = None
        if not again:
            self.move(Phase.GONE)
            return
        self.quick_deaths = self.quick_deaths + 1 if now - self.started_at < QUICK_SECONDS else 0
        self.start_at = now + delay_seconds(self.quick_deaths)
        self.move(Phase.WAITING)

    def verdict(self, now: float, last_beat: float, watched_from: float) -> str | None:
        """Why the child must be killed; None: it lives well.

        `last_beat` is 0 before the first. Nothing counts from before `watched_from`: the whole machine may
        have stood still until then. A controller is held to its heartbeat after the first only.
        """
        if self.phase not in (Phase.STARTING, Phase.READY):
            return None
        if self.closed_at is not None and now - self.closed_at > CLOSING_SECONDS:
            return "it closed its control channel and did not end"
        if self.phase is Phase.STARTING and now - max(self.started_at, watched_from) > READY_SECONDS:
            return f"it was not ready within {READY_SECONDS:g} s"
        beats = self.phase is Phase.READY and (last_beat > 0 or self.role == "worker")
        if beats and now - max(last_beat, self.ready_at, watched_from) > BEAT_SECONDS:
            return f"it gave no sign of life for {BEAT_SECONDS:g} s"
        return None
