import io
import re
import zipfile

import pytest

from gup.content.key import Kind
from gup.demo import tree

STREAMS = tree.streams(9, 200_000)


def test_the_same_seed_makes_the_same_bytes():
    for file in tree.files_of(STREAMS[2], 7):
        assert tree.body(file, 1) == tree.body(file, 1)
        assert tree.body(file, 1) != tree.body(file, 2)


def test_files_differ_from_one_another():
    files = [file for stream in STREAMS for file in tree.files_of(stream, 7)]
    assert len({file.path for file in files}) == len(files)
    assert len({tree.body(file, 1) for file in files}) == len(files)


@pytest.mark.parametrize("stream", STREAMS[:3], ids=lambda stream: stream.product)
def test_a_full_is_a_zip_that_unpacks(stream):
    full = tree.files_of(stream, 5)[0]
    body = tree.body(full, 3)
    assert full.kind is Kind.FULL
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.testzip() is None
        assert "definfo.dat" in archive.namelist()
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        assert b"CurDefs=20250304.003" in archive.read("definfo.dat")
    assert 0.9 < len(body) / stream.full_bytes < 1.1


def test_a_seekable_file_gets_the_bytes_of_a_stream(tmp_path):
    full = tree.files_of(STREAMS[0], 5)[0]
    with (tmp_path / "full.zip").open("wb") as out:
        tree.write(full, 1, out)
    assert (tmp_path / "full.zip").read_bytes() == tree.body(full, 1)


def test_deltas_reach_back_as_far_as_they_should():
    _, *deltas = tree.files_of(STREAMS[0], 5)
    assert [delta.from_ordinal for delta in deltas] == [2, 3, 4]
    assert [delta.from_ordinal for delta in tree.files_of(STREAMS[0], 1)[1:]] == [0]
    for delta in deltas:
        assert delta.kind is Kind.DELTA
        assert 100_000 <= len(tree.body(delta, 1)) <= 300_000
        match = re.fullmatch(
            r"/content/(\{[0-9A-Fa-f-]{36}\})/(\d{9})/xdelta(\d{9})_To_(\d{9})\.dax", delta.path
        )
        assert match is not None
        assert match[2] == match[3] == tree.revision(delta.from_ordinal)
        assert match[4] == tree.revision(5)


def test_revisions_rise_with_the_ordinal():
    numbers = [tree.revision(ordinal) for ordinal in range(400)]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == "250303001"
    moments = [tree.released_at(ordinal) for ordinal in range(400)]
    assert moments == sorted(set(moments))


def test_content_info_names_every_stream_once():
    lines = tree.content_info(STREAMS).decode().splitlines()
    assert len(lines) == len(STREAMS) == len({stream.moniker for stream in STREAMS})
    for line, stream in zip(lines, STREAMS, strict=True):
        assert re.fullmatch(r"\{[0-9A-Fa-f-]{36}\}: .+ - .+", line)
        assert line.endswith(f"{stream.product} - {stream.language}")
    assert {"English", "French", "German", tree.ALL_LANGUAGES} <= {stream.language for stream in STREAMS}


def test_any_number_of_streams_can_be_asked_for():
    assert len({stream.moniker for stream in tree.streams(60, 1)}) == 60
    assert tree.streams(2, 1) == tree.streams(60, 1)[:2]
