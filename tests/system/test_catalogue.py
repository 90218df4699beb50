"""The catalogue over real processes: one fetch for controller and clients, and names in what is shown."""

from harness.scripted import Answer, ScriptedUpstream
from harness.service import Gup
from harness.waiting import until

PATH = "/content/ContentInfo.txt"
NEW = "{07B590B3-9282-482F-BBAA-6D515D385869}"
LINE = "{}: SEPC Virus Definitions {} 12.1 RU6 - MicroDefsB.CurDefs - SymAllLanguages\r\n"
TEXT = LINE.format("{535CB6A4-441F-4e8a-A897-804CD859100E}", "Win32")
MORE = TEXT + LINE.format(NEW, "Win64")
SETTINGS = {"catalog": {}, "cache": {"index_ttl": "1h"}}


def products(gup):
    return {row["product"] for row in gup.api("/api/v1/content")[1]["entries"]}


def test_one_fetch_for_controller_and_clients_and_one_more_question_for_the_unlisted(tmp_path):
    delta = f"/content/{NEW}/260801001/xdelta260731001_To_260801001.dax"
    with ScriptedUpstream() as upstream:
        upstream.answer(PATH, Answer(TEXT.encode(), etag='"1"'))
        upstream.answer(delta, Answer(b"x" * 5000, etag='"d"'))
        with Gup(tmp_path / "cache", [upstream.url], settings=SETTINGS, workers=2) as gup:
            upstream.wait_for_request(PATH)
            for _ in range(4):
                assert gup.get(PATH).body == TEXT.encode()
            assert len(upstream.requests(PATH)) == 1
            upstream.answer(PATH, Answer(MORE.encode(), etag='"2"'))
            assert gup.get(delta).complete
            until(lambda: "SEPC Virus Definitions Win64 12.1 RU6" in products(gup), "the new stream's name")
            asked = [request.header("if-none-match") for request in upstream.requests(PATH)]
            assert asked == [None, '"1"']
