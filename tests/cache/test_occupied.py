"""The table of keys that may have files: what is on the disk is found, complete table or not."""

import pytest
from harness.caches import path_of, working
from harness.upstreams import Answer

from gup.cache.cache import Result
from gup.cache.locks import Occupied
from gup.cache.store import Store

FILE = path_of("full.dax")
BODY = b"delta" * 2000


@pytest.mark.parametrize("complete", [False, True])
async def test_a_body_from_an_earlier_run_is_a_hit(tmp_path, upstream, complete):
    upstream.answer(FILE, Answer(BODY, etag='"a"'))
    async with working(tmp_path, [upstream.url]) as earlier:
        assert await earlier.get(FILE) == BODY
    async with working(tmp_path, [upstream.url]) as one:
        if complete:
            one.dependencies.store.note_occupied()
        opened = await one.open(FILE)
        assert opened.result is Result.HIT
        opened.body.leave()
    assert len(upstream.requests(FILE)) == 1


@pytest.mark.parametrize("by_hand", [False, True])
async def test_a_body_that_another_process_has_stored_since_is_a_hit(tmp_path, upstream, by_hand):
    upstream.answer(FILE, Answer(BODY, etag='"a"'))
    table = Occupied(memoryview(bytearray(4096)))
    table.complete()
    async with working(tmp_path, [upstream.url]) as one, working(tmp_path, [upstream.url]) as other:
        one.dependencies.store.occupied = table
        if not by_hand:
            other.dependencies.store.occupied = table
        assert await other.get(FILE) == BODY
        if by_hand:  # the controller sees it when it next compares its index with the records
            assert list(one.dependencies.store.scan())
        opened = await one.open(FILE)
        assert opened.result is Result.HIT
        opened.body.leave()
    assert len(upstream.requests(FILE)) == 1


def test_a_key_is_unknown_until_the_directory_was_gone_through(tmp_path):
    store = Store(tmp_path)
    store.prepare()
    store.occupied = Occupied(memoryview(bytearray(4096)))
    assert store.occupied.maybe(7)
    (store.partial / f"{8:016x}{0:016x}.state").touch()
    store.note_occupied()
    assert not store.occupied.maybe(7)
    assert store.occupied.maybe(8 >> 2), "a fill's state is a file of its key, too"
    store.occupied.note(7)
    assert store.occupied.maybe(7)


def test_a_folder_that_can_t_be_read_leaves_it_incomplete(tmp_path):
    store = Store(tmp_path)
    store.prepare()
    store.partial.rmdir()
    store.occupied = Occupied(memoryview(bytearray(4096)))
    with pytest.raises(OSError, match="partial"):
        store.note_occupied()
    assert store.occupied.maybe(7)
