"""What holds for every test: nothing is left behind, be it a process, thread, descriptor or asyncio task."""

import asyncio
import contextlib
import gc
import inspect
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop
from harness.needs import pytest_runtest_setup, pytest_terminal_summary
from harness.processes import children_of, until
from harness.service import Gup
from harness.upstreams import Answer, ScriptedUpstream
from harness.warm import TEMPLATE

__all__ = ["pytest_runtest_setup", "pytest_terminal_summary"]  # hooks: pytest finds them here
Answers = Mapping[str, Answer | bytes | Sequence[Answer | bytes]]

_SETTLE_SECONDS = 3.0
uvloop.new_event_loop().close()  # libuv opens one pipe a process, at its first loop, for good


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        if TEMPLATE.link and int(link.name) == TEMPLATE.link.fileno():
            continue
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            found.add((link.name, str(link.readlink())))
    return found


def _children() -> set[psutil.Process]:
    found = set()
    for number in children_of(os.getpid()):
        if TEMPLATE.process is None or number != TEMPLATE.process.pid:
            with contextlib.suppress(psutil.NoSuchProcess):
                child = psutil.Process(number)
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
    items.sort(key=_may_take_seconds, reverse=True)  # a long one that began last would keep all waiting


def _may_take_seconds(item: pytest.Item) -> float:
    """Of those with a time limit of their own; the others keep their random order."""
    limit = item.get_closest_marker("timeout")
    return limit.args[0] if limit is not None else 0.0


@pytest.fixture
def figures(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Shows a line of what was measured, also when the test passes."""

    def show(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line}\n")

    return show


def _service(
    stack: contextlib.ExitStack,
    folder: Path,
    answers: Answers,
    before: Any = None,
    each: Mapping[str, Any] | None = None,
    behind: Sequence[Any] = (),
    settings: Mapping[str, Any] | None = None,
    **how: Any,
) -> tuple[Gup, ScriptedUpstream]:
    upstream = stack.enter_context(before or ScriptedUpstream())
    for path, answer in answers.items():
        upstream.answer(path, *([answer] if isinstance(answer, Answer | bytes) else answer))
    urls, sections = [upstream.url], dict(settings or {})
    if each is not None or behind:
        all_ = [upstream, *map(stack.enter_context, behind)]
        sections["upstream"] = [
            {
                "name": f"u{number}",
                "url": one.url,
                "priority": number,
                **(each or {}),
                **getattr(one, "table", {}),
            }
            for number, one in enumerate(all_)
        ]
        urls = []
    return stack.enter_context(Gup(folder, urls, settings=sections, **how)), upstream


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[Gup, ScriptedUpstream]]]:
    """`serve(answers, section={...})`: a started service, and the scripted upstream that it stands before.

    `before` is another upstream instead. With `each` (settings of an upstream) or `behind` (more of them,
    of lower priority) they stand in the file, as u0, u1, and so on; else it is a flag, which a reload keeps.
    """
    with contextlib.ExitStack() as stack:

        def start(answers: Answers | None = None, /, *, folder: str = "cache", **given: Any):
            how = {name: given.pop(name) for name in _HOW if name in given}
            if isinstance(how.get("workers"), dict):  # in the file, where a reload may change them
                given["workers"], how["workers"] = how["workers"], None
            return _service(stack, tmp_path / folder, answers or {}, settings=given, **how)

        yield start


_HOW = ("before", "each", "behind", "workers", "env", "bind", "admin", "start")


@pytest.fixture(scope="module")
def _shared(request, tmp_path_factory) -> Iterator[tuple[Gup, ScriptedUpstream]]:
    given = dict(getattr(request.module, "SHARED", {}))
    how = {name: given.pop(name) for name in _HOW if name in given}
    how["each"] = {"health_interval": "0s", **how.get("each", {})}
    how["measured"] = True
    with contextlib.ExitStack() as stack:
        yield _service(stack, tmp_path_factory.mktemp("shared") / "cache", {}, settings=given, **how)


@pytest.fixture
def shared(_shared) -> Iterator[tuple[Gup, ScriptedUpstream]]:
    """One service for all tests of a module, with its SHARED settings: they must not disturb each other.

    These are measured in `make coverage`; to measure those of one test would nearly double its time.
    """
    gup, upstream = _shared
    yield gup, upstream
    gup.close_clients()
    upstream.hang_up()
