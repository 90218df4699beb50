"""What an upstream writes is bounded and escaped in every output: problem, log, table, page, API, alarms."""

import pytest
from harness.clients import assert_problem, fetch
from harness.commands import command
from harness.scripted import Answer, ScriptedUpstream
from harness.service import Gup
from harness.trees import content_path
from harness.waiting import until

ANSI, HTML, LONG = "\x1b[2J\x1b]0;owned\x07", "<script>alert(1)</script>", "y" * 100_000
FILE = content_path("xdelta260701001_To_260801001.dax")


@pytest.mark.parametrize(
    "answer",
    [
        Answer(b"x", fields=(("Content-Encoding", f"g{ANSI}{HTML}\xff"),)),
        Answer(b"x", content_type=f"text/html; {HTML}; \xff\xfe"),
        Answer(b"x", fields=(("X-Long", LONG),)),
        Answer(b"x", fields=(("Content-Encoding", HTML + "z" * 4000),)),
        Answer(b"x", 502, reason=f"{HTML}{ANSI}"),
    ],
    ids=["control bytes", "invalid UTF-8", "100 kB", "4 kB", "reason"],
)
def test_no_output_shows_more_than_it_may(tmp_path, answer):
    settings = {"upstream": [{"name": "manager", "url": "http://127.0.0.1:9", "health_interval": "0s"}]}
    with ScriptedUpstream() as upstream:
        settings["upstream"][0]["url"] = upstream.url
        upstream.answer(FILE, answer)
        with Gup(tmp_path / "cache", settings=settings, workers=1) as gup:
            document = assert_problem(gup.get(FILE), 502)
            told = str(document["detail"])
            assert told.isprintable()
            assert len(told.encode()) <= 512
            failures = until(lambda: gup.status()["failures"], "the controller heard of it")
            page = fetch(gup.admin, "/").body.decode()
            table = command("status", "--admin", f"http://127.0.0.1:{gup.admin[1]}").stdout
            gup.wait_log("failed")
            shown = {"api": str(failures), "page": page, "table": table, "log": gup.log}
    for where, text in shown.items():
        assert "\x1b" not in text, where
        assert "\x07" not in text, where
        assert "y" * 600 not in text, where
        assert "z" * 600 not in text, where
        assert all(len(line) < 2500 for line in text.splitlines()), where
    assert HTML not in page
