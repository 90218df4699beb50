"""The simulated content: its streams and files, conditions and ranges."""

import re
import zipfile
from datetime import UTC, datetime

import pytest
import xxhash
from multidict import CIMultiDict

from gup.content.key import Kind
from gup.demo import content
from gup.demo.content import decide, write_revision

STREAMS = content.streams(9, 200_000)


def test_the_same_seed_makes_the_same_bytes_and_another_others(tmp_path):
    files, again, other = (
        write_revision(tmp_path / name, seed, STREAMS[2], 7).files
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    )
    assert files == again
    for file, different in zip(files, other, strict=True):
        body = (tmp_path / "one" / file.path[1:]).read_bytes()
        assert (len(body), xxhash.xxh3_128_hexdigest(body)) == (file.length, file.digest)
        assert (file.path, file.digest != different.digest) == (different.path, True)


def test_files_differ_from_one_another(tmp_path):
    files = [file for stream in STREAMS for file in write_revision(tmp_path, 1, stream, 7).files]
    assert len({file.path for file in files}) == len({file.digest for file in files}) == len(files)


@pytest.mark.parametrize("stream", STREAMS[:3], ids=lambda stream: stream.product)
def test_a_full_is_a_zip_that_unpacks(tmp_path, stream):
    full = write_revision(tmp_path, 3, stream, 5).full
    assert full.kind is Kind.FULL
    with zipfile.ZipFile(tmp_path / full.path[1:]) as archive:
        assert archive.testzip() is None
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        assert b"CurDefs=20250304.003" in archive.read("definfo.dat")
    assert 0.9 < full.length / stream.full_bytes < 1.1


def test_deltas_reach_back_as_far_as_they_should(tmp_path):
    deltas = write_revision(tmp_path, 1, STREAMS[0], 5).deltas
    assert [delta.from_revision for delta in deltas] == [content.revision(start) for start in (2, 3, 4)]
    assert len(write_revision(tmp_path, 1, STREAMS[0], 1).deltas) == 1
    for delta in deltas:
        assert delta.kind is Kind.DELTA
        assert 100_000 <= delta.length <= 300_000
        match = re.fullmatch(
            r"/content/(\{[0-9A-Fa-f-]{36}\})/(\d{9})/xdelta(\d{9})_To_(\d{9})\.dax", delta.path
        )
        assert match is not None
        assert match[2] == match[3] == delta.from_revision
        assert match[4] == content.revision(5)


def test_revisions_rise_with_the_ordinal():
    numbers = [content.revision(ordinal) for ordinal in range(400)]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == "250303001"
    moments = [content.released_at(ordinal) for ordinal in range(400)]
    assert moments == sorted(set(moments))


def test_content_info_names_every_stream_once(tmp_path):
    index = content.write_content_info(tmp_path, STREAMS)
    lines = (tmp_path / index.path[1:]).read_text().splitlines()
    assert len(lines) == len(STREAMS) == len({stream.moniker for stream in STREAMS})
    for line, stream in zip(lines, STREAMS, strict=True):
        assert re.fullmatch(r"\{[0-9A-Fa-f-]{36}\}: .+ - .+", line)
        assert line.endswith(f"{stream.product} - {stream.language}")
    assert {"English", "French", "German", content.ALL_LANGUAGES} <= {stream.language for stream in STREAMS}


def test_any_number_of_streams_can_be_asked_for():
    assert len({stream.moniker for stream in content.streams(60, 1)}) == 60
    assert content.streams(2, 1) == content.streams(60, 1)[:2]


MODIFIED_AT = datetime(2025, 3, 3, 6, tzinfo=UTC).timestamp()
SAME, LATER = "Mon, 03 Mar 2025 06:00:00 GMT", "Mon, 03 Mar 2025 07:00:00 GMT"
EARLIER = "Sun, 02 Mar 2025 06:00:00 GMT"
WHOLE, UNCHANGED = (200, 0, 1000), (304, 0, 0)


@pytest.mark.parametrize(
    ("headers", "answer"),
    [
        ({}, WHOLE),
        ({"Range": "bytes=0-0"}, (206, 0, 1)),
        ({"Range": "bytes=10-19"}, (206, 10, 20)),
        ({"Range": "bytes=990-2000"}, (206, 990, 1000)),
        ({"Range": "bytes=500-"}, (206, 500, 1000)),
        ({"Range": "bytes=-10"}, (206, 990, 1000)),
        ({"Range": "bytes=-5000"}, (206, 0, 1000)),
        ({"Range": "bytes=1000-"}, (416, 0, 0)),
        ({"Range": "bytes=-0"}, (416, 0, 0)),
        ({"Range": "bytes=20-10"}, WHOLE),
        ({"Range": "bytes=-"}, WHOLE),
        ({"Range": "bytes=0-1,5-6"}, WHOLE),
        ({"Range": "lines=0-1"}, WHOLE),
        ({"Range": "bytes=5-", "If-Range": '"abc"'}, (206, 5, 1000)),
        ({"Range": "bytes=5-", "If-Range": 'W/"abc"'}, WHOLE),
        ({"Range": "bytes=5-", "If-Range": '"other"'}, WHOLE),
        ({"Range": "bytes=5-", "If-Range": SAME}, (206, 5, 1000)),
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
    assert decide(CIMultiDict(headers), '"abc"', MODIFIED_AT, 1000) == answer
