"""What a connection is doing, and how long it may take for that; holds no connection."""

from enum import Enum

from gup.config import Listen

LINGER_SECONDS = 2.0


class Phase(Enum):
    """Of one connection; gup.server.connection tells how they follow each other."""

    READING = "reading"
    WAITING = "waiting"
    QUEUED = "queued"
    SENDING = "sending"
    LINGERING = "lingering"
    CLOSED = "closed"


def allowed_seconds(
    phase: Phase, listen: Listen, *, begun: bool, stalled: bool, grace_seconds: float
) -> float:
    """How long the phase may last without progress. `begun`: a head has; `stalled`: nothing is taken."""
    if phase is Phase.READING:
        return listen.header_timeout if begun else listen.idle_timeout
    if phase is Phase.LINGERING:
        return LINGER_SECONDS
    return listen.write_timeout + grace_seconds if stalled else float("inf")
