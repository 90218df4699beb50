"""Time that passes only while an event loop would wait: what takes seconds is tried at once, and exactly."""

import asyncio
import functools
import selectors
import time
from collections.abc import Awaitable, Callable
from unittest import mock


class _Loop(asyncio.SelectorEventLoop):
    """Where it would wait for its next timer, its time is that timer's."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_Selector(self.pass_time))

    def time(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


class _Selector(selectors.DefaultSelector):
    def __init__(self, wait: Callable[[float], None]) -> None:
        super().__init__()
        self._wait = wait

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(timeout and 0)
        if timeout and not ready:
            self._wait(timeout)
        return ready


def in_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """An async test of one process: `time` has its loop's time, and time.sleep() makes that late."""

    @functools.wraps(test)
    def run(*arguments: object, **named: object) -> None:
        with asyncio.Runner(loop_factory=_Loop) as runner:
            loop = runner.get_loop()
            assert isinstance(loop, _Loop)
            clock = {
                "monotonic": loop.time,
                "monotonic_ns": lambda: round(loop.now * 1e9),
                "sleep": loop.pass_time,
            }
            with mock.patch.multiple(time, **clock):
                runner.run(test(*arguments, **named))

    return run
