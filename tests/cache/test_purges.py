"""What a purge names: the rules; and fills, parts and memory bodies that were begun before it."""

import asyncio

import pytest
from harness.caches import Cut, path_of, read, route, working
from harness.content import MONIKER, noise
from harness.upstreams import Answer, Gate

from gup.cache.purges import FILE, Purge, Purges, Selection, add_purge, keep_purges, read_purges
from gup.content.key import ContentKey, Kind, Variant
from gup.files import append_line

MB = 1 << 20
PATH = path_of("full.zip.bin")
OLD, NEW = noise("old", 3 * MB), noise("new", 3 * MB)
KEY = ContentKey.parse(f"14.3 RU2/French/{MONIKER}/260801001/xdelta260731001_To_260801001.dax")
LIVE = ContentKey.parse("any/any/liveupdate/_/norton$20av_1.0_x_livetri.zip")


@pytest.mark.parametrize(
    ("key", "given"),
    [
        (KEY, {"key": KEY.text}),
        (KEY, {"stream": MONIKER.lower()}),
        (KEY, {"revision": "260801001"}),
        (KEY, {"kind": Kind.DELTA}),
        (KEY, {"pattern": "*/xDelta*"}),
        (KEY, {"pattern": "*", "pinned": True}),
        (KEY, {"version": "14.3 ru2"}),
        (KEY, {"language": "fr"}),
        (KEY, {"product": MONIKER}),
        (KEY, {"product": "Antivirus", "streams": (("14.3 RU2", "French", MONIKER),)}),
        (LIVE, {"product": "norton av"}),
    ],
)
def test_what_is_selected(key, given):
    assert Selection(**given).selects(key, Kind.DELTA)


@pytest.mark.parametrize(
    "given",
    [
        {"key": LIVE.text},
        {"stream": "other"},
        {"revision": "260731001"},
        {"kind": Kind.FULL},
        {"pattern": "full*"},
        {"version": "14"},
        {"language": "German"},
        {"product": "Antivirus"},
        {"product": "Antivirus", "streams": (("14.3 RU2", "German", MONIKER),)},
    ],
)
def test_what_is_not_selected(given):
    assert not Selection(**given).selects(KEY, Kind.DELTA)


def test_pinned_ones_are_named_when_that_is_said_or_by_their_key():
    assert not Selection(pattern="*").selects(KEY, Kind.DELTA, pinned=True)
    assert Selection(pattern="*", pinned=True).selects(KEY, Kind.DELTA, pinned=True)
    assert Selection(key=KEY.text).selects(KEY, Kind.DELTA, pinned=True)


def test_a_body_is_named_by_later_purges_alone_and_by_those_of_an_earlier_run(tmp_path):
    told = [0]
    purges = Purges(tmp_path, lambda: told[0])
    assert (purges.known, purges.name(KEY, Kind.DELTA, "")) == ("", False)
    for number, selection in ((7, Selection(key=KEY.text)), (9, Selection(kind=Kind.INDEX))):
        add_purge(tmp_path, Purge(number, 1.0, selection))
    assert not purges.name(KEY, Kind.DELTA, ""), "it is not told yet"
    told[0] += 1
    for known in (purges, Purges(tmp_path)):
        assert known.known == "-=9"
        orders = ("", "-=6", "-=7", "-=9")
        assert [known.name(KEY, Kind.DELTA, order) for order in orders] == [True, True, False, False]
        assert [known.name(KEY, Kind.INDEX, order) for order in orders] == [True, True, True, False]
    purges, _ = read_purges(tmp_path / FILE)
    keep_purges(tmp_path, purges[1:])
    assert Purges(tmp_path).name(KEY, Kind.DELTA, "") is False


def test_a_purge_with_a_time_names_what_was_fetched_before_it(tmp_path):
    """One of an earlier version counts by when it was stored, or, where that is unknown, as older."""
    keep_purges(tmp_path, [Purge(9, 1.0, Selection(fetched_before=100.0), "a")], "a=9")
    purges = Purges(tmp_path, now=lambda: 100.0)
    for order, named in (("a=8 @99999", True), ("a=8 @100000", False), ("a=9 @99999", False)):
        assert purges.name(KEY, Kind.DELTA, order) is named
        assert purges.name(KEY, Kind.DELTA, order, stored_at=1e6) is named
    assert purges.name(KEY, Kind.DELTA, "a=8")
    assert purges.name(KEY, Kind.DELTA, "a=8", stored_at=99.0)
    assert not purges.name(KEY, Kind.DELTA, "a=8", stored_at=100.0)
    assert purges.stamp == "a=9 @100000"


def test_what_is_known_in_a_cluster_is_said_in_the_file(tmp_path):
    keep_purges(tmp_path, [Purge(9, 1.0, Selection(pattern="*"), "b")], known="a=7 b=5+9")
    purges = Purges(tmp_path)
    assert purges.known == "a=7 b=5+9"
    assert purges.name(KEY, Kind.DELTA, "a=7 b=5")
    assert not purges.name(KEY, Kind.DELTA, "b=9")


def test_a_torn_line_costs_that_line_alone(tmp_path):
    file = tmp_path / FILE
    add_purge(tmp_path, Purge(7, 1.0, Selection(pattern="*")))
    file.write_bytes(file.read_bytes() + b'{"number":8,"at":1')
    add_purge(tmp_path, Purge(9, 1.0, Selection(pattern="*")))
    append_line(file, b'{"number":10}')
    assert [purge.number for purge in read_purges(file)[0]] == [7, 9]
    assert (file.stat().st_mode & 0o777) == 0o600


def test_conditions_are_the_same_when_they_were_sent():
    one = Selection(kind=Kind.DELTA, streams=(("a", "b", "c"),))
    assert Selection.of(one.given()) == one
    assert one.given() == {"kind": "delta", "streams": [["a", "b", "c"]]}


# --- fills


async def begun(worker, gate, path=PATH):
    """A reader of the old body, which stands still."""
    opened = await worker.open(path)
    reading = asyncio.create_task(read(opened.body))
    await asyncio.to_thread(gate.wait_reached)
    return opened, reading


@pytest.fixture
def gated(upstream):
    """The old body stands still in its middle; after it comes the new one."""
    gate = Gate()
    upstream.answer(PATH, Answer(OLD, etag='"a"', gates=((2 * MB, gate),)), Answer(NEW, etag='"b"'))
    return gate


@pytest.mark.parametrize("notice", ["a request", "the second"])
async def test_leader_and_follower_go_on_while_the_next_fill_runs(tmp_path, upstream, gated, until, notice):
    async with working(tmp_path, [upstream.url]) as one, working(tmp_path, [upstream.url]) as two:
        led, old = await begun(one, gated)
        followed = await two.open(PATH)
        reading = asyncio.create_task(read(followed.body))
        await until(lambda: followed.body.published >= MB, "it is read along")
        one.purge(pattern="*")
        for worker in (one, two) if notice == "the second" else ():
            worker.cache.set_purged_aside()
        if notice == "a request":
            assert await one.get(PATH) == NEW
        assert await two.get(PATH) == NEW
        gated.open()
        assert [await old, await reading] == [OLD, OLD]
        for opened in (led, followed):
            opened.body.leave()
        await until(lambda: not one.cache.fills and not two.cache.fills, "all fills end")
        assert [await one.get(PATH), await two.get(PATH)] == [NEW, NEW]
    assert len(upstream.requests(PATH)) == 2
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["claims"]


async def test_readers_elsewhere_are_cut_when_a_leader_dies_that_stepped_aside(
    tmp_path, upstream, gated, until
):
    async with working(tmp_path, [upstream.url]) as two:
        async with working(tmp_path, [upstream.url]) as one:
            led, old = await begun(one, gated)
            followed = await two.open(PATH)
            reading = asyncio.create_task(read(followed.body))
            await until(lambda: followed.body.published >= MB, "it is read along")
            one.purge(stream=MONIKER)
            assert await one.get(PATH) == NEW
            two.cache.set_purged_aside()
            led.body.leave()
        for task in (old, reading):
            with pytest.raises(Cut):
                await task
        followed.body.leave()
        gated.open()
        assert await two.get(PATH) == NEW


@pytest.mark.parametrize("length", [5000, 3 * MB])
async def test_who_waited_before_the_purge_and_who_asks_after_it(tmp_path, upstream, length):
    """No byte has come yet: the fill's waiters get its body, later clients the next one."""
    gate = Gate()
    upstream.answer(PATH, Answer(OLD[:length], etag='"a"', head_gate=gate), Answer(NEW, etag='"b"'))
    async with working(tmp_path, [upstream.url]) as one, working(tmp_path, [upstream.url]) as two:
        waiting = asyncio.create_task(one.get(PATH))
        await asyncio.to_thread(gate.wait_reached)
        one.purge(key=route(PATH).key(Variant()).text)
        assert await one.get(PATH) == NEW
        gate.open()
        assert await waiting == OLD[:length]
        assert [await one.get(PATH), await two.get(PATH)] == [NEW, NEW]
    assert len(upstream.requests(PATH)) == 2


async def test_a_purge_while_a_fill_waits_for_its_slot_costs_no_second_fetch(tmp_path, upstream, until):
    gate, other = Gate(), path_of("other.bin")
    upstream.answer(other, Answer(OLD, etag='"a"', gates=((MB, gate),)))
    upstream.answer(PATH, NEW)
    async with working(tmp_path, [upstream.url], fill={"max": 1}) as one:
        opened, reading = await begun(one, gate, other)
        waiting = asyncio.create_task(one.get(PATH))
        await until(one.dependencies.queue.waiting, "it waits for a slot")
        one.purge(pattern="*full*")
        later = asyncio.create_task(one.get(PATH))
        gate.open()
        assert [await waiting, await later] == [NEW, NEW]
        assert await reading == OLD
        opened.body.leave()
    assert len(upstream.requests(PATH)) == 1


async def test_a_part_on_disk_is_not_continued(tmp_path, upstream, gated):
    async with working(tmp_path, [upstream.url]) as one:
        opened, reading = await begun(one, gated)
        opened.body.leave()
        reading.cancel()
    assert list((tmp_path / "partial").glob("*.part"))
    async with working(tmp_path, [upstream.url]) as two:
        two.purge(pattern="*")
        assert await two.get(PATH) == NEW
    assert upstream.requests(PATH)[-1].header("Range") is None


async def test_an_entry_whose_files_are_still_there_is_not_served(tmp_path, upstream):
    upstream.answer(PATH, Answer(OLD, etag='"a"'), Answer(NEW, etag='"a"'))
    async with working(tmp_path, [upstream.url]) as one, working(tmp_path, [upstream.url]) as two:
        assert await one.get(PATH) == OLD
        one.purge(pattern="*")
        assert one.cache.open_now(route(PATH), Variant()) is None
        assert [await one.get(PATH), await two.get(PATH)] == [NEW, NEW]
    assert len(upstream.requests(PATH)) == 2


async def test_a_prefetched_body_is_purged_too(tmp_path, upstream, gated, until):
    async with working(tmp_path, [upstream.url]) as one:
        fetching = asyncio.create_task(one.cache.prefetch(route(PATH), Variant()))
        await asyncio.to_thread(gated.wait_reached)
        one.purge(pattern="*")
        assert await one.get(PATH) == NEW
        gated.open()
        await asyncio.gather(fetching, return_exceptions=True)
        await until(lambda: not one.cache.fills, "all fills end")
        assert await one.get(PATH) == NEW


async def test_an_index_file_that_is_fetched_again_while_it_is_purged(tmp_path, upstream):
    path, gate = "/content/ContentInfo.txt", Gate()
    answers = (
        Answer(b"1" * 200, etag='"a"'),
        Answer(b"1" * 200, etag='"a"', head_gate=gate),
        Answer(b"2" * 200, etag='"b"'),
    )
    upstream.answer(path, *answers)
    async with working(tmp_path, [upstream.url], cache={"index_ttl": 0.0}) as one:
        assert await one.get(path) == b"1" * 200
        asking = asyncio.create_task(one.get(path))
        await asyncio.to_thread(gate.wait_reached)
        one.purge(kind=Kind.INDEX)
        assert await one.get(path) == b"2" * 200
        gate.open()
        assert await asking in (b"1" * 200, b"2" * 200)
        assert await one.get(path) == b"2" * 200
