"""The mark up to which a power cut can't have torn what is stored."""

import time

import pytest
from harness.caches import path_of, read, route, working
from harness.content import noise
from harness.disks import flip, only
from harness.upstreams import Answer

from gup.cache import disk
from gup.cache.disk import Durability, Mark, boot_id, read_mark, write_mark
from gup.content.key import Variant

FILE = path_of("full.dax")
BODY = noise("durable", 300_000)


async def stored(one, upstream, until):
    upstream.answer(FILE, Answer(BODY, etag='"a"'))
    assert await one.get(FILE) == BODY
    await until(lambda: not one.cache.fills, "the fill ends")
    one.cache._entries.clear()
    record = one.dependencies.store.load(route(FILE).key(Variant()))
    assert record is not None
    return record


async def test_a_sync_is_made_when_something_was_committed(tmp_path, upstream, monkeypatch):
    calls = []
    monkeypatch.setattr(disk, "sync_file_system", calls.append)
    async with working(tmp_path, [upstream.url]) as one:
        count = [0]
        syncing = Durability(one.dependencies.store.root, lambda: 10.0, lambda: count[0])
        await syncing.sync()
        await syncing.sync()
        assert len(calls) == 1  # once at the start: what an earlier run left is covered then
        count[0] += 1
        before = time.time()
        await syncing.sync()
        await syncing.sync()
        assert len(calls) == 2
        mark = read_mark(one.dependencies.store.run)
        assert mark.boot_id == boot_id()
        assert before <= mark.at <= time.time()


async def test_a_refused_sync_covers_nothing_and_is_tried_again(
    tmp_path, upstream, until, monkeypatch, caplog
):
    async with working(tmp_path, [upstream.url]) as one:
        record = await stored(one, upstream, until)
        syncing = Durability(one.dependencies.store.root, lambda: 10.0, lambda: 1)

        def refuses(_fd):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(disk, "sync_file_system", refuses)
            await syncing.sync()
            await syncing.sync()
        assert caplog.text.count("refuses to sync") == 1
        assert not read_mark(one.dependencies.store.run).covers(record)
        await syncing.sync()
        assert read_mark(one.dependencies.store.run).covers(record)


@pytest.mark.parametrize(
    ("boot", "ago", "sent_unseen"),
    [(None, 0.0, True), ("another", -60.0, True), ("another", 60.0, False)],
    ids=["since the machine started", "before the last sync", "after the last sync before a power cut"],
)
async def test_in_every_mode_what_a_power_cut_may_have_torn_is_compared(
    tmp_path, upstream, until, boot, ago, sent_unseen
):
    """With `scrub` a flipped byte of an entry that the mark covers is sent: it is not looked at."""
    async with working(tmp_path, [upstream.url], cache={"verify": "scrub"}) as one:
        record = await stored(one, upstream, until)
        mark = Mark(boot_id=boot or boot_id(), at=record.stored_at - ago)
        write_mark(one.dependencies.store.run, mark)
        flip(only((tmp_path / "content").rglob("full.dax")), 1000)
        opened = await one.open(FILE)
        if sent_unseen:
            assert await read(opened.body) != BODY
        else:
            assert not await one.cache.is_sound_at(opened, 0)
        opened.body.leave()
        await until(lambda: not one.cache.fills, "the fill ends")
