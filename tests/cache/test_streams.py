"""The file that numbers streams, when it is damaged."""

from gup.cache.store import Demotions
from gup.cache.streams import Streams, idle_streams, read_streams
from gup.content.key import ContentKey
from gup.metrics import MAX_STREAMS


def key(stream):
    return ContentKey("any", "any", stream, "260801001", "full.zip")


def test_a_damaged_line_costs_its_own_stream_the_number(tmp_path):
    path = tmp_path / "streams"
    path.write_bytes(b"any/any/{A}\n\xff\xfe\x80\nany/any/{C}\n")
    streams = Streams(path)
    assert [streams.number(key(name)) for name in ("{A}", "{B}", "{C}")] == [0, MAX_STREAMS, 2]
    assert streams.add(key("{B}")) == 1
    assert read_streams(path)[1] == ("any", "any", "{B}")
    assert idle_streams(path, tmp_path) == []


def test_demotions_with_a_damaged_time_are_not_counted(tmp_path):
    path = tmp_path / "demotions"
    path.write_text(f"{'9' * 400} {'a' * 32}\n" * 9000)
    Demotions(path).note("b" * 32)
    assert path.read_text().endswith(f" {'b' * 32}\n")
    assert len(path.read_text().splitlines()) == 1
