"""The store's limits, kept by a running control plane."""

import asyncio

import pytest
from harness.control import limited

from gup.content.key import Kind
from gup.control.eviction import remove_part

pytestmark = pytest.mark.usefixtures("no_blocking_call")


async def test_commits_beyond_the_limit_evict_the_least_recently_used_soon(world):
    world.settings = limited(world.settings, max_size=1000)
    old = world.commit(world.key(revision="_", file="old.7z"), b"o" * 600, Kind.OTHER, at=10.0)
    async with world.running() as control:
        new = await asyncio.to_thread(
            world.commit, world.key(revision="_", file="new.7z"), b"n" * 600, Kind.OTHER, world.now
        )
        begun = asyncio.get_running_loop().time()
        world.tell_committed(new)
        await world.until(lambda: world.counters.get("gup_evictions_total", reason="size") == 1)
        assert asyncio.get_running_loop().time() - begun < 5.0
        # The old entry may have gone while the new one was still a part: parts count too.
        await world.until(lambda: set(control.state.index.rows) == {new.key.text})
        await world.until(lambda: world.store_bytes[-1:] == [600])
    assert not world.store.body_path(old.key).exists()
    assert world.counters.get("gup_evicted_bytes_total", reason="size") == 600
    assert world.epochs == 1


async def test_a_worker_in_need_gets_room(world):
    world.settings = limited(world.settings, max_size=1000)
    old = world.commit(world.key(revision="_", file="old.7z"), b"o" * 600, Kind.OTHER)
    async with world.running():
        world.tell(type="need", bytes=500)
        await world.until(lambda: world.counters.get("gup_evictions_total", reason="size") == 1)
    assert not world.store.body_path(old.key).exists()


async def test_superseded_revisions_go_after_a_commit(world):
    world.settings = limited(world.settings, keep_revisions=1)
    world.commit(world.key("260101001"))
    async with world.running() as control:
        new = await asyncio.to_thread(world.commit, world.key("260101002"))
        world.tell_committed(new)
        await world.until(lambda: world.counters.get("gup_evictions_total", reason="revision") == 1)
        assert set(control.state.index.rows) == {new.key.text}


async def test_the_limit_holds_under_a_stream_of_commits(world):
    world.settings = limited(world.settings, max_size=10_000)
    async with world.running() as control:
        for number in range(60):
            key = world.key(revision="_", file=f"{number:03}.7z")
            record = await asyncio.to_thread(world.commit, key, b"x" * 1000, Kind.OTHER, world.now)
            world.tell_committed(record)
        await world.until(lambda: f"14.3 RU2/French/{world.MONIKER}/_/059.7z" in control.state.index.rows)
        await world.until(lambda: control.state.index.total_bytes <= 10_000)
    bodies = [stored.size_bytes for stored in world.store.scan()]
    assert sum(bodies) == 10_000, "no more is evicted than has to be"


async def test_evict_now_spares_what_is_claimed_or_pinned(world, browser):
    pinned = world.commit(world.key(revision="_", file="pinned.7z"), kind=Kind.OTHER)
    filled = world.commit(world.key(revision="_", file="filled.7z"), kind=Kind.OTHER)
    free = world.commit(world.key(revision="_", file="free.7z"), kind=Kind.OTHER)
    world.store.set_pinned(pinned.key, True)
    abandoned, under_way = world.key("260101008"), world.key("260101009")
    world.begin_part(abandoned, b"a" * 9, 99)
    world.begin_part(under_way, b"u" * 9, 99)
    for key in (filled.key, under_way):
        assert world.claims.try_claim(key.claim_offset)
    async with world.running() as control:
        await world.apply(control, limited(world.settings, max_size=0))
        async with browser.post(world.url + "/api/v1/evict") as answer:
            assert answer.status == 200
        await world.until(lambda: set(control.state.index.rows) == {pinned.key.text, filled.key.text})
    assert not world.store.body_path(free.key).exists()
    assert not world.store.part_path(abandoned.id, 1).exists()
    assert not world.store.state_path(abandoned.id).exists()
    assert world.store.part_path(under_way.id, 1).exists()
    assert world.counters.get("gup_evictions_total", reason="part") == 1
    assert not world.claims.held(free.key.claim_offset)


async def test_nothing_is_evicted_while_the_index_is_incomplete(world):
    record = world.commit()
    world.settings = limited(world.settings, max_size=0)
    async with world.running() as control:
        control.state.index.complete = False
        done = await control.state.evictor.evict()
        assert done == []
        control.state.index.complete = True
        await control.state.evictor.evict()
    assert not world.store.body_path(record.key).exists()


async def test_a_part_that_went_on_meanwhile_is_not_removed(world):
    key = world.key("260101009")
    world.begin_part(key, b"a" * 9, 99)
    async with world.running() as control:
        (part,) = (await control.state.evictor.measure()).parts
        await asyncio.to_thread(world.begin_part, key, b"more" * 9, 99)
        assert not await asyncio.to_thread(remove_part, world.store, part)
    assert world.store.part_path(key.id, 1).exists()
