"""What a beat at the engine brings, and how it fails; without the engine's library, which may be missing."""

from dataclasses import dataclass, field

from gup.errors import GupError


class EngineError(GupError):
    """The engine did not answer, or not as it should; the text says why."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What the engine answered. `grant` is None when a node that started earlier has this name."""

    time_ms: int
    grant: int | None
    share: int
    rows: dict[str, str] = field(default_factory=dict)
    """Signed rows by the names under which they stand."""
    orders: tuple[tuple[str, dict[str, str]], ...] = ()
    """Ids and fields."""
