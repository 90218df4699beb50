"""An event loop whose clock jumps to the next timer: hours pass in no time, and nothing waits for real.

It raises `Stuck` when nothing is left to happen while something still waits.
"""

import asyncio
import selectors


class Stuck(Exception):  # noqa: N818 - what the tests look for
    """Everybody waits for somebody else."""


class _Selector(selectors.SelectSelector):
    """Selects nothing; the time-out that it is given passes at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:
            raise Stuck
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time begins at 0 s."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(main) -> object:
    """The result of a coroutine function, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())
