import pytest

from gup.demo import shelf as shelves
from gup.demo import tree
from gup.demo.catalogue import CATALOGUE_JSON, digest_of
from gup.demo.shelf import Shelf

STREAMS = tree.streams(3, 20_000)


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path, 1, STREAMS)


def publish(shelf, *streams):
    return shelf.publish([shelf.prepare(at, shelf.next_ordinal(at)) for at in streams])


def test_a_publication_puts_its_files_on_offer(shelf):
    publish(shelf, 0, 1, 2)
    catalogue = CATALOGUE_JSON.validate_json(shelf.catalogue_json)
    assert [stream.moniker for stream in catalogue.streams] == [stream.moniker for stream in STREAMS]
    for stream in catalogue.streams:
        assert len(stream.deltas) == tree.DELTA_DEPTH
        for offered in (stream.full, *stream.deltas, catalogue.content_info):
            body = shelf.find(offered.path).location.read_bytes()
            assert (len(body), digest_of(body)) == (offered.length, offered.digest)
        oldest, *_, last = stream.revisions
        assert stream.newest == last
        assert stream.delta_from(oldest) is None
        assert stream.delta_from(stream.revisions[-2]) in stream.deltas


def test_shelved_bytes_are_those_of_the_tree(shelf):
    publish(shelf, 0)
    planned = tree.files_of(STREAMS[0], shelves.FIRST_NEWEST)
    for file in planned:
        assert shelf.find(file.path).location.read_bytes() == tree.body(file, 1)


def test_monikers_are_found_without_case(shelf):
    publish(shelf, 0)
    path = tree.files_of(STREAMS[0], shelves.FIRST_NEWEST)[0].path
    assert shelf.find(path.lower()) is shelf.find(path)
    assert shelf.find("/content/none") is None


def test_the_serial_rises_and_the_newest_moves(shelf):
    publish(shelf, 0, 1, 2)
    before = CATALOGUE_JSON.validate_json(shelf.catalogue_json)
    publish(shelf, 1)
    after = CATALOGUE_JSON.validate_json(shelf.catalogue_json)
    assert after.serial == before.serial + 1
    assert after.streams[0] == before.streams[0]
    assert after.streams[1].delta_from(before.streams[1].newest) is not None


def test_old_publications_are_withdrawn_and_leave_the_disk(shelf, tmp_path):
    publish(shelf, 0)
    first = tree.files_of(STREAMS[0], shelves.FIRST_NEWEST)
    for _ in range(shelves.KEEP_PUBLICATIONS - 1):
        assert publish(shelf, 0) == []
    full_shelf = len(list(tmp_path.iterdir()))
    withdrawn = publish(shelf, 0)
    assert {file.published.path for file in withdrawn} == {file.path for file in first}
    shelf.discard(withdrawn)
    assert len(list(tmp_path.iterdir())) == full_shelf
    assert shelf.find(first[0].path) is None
