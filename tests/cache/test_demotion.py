"""Damaged entries: what is damaged is never sent, sound chunks are kept, the rest is fetched again."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from harness.caches import Cut, path_of, read, route, working
from harness.disks import flip, only, to_directory, to_fifo, to_link
from harness.upstreams import Answer, Gate

from gup.cache.cache import Result
from gup.cache.locks import Occupied
from gup.cache.records import CHUNK_BYTES
from gup.content.key import Variant
from gup.upstream.download import OVERLAP_BYTES

FILE = path_of("full.dax")
KEY = route(FILE).key(Variant())
BODY = random.Random(11).randbytes(5 * CHUNK_BYTES + 777)
LAST_CHUNK = (len(BODY) - 1) // CHUNK_BYTES * CHUNK_BYTES
OTHER = random.Random(12).randbytes(len(BODY))
GOOD = Answer(BODY, etag='"a"')


async def filled(one, upstream, until, answer=GOOD) -> Path:
    """The body is stored, everything closed again; where it lies."""
    upstream.answer(FILE, answer)
    assert await one.get(FILE) == answer.body
    await until(lambda: not one.cache.fills, "the fill ends")
    one.cache._entries.clear()
    return only((one.dependencies.store.root / "content").rglob("full.dax"))


async def whole_again(one, until) -> None:
    """Ask until all of it comes, as clients do that are cut: they resume."""
    got = b""
    for _ in range(10):
        opened = await one.open(FILE)
        if not await one.cache.is_sound_at(opened, len(got)):
            continue
        try:
            got += await read(opened.body, len(got))
            break
        except Cut as cut:
            got += cut.args[0]
        finally:
            opened.body.leave()
    assert got == BODY
    await until(lambda: not one.cache.fills, "the fill ends")


def received(one) -> int:
    """From upstream, for the fill and for what was damaged."""
    return sum(
        one.counted("gup_upstream_received_bytes_total", upstream="u0", purpose=purpose)
        for purpose in ("fill", "repair")
    )


def found(one, where="body") -> int:
    return one.counted("gup_integrity_failures_total", where=where)


def record_of(one):
    record = one.dependencies.store.load(KEY)
    assert record is not None
    return record


@pytest.mark.parametrize("chunk", [0, 2, 5])
async def test_readers_are_cut_at_the_damage_and_the_rest_is_fetched_again(tmp_path, upstream, until, chunk):
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        tag, before = record_of(one).etag, received(one)
        flip(body, chunk * CHUNK_BYTES + 7)
        opened = await one.open(FILE)
        assert opened.result is Result.HIT
        with pytest.raises(Cut) as cut:
            await read(opened.body)
        assert cut.value.args[0] == BODY[: chunk * CHUNK_BYTES]
        await whole_again(one, until)
        assert record_of(one).etag == tag
        assert body.read_bytes() == BODY
        fetched = received(one) - before
        assert len(BODY) - chunk * CHUNK_BYTES <= fetched <= len(BODY) - chunk * CHUNK_BYTES + OVERLAP_BYTES
        assert found(one) == 1
        assert one.counted("gup_fills_total", outcome="committed") == 2
    assert not list((tmp_path / "partial").glob("*.part"))


async def test_pin_and_times_are_kept(tmp_path, upstream, until):
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        assert one.dependencies.claims.try_claim(KEY.claim_offset)
        one.dependencies.store.save(replace(record_of(one), pinned=True, stored_at=1_700_000_000.0))
        one.dependencies.claims.release(KEY.claim_offset)
        flip(body, 3 * CHUNK_BYTES)
        await whole_again(one, until)
        record = record_of(one)
        assert (record.pinned, record.stored_at) == (True, 1_700_000_000.0)


async def test_a_part_that_was_an_entry_survives_a_crash_with_its_pin(tmp_path, upstream, until):
    gate = Gate()
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        assert one.dependencies.claims.try_claim(KEY.claim_offset)
        one.dependencies.store.save(replace(record_of(one), pinned=True))
        one.dependencies.claims.release(KEY.claim_offset)
        flip(body, 2 * CHUNK_BYTES)
        upstream.answer(FILE, replace(GOOD, gates=((3 * CHUNK_BYTES, gate),)))
        opened = await one.open(FILE)
        with pytest.raises(Cut):
            await read(opened.body)
        await until(lambda: not body.exists(), "it is a part")
    gate.open()
    async with working(tmp_path, [upstream.url]) as next_one:
        assert await next_one.get(FILE) == BODY
        await until(lambda: not next_one.cache.fills, "the fill ends")
        assert record_of(next_one).pinned


@pytest.mark.parametrize(
    ("harm", "kept"),
    [
        (lambda body: os.truncate(body, 2 * CHUNK_BYTES + 5), 2 * CHUNK_BYTES),
        (lambda body: os.truncate(body, len(BODY) + 4), LAST_CHUNK),
        (lambda body: os.utime(body, ns=(1, 1)), len(BODY) + OVERLAP_BYTES),
    ],
    ids=["cut short", "too long", "another time"],
)
async def test_a_body_that_is_not_as_recorded_is_right_before_it_is_served(
    tmp_path, upstream, until, harm, kept
):
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        before = received(one)
        harm(body)
        assert await one.get(FILE) == BODY
        await until(lambda: not one.cache.fills, "the fill ends")
        assert body.read_bytes() == BODY
        assert received(one) - before <= len(BODY) - kept + OVERLAP_BYTES


@pytest.mark.parametrize("harm", [Path.unlink, to_directory, to_link, to_fifo])
async def test_what_is_no_file_any_more_is_fetched_anew_without_a_comparison(tmp_path, upstream, until, harm):
    """In the mode that trusts what it opens; the other one is tested with the whole service."""
    async with working(tmp_path, [upstream.url], cache={"verify": "scrub"}) as one:
        body = await filled(one, upstream, until)
        harm(body)
        assert await one.get(FILE) == BODY
        await until(lambda: not one.cache.fills, "the fill ends")
        assert body.read_bytes() == BODY
        assert not body.is_symlink()
        assert found(one) == 1


@pytest.mark.parametrize(
    "answer",
    [
        Answer(OTHER, etag='"a"'),
        Answer(OTHER, etag='"b"'),
        Answer(OTHER[:9000], etag='"c"'),
    ],
    ids=["other bytes", "another tag", "shorter"],
)
async def test_other_bytes_are_never_joined_and_get_another_tag(tmp_path, upstream, until, answer):
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        tag = record_of(one).etag
        flip(body, 3 * CHUNK_BYTES)
        upstream.answer(FILE, answer)
        opened = await one.open(FILE)
        with pytest.raises(Cut) as cut:
            await read(opened.body)
        assert cut.value.args[0] == BODY[: 3 * CHUNK_BYTES]
        await until(lambda: not one.cache.fills, "the fill ends")
        assert await one.get(FILE) == answer.body
        assert record_of(one).etag != tag


async def test_another_generation_than_that_of_the_damage_is_left_alone(tmp_path, upstream, until):
    async with working(tmp_path, [upstream.url]) as one:
        await filled(one, upstream, until)
        fill = one.cache._suspect(record_of(one), counted=False, seen=1)
        await fill.ended.wait()
        assert fill.problem is None
        assert len(upstream.requests(FILE)) == 1


async def test_a_disk_that_damages_again_and_again_is_not_written_to(tmp_path, upstream, until):
    """The third demotion of one key in a day."""
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        for _ in range(2):
            flip(body, 3 * CHUNK_BYTES)
            await whole_again(one, until)
            one.cache._entries.clear()
        flip(body, 3 * CHUNK_BYTES)
        opened = await one.open(FILE)
        with pytest.raises(Cut):
            await read(opened.body)
        await until(lambda: not one.cache.fills, "the try ends")
        assert one.counted("gup_fills_total", outcome="unstorable") == 1
        told = [event for event in one.told if event["type"] == "unstorable"]
        assert "damages stored bodies repeatedly" in told[-1]["detail"]
        assert told[-1]["disk"]


@pytest.mark.parametrize("length", [5_000, 4 * CHUNK_BYTES])
async def test_what_was_never_here_is_not_stored_on_such_a_disk_either(tmp_path, upstream, until, length):
    upstream.answer(FILE, Answer(BODY[:length], etag='"a"'))
    async with working(tmp_path, [upstream.url]) as one:
        store = one.dependencies.store
        store.occupied = Occupied(memoryview(bytearray(4096)))
        store.occupied.complete()
        for number in range(16):
            store.demotions.note(f"{number:032x}")
        assert await one.get(FILE) == BODY[:length]
        await until(lambda: not one.cache.fills, "it ends")
        assert one.counted("gup_fills_total", outcome="unstorable") == 1
        assert not list((tmp_path / "content").rglob("*.dax"))
        assert not list((tmp_path / "partial").glob("*.part"))
