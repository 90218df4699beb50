"""Waiting for a condition with a deadline; never sleeps for a fixed time and hopes."""

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(found: Callable[[], Found], what: str, timeout_seconds: float = 30.0) -> Found:
    """The first true answer of `found`; AssertionError naming `what` when the time is over."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        answer = found()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_seconds} s: {what} (last: {answer!r})")
        time.sleep(0.005)
