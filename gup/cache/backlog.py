"""What waits for a place to fill on the whole machine, and for how long; knows neither keys nor bodies."""

from collections.abc import Callable

_FIELD_BITS = 16
_FIELD_MASK = (1 << _FIELD_BITS) - 1
_SMOOTHING = 4
"""A new duration counts for a quarter, what was known before for the rest."""
PRIORITIES = 4
CLASSES = 2
"""Deltas and index files are one class of places, all else the other (gup.cache.queue)."""


class Backlog:
    """One word a process, four counts of waiting fills by priority; and one word a class for all.

    A process writes its own word alone, and one that is `alive` no more is passed over. The class's word,
    the mean microseconds that a fill held its place lately, is written by whoever ends a fill: a lost update
    costs one sample.
    """

    def __init__(
        self,
        waiting: "memoryview[int]",
        held: "memoryview[int]",
        mine: int,
        alive: Callable[[int], bool],
    ) -> None:
        self._waiting = waiting
        self._held = held
        self._mine = mine
        self._alive = alive
        waiting[mine] = 0

    @classmethod
    def alone(cls) -> "Backlog":
        """For a process that shares with nobody."""
        words = memoryview(bytearray(8 * (1 + CLASSES))).cast("Q")
        return cls(words[:1], words[1:], 0, lambda _block: True)

    def enter(self, priority: int) -> None:
        self._waiting[self._mine] += 1 << (_FIELD_BITS * priority)

    def leave(self, priority: int) -> None:
        self._waiting[self._mine] -= 1 << (_FIELD_BITS * priority)

    def waiting(self, priority: int) -> int:
        """Fills of this priority that wait in all processes."""
        shift = _FIELD_BITS * priority
        return sum(
            (word >> shift) & _FIELD_MASK
            for block, word in enumerate(self._waiting)
            if word and self._alive(block)
        )

    def held(self, class_: int, seconds: float) -> None:
        """Note that a fill had its place for so long."""
        sample = max(1, int(seconds * 1_000_000))
        before = self._held[class_] or sample
        self._held[class_] = before + (sample - before) // _SMOOTHING

    def mean_held_seconds(self, class_: int) -> float:
        """How long a fill holds its place; 0.0 while that is unknown."""
        return self._held[class_] / 1_000_000
