"""Every change of an entry holds its claim."""

import asyncio
import os
import threading
from dataclasses import replace

import pytest

from gup.cache.purges import Selection
from gup.cache.records import FillState, Phase
from gup.cache.recovery import Recovery
from gup.content.key import Kind
from gup.control import eviction
from gup.control.dependencies import BusyError, change
from gup.control.threads import to_its_end

OLD, NEW = b"the old body", b"the new generation"


@pytest.fixture
def refused(world, monkeypatch) -> asyncio.Event:
    """Tells when the controller has tried to take a claim in vain."""
    told, taken = asyncio.Event(), world.claims.try_claim

    def try_claim(offset):
        if not (got := taken(offset)):
            told.set()
        return got

    monkeypatch.setattr(world.claims, "try_claim", try_claim)
    return told


async def test_a_pin_waits_for_the_fill_and_pins_what_that_has_stored(world, refused):
    key = world.key("_", "ContentInfo.txt")
    world.commit(key, OLD, Kind.INDEX)
    async with world.running() as control:
        assert world.worker_claims.try_claim(key.claim_offset)
        pinning = asyncio.create_task(control.state.set_pinned(key, pinned=True))
        await refused.wait()
        assert not world.store.load(key).pinned
        fresh = world.commit_claimed(key, NEW, Kind.INDEX)
        world.worker_claims.release(key.claim_offset)
        assert await pinning
    stored = world.store.load(key)
    assert stored == replace(fresh, pinned=True)
    assert world.store.open_body(stored) is not None


async def test_a_purge_waits_for_the_fill_and_removes_what_that_has_stored(world, browser, refused):
    key = world.key()
    async with world.running():
        assert world.worker_claims.try_claim(key.claim_offset)
        purging = asyncio.create_task(browser.delete(f"{world.url}/api/v1/content/{key.text}"))
        await refused.wait()
        world.commit_claimed(key, NEW)
        world.worker_claims.release(key.claim_offset)
        async with await purging as answer:
            assert (answer.status, (await answer.json())["freed_bytes"]) == (200, len(NEW))
    assert not world.store.body_path(key).exists()
    assert not world.store.record_path(key).exists()


@pytest.mark.parametrize(("method", "path"), [("PUT", "/pin"), ("DELETE", "/pin")], ids=["pin", "unpin"])
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


async def test_what_is_claimed_for_longer_is_purged_as_soon_as_it_is_free(world, browser, monkeypatch):
    monkeypatch.setattr(eviction, "PATIENCE_SECONDS", 0.0)
    record = world.commit(body=OLD)
    async with world.running() as control:
        url = f"{world.url}/api/v1/content/{record.key.text}"
        assert world.worker_claims.try_claim(record.key.claim_offset)
        async with browser.delete(url) as answer:
            assert (answer.status, (await answer.json())["freed_bytes"]) == (200, 0)
        assert control.state.dependencies.purges.name(record.key, Kind.FULL, record.order)
        fresh = replace(record, order=control.state.dependencies.purges.known)
        assert not control.state.dependencies.purges.name(record.key, Kind.FULL, fresh.order)
        world.worker_claims.release(record.key.claim_offset)
        await world.until(lambda: not world.store.body_path(record.key).exists())
        await world.until(lambda: record.key.text not in control.state.index.rows)


async def test_on_a_full_disk_what_is_purged_makes_room_for_the_note(world, monkeypatch):
    record, added = world.commit(body=OLD), []

    def add_purge(run, purge):
        if not added:
            added.append(purge)
            raise OSError(28, "No space left on device")
        assert not world.store.body_path(record.key).exists()
        real(run, purge)

    real = eviction.add_purge
    monkeypatch.setattr(eviction, "add_purge", add_purge)
    async with world.running() as control:
        assert await control.state.evictor.purge(record.key) == len(OLD)
        assert control.state.dependencies.purges.known >= f"-={added[0].number}"
        assert not control.state.index.rows


@pytest.mark.parametrize("died", [False, True], ids=["it lives", "the controller died"])
async def test_a_body_that_is_fetched_after_the_purge_stays(world, died):
    """Also when the files of an earlier one could not be removed at once."""
    record = world.commit(body=OLD)
    async with world.running() as control:
        assert world.worker_claims.try_claim(record.key.claim_offset)
        assert await control.state.evictor.purge_all([record.key], Selection(pattern="*")) == (1, 0)
        if not died:
            number = control.state.dependencies.purges.known
            fresh = replace(record, order=number)
            world.worker_store.save(fresh)
            world.worker_claims.release(record.key.claim_offset)
            await world.until(lambda: not control.state.evictor._left)
            assert world.store.load(record.key) == fresh
            return
    world.worker_claims.release(record.key.claim_offset)
    async with world.running():
        await world.until(lambda: not world.store.body_path(record.key).exists())


async def test_the_pin_of_a_new_generation_is_written_when_the_claim_is_free(world, refused):
    key = world.key("_", "ContentInfo.txt")
    world.commit(key, OLD, Kind.INDEX)
    with world.claimed(key) as store:
        store.set_pinned(key, True)
    async with world.running() as control:
        assert world.worker_claims.try_claim(key.claim_offset)
        fresh = world.commit_claimed(key, NEW, Kind.INDEX)
        world.tell_committed(fresh, replaced=True)
        await asyncio.wait_for(refused.wait(), 10)
        assert control.state.repin == {key.text}
        assert world.store.load(key) == fresh
        world.worker_claims.release(key.claim_offset)
        await world.until(lambda: not control.state.repin)
        assert control.state.index.rows[key.text].pinned
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

    await Recovery(world.store, world.counters, nobody, lambda _event: None).run()
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


async def test_a_commit_goes_on_while_empty_folders_are_pruned(world, monkeypatch):
    make, prunes = os.mkdir, iter(range(3))

    def make_and_prune(path, *more, **named):
        make(path, *more, **named)
        if next(prunes, None) is not None:
            world.store.prune()  # as reconciling does, in a thread of the controller

    with monkeypatch.context() as patched:  # undone before the world ends, which watches this call itself
        patched.setattr(os, "mkdir", make_and_prune)
        record = world.commit()
    assert world.store.load(record.key) == record
    assert next(prunes, None) is None


async def test_what_was_to_be_pinned_before_it_was_known_is_pinned_in_lists_too(world):
    """An order of another member may come between a commit and the event of it."""
    key = world.commit().key
    async with world.running() as control:
        assert not control.state.index.rows.get(key.text).pinned
        control.state.repin.add(key.text)
        await world.until(lambda: control.state.index.rows.get(key.text).pinned)
        assert world.store.load(key).pinned
        control.state.repin.add(key.text)
        await control.state.set_pinned(key, pinned=False)
        assert not control.state.repin
