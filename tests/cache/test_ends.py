"""Ends of processes around a commit: what any client had whole is served, with no upstream there."""

import asyncio
import os
import time

import pytest
from harness.caches import Cut, path_of, read, route, slot_of, working
from harness.content import noise, zip_of
from harness.processes import quiet_clock
from harness.upstreams import Answer, Gate, ScriptedUpstream

from gup.cache.cache import Result
from gup.cache.records import CHUNK_BYTES, chunk_sum
from gup.cache.recovery import Recovery
from gup.cache.store import Store
from gup.content.key import Variant
from gup.errors import Problem

FILE, ZIP = path_of("full.dax"), path_of("full.zip")
LENGTH = 2 * CHUNK_BYTES + 12345
BODY = noise("ends", LENGTH)
BODIES = {
    "at once": Answer(BODY[:3000], etag='"a"'),
    "in pieces": Answer(BODY[:400_000], etag='"a"', piece_seconds=0.001),
    "large": Answer(BODY, etag='"a"'),
    "whole chunks": Answer(BODY[: 2 * CHUNK_BYTES], etag='"a"'),
    "of unknown length": Answer(BODY, chunked=True),
}


@pytest.mark.parametrize("stopped", ["at the last byte", "in the commit"])
@pytest.mark.parametrize("body", BODIES, ids=str)
async def test_a_process_ends_after_its_commits(tmp_path, upstream, monkeypatch, body, stopped):
    upstream.answer(FILE, BODIES[body])
    loop, begun = asyncio.get_running_loop(), asyncio.Event()
    commit = Store.commit

    def slowly(store, record, **named):
        loop.call_soon_threadsafe(begun.set)
        time.sleep(0.05)
        return commit(store, record, **named)

    monkeypatch.setattr(Store, "commit", slowly)
    async with working(tmp_path, [upstream.url]) as one:
        opened = await one.open(FILE)
        assert await read(opened.body) == BODIES[body].body
        if stopped == "in the commit":
            await begun.wait()
    assert [event["type"] for event in one.told if event["type"] == "committed"] == ["committed"]
    upstream.stop()
    async with working(tmp_path, [upstream.url]) as next_one:
        opened = await next_one.open(FILE)
        assert opened.result is Result.HIT
        assert await read(opened.body) == BODIES[body].body
    assert list((tmp_path / "partial").glob("*.part")) == []


# --- whole parts


def dies(_store, _record, **_named):
    """The process is killed."""
    raise asyncio.CancelledError


async def dies_before_its_commit(tmp_path, upstream, path: str, answer: Answer) -> None:
    """Leave what a leader leaves that was killed when every byte was written."""
    upstream.answer(path, answer)
    async with working(tmp_path, [upstream.url]) as one:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "commit", dies)
            opened = await one.open(path)
            with pytest.raises(Cut) as cut:
                await read(opened.body)
            assert len(cut.value.args[0]) <= len(answer.body) - 4096, "nobody has it whole"
            while one.cache.fills:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0)
    assert not list((tmp_path / "content").rglob("full.*"))


def recovery_of(worker, clock) -> Recovery:
    return Recovery(
        worker.dependencies.store,
        worker.dependencies.counters,
        lambda found, inherits: worker.cache.take_over(found, found.variant, inherits=inherits),
        worker.dependencies.tell,
        clock,
    )


@pytest.mark.parametrize("by", ["a client", "the controller"])
@pytest.mark.parametrize("body", ["large", "whole chunks", "of unknown length"])
async def test_a_whole_part_is_committed_without_upstream(tmp_path, upstream, until, body, by):
    answer = BODIES[body]
    await dies_before_its_commit(tmp_path, upstream, FILE, answer)
    upstream.stop()
    async with working(tmp_path, [upstream.url], fill={"max": 1}) as next_one:
        async with slot_of(next_one.dependencies.queue, 2, 0.0):  # it needs no slot either
            if by == "the controller":
                now = [0.0]
                recovery = recovery_of(next_one, lambda: now[0])
                await recovery.run()
                if body == "of unknown length":  # whether that is all of it is found out when it is looked at
                    now[0] = 3.0
                    await recovery.run()
                await until(lambda: not next_one.cache.fills, "it is committed")
                opened = await next_one.open(FILE)
                opened.body.leave()
                assert opened.result is Result.HIT
            assert await next_one.get(FILE) == answer.body
            await until(lambda: not next_one.cache.fills, "it is committed")
        assert (await next_one.open(FILE)).result is Result.HIT
        assert [event["type"] for event in next_one.told].count("committed") == 1
        assert next_one.dependencies.store.load_state(route(FILE).key(Variant()).id) is None
    assert not list((tmp_path / "partial").glob("*.part"))
    assert not list((tmp_path / "partial").glob("*.sums"))


async def test_a_follower_that_has_it_whole_commits_it(tmp_path, upstream, until):
    """Its leader is killed between the last byte and the commit, and the upstream has gone too."""
    upstream.answer(FILE, BODIES["large"])
    async with working(tmp_path, [upstream.url]) as follower:
        async with working(tmp_path, [upstream.url]) as leader:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(leader.dependencies.store, "commit", lambda record, **_: dies(None, record))
                led, followed = await leader.open(FILE), await follower.open(FILE)
                with pytest.raises(Cut):
                    await read(led.body)
                upstream.stop()
                assert await read(followed.body) == BODY
            await until(lambda: not follower.cache.fills, "the follower commits")
        assert (await follower.open(FILE)).result is Result.HIT


@pytest.mark.parametrize("where", ["first chunk", "last chunk", "no sum of the last"])
async def test_a_part_of_full_size_that_is_not_right_needs_its_upstream(tmp_path, upstream, until, where):
    await dies_before_its_commit(tmp_path, upstream, FILE, BODIES["large"])
    (part,), (sums,) = ((tmp_path / "partial").glob(f"*.{what}") for what in ("part", "sums"))
    if where == "no sum of the last":
        assert sums.stat().st_size == 24
        os.truncate(sums, 16)
    else:
        with part.open("r+b") as file:
            file.seek(5 if where == "first chunk" else LENGTH - 5)
            file.write(b"wrong")
    with ScriptedUpstream() as second:
        async with working(tmp_path, [second.url], each={"give_up": "1s"}) as next_one:
            second.answer(FILE, BODIES["large"])
            assert await next_one.get(FILE) == BODY
            await until(lambda: not next_one.cache.fills, "the fill ends")
        assert len(second.requests(FILE)) >= 1


async def test_a_whole_part_that_is_no_zip_is_not_committed(tmp_path, upstream):
    right = zip_of("ends", LENGTH)
    await dies_before_its_commit(tmp_path, upstream, ZIP, Answer(right, etag='"a"'))
    (part,), (sums,) = ((tmp_path / "partial").glob(f"*.{what}") for what in ("part", "sums"))
    wrong = right[:-40] + bytes(40)
    part.write_bytes(wrong)
    sums.write_bytes(
        b"".join(
            chunk_sum(wrong[at : at + CHUNK_BYTES]).to_bytes(8, "little")
            for at in range(0, LENGTH, CHUNK_BYTES)
        )
    )
    upstream.stop()
    async with working(tmp_path, [upstream.url], each={"give_up": "100ms"}) as next_one:
        with pytest.raises(Problem):
            await next_one.get(ZIP)
        assert next_one.counted("gup_integrity_failures_total", where="part") == 1
    assert not list((tmp_path / "content").rglob("full.zip"))


@pytest.mark.parametrize("seen", [False, True], ids=["left by a stop", "its leader was seen to die"])
async def test_what_the_controller_goes_on_with_is_never_refused(tmp_path, upstream, until, seen):
    """All slots are taken, for longer than the queue has patience: it waits, or has its leader's slot."""
    gate = Gate()
    now = [0.0]
    cut = Answer(BODY, etag='"a"', gates=((CHUNK_BYTES + 100_000, gate),))
    upstream.answer(FILE, cut, BODIES["large"])
    async with working(tmp_path, [upstream.url], fill={"max": 1, "queue_timeout": "10ms"}) as controller:
        recovery = recovery_of(controller, lambda: now[0])
        async with working(tmp_path, [upstream.url]) as leader:
            opened = await leader.open(FILE)
            await until(lambda: gate.is_reached and opened.body.published > CHUNK_BYTES, "the gate")
            if seen:
                await recovery.run()
        gate.open()
        async with slot_of(controller.dependencies.queue, 2, 0.0) as held:
            assert held
            for later in (10.0, 20.0):
                now[0] = later
                await recovery.run()
            if seen:
                await until(lambda: not controller.cache.fills, "it has ended, with the slot still taken")
            else:
                await until(controller.dependencies.queue.waiting, "it waits")
                await asyncio.sleep(0.05)
                assert controller.cache.fills == 1
        await until(lambda: not controller.cache.fills, "it has ended")
        assert (await controller.open(FILE)).result is Result.HIT
        assert controller.dependencies.queue.idle()


# --- followers


async def test_a_follower_looks_ever_more_rarely_while_its_leader_queues(tmp_path, upstream, until):
    gate = Gate()
    upstream.answer(path_of("full.dax", revision="260101001"), Answer(BODY, gates=((1000, gate),)))
    upstream.answer(FILE, BODIES["at once"])
    async with (
        working(tmp_path, [upstream.url], fill={"max": 1}) as leader,
        working(tmp_path, [upstream.url], fill={"max": 1}) as follower,
    ):
        other = asyncio.create_task(leader.get(path_of("full.dax", revision="260101001")))
        await until(lambda: gate.is_reached, "the slot is taken")
        queued = asyncio.create_task(leader.get(FILE))
        await until(leader.dependencies.queue.waiting, "the leader queues")
        looks, taken = 0, follower.dependencies.claims.taken

        def counted(offset: int) -> bool:
            nonlocal looks
            looks += offset == route(FILE).key(Variant()).claim_offset
            return taken(offset)

        follower.dependencies.claims.taken = counted  # type: ignore[method-assign]
        following = asyncio.create_task(follower.get(FILE))
        await asyncio.sleep(1.5)
        assert 10 < looks < 65, "over 130 with a look each 16 ms"
        gate.open()
        ended = quiet_clock()
        assert await following == await queued == BODIES["at once"].body
        assert quiet_clock() - ended < 2.0
        assert await other == BODY
