"""A whole data plane on one loop, without processes."""

import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import count

from harness.caches import Worker
from harness.internals import (
    AccessLog,
    Admission,
    Claims,
    ClientCounts,
    ClientNames,
    Downloads,
    Handler,
    HotCache,
    Listener,
    Policy,
    Slots,
)
from harness.private import private_turns


@dataclass
class DataPlane:
    worker: Worker
    policy: Policy
    handler: Handler
    listener: Listener
    address: tuple[str, int]
    epoch: list[int]
    """The policy's."""


@contextlib.asynccontextmanager
async def data_plane(worker: Worker, *, is_hot: bool = True) -> AsyncIterator[DataPlane]:
    """Without `is_hot` nothing stays in its hot cache: each look at the epochs finds others."""
    own, epoch, looks = worker.dependencies, [0], count()
    hot_cache = HotCache(
        lambda: (epoch[0] if is_hot else next(looks), own.store_epoch()), worker.cache.close_removed
    )
    policy = Policy(own, lambda: epoch[0], hot_cache.drop)
    own.pool.lists = lambda name, moniker: policy.choices.catalogues.listed(name, moniker) is not None
    none, limits = lambda _name: lambda: 0, lambda: own.settings.clients
    with contextlib.closing(Claims(own.store.run / "downloads")) as locks:
        downloads = Downloads(
            Slots(locks, 0, lambda: 0), limits, own.counters, none, private_turns(), ClientCounts.alone()
        )
        access_log = AccessLog(own.settings, own.counters, ClientNames("full", b"0" * 16))
        handler = Handler(own, worker.cache, policy, hot_cache, downloads, access_log, "test")
        admission = Admission(own.settings, own.counters, ClientCounts.alone(), lambda: 1, most_here=100)
        listening = socket.create_server(("127.0.0.1", 0))
        handed = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener = Listener([listening], handed, own.settings, handler, admission, lambda _now: None)
        address = listening.getsockname()
        listener.start()
        try:
            yield DataPlane(worker, policy, handler, listener, address, epoch)
        finally:
            await listener.drain(1.0)
            await policy.close()
