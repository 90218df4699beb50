"""A whole data plane on one loop, without processes."""

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
from harness.caches import Worker, working
from harness.private import private_turns

from gup.cache.fair_shares import ClientCounts
from gup.cache.locks import Claims, Slots
from gup.client_names import ClientNames
from gup.server.access_log import AccessLog
from gup.server.admission import Admission
from gup.server.downloads import Downloads
from gup.server.handler import Handler
from gup.server.hot_cache import HotCache
from gup.server.listener import Listener
from gup.server.policy import Policy


@dataclass
class DataPlane:
    worker: Worker
    policy: Policy
    handler: Handler
    listener: Listener
    address: tuple[str, int]
    epoch: list[int]
    """The policy's."""


@pytest.fixture
def serving(tmp_path) -> Callable:
    """A data plane before upstreams with these URLs and settings, as `working` takes them."""

    @contextlib.asynccontextmanager
    async def make(
        urls: list[str], *, prepare: Callable = lambda _worker: None, **more
    ) -> AsyncIterator[DataPlane]:
        with contextlib.ExitStack() as stack:
            async with working(tmp_path, urls, **more) as worker:
                prepare(worker)
                own, epoch = worker.dependencies, [0]
                hot_cache = HotCache(lambda: (epoch[0], own.store_epoch()), worker.cache.close_removed)
                policy = Policy(own, lambda: epoch[0], hot_cache.drop)
                own.pool.lists = lambda name, moniker: (
                    policy.choices.catalogues.listed(name, moniker) is not None
                )
                locks = stack.enter_context(contextlib.closing(Claims(own.store.run / "downloads")))
                none, limits = lambda _name: lambda: 0, lambda: own.settings.clients
                downloads = Downloads(
                    Slots(locks, 0, lambda: 0),
                    limits,
                    own.counters,
                    none,
                    private_turns(),
                    ClientCounts.alone(),
                )
                access_log = AccessLog(own.settings, own.counters, ClientNames("full", b"0" * 16))
                handler = Handler(own, worker.cache, policy, hot_cache, downloads, access_log, "test")
                connections = ClientCounts.alone()
                admission = Admission(own.settings, own.counters, connections, lambda: 1, most_here=100)
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

    return make
