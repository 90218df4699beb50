"""Runs one scenario of the store in a forked process of its own, as often as it is told: `main` reads lines.

A line is JSON: `action` ("get" or one of ACTIONS) and its `path`, settings of the `cache`, `root`, `url`,
`log`, `at` (the step to be killed before; 0: none) and `torn`. The answer is the wait status. Everything is
imported once: a run costs the fork.
"""

import asyncio
import json
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp  # noqa: F401 - imported late otherwise, in each run
from fault.crashing import Crash, install
from harness.caches import Cut, Worker, path_of, read, route, working
from harness.internals import (
    CacheSettings,
    ContentKey,
    Evictor,
    Index,
    Problem,
    Recovery,
    Variant,
    change,
    reconcile,
)

FULL = path_of("full.dax")
ZIP = path_of("full.zip")
INDEX = "/content/ContentInfo.txt"
OLD = [path_of("full.dax", f"2601{day:02}001") for day in (1, 2, 3)]


async def no_fills(worker: Worker) -> None:
    """Until all have ended."""
    while worker.cache.fills:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.002)


def key_of(path: str) -> ContentKey:
    return route(path).key(Variant())


async def get(worker: Worker, crash: Crash, path: str) -> None:
    """As a client; `whole` when it has all."""
    try:
        opened = await worker.open(path)
    except Problem as problem:
        crash.mark(f"problem {problem.slug}")
        return
    try:
        await read(opened.body)
        crash.mark(f"whole {path}")
    except Cut:
        crash.mark(f"cut {path}")
    finally:
        opened.body.leave()
    await no_fills(worker)


def recovery_of(worker: Worker, clock: Callable[[], float] = time.monotonic) -> Recovery:
    def take_over(found, inherits: bool) -> asyncio.Event | None:
        return worker.cache.take_over(found, found.variant, inherits=inherits)

    return Recovery(
        worker.dependencies.store,
        worker.dependencies.counters,
        take_over,
        worker.dependencies.tell,
        clock,
    )


async def unmended(_key: ContentKey, _counted: bool) -> Problem | None:
    """What mending tells while there is no upstream."""
    return Problem("no-upstream", "none is there")


async def space_of(worker: Worker, max_size: int) -> Evictor:
    """The controller's eviction over what is in the store."""
    dependencies = worker.dependencies
    cache = CacheSettings(
        directory=dependencies.store.root, max_size=max_size, min_free=0, max_part_age=3600, max_unused=0
    )
    dependencies: Any = SimpleNamespace(
        settings=lambda: SimpleNamespace(cache=cache),
        store=dependencies.store,
        claims=dependencies.claims,
        counters=dependencies.counters,
        mend=unmended,
        raise_store_epoch=dependencies.raise_store_epoch,
        purges=dependencies.purges,
        share_purges=worker.share_purges,
        cluster=None,
        book=None,
        set_store_bytes=lambda _: None,
        promised_bytes=lambda: 0,
        drop_memory=lambda _key: 0,
    )
    index = Index(dependencies.store.index, lambda: None, lambda _refusal: None)
    await reconcile(dependencies, index, time.time())
    return Evictor(dependencies, index, time.time)


async def _recover(worker: Worker, crash: Crash) -> None:
    ahead = 0.0
    recovery = recovery_of(worker, lambda: time.monotonic() + ahead)
    for _ in range(2):
        await recovery.run()
        ahead += 10.0
    await no_fills(worker)
    crash.mark("recovered")


async def _evict(worker: Worker, crash: Crash) -> None:
    space = await space_of(worker, max_size=1_500_000)
    crash.mark(f"evicted {len(await space.evict())}")


async def _purge(worker: Worker, crash: Crash) -> None:
    space = await space_of(worker, max_size=1 << 40)
    await space.purge(key_of(FULL))
    crash.mark("purged")


async def _pin(worker: Worker, crash: Crash) -> None:
    store = worker.dependencies.store
    await change(worker.dependencies.claims, key_of(FULL), lambda: store.set_pinned(key_of(FULL), True))
    crash.mark("pinned")


ACTIONS: dict[str, Callable[[Worker, Crash], Awaitable[None]]] = {
    "recover": _recover,
    "evict": _evict,
    "purge": _purge,
    "pin": _pin,
}


async def run(order: dict[str, Any], crash: Crash) -> None:
    async with working(Path(order["root"]), [order["url"]], cache=order["cache"]) as worker:

        def tell(event: Mapping[str, object]) -> None:
            if event["type"] == "committed":
                crash.mark(f"committed {event['key']}")

        worker.dependencies.tell = tell
        install(crash)
        crash.mark("begun")
        if order["action"] == "get":
            await get(worker, crash, order["path"])
        else:
            await ACTIONS[order["action"]](worker, crash)
        crash.mark("ended")


def _child(order: dict[str, Any]) -> None:
    crash = Crash(Path(order["root"]), Path(order["log"]), order["at"], torn=order["torn"])
    asyncio.run(run(order, crash))


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _child(order)
                status = 0
            except BaseException:  # noqa: BLE001 - the process ends here, whatever it was
                traceback.print_exc()
            os._exit(status)
        print(os.waitpid(pid, 0)[1], flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
