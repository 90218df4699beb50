"""Every change of an entry holds its claim, and no bad entry stops a job over all of them."""

import asyncio
import json
import os
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest
from harness.control import get, limited

from gup.cache.records import FillState, Phase, seal
from gup.cache.recovery import Recovery
from gup.content.key import Kind
from gup.control.dependencies import BusyError, change, to_its_end
from gup.control.service import Control

OLD, NEW = b"the old body", b"the new generation"


class Tried:
    """Tells when the controller has tried to take a claim in vain."""

    def __init__(self, world, monkeypatch):
        self.refused = asyncio.Event()
        taken = world.claims.try_claim

        def try_claim(offset):
            got = taken(offset)
            if not got:
                self.refused.set()
            return got

        monkeypatch.setattr(world.claims, "try_claim", try_claim)


async def test_a_pin_waits_for_the_fill_and_pins_what_that_has_stored(world, monkeypatch):
    key = world.key("_", "ContentInfo.txt")
    world.commit(key, OLD, Kind.INDEX)
    async with world.running() as control:
        tried = Tried(world, monkeypatch)
        assert world.worker_claims.try_claim(key.claim_offset)
        pinning = asyncio.create_task(control.state.set_pinned(key, pinned=True))
        await tried.refused.wait()
        assert not world.store.load(key).pinned
        fresh = world.commit_claimed(key, NEW, Kind.INDEX)
        world.worker_claims.release(key.claim_offset)
        assert await pinning
    stored = world.store.load(key)
    assert stored == replace(fresh, pinned=True)
    assert world.store.open_body(stored) is not None


async def test_a_purge_waits_for_the_fill_and_removes_what_that_has_stored(world, browser, monkeypatch):
    key = world.key()
    async with world.running():
        tried = Tried(world, monkeypatch)
        assert world.worker_claims.try_claim(key.claim_offset)
        purging = asyncio.create_task(browser.delete(f"{world.url}/api/v1/content/{key.text}"))
        await tried.refused.wait()
        world.commit_claimed(key, NEW)
        world.worker_claims.release(key.claim_offset)
        async with await purging as answer:
            assert (answer.status, (await answer.json())["freed_bytes"]) == (200, len(NEW))
    assert not world.store.body_path(key).exists()
    assert not world.store.record_path(key).exists()


@pytest.mark.parametrize(
    ("method", "path"), [("DELETE", ""), ("PUT", "/pin"), ("DELETE", "/pin")], ids=["purge", "pin", "unpin"]
)
async def test_what_is_claimed_for_longer_is_told_and_left_as_it_is(
    world, browser, monkeypatch, method, path
):
    monkeypatch.setattr(change, "__defaults__", (0.0,))
    record = world.commit(body=OLD)
    async with world.running():
        assert world.worker_claims.try_claim(record.key.claim_offset)
        url = f"{world.url}/api/v1/content/{record.key.text}{path}"
        async with browser.request(method, url) as answer:
            told = await answer.json(content_type=None)
        assert (answer.status, told["status"]) == (409, 409)
        assert record.key.text in told["detail"]
        assert "try again" in told["detail"]
        world.worker_claims.release(record.key.claim_offset)
        assert world.store.load(record.key) == record
        assert world.store.open_body(record) is not None


async def test_the_pin_of_a_new_generation_is_written_when_the_claim_is_free(world, monkeypatch):
    key = world.key("_", "ContentInfo.txt")
    world.commit(key, OLD, Kind.INDEX)
    world.store.set_pinned(key, True)
    async with world.running() as control:
        tried = Tried(world, monkeypatch)
        assert world.worker_claims.try_claim(key.claim_offset)
        fresh = world.commit_claimed(key, NEW, Kind.INDEX)
        world.tell_committed(fresh, replaced=True)
        await asyncio.wait_for(tried.refused.wait(), 10)
        assert control.state.repin == {key.text}
        assert world.store.load(key) == fresh
        world.worker_claims.release(key.claim_offset)
        await world.until(lambda: not control.state.repin)
    assert world.store.load(key) == replace(fresh, pinned=True)


@pytest.mark.parametrize("generation", [7, None], ids=["part", "interrupted commit"])
async def test_nothing_of_what_was_purged_comes_back(world, generation):
    """Neither from a part nor from that of a commit that was interrupted."""
    record = world.commit(body=OLD)
    generation = generation or record.generation
    world.store.part_path(record.key.id, generation).write_bytes(OLD)
    os.utime(world.store.part_path(record.key.id, generation), ns=(0, record.generation))
    world.store.save_state(FillState(record.key, Kind.FULL, generation, Phase.STREAMING, record.head))
    async with world.running() as control:
        assert await control.state.evictor.purge(record.key) == 2 * len(OLD)

    async def nobody(_route):
        raise AssertionError("a purged body is taken over")

    await Recovery(world.store, world.claims, world.counters, nobody, lambda _event: None).run()
    assert [path.name for path in world.store.partial.iterdir()] == ["claims"]
    assert world.store.load(record.key) is None
    assert not world.store.body_path(record.key).exists()


async def test_a_claim_is_held_until_the_change_has_ended_even_if_it_is_cancelled(world):
    key, begun, go_on = world.key(), threading.Event(), threading.Event()

    def slow():
        begun.set()
        go_on.wait(10)

    changing = asyncio.create_task(change(world.claims, key, slow))
    await asyncio.to_thread(begun.wait, 10)
    changing.cancel()
    waiting, _ = await asyncio.wait({changing}, timeout=0)
    assert not waiting
    with pytest.raises(BusyError, match="being fetched or checked"):
        await change(world.worker_claims, key, lambda: None, patience_seconds=0.0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await changing
    await change(world.worker_claims, key, lambda: None, patience_seconds=0.0)


async def test_what_goes_wrong_in_the_thread_is_raised_and_the_claim_given_back(world):
    def broken():
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        await change(world.claims, world.key(), broken)
    assert not world.worker_claims.taken(world.key().claim_offset)
    assert await to_its_end(lambda: 5) == 5


# --- bad entries


def spoil(world, record, **changed):
    """A record with a right checksum and wrong values, as an earlier release imported them."""
    path = world.store.record_path(record.key)
    fields = json.loads(path.read_bytes())
    del fields["checksum"]
    path.write_bytes(seal(fields | changed))


BAD = {
    "length 80.0": lambda world, record: spoil(world, record, length=80.0),
    "negative length": lambda world, record: spoil(world, record, length=-5),
    "huge length": lambda world, record: spoil(world, record, length=10**30),
    "other host": lambda world, record: spoil(world, record, path="@evil.example:80/x"),
    "CRLF": lambda world, record: spoil(world, record, upstream_etag='"\r\nX: y"'),
    "no sums": lambda world, record: spoil(world, record, sums=""),
    "nested": lambda world, record: world.store.record_path(record.key).write_bytes(b"[" * 100_000),
    "pipe": lambda world, record: (
        world.store.record_path(record.key).unlink(),
        os.mkfifo(world.store.record_path(record.key)),
    ),
    "huge file": lambda world, record: os.truncate(world.store.record_path(record.key), 1 << 32),
}


@dataclass
class Passes:
    """What passes over the entries of a running control plane tell."""

    control: Control
    world: Any
    browser: aiohttp.ClientSession

    async def scrub(self) -> int:
        """A whole pass of the scrubber; how many entries it read."""
        scrubber, world = self.control.state.scrubber, self.world
        before = scrubber.progress().ended_at or 0
        world.now += 8 * 86400
        await world.until(lambda: (scrubber.progress().ended_at or 0) > before)
        return scrubber.progress().checked

    async def verify(self) -> dict:
        async with self.browser.post(f"{self.world.url}/api/v1/verify") as answer:
            assert answer.status == 202
        progress = {"running": True}
        while progress["running"]:
            _, progress = await get(self.browser, self.world, "/api/v1/verify")
        assert progress["failed"] is None
        return progress


@asynccontextmanager
async def passes(world, browser):
    world.settings = limited(world.settings, max_size=1 << 30, keep_revisions=0, scrub_rate=1 << 40)
    async with world.running() as control:
        made = Passes(control, world, browser)
        await made.scrub()
        yield made


async def test_bad_records_stop_no_pass_over_all(world, browser):
    """What comes after them is scrubbed, verified, reconciled, listed and evicted too."""
    keys = [world.key(f"2601010{n:02}") for n in range(len(BAD) + 2)]
    records = [world.commit(key, b"body of %s" % key.revision.encode(), at=1000.0) for key in keys]
    good = {keys[0].text, keys[-1].text}
    async with passes(world, browser) as seen:
        for record, harm in zip(records[1:-1], BAD.values(), strict=True):
            harm(world, record)
        assert await seen.scrub() == len(keys)
        _, told = await get(browser, world, "/api/v1/content")
        assert len(told["entries"]) == len(keys)
        for record in records[1:-1]:
            status, told = await get(browser, world, f"/api/v1/content/{record.key.text}")
            assert (status, told["record"]) == (200, None)
        progress = await seen.verify()
        assert progress["checked"] == progress["total"] == len(keys)
        found = {(finding["where"], finding["key"]) for finding in progress["found"]}
        assert found == {("record", record.key.text) for record in records[1:-1]}
        await seen.control._reconcile()
        assert set(seen.control.state.index.rows) == good
        world.settings = limited(world.settings, max_size=1)
        assert {eviction.key for eviction in await seen.control.state.evictor.evict()} == good


async def test_a_mistake_of_ours_at_one_entry_stops_no_pass_over_all(world, browser, monkeypatch):
    records = [world.commit(world.key(f"26010100{n}"), b"body %d" % n) for n in range(3)]
    load = world.store.load

    def broken(key):
        if key == records[1].key:
            raise RuntimeError("nobody has thought of that")
        return load(key)

    async with passes(world, browser) as seen:
        monkeypatch.setattr(world.store, "load", broken)
        assert await seen.scrub() == 3
        progress = await seen.verify()
        assert progress["checked"] == 3
        (found,) = progress["found"]
        assert "nobody has thought of that" in found["detail"]
