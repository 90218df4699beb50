"""Caches as workers have them, several on one directory in one process: each with its own claims."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from harness.content import MONIKER
from harness.internals import (
    CLOCK_WORDS,
    CUT,
    FAILURE_WORDS,
    ROW_WORDS,
    Body,
    BudgetGate,
    Cache,
    Claims,
    ClientCounts,
    FillDependencies,
    FillQueue,
    Members,
    MemoryFiles,
    NegativeCache,
    Opened,
    Pool,
    Purge,
    Purges,
    Route,
    Routes,
    Selection,
    Settings,
    ShortJobs,
    Slots,
    Space,
    Store,
    Streams,
    Variant,
    Wan,
    add_purge,
)
from harness.private import private_backlog, private_counters, private_turns

_MEMORY: dict[Path, "memoryview[int]"] = {}
"""The table of memory files of all workers on one directory."""
_FAILURES: dict[Path, "memoryview[int]"] = {}
"""Their table of failures."""
_PURGED: dict[Path, int] = {}
"""Their changes of the purges."""


@dataclass
class Worker:
    """One worker's cache, and what it told and counted."""

    cache: Cache
    dependencies: FillDependencies
    told: list[dict] = field(default_factory=list)

    async def open(self, path: str) -> Opened:
        return await self.cache.open(route(path), Variant())

    async def get(self, path: str) -> bytes:
        opened = await self.open(path)
        try:
            return await read(opened.body)
        finally:
            opened.body.leave()

    def purge(self, **selected: str) -> None:
        """Note a purge as the controller does, for all workers on the directory; no file is removed."""
        add_purge(self.dependencies.store.run, Purge(time.time_ns(), time.time(), Selection(**selected)))
        self.share_purges()

    def share_purges(self) -> None:
        _PURGED[self.dependencies.store.root] = time.time_ns()
        self.dependencies.raise_store_epoch()

    def failed(self, path: str) -> bool:
        """Whether a failure of this path stands."""
        asked = route(path)
        return self.dependencies.failures.get(asked.key(Variant()), asked.upstream_path) is not None

    def counted(self, name: str, **labels: str) -> int:
        return self.dependencies.counters.get(name, **labels)


class Cut(Exception):  # noqa: N818 - an event, wanted by some tests
    """The body ended before its end."""


def route(path: str) -> Route:
    return Routes().route(path)


def path_of(file: str, revision: str = "260801001") -> str:
    return f"/content/{MONIKER}/{revision}/{file}"


async def read(body: Body, start: int = 0, stop: int | None = None) -> bytes:
    """The body's bytes as a connection takes them; Cut when it breaks off."""
    got = bytearray()
    offset = start
    while (end := body.end()) is None or offset < min(end, stop or end):
        amount = body.available(offset, 1 << 20)
        if amount == CUT:
            raise Cut(bytes(got))
        if amount == 0:
            if body.end() is not None and offset >= body.end():
                break
            woken = asyncio.Event()
            body.wait(offset, woken.set)
            await woken.wait()
            continue
        got += body.view(offset, amount)
        offset += amount
    return bytes(got)


@asynccontextmanager
async def working(
    root: Path, upstreams: list[str], *, tables: Sequence[dict] = (), **sections: dict
) -> AsyncIterator[Worker]:
    """`tables` are settings of single upstreams, in the order of `upstreams`."""
    own = dict(enumerate(tables))
    each = sections.pop("each", {})
    sections["cache"] = {"directory": str(root), "min_free": 0, **sections.get("cache", {})}
    rows = [
        {"url": url, "name": f"u{number}", "priority": number, **each, **own.get(number, {})}
        for number, url in enumerate(upstreams)
    ]
    settings = Settings.model_validate({**sections, "upstream": rows, "wan": {"rate": "0"}})
    store = Store(root)
    store.prepare()
    names = [upstream.name for upstream in settings.upstream]
    counters = private_counters(names)
    words = memoryview(bytearray(8 * CLOCK_WORDS)).cast("Q")
    wan = Wan(words, 0, private_turns(), lambda: settings.wan.rate, store.run / "wan.lock")
    pool = Pool(settings.upstream, counters, wan, user_agent="gup/test", via="1.1 test (gup)")
    executor = ThreadPoolExecutor(8)
    promised = [0]

    def promise(change: int) -> None:
        promised[0] += change

    claims = store.claims = Claims(store.partial / "claims")
    slot_locks = Claims(store.run / "slots")
    told: list[dict] = []

    def tell(event) -> None:
        told.append(dict(event))

    queue = FillQueue(
        Slots(slot_locks, 10_000, lambda: settings.fill.max),
        Slots(slot_locks, 0, lambda: settings.fill.max),
        Slots(slot_locks, 20_000, lambda: 2 * settings.fill.max),
        lambda: settings.fill.queue_timeout,
        (private_turns(), private_turns()),
        private_backlog(),
    )
    epochs: list[None] = []

    dependencies = FillDependencies(
        store=store,
        claims=claims,
        pool=pool,
        members=Members(counters),
        counters=counters,
        queue=queue,
        space=Space(
            root,
            max_size=lambda: settings.cache.max_size,
            min_free=lambda: settings.cache.min_free,
            used=lambda: promised[0],
            promise=promise,
            need=lambda missing, refused: tell({"type": "need", "bytes": missing, "refused": refused}),
            evictions=lambda: len(epochs),
        ),
        memory=MemoryFiles(
            _MEMORY.setdefault(root, memoryview(bytearray(8 * (1 + 8 * ROW_WORDS))).cast("Q")),
            nullcontext,
            lambda: settings.fill.memory,
            lambda: settings.listen.write_timeout,
        ),
        failures=NegativeCache(
            _FAILURES.setdefault(root, memoryview(bytearray(8 * FAILURE_WORDS * 16)).cast("Q")), nullcontext
        ),
        purges=Purges(store.run, lambda: _PURGED.get(root, 0)),
        misses=ClientCounts.alone(),
        streams=Streams(store.run / "streams"),
        executor=executor,
        short=ShortJobs(),
        settings=settings,
        tell=tell,
        raise_store_epoch=lambda: epochs.append(None),
        store_epoch=lambda: len(epochs),
        wall_clock=time.time,
        clock=time.monotonic,
        budget=BudgetGate.of(lambda: settings.wan.budget, counters, time.time),
    )
    cache = Cache(
        dependencies,
        max_open=64,
        bypass=Slots(slot_locks, 200_000, lambda: 4),
        range_bypass=Slots(slot_locks, 100_000, lambda: 2),
    )
    worker = Worker(cache, dependencies, told)
    try:
        yield worker
    finally:
        await cache.stop()
        await pool.close()
        await dependencies.members.close()
        dependencies.short.close()
        executor.shutdown(wait=True)
        wan.close()
        claims.close()
        slot_locks.close()
        await asyncio.sleep(0)


@asynccontextmanager
async def slot_of(queue: FillQueue, *arguments, **options):
    """A slot of the queue for the block, or None."""
    slot = await queue.take(*arguments, **options)
    try:
        yield slot
    finally:
        if slot is not None:
            slot.leave()
