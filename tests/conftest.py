"""What holds for every test: nothing is left behind, be it a process, thread, descriptor or asyncio task."""

import asyncio
import contextlib
import gc
import inspect
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest
import uvloop
from blockbuster import blockbuster_ctx
from harness.waiting import until

_SETTLE_SECONDS = 3.0
uvloop.new_event_loop().close()  # libuv opens one pipe a process, at its first loop, for good


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            found.add((link.name, str(link.readlink())))
    return found


def _children() -> set[psutil.Process]:
    """Read from one small file a thread: psutil alone would read the whole of /proc, before every test."""
    found = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            numbers = (thread / "children").read_text().split()
            for child in (psutil.Process(int(number)) for number in numbers):
                found |= {child, *child.children(recursive=True)}
    return found


def _threads() -> set[threading.Thread]:
    """Without those of the loop's own executor, which end with the loop, after this look."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


def _nothing_new(look: Callable[[], set], before: set, what: str) -> None:
    """What is there now must have been there before; what is just ending gets a moment."""
    if not look() - before:
        return
    gc.collect()  # not before: it takes longer than most tests
    with contextlib.suppress(AssertionError):
        until(lambda: not (look() - before), what, _SETTLE_SECONDS)
    if left := look() - before:
        pytest.fail(f"the test left {what} behind: {sorted(map(str, left))}", pytrace=False)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = _descriptors(), _children(), _threads()
    yield
    for look, known, what in zip(
        (_descriptors, _children, _threads), before, ("descriptors", "processes", "threads"), strict=True
    ):
        _nothing_new(look, known, what)


@pytest.fixture
async def no_task_left_behind() -> AsyncIterator[None]:
    """In every async test, by `pytest_collection_modifyitems`: set up first, so torn down last."""
    before = asyncio.all_tasks()
    yield
    left: set[asyncio.Task] = set()
    for _ in range(100):  # what was cancelled, or whose peer has gone, gets a moment to end
        left = asyncio.all_tasks() - before - {asyncio.current_task()}
        if not left:
            return
        await asyncio.sleep(0.01)
    if left:
        pytest.fail(f"the test left tasks behind: {sorted(map(repr, left))}", pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.function):
            names = item.fixturenames
            if "no_task_left_behind" not in names:
                names.insert(0, "no_task_left_behind")


@pytest.fixture
def no_blocking_calls() -> Iterator[None]:
    """For async tests that ask for it: a blocking call of gup's own code on the loop raises BlockingError."""
    with blockbuster_ctx(scanned_modules=["gup"]):
        yield


@pytest.fixture
def figures(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Shows a line of what was measured, also when the test passes."""

    def show(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line}\n")

    return show
