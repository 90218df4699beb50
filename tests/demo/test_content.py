"""The simulated content: its tree, its files on disk, conditions and ranges."""

import io
import re
import zipfile
from datetime import UTC, datetime

import pytest
from multidict import CIMultiDict

from gup.content.key import Kind
from gup.demo import content
from gup.demo.content import CATALOGUE_JSON, Answer, Shelf, Validators, decide, digest_of

STREAMS = content.streams(9, 200_000)


def body_of(file, seed):
    out = io.BytesIO()
    content.write(file, seed, content.DigestingFile(out))
    return out.getvalue()


def test_the_same_seed_makes_the_same_bytes():
    for file in content.files_of(STREAMS[2], 7):
        assert body_of(file, 1) == body_of(file, 1)
        assert body_of(file, 1) != body_of(file, 2)


def test_files_differ_from_one_another():
    files = [file for stream in STREAMS for file in content.files_of(stream, 7)]
    assert len({file.path for file in files}) == len(files)
    assert len({body_of(file, 1) for file in files}) == len(files)


@pytest.mark.parametrize("stream", STREAMS[:3], ids=lambda stream: stream.product)
def test_a_full_is_a_zip_that_unpacks(stream):
    full = content.files_of(stream, 5)[0]
    body = body_of(full, 3)
    assert full.kind is Kind.FULL
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.testzip() is None
        assert "definfo.dat" in archive.namelist()
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        assert b"CurDefs=20250304.003" in archive.read("definfo.dat")
    assert 0.9 < len(body) / stream.full_bytes < 1.1


def test_a_seekable_file_gets_the_bytes_of_a_stream(tmp_path):
    full = content.files_of(STREAMS[0], 5)[0]
    with (tmp_path / "full.zip").open("wb") as out:
        content.write(full, 1, content.DigestingFile(out))
    assert (tmp_path / "full.zip").read_bytes() == body_of(full, 1)


def test_deltas_reach_back_as_far_as_they_should():
    _, *deltas = content.files_of(STREAMS[0], 5)
    assert [delta.from_ordinal for delta in deltas] == [2, 3, 4]
    assert [delta.from_ordinal for delta in content.files_of(STREAMS[0], 1)[1:]] == [0]
    for delta in deltas:
        assert delta.kind is Kind.DELTA
        assert 100_000 <= len(body_of(delta, 1)) <= 300_000
        match = re.fullmatch(
            r"/content/(\{[0-9A-Fa-f-]{36}\})/(\d{9})/xdelta(\d{9})_To_(\d{9})\.dax", delta.path
        )
        assert match is not None
        assert match[2] == match[3] == content.revision(delta.from_ordinal)
        assert match[4] == content.revision(5)


def test_revisions_rise_with_the_ordinal():
    numbers = [content.revision(ordinal) for ordinal in range(400)]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == "250303001"
    moments = [content.released_at(ordinal) for ordinal in range(400)]
    assert moments == sorted(set(moments))


def test_content_info_names_every_stream_once():
    lines = content.content_info(STREAMS).decode().splitlines()
    assert len(lines) == len(STREAMS) == len({stream.moniker for stream in STREAMS})
    for line, stream in zip(lines, STREAMS, strict=True):
        assert re.fullmatch(r"\{[0-9A-Fa-f-]{36}\}: .+ - .+", line)
        assert line.endswith(f"{stream.product} - {stream.language}")
    assert {"English", "French", "German", content.ALL_LANGUAGES} <= {stream.language for stream in STREAMS}


def test_any_number_of_streams_can_be_asked_for():
    assert len({stream.moniker for stream in content.streams(60, 1)}) == 60
    assert content.streams(2, 1) == content.streams(60, 1)[:2]


FEW = content.streams(3, 20_000)


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path, 1, FEW)


def publish(shelf, *streams):
    return shelf.publish([shelf.prepare(at, shelf.next_ordinal(at)) for at in streams])


def test_a_publication_puts_its_files_on_offer(shelf):
    publish(shelf, 0, 1, 2)
    catalogue = CATALOGUE_JSON.validate_json(shelf.catalogue_json)
    assert [stream.moniker for stream in catalogue.streams] == [stream.moniker for stream in FEW]
    for stream in catalogue.streams:
        assert len(stream.deltas) == content.DELTA_DEPTH
        for offered in (stream.full, *stream.deltas, catalogue.content_info):
            body = shelf.find(offered.path).location.read_bytes()
            assert (len(body), digest_of(body)) == (offered.length, offered.digest)
        oldest, *_, last = stream.revisions
        assert stream.newest == last
        assert stream.delta_from(oldest) is None
        assert stream.delta_from(stream.revisions[-2]) in stream.deltas


def test_shelved_bytes_are_those_of_the_tree(shelf):
    publish(shelf, 0)
    planned = content.files_of(FEW[0], content.FIRST_NEWEST)
    for file in planned:
        assert shelf.find(file.path).location.read_bytes() == body_of(file, 1)


def test_monikers_are_found_without_case(shelf):
    publish(shelf, 0)
    path = content.files_of(FEW[0], content.FIRST_NEWEST)[0].path
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
    first = content.files_of(FEW[0], content.FIRST_NEWEST)
    for _ in range(content.KEEP_PUBLICATIONS - 1):
        assert publish(shelf, 0) == []
    full_shelf = len(list(tmp_path.iterdir()))
    withdrawn = publish(shelf, 0)
    assert {file.published.path for file in withdrawn} == {file.path for file in first}
    shelf.discard(withdrawn)
    assert len(list(tmp_path.iterdir())) == full_shelf
    assert shelf.find(first[0].path) is None


KNOWN = Validators('"abc"', datetime(2025, 3, 3, 6, tzinfo=UTC).timestamp())
SAME, LATER = "Mon, 03 Mar 2025 06:00:00 GMT", "Mon, 03 Mar 2025 07:00:00 GMT"
EARLIER = "Sun, 02 Mar 2025 06:00:00 GMT"
WHOLE, UNCHANGED = Answer(200, 0, 1000), Answer(304, 0, 0)


@pytest.mark.parametrize(
    ("headers", "answer"),
    [
        ({}, WHOLE),
        ({"Range": "bytes=0-0"}, Answer(206, 0, 1)),
        ({"Range": "bytes=10-19"}, Answer(206, 10, 20)),
        ({"Range": "bytes=990-2000"}, Answer(206, 990, 1000)),
        ({"Range": "bytes=500-"}, Answer(206, 500, 1000)),
        ({"Range": "bytes=-10"}, Answer(206, 990, 1000)),
        ({"Range": "bytes=-5000"}, Answer(206, 0, 1000)),
        ({"Range": "bytes=1000-"}, Answer(416, 0, 0)),
        ({"Range": "bytes=-0"}, Answer(416, 0, 0)),
        ({"Range": "bytes=20-10"}, WHOLE),
        ({"Range": "bytes=-"}, WHOLE),
        ({"Range": "bytes=0-1,5-6"}, WHOLE),
        ({"Range": "lines=0-1"}, WHOLE),
        ({"Range": "bytes=5-", "If-Range": '"abc"'}, Answer(206, 5, 1000)),
        ({"Range": "bytes=5-", "If-Range": 'W/"abc"'}, WHOLE),
        ({"Range": "bytes=5-", "If-Range": '"other"'}, WHOLE),
        ({"Range": "bytes=5-", "If-Range": SAME}, Answer(206, 5, 1000)),
        ({"Range": "bytes=5-", "If-Range": LATER}, WHOLE),
        ({"If-None-Match": '"abc"'}, UNCHANGED),
        ({"if-none-match": 'W/"abc", "x"'}, UNCHANGED),
        ({"If-None-Match": "*"}, UNCHANGED),
        ({"If-None-Match": '"x"', "If-Modified-Since": LATER}, WHOLE),
        ({"If-Modified-Since": SAME}, UNCHANGED),
        ({"If-Modified-Since": EARLIER}, WHOLE),
        ({"If-Modified-Since": "yesterday"}, WHOLE),
        ({"If-None-Match": '"abc"', "Range": "bytes=0-1"}, UNCHANGED),
    ],
)
def test_conditions_and_ranges(headers, answer):
    assert decide(CIMultiDict(headers), KNOWN, 1000) == answer


def test_the_date_is_written_as_http_wants_it():
    assert KNOWN.last_modified == SAME
