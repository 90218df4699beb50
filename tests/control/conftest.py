"""A real store, a fake process around the control plane, and a browser of sorts."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import aiohttp
import pytest
from blockbuster import blockbuster_ctx
from harness.private import private_counters

from gup.cache.budget_gate import BudgetGate
from gup.cache.locks import Claims
from gup.cache.purges import Purges
from gup.cache.records import ChunkSums, FillState, Head, Phase, Record
from gup.cache.store import Store
from gup.config import Settings
from gup.content.catalog import Catalogues
from gup.content.key import ContentKey, Kind, Variant
from gup.content.routes import Route
from gup.control.auth import local_path, make_local_token
from gup.control.dependencies import ControlDependencies, Reload
from gup.control.entry_table import EntryTable
from gup.control.service import Control
from gup.errors import Problem
from gup.metrics import Counters, layout

ZoneInfo("UTC")  # in memory from now on: the control plane is made before its loop runs, and may read it
MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"


def content_key(revision: str = "260101001", file: str = "full.zip", **parts: str) -> ContentKey:
    names = {"version": "14.3 RU2", "language": "French", "stream": MONIKER} | parts
    return ContentKey(**names, revision=revision, file=file)


def commit(store: Store, key: ContentKey, body: bytes, kind: Kind = Kind.FULL, at: float = 1000.0) -> Record:
    """Bring an entry into the store the way a fill does."""
    generation = time.time_ns()
    store.part_path(key.id, generation).write_bytes(body)
    sums = ChunkSums()
    sums.add(body)
    head = Head(len(body), f'"{key.id[:8]}"', "application/zip", None, "manager", None)
    record = Record.of(key, kind, head, sums.finish(), at, generation, "")
    store.commit(record)
    store.touch(key, at)
    return record


@dataclass
class World:
    """The fake process: what the control plane asked of it, and the way to send it events."""

    root: Path
    store: Store
    claims: Claims
    worker_claims: Claims
    worker_store: Store
    counters: Counters
    settings: Settings
    sender: socket.socket
    receiver: socket.socket
    now: float = 2_000_000.0
    installed_at: float = 2_000_000.0 - 86400
    epochs: int = 0
    purged: int = 0
    store_bytes: list[int] = field(default_factory=list)
    workers: list[dict[str, object]] = field(
        default_factory=lambda: [{"slot": 0, "pid": 4711, "up_since": 1_999_000.0, "ready": True}]
    )
    streams: list[tuple[str, str, str]] = field(default_factory=list)
    wan_rate: int = 8_000_000
    config_ok: bool = True
    reloads: int = 0
    reload_problems: list[str] = field(default_factory=list)
    reload_waiting: list[str] = field(default_factory=list)
    recovered: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    mends: list[tuple[str, bool]] = field(default_factory=list)
    problem: Problem | None = None
    whole: dict[str, bytes] = field(default_factory=dict)

    MONIKER = MONIKER
    key = staticmethod(content_key)

    @staticmethod
    async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Let the loop turn until `condition` holds; fails when it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come to hold"
            await asyncio.sleep(0.002)

    def commit(
        self, key: ContentKey | None = None, body: bytes = b"body", kind: Kind = Kind.FULL, at: float = 1000.0
    ) -> Record:
        """Bring an entry into the store the way a worker does: holding the key's claim."""
        key = key or content_key()
        with self.claimed(key) as store:
            return commit(store, key, body, kind, at)

    @contextlib.contextmanager
    def claimed(self, key: ContentKey) -> Iterator[Store]:
        """A worker's store, while that worker has the key's claim."""
        while not self.worker_claims.try_claim(key.claim_offset):
            time.sleep(0.001)  # the controller looks at this key at the moment
        try:
            yield self.worker_store
        finally:
            self.worker_claims.release(key.claim_offset)

    def commit_claimed(self, key: ContentKey, body: bytes, kind: Kind = Kind.FULL) -> Record:
        """The same, by a worker that holds the claim already."""
        assert self.worker_claims.held(key.claim_offset)
        return commit(self.worker_store, key, body, kind)

    def begin_part(self, key: ContentKey, body: bytes, length: int) -> None:
        """A part under way, as a worker leaves it on disk (the claim is the test's affair)."""
        head = Head(length, '"tag"', "application/zip", None, "manager", None)
        self.store.part_path(key.id, 1).write_bytes(body)
        self.worker_store.save_state(FillState(key, Kind.FULL, 1, Phase.STREAMING, head))

    def totals(self) -> dict[str, int]:
        return {name: self.counters.words[at] for at, name in enumerate(layout(["manager"]))}

    def share_purges(self) -> None:
        self.purged += 1
        self.raise_epoch()

    def raise_epoch(self) -> None:
        self.epochs += 1

    async def upgrade(self) -> list[str]:
        return self.reload_problems

    async def reload(self) -> Reload:
        self.reloads += 1
        return Reload(self.reload_problems, ["wan.rate"], self.reload_waiting)

    async def recover(self) -> None:
        self.recovered.set()

    async def fetch_ahead(self, _route: Route, _variant: Variant) -> bool:
        raise Problem("no-upstream", "nothing can be fetched here")

    async def mend(self, key: ContentKey, counted: bool) -> Problem | None:
        """What the cache would do: the body is whole again, unless a problem is set."""
        if self.problem is None and key.text in self.whole:
            await asyncio.to_thread(self._make_whole, key)
        self.mends.append((key.text, counted))
        return self.problem

    def _make_whole(self, key: ContentKey) -> None:
        path, record = self.store.body_path(key), self.store.load(key)
        path.write_bytes(self.whole[key.text])
        self.store.set_time(path, record)

    def tell(self, **event: Any) -> None:
        self.sender.send(json.dumps(event).encode())

    def tell_committed(self, record: Record, *, replaced: bool = False) -> None:
        self.tell(
            type="committed",
            key=record.key.text,
            length=record.length,
            replaced=replaced,
            kind=str(record.kind),
        )

    def dependencies(self, admin: socket.socket | None = None) -> ControlDependencies:
        self.gate = BudgetGate.of(lambda: self.settings.wan.budget, self.counters, lambda: self.now)
        return ControlDependencies(
            settings=lambda: self.settings,
            store=self.store,
            claims=self.claims,
            counters=self.counters,
            totals=self.totals,
            since_start=self.totals,
            stream_names=lambda: self.streams,
            raise_store_epoch=self.raise_epoch,
            purges=Purges(self.store.run, lambda: self.purged),
            share_purges=self.share_purges,
            set_store_bytes=self.store_bytes.append,
            promised_bytes=lambda: 0,
            wan_rate=lambda: self.wan_rate,
            site_rate=lambda: self.wan_rate,
            workers=lambda: self.workers,
            config_ok=lambda: self.config_ok,
            reload=self.reload,
            upgrade=self.upgrade,
            recover=self.recover,
            mend=self.mend,
            events=self.receiver,
            admin=admin or self.sender,
            handed=(self.sender, self.sender),
            started_at=self.now - 3600,
            installed_at=self.installed_at,
            label_of=lambda _stream, _file: None,
            upstream_states=lambda: {"manager": ("unknown", None)},
            fetch_ahead=self.fetch_ahead,
            head=self.fetch_ahead,
            drop_memory=lambda _key: 0,
            places=lambda _stream: (),
            link_idle=lambda: True,
            gate=self.gate,
            fills_waiting=lambda: 0,
            catalogues=dict,
            catalogue_rows=Catalogues,
            unlisted=lambda _moniker: None,
        )

    async def apply(self, control: Control, settings: Settings) -> None:
        """What the controller process does with reloaded settings."""
        self.settings = settings
        await control.apply(settings)

    @asynccontextmanager
    async def running(self, *, complete: bool = True) -> AsyncIterator[Control]:
        """A control plane that serves on a loopback port."""
        before = asyncio.all_tasks()
        admin = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{admin.getsockname()[1]}"
        control = Control(self.dependencies(admin), lambda: self.now)
        await control.start()
        try:
            if complete:
                await self.until(lambda: control.state.index.complete)
            yield control
        finally:
            await control.stop()
            admin.close()
        left = asyncio.all_tasks() - before
        assert not left, f"tasks left behind: {left}"
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("gup-")]
        assert not threads, f"threads left behind: {threads}"


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr("gup.control.integrity_jobs._IDLE_SECONDS", 0.05)
    store = Store(tmp_path / "cache")
    store.prepare()
    await asyncio.to_thread(make_local_token, store.run)
    claims, worker_claims = Claims(store.partial / "claims"), Claims(store.partial / "claims")
    store.claims = claims
    worker_store = Store(store.root, worker_claims)
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    settings = Settings.model_validate(
        {
            "cache": {
                "directory": store.root,
                "max_size": "1MB",
                "min_free": "0B",
                "max_unused": "0s",
                "max_part_age": "0s",
            },
            "upstream": [{"name": "manager", "url": "http://manager:8014"}],
            "site": {"name": "branch-7"},
        }
    )
    counters = private_counters(["manager"])
    with blockbuster_ctx("gup.control") as watch:  # what it calls on the loop; tests may block
        for name, function in watch.functions.items():
            if name.startswith("sqlite3."):  # a database in memory
                function.can_block_in("gup/control/entry_table.py", set(vars(EntryTable)))
        yield World(
            tmp_path, store, claims, worker_claims, worker_store, counters, settings, sender, receiver
        )
    claims.close()
    worker_claims.close()
    sender.close()
    receiver.close()


@pytest.fixture
def table() -> Iterator[EntryTable]:
    with contextlib.closing(EntryTable()) as table:
        yield table


@pytest.fixture
async def browser(world: World) -> AsyncIterator[aiohttp.ClientSession]:
    """Shows the token that commands on the same machine show."""
    shown = {"Authorization": f"Bearer {local_path(world.store.run).read_text().strip()}"}
    timeout = aiohttp.ClientTimeout(total=20)
    async with aiohttp.ClientSession(timeout=timeout, headers=shown) as session:
        yield session
