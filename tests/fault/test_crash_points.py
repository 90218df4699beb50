"""kill -9 between any two steps of what changes the store: nothing committed is lost, nothing stays behind.

A first run of each scenario records every call that changes the cache directory; then it is run anew for
each of them and dies just before it, with a write done by half, or with what was not yet durable lost as in a
power cut. `make test` takes a few of these points, `make fault` all.
"""

import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault.crash_runner import FULL, INDEX, OLD, ZIP, key_of, recovery_of
from fault.crashing import cut_power
from fault.invariants import bodies_of, violations
from harness.caches import Cut, Worker, working
from harness.content import zip_of
from harness.internals import CHUNK_BYTES, ContentKey, Index, Problem, Record, Store, reconcile
from harness.service import REPOSITORY
from harness.upstreams import Answer, Gate, ScriptedUpstream

SEED = os.environ.get("GUP_TEST_SEED", "1")
BODY = random.Random("body").randbytes(CHUNK_BYTES + 200_000)
SECOND = random.Random("second").randbytes(CHUNK_BYTES + 5)
"""What the index file becomes: as long as it needs to be for every step of a fill."""
PART_BYTES = CHUNK_BYTES + 70_000
A_WHILE_SECONDS = 7200.0
"""After which nothing that is of no use may be left."""
POINTS = 3
"""Of each scenario, in `make test`."""

GOOD = Answer(BODY, etag='"a"')
DOWN = Answer(b"", 503)
Prepare = Callable[[Path, ScriptedUpstream], Awaitable[None]]


@dataclass(frozen=True)
class Case:
    """What a scenario begins with and what must hold after it, wherever it dies."""

    prepare: Prepare
    answer: Answer = GOOD
    kept: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    """Entries that must be served without an upstream, with what they may be."""
    path: str = FULL
    action: str = "get"
    """Of crash_runner."""
    cache: Mapping[str, str] = field(default_factory=dict)
    """Settings."""
    bodies: tuple[bytes, ...] = (BODY,)
    """What `path` may be, once upstream is right again."""
    etag: str = '"a"'
    """What upstream then tags it with: a body that was found wrong is not read again under its own tag."""


async def nothing(root: Path, upstream: ScriptedUpstream) -> None:  # noqa: ARG001
    Store(root).prepare()


def _stored(*paths: str) -> Prepare:
    async def prepare(root: Path, upstream: ScriptedUpstream) -> None:
        async with working(root, [upstream.url]) as worker:
            for path in paths:
                upstream.answer(path, GOOD)
                assert await worker.get(path) == BODY
            await _until(lambda: not worker.cache.fills)

    return prepare


def _part_left(damage: Callable[[Path], None] = lambda part: None) -> Prepare:  # noqa: ARG005
    async def prepare(root: Path, upstream: ScriptedUpstream) -> None:
        gate = Gate()
        upstream.answer(FULL, Answer(BODY, etag='"a"', gates=((PART_BYTES, gate),)))
        async with working(root, [upstream.url]) as worker:
            opened = await worker.open(FULL)
            await _until(lambda: opened.body.published == PART_BYTES)
        gate.open()
        damage(next((root / "partial").glob("*.part")))

    return prepare


def _garbage(part: Path) -> None:
    with part.open("r+b") as file:
        file.seek(-1000, 2)
        file.write(bytes(1000))


async def _commit_left(root: Path, upstream: ScriptedUpstream) -> None:
    """A commit that was interrupted right after its record."""
    upstream.answer(FULL, GOOD)
    async with working(root, [upstream.url]) as worker:
        store = worker.dependencies.store

        def dies(record: Record, **_named: object) -> bool:
            store.save(record)
            raise asyncio.CancelledError

        store.commit = dies
        with contextlib.suppress(Cut):  # as its readers are when it dies
            await worker.get(FULL)
        await _until(lambda: not worker.cache.fills)


STALE = {"index_ttl": "0s"}
CASES: dict[str, Case] = {
    "fill": Case(nothing),
    "fill of unknown length": Case(nothing, Answer(BODY, etag='"a"', chunked=True)),
    "replacement": Case(
        _stored(INDEX),
        Answer(SECOND, etag='"b"'),
        {INDEX: (BODY, SECOND)},
        INDEX,
        cache=STALE,
        bodies=(BODY, SECOND),
        etag='"b"',
    ),
    "revalidation": Case(_stored(INDEX), kept={INDEX: (BODY,)}, path=INDEX, cache=STALE),
    "takeover": Case(_part_left()),
    "takeover with damage": Case(_part_left(_garbage)),
    "takeover without upstream": Case(_part_left(), DOWN, cache={"error_ttl": "50ms"}),
    "absent": Case(nothing, Answer(b"", 404), cache={"negative_ttl": "50ms"}),
    "too large": Case(nothing, cache={"max_size": "1MB"}),
    "rejected": Case(nothing, path=ZIP, bodies=(zip_of("right", len(BODY)),), etag='"right"'),
    "recovery of a commit": Case(_commit_left, DOWN, {FULL: (BODY,)}, action="recover"),
    "recovery of a fill": Case(_part_left(), action="recover"),
    "eviction": Case(_stored(*OLD), action="evict"),
    "eviction of a part": Case(_part_left(lambda part: os.utime(part, (1, 1))), action="evict"),
    "purge": Case(_stored(FULL, OLD[0]), kept={OLD[0]: (BODY,)}, action="purge"),
    "pin": Case(_stored(FULL), kept={FULL: (BODY,)}, action="pin"),
}


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.002)


class Runner:
    """The process that runs scenarios, and the folder for their cache directories and logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs = 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_runner.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
        )

    def run(self, case: Case, template: Path, url: str, at: int, *, torn: bool) -> "Run":
        """Run it on a copy of `template`, to be killed before step `at` (0: not)."""
        self._runs += 1
        root = self.folder / f"{self._runs}"
        log = self.folder / f"{self._runs}.log"
        shutil.copytree(template, root)
        order = {"action": case.action, "path": case.path, "cache": case.cache, "root": str(root)}
        order |= {"url": url, "log": str(log), "at": at, "torn": torn}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        lines = log.read_text().splitlines()
        marks = [line.removeprefix("mark ") for line in lines if line.startswith("mark ")]
        return Run(root, log, status, [line for line in lines if not line.startswith("mark ")], marks)

    def close(self) -> None:
        self._process.communicate()


@dataclass(frozen=True)
class Run:
    root: Path
    log: Path
    status: int
    steps: list[str]
    marks: list[str]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    made = Runner(tmp_path_factory.mktemp("crash"))
    yield made
    made.close()


@pytest.fixture
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as scripted:
        yield scripted


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "most", [POINTS, pytest.param(None, marks=pytest.mark.long)], ids=["a few", "every one"]
)
@pytest.mark.parametrize("scenario", CASES)
async def test_a_crash_at_any_point_loses_nothing_and_leaves_nothing(
    tmp_path, runner, upstream, scenario, most
):
    case, template = CASES[scenario], tmp_path / "template"
    await case.prepare(template, upstream)
    whole = await _run(runner, upstream, scenario, template, 0, torn=False)
    assert (whole.status, whole.marks[-1]) == (0, "ended"), whole.marks
    chance = random.Random(f"{SEED} {scenario}")
    await _assert_recovers(whole, scenario, upstream, chance, "no crash")
    steps = [*whole.steps, "the end"]
    points = [(at, how) for at in range(1, len(steps) + 1) for how in ("killed", "torn", "power cut")]
    for at, how in points if most is None else chance.sample(points, most):
        died = await _run(runner, upstream, scenario, template, at, torn=how == "torn")
        step = steps[at - 1]
        assert died.status in (9, 0), (how, step)  # 0: threads took turns otherwise, it was over before
        if how == "power cut":  # what is new is not synced: only its loss as a whole is allowed
            cut_power(died.root, died.log, died.steps, chance)
            died = replace(died, marks=[mark for mark in died.marks if not mark.startswith("committed")])
        await _assert_recovers(died, scenario, upstream, chance, f"{how} before {at}: {step}")


async def _run(
    runner: Runner, upstream: ScriptedUpstream, scenario: str, template: Path, at: int, *, torn: bool
) -> Run:
    upstream.answer(CASES[scenario].path, CASES[scenario].answer)
    return await asyncio.to_thread(runner.run, CASES[scenario], template, upstream.url, at, torn=torn)


# --- what must hold


async def _assert_recovers(
    died: Run, scenario: str, upstream: ScriptedUpstream, chance: random.Random, point: str
) -> None:
    case = CASES[scenario]
    try:
        async with working(died.root, [upstream.url], cache={"error_ttl": "20ms"}) as worker:
            if chance.random() < 0.5:
                upstream.answer(case.path, DOWN)
                await _settle(worker)
            await _assert_nothing_lost(worker, case, died.marks, upstream)
            upstream.answer(case.path, Answer(case.bodies[-1], etag=case.etag))
            await _assert_served(worker, case.path, case.bodies)
            await _settle(worker)
            await _assert_clean(worker)
    except (AssertionError, Problem, Cut) as error:
        raise AssertionError(f"{scenario}, {point}: {error!r}") from error


async def _assert_nothing_lost(
    worker: Worker, case: Case, marks: list[str], upstream: ScriptedUpstream
) -> None:
    """Without an upstream: what was committed is served, right."""
    kept = dict(case.kept)
    if f"committed {key_of(case.path).text}" in marks:
        kept[case.path] = case.bodies[-1:]
    for path, bodies in kept.items():
        upstream.answer(path, DOWN)
        assert await worker.get(path) in bodies, path
    if "pinned" in marks:
        record = worker.dependencies.store.load(key_of(case.path))
        assert record is not None
        assert record.pinned


async def _assert_served(worker: Worker, path: str, bodies: tuple[bytes, ...]) -> None:
    """With one: right, once failures that were told have passed."""
    deadline = time.monotonic() + 5
    while True:
        assert time.monotonic() < deadline, f"{path} is not served"
        try:
            got = await worker.get(path)
        except (Problem, Cut):
            await asyncio.sleep(0.01)
            continue
        assert got in bodies
        return


async def _settle(worker: Worker) -> None:
    """The controller's work, with time passing."""
    store, dependencies = worker.dependencies.store, worker.dependencies

    async def look_over(now: float) -> set[str]:
        index = Index(store.index, lambda: None, lambda _: None)
        with contextlib.closing(index.rows) as rows:
            await reconcile(dependencies, index, now)
            return set(rows)

    def mend(key: ContentKey, counted: bool) -> Awaitable[Problem | None]:
        return worker.cache.repair(key, counted=counted)

    dependencies: Any = SimpleNamespace(
        store=store, claims=dependencies.claims, counters=dependencies.counters, mend=mend
    )

    await look_over(time.time() + A_WHILE_SECONDS)
    ahead = 0.0
    recovery = recovery_of(worker, lambda: time.monotonic() + ahead)
    for _ in range(3):
        await _until(lambda: not worker.cache.fills)
        await recovery.run()
        ahead += 10.0
    await _until(lambda: not worker.cache.fills)
    for path in store.partial.iterdir():
        if path.suffix != ".part":
            stat = path.stat()
            os.utime(path, (stat.st_mtime - A_WHILE_SECONDS, stat.st_mtime - A_WHILE_SECONDS))
    ahead += A_WHILE_SECONDS
    await recovery.run()

    rows = await look_over(time.time() + A_WHILE_SECONDS)
    assert rows == set(bodies_of(store.root))


async def _assert_clean(worker: Worker) -> None:
    assert violations(worker.dependencies.store.root) == []
