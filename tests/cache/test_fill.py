"""Fills: one leader on the machine, followers in other processes, and every end that a fill can have."""

import asyncio
import os
import random
import time
from dataclasses import replace

import pytest
from harness.caches import MONIKER, Cut, path_of, read, route, working
from harness.upstreams import Answer, Gate, ScriptedUpstream

from gup.cache.cache import Result
from gup.cache.follower import _IDLE_POLL_SECONDS
from gup.cache.locks import Claims
from gup.cache.records import CHUNK_BYTES, Phase, seal, unseal
from gup.cache.recovery import renew
from gup.content.catalog import CATALOG_PATH
from gup.content.key import ContentKey, Variant
from gup.errors import Problem

FILE = path_of("full.dax")
BODY = random.Random(7).randbytes(3 * CHUNK_BYTES + 12345)
SMALL_FILE = path_of("xdelta260801001_To_260802001.dax")
SMALL_BODY = BODY[:100_000]


async def test_the_end_is_withheld_until_the_body_is_found_right(tmp_path, upstream, until):
    gate = Gate()
    upstream.answer(FILE, Answer(BODY, etag='"a"', gates=((len(BODY) - 1, gate),)))
    async with working(tmp_path, [upstream.url]) as one:
        opened = await one.open(FILE)
        await until(
            lambda: gate.is_reached and opened.body.published >= len(BODY) - 4096 - 65536, "most of it"
        )
        assert opened.body.published <= len(BODY) - 4096
        gate.open()
        assert await read(opened.body) == BODY


async def test_a_body_that_ends_wrongly_is_never_held_whole_and_not_stored(tmp_path, upstream):
    upstream.answer(path_of("full.zip"), Answer(BODY, etag='"a"'))  # no ZIP
    async with working(tmp_path, [upstream.url]) as one:
        opened = await one.open(path_of("full.zip"))
        with pytest.raises(Cut) as cut:
            await read(opened.body)
        assert len(cut.value.args[0]) <= len(BODY) - 4096
        with pytest.raises(Problem) as problem:
            await one.open(path_of("full.zip"))
        assert problem.value.slug == "upstream-bad-body"
        assert not list((tmp_path / "content").rglob("*.zip"))
        assert not list((tmp_path / "partial").glob("*.part"))


async def test_a_client_that_waits_at_a_follower_is_not_polled_for_at_the_idle_interval(
    tmp_path, upstream, until, monkeypatch
):
    """The first look after the body appeared counts: the client is not one of its readers yet."""
    head, rest = Gate(), Gate()
    upstream.answer(FILE, Answer(BODY, etag='"a"', gates=((0, head), (CHUNK_BYTES, rest))))
    async with working(tmp_path, [upstream.url]) as leader, working(tmp_path, [upstream.url]) as follower:
        led = asyncio.create_task(leader.open(FILE))
        await until(lambda: head.is_reached, "the leader waits for the body")
        followed = asyncio.create_task(follower.open(FILE))
        fills = follower.cache._fills
        await until(lambda: any(fill.wanted for fill in fills.values()), "the follower's client")
        pauses, sleep = [], asyncio.sleep

        def pause(seconds, *result):
            pauses.append(seconds)
            return sleep(seconds, *result)

        monkeypatch.setattr("gup.cache.follower.asyncio.sleep", pause)
        head.open()
        opened = await followed
        assert opened.body.published < len(BODY)
        await sleep(0)
        assert _IDLE_POLL_SECONDS not in pauses
        rest.open()
        assert await read(opened.body) == BODY
        assert await read((await led).body) == BODY
    assert len(upstream.requests(FILE)) == 1


# --- takeover


async def _dies_at(tmp_path, upstream, amount: int, until) -> None:
    """Leave what a leader leaves that is killed near `amount` bytes: the last 70,000 may be missing."""
    gate = Gate()
    upstream.answer(FILE, Answer(BODY, etag='"a"', gates=((amount, gate),)), Answer(BODY, etag='"a"'))
    async with working(tmp_path, [upstream.url]) as leader:
        opened = await leader.open(FILE)
        await until(lambda: opened.body.published >= amount - 70_000 and gate.is_reached, "its part")
    gate.open()


async def test_a_dead_leaders_part_is_taken_over_from_its_last_good_byte(tmp_path, upstream, until):
    amount = 2 * CHUNK_BYTES + 100_000
    await _dies_at(tmp_path, upstream, amount, until)
    async with working(tmp_path, [upstream.url]) as next_one:
        assert await next_one.get(FILE) == BODY
        assert next_one.counted("gup_fill_resumes_total", reason="takeover") == 1
    assert upstream.requests(FILE)[-1].body_bytes == len(BODY) - 2 * CHUNK_BYTES + 65536
    assert upstream.requests(FILE)[-1].header("if-range") == '"a"'


@pytest.mark.parametrize("size", ["small", "large"])
async def test_an_interrupted_commit_is_finished(tmp_path, upstream, until, monkeypatch, size):
    """Its record is written, and the leader is killed before the body is in its place."""
    body = BODY if size == "large" else BODY[:5000]
    upstream.answer(FILE, Answer(body, etag='"a"'))
    async with working(tmp_path, [upstream.url]) as one:
        store = one.dependencies.store
        died = asyncio.Event()
        loop = asyncio.get_running_loop()

        def dies(record, **_named):
            store.save(record)
            loop.call_soon_threadsafe(died.set)
            raise asyncio.CancelledError  # the leader ends here, as if it had been killed

        monkeypatch.setattr(store, "commit", dies)
        with pytest.raises((Cut, Problem)):  # nobody has had it whole
            await one.get(FILE)
        await died.wait()
        await until(lambda: not one.cache.fills, "the fill ends")
    upstream.stop()
    async with working(tmp_path, [upstream.url]) as next_one:
        opened = await next_one.open(FILE)
        assert opened.result is Result.HIT
        assert await read(opened.body) == body
        assert next_one.dependencies.store.load_state(opened.key.id) is None
    assert len(upstream.requests(FILE)) == 1


async def test_a_record_of_the_first_format_is_read(tmp_path, upstream, until):
    upstream.answer(FILE, Answer(BODY, etag='"a"'))
    async with working(tmp_path, [upstream.url]) as one:
        assert await one.get(FILE) == BODY
        await until(lambda: not one.cache.fills, "the fill ends")
        store = one.dependencies.store
        (path,) = (tmp_path / "content").rglob(".full.dax.gup")
        members = unseal(path.read_bytes(), "record", 1 << 20)
        body = store.body_path(ContentKey.parse(members["key"]))
        os.utime(body, ns=(1, 1_700_000_000_123_456_789))
        members |= {"format": 1, "body_mtime_ns": 1_700_000_000_123_456_789}
        del members["generation"]
        path.write_bytes(seal(members))
    upstream.stop()
    async with working(tmp_path, [upstream.url]) as next_one:
        opened = await next_one.open(FILE)
        assert opened.result is Result.HIT
        assert await read(opened.body) == BODY


async def test_an_entry_that_is_purged_as_soon_as_it_is_stored_is_fetched_again(
    tmp_path, upstream, until, monkeypatch
):
    """It is purged between the look that finds it and the answer."""
    upstream.answer(FILE, Answer(BODY, etag='"a"'))
    async with working(tmp_path, [upstream.url]) as one, working(tmp_path, [upstream.url]) as two:
        await one.get(FILE)
        await until(lambda: not one.cache.fills, "the fill ends")
        looked, left = two.cache._entries.load, [1]

        def purged_after_the_look(key):
            found = looked(key)
            if left[0]:
                left[0] -= 1
                one.dependencies.store.claims = None
                one.dependencies.store.remove(key)
                two.dependencies.raise_store_epoch()
            return found

        monkeypatch.setattr(two.cache._entries, "load", purged_after_the_look)
        assert await two.get(FILE) == BODY
    assert len(upstream.requests(FILE)) == 2


async def test_a_failure_in_mid_body_keeps_the_part_for_the_next_try(tmp_path, upstream, until):
    upstream.answer(FILE, Answer(BODY, etag='"a"', close_at=2 * CHUNK_BYTES), Answer(b"", 503))
    async with working(tmp_path, [upstream.url], cache={"error_ttl": "50ms"}) as one:
        opened = await one.open(FILE)
        with pytest.raises(Cut):
            await read(opened.body)
        await until(lambda: not one.cache.fills, "the fill ends")
        state = one.dependencies.store.load_state(opened.key.id)
        assert state is not None
        assert state.phase is Phase.FAILED
        assert state.failure is not None
        upstream.answer(FILE, Answer(BODY, etag='"a"'))
        before = upstream.body_bytes(FILE)
        await until(lambda: not one.failed(FILE), "the failure expires")
        again = await one.open(FILE)
        assert again.body.head.etag == opened.body.head.etag
        assert await read(again.body) == BODY
        assert upstream.body_bytes(FILE) - before <= len(BODY) - 2 * CHUNK_BYTES + 65536


# --- unknown length, ranges ahead, what can't be stored


async def test_a_body_of_unknown_length_is_stored_with_an_etag_at_the_end(tmp_path, upstream, until):
    upstream.answer(FILE, Answer(BODY, chunked=True))
    async with working(tmp_path, [upstream.url]) as one, working(tmp_path, [upstream.url]) as two:
        first, second = await one.open(FILE), await two.open(FILE)
        assert first.body.head.etag is None
        assert await read(first.body) == BODY == await read(second.body)
        await until(lambda: not one.cache.fills, "the fill ends")
        stored = await one.open(FILE)
        assert stored.result is Result.HIT
        assert stored.body.head.etag is not None


async def test_a_span_far_ahead_is_fetched_alone_and_at_most_two_at_once(tmp_path, upstream, until):
    gate = Gate()
    upstream.answer(FILE, Answer(BODY, etag='"a"', gates=((200_000, gate),)), Answer(BODY, etag='"a"'))
    async with working(tmp_path, [upstream.url], fill={"range_wait": "10ms"}) as one:
        opened = await one.open(FILE)
        await until(lambda: gate.is_reached, "the gate")
        spans = [
            await one.cache.pass_through.range(opened, route(FILE), Variant(), start, start + 900_000)
            for start in (1_000_000, 1_100_000, 1_150_000)
        ]
        assert spans[2] is None
        for start, span in zip((1_000_000, 1_100_000), spans, strict=False):
            assert await read(span, start) == BODY[start : start + 900_000]
            span.leave()
        gate.open()
        assert await read(opened.body) == BODY
    assert upstream.requests(FILE)[1].header("range") == "bytes=1000000-1899999"


@pytest.mark.parametrize("catalog", [True, False])
async def test_a_moniker_that_upstream_spells_otherwise_is_found(tmp_path, upstream, catalog):
    """A file system that tells upper from lower case, and a client that does not."""
    spelled = MONIKER.replace("E8A", "e8a") if catalog else MONIKER
    asked = FILE.replace(MONIKER, MONIKER.lower())
    upstream.answer(FILE.replace(MONIKER, spelled), Answer(BODY, etag='"a"'))
    upstream.exact = True
    if catalog:
        upstream.answer(CATALOG_PATH, Answer(f"{spelled}: Definitions - Short - SymAllLanguages".encode()))
    async with working(tmp_path, [upstream.url]) as one:
        assert await one.get(asked) == BODY
        assert await one.get(FILE) == BODY
        with pytest.raises(Problem):
            await one.open(path_of("full.zip").replace(MONIKER, spelled))
    asked_for = [seen.path for seen in upstream.requests()]
    assert len([path for path in asked_for if path.endswith("full.dax")]) == 2
    assert len([path for path in asked_for if path.endswith("full.zip")]) == 1
    assert len([path for path in asked_for if path.endswith("ContentInfo.txt")]) == 1


async def test_an_index_file_is_revalidated_once_and_served_stale(tmp_path, upstream, until):
    index = "/content/ContentInfo.txt"
    upstream.answer(index, Answer(b"first", etag='"1"'))
    async with working(tmp_path, [upstream.url], cache={"index_ttl": "60s", "error_ttl": "60s"}) as one:
        ahead = 0.0
        one.dependencies.wall_clock = lambda: time.time() + ahead
        assert await one.get(index) == b"first"
        await until(lambda: not one.cache.fills, "the fill ends")
        ahead = 61.0
        again = await asyncio.gather(*(one.open(index) for _ in range(5)))
        assert {opened.result for opened in again} <= {Result.REVALIDATED, Result.COLLAPSED, Result.HIT}
        assert [seen.status for seen in upstream.requests(index)] == [200, 304]
        upstream.answer(index, Answer(b"", 503))
        ahead = 122.0
        stale = await asyncio.gather(*(one.open(index) for _ in range(5)))
        assert {opened.result for opened in stale} == {Result.STALE}
        assert await read(stale[0].body) == b"first"
        assert len(upstream.requests(index)) == 3


async def test_an_upstream_that_is_away_at_the_takeover_costs_nothing_of_the_part(tmp_path, upstream, until):
    """The next try, when upstream is there again, goes on where the dead leader was."""
    await _dies_at(tmp_path, upstream, 2 * CHUNK_BYTES + 100_000, until)
    upstream.answer(FILE, Answer(b"", 503))
    async with working(tmp_path, [upstream.url], cache={"error_ttl": "50ms"}) as next_one:
        with pytest.raises(Problem):
            await next_one.get(FILE)
        upstream.answer(FILE, Answer(BODY, etag='"a"'))
        await until(lambda: not next_one.failed(FILE), "the failure expires")
        assert await next_one.get(FILE) == BODY
    assert upstream.requests(FILE)[-1].body_bytes == len(BODY) - 2 * CHUNK_BYTES + 65536


async def test_an_upstream_that_cuts_within_the_unsure_tail_is_got_through_all_the_same(
    tmp_path, upstream, until
):
    """What was compared and found right is not compared again after the next cut."""
    await _dies_at(tmp_path, upstream, 2 * CHUNK_BYTES - 10_000, until)
    upstream.answer(FILE, Answer(BODY, etag='"a"', cut_after=400_000))
    async with working(tmp_path, [upstream.url]) as next_one:
        assert await next_one.get(FILE) == BODY


async def test_an_upstream_that_hangs_for_longer_than_give_up_is_no_reason_not_to_ask_another(
    tmp_path, upstream
):
    upstream.answer(FILE, Answer(BODY, etag='"a"', stall_after=CHUNK_BYTES))
    quick = {"read_timeout": "300ms", "give_up": "100ms"}
    with ScriptedUpstream() as second:
        second.answer(FILE, Answer(BODY, etag='"b"'))
        async with working(tmp_path, [upstream.url, second.url], each=quick) as one:
            assert await one.get(FILE) == BODY


async def test_a_revalidation_puts_no_old_record_over_what_came_meanwhile(tmp_path, upstream, until):
    """The record is read again under the claim: another body's stays, a pin stays, nothing comes back."""
    upstream.answer(FILE, Answer(BODY, etag='"a"'), Answer(b"x" + BODY, etag='"b"'))
    async with working(tmp_path, [upstream.url]) as one:
        await one.get(FILE)
        key, store, claims = route(FILE).key(Variant()), one.dependencies.store, one.dependencies.claims
        await until(lambda: claims.try_claim(key.claim_offset), "the fill ends")
        old = store.load(key)
        store.set_pinned(key, True)
        renew(one.dependencies, old, 5.0)
        assert store.load(key) == replace(old, pinned=True, validated_at=5.0)
        store.remove(key)
        renew(one.dependencies, old, 6.0)
        assert store.load(key) is None
        claims.release(key.claim_offset)
        one.dependencies.raise_store_epoch()
        one.cache.close_removed()
        assert await one.get(FILE) == b"x" + BODY
        await until(lambda: claims.try_claim(key.claim_offset), "the fill ends")
        new = store.load(key)
        renew(one.dependencies, old, 7.0)
        assert store.load(key) == new
        claims.release(key.claim_offset)


async def test_the_store_is_changed_by_whoever_holds_the_claim_only(tmp_path, upstream, until):
    upstream.answer(FILE, Answer(BODY, etag='"a"'))
    async with working(tmp_path, [upstream.url]) as one:
        await one.get(FILE)
        key, store, claims = route(FILE).key(Variant()), one.dependencies.store, one.dependencies.claims
        await until(lambda: claims.try_claim(key.claim_offset), "the fill ends")
        record = store.load(key)
        claims.release(key.claim_offset)
        changes = (
            lambda: store.save(record),
            lambda: store.set_pinned(key, True),
            lambda: store.remove(key),
            lambda: store.purge(key),
        )
        for change in changes:
            with pytest.raises(AssertionError, match="is not claimed"):
                change()
        assert store.load(key) == record


# --- a follower


async def test_a_part_of_an_earlier_service_is_not_read_before_its_leader_has_compared_it(
    tmp_path, upstream, until
):
    """A power cut left zeros, in a part that is as long as the body; another process has just claimed it."""
    gate, at = Gate(), 2 * CHUNK_BYTES
    body = BODY[: at + 5000]
    upstream.answer(FILE, Answer(body, etag='"a"', gates=((at, gate),)))
    key = route(FILE).key(Variant())
    async with working(tmp_path, [upstream.url]) as before:
        opened = await before.open(FILE)
        await until(lambda: opened.body.available(at - 1, 1) == 1, "the part has its first bytes")
        opened.body.leave()
    gate.open()
    async with working(tmp_path, [upstream.url]) as now:
        store = now.dependencies.store
        store.service_start = 5.0
        state = store.load_state(key.id)
        part = store.part_path(key.id, state.generation)
        part.write_bytes(body[:100] + bytes(len(body) - 100))
        leader = Claims(store.partial / "claims")
        assert leader.try_claim(key.claim_offset)
        opening = asyncio.ensure_future(now.open(FILE))
        assert not (await asyncio.wait({opening}, timeout=0.2))[0], "nothing is read of the torn part"
        part.write_bytes(body[:at])
        store.save_state(replace(state, service_start=5.0))
        opened = await opening
        reading = asyncio.ensure_future(read(opened.body))
        part.write_bytes(body)
        assert await reading == body
        opened.body.leave()
        leader.close()


# --- a small body takes one step: two jobs in threads, two files, and nothing that another process polls


async def jobs_of(worker, monkeypatch, work) -> int:
    """How many jobs `work` gives to threads."""
    jobs, submit = [], worker.dependencies.executor.submit

    def counted(*arguments):
        jobs.append(arguments)
        return submit(*arguments)

    monkeypatch.setattr(worker.dependencies.executor, "submit", counted)
    await work
    monkeypatch.undo()
    return len(jobs)


async def test_a_miss_is_two_jobs_and_leaves_body_and_record(tmp_path, upstream, monkeypatch, until):
    upstream.answer(SMALL_FILE, Answer(SMALL_BODY, etag='"a"'))
    async with working(tmp_path, [upstream.url]) as one:

        async def miss():
            opened = await one.open(SMALL_FILE)
            assert (opened.result, opened.body.source) == (Result.MISS, "fill")
            assert one.dependencies.store.open_body(one.dependencies.store.load(opened.key)), (
                "stored before it is shown"
            )
            assert await read(opened.body) == SMALL_BODY
            opened.body.leave()
            await until(lambda: not one.cache.fills, "the fill ends")

        assert await jobs_of(one, monkeypatch, miss()) == 2
        assert (await one.open(SMALL_FILE)).result is Result.HIT
    kept = {path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "run"}
    assert kept == {"claims", route(SMALL_FILE).file, f".{route(SMALL_FILE).file}.gup"}


async def test_a_slow_one_opens_a_part_and_is_shown(tmp_path, upstream):
    upstream.answer(SMALL_FILE, Answer(SMALL_BODY, etag='"a"', piece_seconds=0.03))
    async with working(tmp_path, [upstream.url]) as one:
        opened = await one.open(SMALL_FILE)
        assert opened.body.end() == len(SMALL_BODY)
        assert opened.body.published < len(SMALL_BODY)
        assert list((tmp_path / "partial").glob("*.part"))
        assert await read(opened.body) == SMALL_BODY
