"""Whose turn it is among processes that wait for the same thing; knows neither bytes nor places."""

from collections.abc import Callable

NOBODY = (1 << 64) - 1
_RANK_BITS = 60


def rank(priority: int, tag: int) -> int:
    """Priority first (0 is the most urgent), then the smaller tag: one word to compare."""
    return (priority << _RANK_BITS) | min(tag, (1 << _RANK_BITS) - 1)


class Turns:
    """One word a process: the rank of its first waiter, NOBODY without one.

    Each process writes its own word alone. A process that is `alive` no more is passed over; its successor
    empties the word when it starts.
    """

    def __init__(self, words: "memoryview[int]", mine: int, alive: Callable[[int], bool]) -> None:
        self._words = words
        self._mine = mine
        self._alive = alive
        words[mine] = NOBODY

    @classmethod
    def alone(cls) -> "Turns":
        """For a process that shares with nobody."""
        return cls(memoryview(bytearray(8)).cast("Q"), 0, lambda _block: True)

    def ask(self, first: int | None) -> None:
        """Publish the rank of this process's first waiter."""
        self._words[self._mine] = NOBODY if first is None else first

    def free(self) -> bool:
        """Whether nobody waits in any process."""
        return all(word == NOBODY or not self._alive(block) for block, word in enumerate(self._words))

    def mine(self) -> bool:
        """Whether no other process has a waiter that comes before this one's first."""
        own = self._words[self._mine]
        return not any(
            other < own and block != self._mine and self._alive(block)
            for block, other in enumerate(self._words)
        )
