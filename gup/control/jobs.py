"""Work that goes on beside requests: owns every task of the control plane. Knows no job's aim."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine

_log = logging.getLogger("gup.control.jobs")


class Jobs:
    """Named tasks. A job that raises is logged and, if it is periodic, runs again at its next turn."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Run `work` once, until it ends or `stop`. No other of this name may run."""
        if any(task.get_name() == f"control {name}" for task in self._tasks):
            work.close()
            raise AssertionError(f"{name} runs already")
        task = asyncio.create_task(self._guarded(name, work), name=f"control {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it never began

    def every(self, seconds: float, name: str, turn: Callable[[], Awaitable[None]]) -> None:
        """Run `turn` now and again `seconds` after each end."""

        async def repeat() -> None:
            while True:
                await self._guarded(name, turn())
                await asyncio.sleep(seconds)

        self.start(name, repeat())

    async def stop(self) -> None:
        """Cancel all and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    async def _guarded(name: str, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception:  # noqa: BLE001 - must end neither the control plane nor the job's later turns
            _log.exception("the job %r failed", name)
