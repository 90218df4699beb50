"""Content that upstream replaces while it is fetched: halves of two bodies are never joined."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from harness.caches import Cut, path_of, read, route, working
from harness.content import noise
from harness.upstreams import Answer, Gate, ScriptedUpstream

from gup.cache.records import CHUNK_BYTES
from gup.content.key import Variant

FILE, INDEX = path_of("full.dax"), "/content/ContentInfo.txt"
LENGTH = 3_000_000
HALF = LENGTH // 2
OVERLAP_BYTES = 64 * 1024
BODY = noise("before", LENGTH)
AROUND = 150_000
OTHER = noise("after", HALF - AROUND) + BODY[HALF - AROUND : HALF + AROUND] + noise("rest", HALF - AROUND)
"""Of the same length, and equal around the joint, which an overlap of 64 KiB does not tell apart."""
DATED = (("Date", "Sat, 01 Aug 2026 12:00:00 GMT"),)
OLD_AT, NEW_AT = 1_785_000_000.0, 1_785_003_600.0


@dataclass(frozen=True)
class Change:
    """What upstream answers before and after, but for the bodies; `asked_with` is the resume's If-Range."""

    before: Answer
    after: Answer
    asked_with: str | None


OLD_DATE = "Sat, 25 Jul 2026 17:20:00 GMT"
CHANGES = {
    "etag": Change(Answer(etag='"1"'), Answer(etag='"2"'), '"1"'),
    "etag, If-Range ignored": Change(Answer(etag='"1"'), Answer(etag='"2"', if_range=False), '"1"'),
    "etag, no ranges": Change(Answer(etag='"1"'), Answer(etag='"2"', ranges=False), '"1"'),
    "date": Change(
        Answer(last_modified=OLD_AT, fields=DATED), Answer(last_modified=NEW_AT, fields=DATED), OLD_DATE
    ),
    "date, If-Range ignored": Change(
        Answer(last_modified=OLD_AT, fields=DATED),
        Answer(last_modified=NEW_AT, fields=DATED, if_range=False),
        OLD_DATE,
    ),
    "date that is not strong": Change(Answer(last_modified=OLD_AT), Answer(last_modified=NEW_AT), None),
    "weak etag": Change(Answer(etag='W/"1"'), Answer(etag='W/"2"'), None),
    "etag gone": Change(Answer(etag='"1"'), Answer(if_range=False, last_modified=NEW_AT), '"1"'),
}


@pytest.fixture(params=CHANGES, ids=str)
def change(request):
    return CHANGES[request.param]


async def cut_at(opened) -> bytes:
    with pytest.raises(Cut) as cut:
        await read(opened.body)
    got: bytes = cut.value.args[0]
    return got


def stored(root) -> list[bytes]:
    return [path.read_bytes() for path in (root / "content").rglob("full.dax")]


async def test_readers_are_cut_and_it_is_fetched_anew(tmp_path, upstream, until, change):
    upstream.answer(FILE, replace(change.before, body=BODY, close_at=HALF), replace(change.after, body=OTHER))
    async with working(tmp_path, [upstream.url]) as one, working(tmp_path, [upstream.url]) as two:
        led, followed = await one.open(FILE), await two.open(FILE)
        for got in await asyncio.gather(cut_at(led), cut_at(followed)):
            assert BODY.startswith(got)
        await until(lambda: not one.cache.fills and not two.cache.fills, "the fill ends")
        assert stored(tmp_path) == [OTHER]
        again = await one.open(FILE)
        assert await read(again.body) == OTHER
        assert again.body.head.etag != led.body.head.etag
        assert one.counted("gup_fills_total", outcome="failed") == 0
    assert upstream.requests(FILE)[1].header("if-range") == change.asked_with
    assert not list((tmp_path / "partial").glob("*.part"))


async def test_readers_go_on_when_all_that_is_here_is_equal(tmp_path, upstream, change):
    """Touched, or copied anew: other validators, the same bytes."""
    upstream.answer(
        FILE,
        replace(change.before, body=BODY, close_at=HALF),
        *[replace(change.after, body=BODY, ranges=True, close_at=2 * CHUNK_BYTES)] * 2,
        replace(change.after, body=BODY, ranges=True),
    )
    async with working(tmp_path, [upstream.url]) as one:
        assert await one.get(FILE) == BODY
        wasted = one.counted("gup_upstream_wasted_bytes_total", reason="overlap")
        assert HALF <= wasted <= HALF + 3 * OVERLAP_BYTES
    last = upstream.requests(FILE)[-1]
    if change.after.etag is not None and change.after.etag.startswith('"'):
        assert last.header("if-range") == change.after.etag
    assert last.status == 206, "what was compared once is not compared again"


async def test_a_comparison_that_breaks_off_goes_on_where_it_was(tmp_path, upstream):
    after = Answer(BODY, etag='"2"', if_range=False)
    upstream.answer(
        FILE,
        Answer(BODY, etag='"1"', close_at=HALF),
        after,  # the range, which is refused
        replace(after, close_at=CHUNK_BYTES),
        after,
    )
    async with working(tmp_path, [upstream.url]) as one:
        assert await one.get(FILE) == BODY
    ranges = [seen.header("range") for seen in upstream.requests(FILE)]
    assert ranges[:3] == [None, f"bytes={HALF - OVERLAP_BYTES}-", None]
    resumed_at = int(ranges[3].removeprefix("bytes=").removesuffix("-"))
    assert CHUNK_BYTES - 2 * OVERLAP_BYTES < resumed_at <= CHUNK_BYTES - OVERLAP_BYTES


async def test_validators_that_change_at_each_answer_come_to_an_end(tmp_path, upstream, until):
    each = [Answer(BODY, etag=f'"{n}"', if_range=False, cut_after=CHUNK_BYTES // 2) for n in range(200)]
    upstream.answer(FILE, Answer(BODY, etag='"first"', close_at=HALF), *each)
    async with working(tmp_path, [upstream.url], each={"give_up": "1s"}) as one:
        opened = await one.open(FILE)
        assert BODY.startswith(await cut_at(opened))
        await until(lambda: not one.cache.fills, "the fill ends")
    assert len(upstream.requests(FILE)) < 20
    assert stored(tmp_path) == []


@pytest.mark.parametrize("length", [LENGTH - 100_000, LENGTH + 100_000, HALF // 2], ids=str)
@pytest.mark.parametrize("tagged", [True, False], ids=["tagged", "no validators"])
async def test_another_length_is_another_body(tmp_path, upstream, until, length, tagged):
    """Shorter than what is here too: then there is no such range any more."""
    other = (BODY + noise("more", 200_000))[:length]
    before, after = ('"1"', '"2"') if tagged else (None, None)
    upstream.answer(FILE, Answer(BODY, etag=before, close_at=HALF), Answer(other, etag=after, if_range=False))
    async with working(tmp_path, [upstream.url]) as one:
        assert BODY.startswith(await cut_at(await one.open(FILE)))
        await until(lambda: not one.cache.fills, "the fill ends")
        assert await one.get(FILE) == other
    assert stored(tmp_path) == [other]


# --- whoever goes on with the fill


async def _dies_at_half(tmp_path, upstream, until, before: Answer, after: Sequence[Answer]) -> None:
    gate = Gate()
    upstream.answer(FILE, replace(before, body=BODY, gates=((HALF, gate),)), *after)
    async with working(tmp_path, [upstream.url]) as leader:
        opened = await leader.open(FILE)
        await until(lambda: opened.body.published >= HALF - 70_000 and gate.is_reached, "its part")
    gate.open()


@pytest.mark.parametrize("body", [OTHER, BODY], ids=["other bytes", "the same bytes"])
async def test_after_a_restart(tmp_path, upstream, until, change, body):
    await _dies_at_half(tmp_path, upstream, until, change.before, [replace(change.after, body=body)])
    async with working(tmp_path, [upstream.url]) as next_one:
        assert await next_one.get(FILE) == body
        await until(lambda: not next_one.cache.fills, "the fill ends")
        assert body is OTHER or next_one.counted("gup_integrity_failures_total", where="part") == 0
    assert stored(tmp_path) == [body]
    assert upstream.requests(FILE)[1].header("if-range") == change.asked_with


async def test_a_follower_that_takes_over_cuts_its_readers(tmp_path, upstream, until, change):
    gate = Gate()
    upstream.answer(
        FILE, replace(change.before, body=BODY, gates=((HALF, gate),)), replace(change.after, body=OTHER)
    )
    async with working(tmp_path, [upstream.url]) as follower:
        async with working(tmp_path, [upstream.url]) as leader:
            led, followed = await leader.open(FILE), await follower.open(FILE)
            reading = asyncio.create_task(cut_at(followed))
            await until(lambda: led.body.published > CHUNK_BYTES and gate.is_reached, "the gate")
        gate.open()
        assert BODY.startswith(await reading)
        await until(lambda: not follower.cache.fills, "the fill ends")
        assert await follower.get(FILE) == OTHER
    assert stored(tmp_path) == [OTHER]


@pytest.mark.parametrize("dies", [False, True], ids=["the same leader", "after a restart"])
async def test_a_second_upstreams_validators_are_kept_too(tmp_path, upstream, until, dies):
    """The first goes, the second goes on, and is then the one that has another body."""
    other = BODY[:CHUNK_BYTES] + OTHER[CHUNK_BYTES:HALF] + BODY[HALF : HALF + AROUND] + OTHER[HALF + AROUND :]
    upstream.answer(FILE, Answer(BODY, etag='"1"', close_at=CHUNK_BYTES), Answer(b"", 503))
    gate = Gate()
    at = HALF + AROUND // 2
    with ScriptedUpstream() as second:
        went_on = Answer(BODY, etag='"a"', gates=((at, gate),), close_at=at)
        second.answer(FILE, went_on, Answer(other, etag='"b"', if_range=False))
        urls = [upstream.url, second.url]
        async with working(tmp_path, urls) as one:
            opened = await one.open(FILE)
            await until(lambda: gate.is_reached and opened.body.published > HALF, "the second goes on")
            if not dies:
                gate.open()
                assert BODY.startswith(await cut_at(opened))
                await until(lambda: not one.cache.fills, "the fill ends")
        gate.open()
        async with working(tmp_path, urls) as next_one:
            assert await next_one.get(FILE) == other
            await until(lambda: not next_one.cache.fills, "the fill ends")
        assert stored(tmp_path) == [other]
        asked = second.requests(FILE)
        assert asked[1].header("if-range") == '"a"'


async def test_who_comes_while_it_is_fetched_anew_gets_the_new_body(tmp_path, upstream, until):
    gate = Gate()
    upstream.answer(
        FILE,
        Answer(BODY, etag='"1"', close_at=HALF),
        Answer(OTHER, etag='"2"', gates=((0, gate),), ranges=False),
    )
    async with working(tmp_path, [upstream.url]) as one:
        opened = await one.open(FILE)
        reading = asyncio.create_task(cut_at(opened))
        await until(lambda: gate.is_reached, "the resume")
        gate.open()
        await reading
        got = await asyncio.gather(*(one.get(FILE) for _ in range(5)))
        assert set(got) == {OTHER}


async def test_an_index_file_is_compared_whole_at_another_upstream(tmp_path, upstream, until):
    """Such files differ between upstreams: an equal overlap says nothing there."""
    upstream.answer(INDEX, Answer(BODY, etag='"1"', close_at=HALF), Answer(b"", 503))
    with ScriptedUpstream() as second:
        second.answer(INDEX, Answer(OTHER, etag='"2"'))
        async with working(tmp_path, [upstream.url, second.url]) as one:
            assert BODY.startswith(await cut_at(await one.open(INDEX)))
            await until(lambda: not one.cache.fills, "the fill ends")
        second.answer(INDEX, Answer(BODY, etag='"2"'))
    (found,) = (tmp_path / "content").rglob("ContentInfo.txt")
    assert found.read_bytes() == OTHER


async def test_a_span_far_ahead_is_of_the_same_body_or_waited_for(tmp_path, upstream, until):
    """It goes out under the fill's ETag: one of changed validators would be another body's."""
    gate = Gate()
    upstream.answer(
        FILE, Answer(BODY, etag='"1"', gates=((200_000, gate),)), Answer(OTHER, etag='"2"', if_range=False)
    )
    async with working(tmp_path, [upstream.url], fill={"range_wait": 0.0}) as one:
        opened = await one.open(FILE)
        await until(lambda: gate.is_reached, "the fill stands")
        assert (
            await one.cache.pass_through.range(opened, route(FILE), Variant(), 2_000_000, 2_100_000) is None
        )
        assert len(upstream.requests(FILE)) == 2
        gate.open()
        assert await read(opened.body) == BODY
