"""Nodes of one cluster: three real services; or in this process, each a cache with its own peer port, without
an engine.
"""

import asyncio
import contextlib
import gc
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster.nodes import Valkey
from cluster.services import UNLIMITED, Site, running
from harness.caches import Worker, working
from harness.private import private_turns
from harness.processes import until as wait_until
from harness.upstreams import ScriptedUpstream

from gup.cache.fair_shares import ClientCounts
from gup.cache.locks import Slots
from gup.client_names import ClientNames
from gup.cluster.member_list import Member
from gup.cluster.member_list import Members as MemberList
from gup.cluster.signing import Signer
from gup.content.key import ContentKey, Kind
from gup.metrics import MAX_MEMBERS
from gup.server.downloads import Downloads
from gup.server.listener import Listener
from gup.server.peer import PeerAdmission, PeerHandler, PeerLog
from gup.upstream.members import Members


@pytest.fixture
def upstream():
    with ScriptedUpstream() as started:
        yield started


@pytest.fixture
def until() -> Callable:
    async def wait(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - of sockets and other processes
                await asyncio.sleep(0.005)
        assert condition(), what

    return wait


@pytest.fixture
def valkey(tmp_path) -> Iterator[Valkey]:
    engine = Valkey(tmp_path / "valkey")
    yield engine
    engine.kill()


@pytest.fixture
def site(tmp_path) -> Iterator[Site]:
    """Three real services that know each other."""
    with running(tmp_path) as started:
        for name in ("a", "b", "c"):
            started.start(name, settings=UNLIMITED)
        wait_until(started.all_ask_all, "all ask all", 30)
        yield started


SIGNER = Signer("test", (b"a secret of the site",))


def now_ms() -> int:
    return int(time.time() * 1000)


@dataclass
class Node:
    """One node, and how it is taken away."""

    name: str
    worker: Worker
    listener: Listener
    port: int
    known: dict[str, str]
    gone: bool = False

    def knows(self, *nodes: "Node") -> None:
        """These, but for itself, are the members that it may ask."""
        self.known.clear()
        self.known |= {node.name: f"http://127.0.0.1:{node.port}" for node in nodes if node is not self}

    @property
    def sent_bytes(self) -> int:
        return self.worker.counted("gup_peer_sent_bytes_total", slot=str(MAX_MEMBERS))

    @property
    def got_bytes(self) -> int:
        return self.worker.counted("gup_peer_received_bytes_total", slot=str(MAX_MEMBERS))

    async def vanish(self) -> None:
        """Its port closes and its connections are reset."""
        if self.gone:
            return
        self.gone = True
        for connection in list(self.listener._connections):
            connection.cut()
        await self.listener.drain(0.0)


def close_files_of(folder: Path) -> None:
    """What a process had open ends with it, also what a thread was just opening when it was stopped."""

    def left() -> list[int]:
        found = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
                found += [int(link.name)] if link.readlink().is_relative_to(folder) else []
        return found

    if left():
        gc.collect()
        for fd in left():
            os.close(fd)


@asynccontextmanager
async def cluster(root, urls, count: int, **sections) -> AsyncIterator[list[Node]]:
    nodes: list[Node] = []
    async with AsyncExitStack() as stack:
        for number in range(count):
            name = f"node{number}"
            folder = root / name
            folder.mkdir()
            stack.callback(close_files_of, folder)
            worker = await stack.enter_async_context(working(folder, urls, **sections))
            deps = worker.dependencies
            known: dict[str, str] = {}
            await deps.members.close()
            deps.members = Members(
                deps.counters,
                user_agent="gup/test",
                via="1.1 site (gup)",
                node=name,
                signer=lambda: SIGNER,
                time_ms=now_ms,
                listed=lambda known=known: MemberList(
                    others=tuple(Member(*each, askable=True) for each in known.items())
                ),
                is_purged=lambda key, kind, order, deps=deps: deps.purges.name(
                    ContentKey.parse(key), Kind(kind), order
                ),
            )
            listening = socket.create_server(("127.0.0.1", 0))
            slots = Slots(deps.claims, 1_000_000, lambda: 0)
            clients = deps.settings.clients.model_copy(update={"max_downloads": 0})
            downloads = Downloads(
                slots,
                lambda c=clients: c,
                deps.counters,
                lambda _: lambda: 0,
                private_turns(),
                ClientCounts.alone(),
            )
            log = PeerLog(deps.settings, deps.counters, ClientNames("full", b"x" * 32))
            handler = PeerHandler(
                deps, worker.cache, downloads, log, "site", name, lambda: SIGNER, lambda: [now_ms()]
            )
            listener = Listener([listening], None, deps.settings, handler, PeerAdmission(), lambda _: None)
            listener.start()
            nodes.append(Node(name, worker, listener, listening.getsockname()[1], known))
        for node in nodes:
            node.knows(*nodes)
        try:
            yield nodes
        finally:
            for node in nodes:
                await node.vanish()
