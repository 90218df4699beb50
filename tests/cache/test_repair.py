"""Committed bodies that are not what was stored: only what is bad is fetched again, and never sent."""

import asyncio
import os
import random
from pathlib import Path

import pytest
from harness.caches import Cut, path_of, read, route, working
from harness.harm import flip, only
from harness.scripted import Answer, Gate

from gup.cache.cache import Result
from gup.cache.checksum import CHUNK_BYTES
from gup.cache.chunks import runs
from gup.content.key import Variant
from gup.errors import Problem

FILE = path_of("full.dax")
BODY = random.Random(11).randbytes(5 * CHUNK_BYTES + 777)
GOOD = Answer(BODY, etag='"a"')
MODES = ["first_use", "always"]


async def filled(one, upstream, until, answer=GOOD) -> Path:
    """The body is stored, everything closed again; where it lies."""
    upstream.answer(FILE, answer)
    assert await one.get(FILE) == answer.body
    await until(lambda: not one.cache.fills, "the fill ends")
    one.cache._entries.clear()
    return only((one.means.store.root / "content").rglob("full.dax"))


def repaired(one) -> int:
    return one.counted("gup_upstream_received_bytes_total", upstream="u0", purpose="repair")


def found(one, where="body") -> int:
    return one.counted("gup_integrity_failures_total", where=where)


def test_neighbouring_chunks_are_one_run():
    assert list(runs([])) == []
    assert list(runs([0])) == [(0, 0)]
    assert list(runs([0, 1, 2, 4, 7, 8])) == [(0, 2), (4, 4), (7, 8)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunks", [(0,), (2,), (5,), (1, 2, 4)])
async def test_only_bad_chunks_are_fetched_again(tmp_path, upstream, until, mode, chunks):
    async with working(tmp_path, [upstream.url], cache={"verify": mode}) as one:
        body = await filled(one, upstream, until)
        asked = len(upstream.requests(FILE))
        flip(body, *(chunk * CHUNK_BYTES + 7 for chunk in chunks))
        inode = body.stat().st_ino
        opened = await one.open(FILE)
        assert opened.result is Result.HIT
        tag = opened.body.head.etag
        assert await read(opened.body) == BODY
        opened.body.leave()
        assert body.read_bytes() == BODY
        assert body.stat().st_ino != inode, "a published byte is never overwritten"
        sizes = [min(CHUNK_BYTES, len(BODY) - chunk * CHUNK_BYTES) for chunk in chunks]
        assert repaired(one) == sum(sizes)
        assert upstream.requests(FILE)[asked].header("if-range") == '"a"'
        assert found(one) == 1
        again = await one.open(FILE)
        assert (again.result, again.body.head.etag) == (Result.HIT, tag)
        assert await read(again.body) == BODY
        again.body.leave()
        assert not list(one.means.store.partial.glob("*.part"))


@pytest.mark.parametrize(
    ("harm", "fetched"),
    [
        (lambda body: os.truncate(body, 3 * CHUNK_BYTES + 5), 2 * CHUNK_BYTES + 777),
        (lambda body: os.truncate(body, len(BODY) + 5), 0),
        (lambda body: os.utime(body, ns=(1, 1)), 0),
        (lambda body: body.write_bytes(b"x" * CHUNK_BYTES + BODY[CHUNK_BYTES:]), CHUNK_BYTES),
    ],
    ids=["truncated", "too long", "another time alone", "written over"],
)
async def test_a_body_that_is_not_as_recorded_is_mended_before_it_is_served(
    tmp_path, upstream, until, harm, fetched
):
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        harm(body)
        opened = await one.open(FILE)
        assert await read(opened.body) == BODY
        assert repaired(one) == fetched
        assert body.read_bytes() == BODY
        assert one.counted("gup_upstream_received_bytes_total", upstream="u0", purpose="fill") == len(BODY)


def _directory(body: Path) -> None:
    body.unlink()
    body.mkdir()
    (body / "something").write_text("in it")


def _link(body: Path) -> None:
    body.rename(body.with_name("elsewhere"))
    body.symlink_to(body.with_name("elsewhere"))


def _fifo(body: Path) -> None:
    body.unlink()
    os.mkfifo(body)


@pytest.mark.parametrize("harm", [Path.unlink, _directory, _link, _fifo])
@pytest.mark.parametrize("mode", ["first_use", "scrub"])
async def test_what_is_no_file_any_more_is_fetched_anew(tmp_path, upstream, until, harm, mode):
    async with working(tmp_path, [upstream.url], cache={"verify": mode}) as one:
        body = await filled(one, upstream, until)
        harm(body)
        assert await one.get(FILE) == BODY
        await until(lambda: not one.cache.fills, "the fill ends")
        assert body.read_bytes() == BODY
        assert not body.is_symlink()
        assert found(one) == 1


async def test_a_directory_in_place_of_a_record_is_a_miss(tmp_path, upstream, until):
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        record = body.with_name(".full.dax.gup")
        record.unlink()
        record.mkdir()
        assert await one.get(FILE) == BODY
        await until(lambda: not one.cache.fills, "the fill ends")
        assert record.is_file()
        assert found(one, "record") == 1


async def test_readers_wait_at_the_damage_and_go_on_when_it_is_mended(tmp_path, upstream, until):
    gate = Gate()
    async with working(tmp_path, [upstream.url]) as one, working(tmp_path, [upstream.url]) as two:
        body = await filled(one, upstream, until)
        flip(body, 3 * CHUNK_BYTES)
        upstream.answer(FILE, Answer(BODY, etag='"a"', head_gate=gate))
        readers = [asyncio.create_task(worker.get(FILE)) for worker in (one, two) for _ in range(5)]
        await until(lambda: gate.is_reached, "the repair asks upstream")
        opened = await one.open(FILE)
        assert await read(opened.body, 0, 3 * CHUNK_BYTES) == BODY[: 3 * CHUNK_BYTES]
        assert not any(reader.done() for reader in readers)
        gate.open()
        assert all(got == BODY for got in await asyncio.gather(*readers))
        assert len(upstream.requests(FILE)) == 2
        assert repaired(one) + repaired(two) == CHUNK_BYTES


@pytest.mark.parametrize("mode", MODES)
async def test_without_upstream_sound_chunks_are_served_and_kept(tmp_path, upstream, until, mode):
    async with working(tmp_path, [upstream.url], cache={"verify": mode, "error_ttl": "50ms"}) as one:
        body = await filled(one, upstream, until)
        flip(body, 3 * CHUNK_BYTES)
        upstream.answer(FILE, Answer(b"", 503))
        opened = await one.open(FILE)
        with pytest.raises(Cut) as cut:
            await read(opened.body)
        assert cut.value.args[0] == BODY[: 3 * CHUNK_BYTES]
        opened.body.leave()
        opened = await one.open(FILE)
        assert await one.cache.make_sure(opened, 4 * CHUNK_BYTES)
        assert await read(opened.body, 4 * CHUNK_BYTES) == BODY[4 * CHUNK_BYTES :]
        with pytest.raises(Problem) as problem:
            await one.cache.make_sure(opened, 3 * CHUNK_BYTES)
        assert problem.value.status == 502
        opened.body.leave()
        upstream.answer(FILE, GOOD)
        await until(lambda: one.cache._failures.get(opened.key) is None, "the failure expires")
        assert await one.get(FILE) == BODY
        assert repaired(one) == CHUNK_BYTES


async def test_of_a_truncated_body_the_rest_is_served_without_upstream(tmp_path, upstream, until):
    async with working(tmp_path, [upstream.url], cache={"error_ttl": "50ms"}) as one:
        body = await filled(one, upstream, until)
        os.truncate(body, 2 * CHUNK_BYTES)
        upstream.answer(FILE, Answer(b"", 503))
        opened = await one.open(FILE)
        assert await read(opened.body, 0, 2 * CHUNK_BYTES) == BODY[: 2 * CHUNK_BYTES]
        with pytest.raises(Cut):
            await read(opened.body)
        upstream.answer(FILE, GOOD)
        await until(lambda: one.cache._failures.get(opened.key) is None, "the failure expires")
        assert await one.get(FILE) == BODY
        assert repaired(one) == len(BODY) - 2 * CHUNK_BYTES


OTHER = random.Random(12).randbytes(len(BODY))


@pytest.mark.parametrize(
    "answer",
    [
        Answer(OTHER, etag='"a"'),
        Answer(OTHER, etag='"b"'),
        Answer(BODY, etag='"a"', ranges=False),
        Answer(OTHER[:9000]),
    ],
    ids=["other bytes", "another tag", "no ranges", "shorter"],
)
async def test_what_cannot_be_mended_is_fetched_anew_with_another_tag(tmp_path, upstream, until, answer):
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        opened = await one.open(FILE)
        flip(body, 3 * CHUNK_BYTES)
        upstream.answer(FILE, answer)
        with pytest.raises(Cut) as cut:
            await read(opened.body)
        assert cut.value.args[0] == BODY[: 3 * CHUNK_BYTES]
        again = await one.open(FILE)
        assert again.body.head.etag != opened.body.head.etag
        assert await read(again.body) == answer.body
        await until(lambda: not one.cache.fills, "the fill ends")
        assert body.read_bytes() == answer.body


async def test_a_repair_that_breaks_off_goes_on_at_its_chunk(tmp_path, upstream, until):
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        flip(body, CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES)
        upstream.answer(FILE, Answer(BODY, etag='"a"', close_at=2 * CHUNK_BYTES + 70_000), GOOD)
        assert await one.get(FILE) == BODY
        assert [seen.header("range") for seen in upstream.requests(FILE)][1:] == [
            f"bytes={CHUNK_BYTES}-{4 * CHUNK_BYTES - 1}",
            f"bytes={2 * CHUNK_BYTES}-{4 * CHUNK_BYTES - 1}",
        ]


async def test_a_file_that_was_changed_under_a_reader_is_doubted(tmp_path, upstream, until):
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        opened = await one.open(FILE)
        assert await read(opened.body) == BODY
        assert opened.entry.all_verified
        with body.open("r+b") as file:
            file.seek(4 * CHUNK_BYTES)
            file.write(b"an editor was here")
        one.cache.look_over()
        assert not opened.entry.all_verified
        assert await read(opened.body) == BODY
        assert repaired(one) == CHUNK_BYTES
        assert found(one) == 1


async def test_the_scrub_mode_trusts_what_it_opens(tmp_path, upstream, until):
    async with working(tmp_path, [upstream.url], cache={"verify": "scrub"}) as one:
        body = await filled(one, upstream, until)
        flip(body, CHUNK_BYTES)
        opened = await one.open(FILE)
        assert opened.entry.all_verified
        assert await read(opened.body) != BODY
        assert await one.cache.mend(opened.key, counted=False) is None
        assert found(one) == 1
        assert await one.get(FILE) == BODY
        assert repaired(one) == CHUNK_BYTES


async def test_another_mode_drops_what_was_trusted(tmp_path, upstream, until):
    async with working(tmp_path, [upstream.url], cache={"verify": "scrub"}) as one:
        body = await filled(one, upstream, until)
        flip(body, CHUNK_BYTES)
        assert (await one.open(FILE)).entry.all_verified
        cache = one.means.settings.cache.model_copy(update={"verify": "first_use"})
        one.means.settings = one.means.settings.model_copy(update={"cache": cache})
        assert await one.get(FILE) == BODY


async def test_always_never_gives_a_descriptor_and_holds_little_for_many(tmp_path, upstream, until):
    async with working(tmp_path, [upstream.url], cache={"verify": "always"}) as one:
        await filled(one, upstream, until)
        opened = [await one.open(FILE) for _ in range(80)]
        assert {item.body.fd for item in opened} == {-1}
        for item in opened:
            assert await item.body.sound_at(0)
        assert sum(len(item.body._held) for item in opened) <= (64 << 20) + 20 * 65536
        assert await read(opened[-1].body) == BODY
        for item in opened:
            item.body.leave()
        assert one.cache._holders.count == 0
        assert one.cache.open_now(route(FILE), Variant()) is None


async def test_without_room_to_mend_it_is_an_honest_error_and_no_endless_trying(tmp_path, upstream, until):
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        flip(body, 3 * CHUNK_BYTES)
        cache = one.means.settings.cache.model_copy(update={"max_size": 1})
        one.means.settings = one.means.settings.model_copy(update={"cache": cache})
        one.means.space._max_size = lambda: 1
        opened = await one.open(FILE)
        with pytest.raises(Cut):
            await read(opened.body)
        for _ in range(3):
            with pytest.raises(Problem) as problem:
                await one.cache.make_sure(opened, 3 * CHUNK_BYTES)
            assert (problem.value.slug, problem.value.status) == ("overloaded", 503)
        assert len(upstream.requests(FILE)) == 1
        assert found(one) == 1
        assert body.exists()


async def test_a_repair_waits_for_its_place_as_any_fill(tmp_path, upstream, until):
    other, gate = path_of("other.dax", revision="260901001"), Gate()
    fill = {"max": 1, "queue_timeout": "20s"}
    async with working(tmp_path, [upstream.url], fill=fill) as one:
        body = await filled(one, upstream, until)
        flip(body, 7)
        upstream.answer(other, Answer(BODY, etag='"o"', gates=((2 * CHUNK_BYTES, gate),)))
        holding = await one.open(other)
        reading = asyncio.create_task(one.get(FILE))
        await until(lambda: one.means.queue._waiting, "the repair waits")
        gate.open()
        assert await reading == BODY
        assert await read(holding.body) == BODY
        holding.body.leave()
        assert repaired(one) == CHUNK_BYTES


async def test_who_finds_no_room_for_a_repair_is_passed_through_and_nothing_is_fetched_for_nobody(
    tmp_path, upstream, until
):
    async with working(tmp_path, [upstream.url]) as one:
        body = await filled(one, upstream, until)
        key = (await one.open(FILE)).key
        one.cache._entries.clear()
        os.truncate(body, len(BODY) - 1)
        one.means.space._max_size = lambda: 1
        problem = await one.cache.mend(key, counted=False)
        assert problem is not None
        assert problem.slug == "overloaded"
        assert len(upstream.requests(FILE)) == 1
        opened = await one.open(FILE)
        assert opened.result is Result.BYPASS
        assert await read(opened.body) == BODY
        opened.body.leave()
        assert body.stat().st_size == len(BODY) - 1, "what is sound of it is kept"
