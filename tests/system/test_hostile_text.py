"""What an upstream writes is bounded and escaped in every output: problem, log, table, page, API, alarms."""

from harness.clients import assert_problem, fetch
from harness.commands import command
from harness.content import content_path
from harness.processes import until
from harness.upstreams import Answer

ANSI, HTML, LONG = "\x1b[2J\x1b]0;owned\x07", "<script>alert(1)</script>", "y" * 100_000
HOSTILE = {
    "control bytes": Answer(b"x", fields=(("Content-Encoding", f"g{ANSI}{HTML}\xff"),)),
    "invalid UTF-8": Answer(b"x", content_type=f"text/html; {HTML}; \xff\xfe"),
    "100 kB": Answer(b"x", fields=(("X-Long", LONG),)),
    "4 kB": Answer(b"x", fields=(("Content-Encoding", HTML + "z" * 4000),)),
    "reason": Answer(b"x", 502, reason=f"{HTML}{ANSI}"),
}


def test_no_output_shows_more_than_it_may(serve):
    gup, upstream = serve(workers=1, each={"health_interval": "0s"})
    for number, answer in enumerate(HOSTILE.values(), 1):
        path = content_path(f"xdelta{number}_To_9.dax")
        upstream.answer(path, answer)
        told = str(assert_problem(gup.get(path), 502)["detail"])
        assert told.isprintable()
        assert len(told.encode()) <= 512
        failures = until(lambda n=number: len(f := gup.status()["failures"]) >= n and f, "it is heard of")
    shown = {
        "api": str(failures),
        "page": fetch(gup.admin, "/").body.decode(),
        "table": command("status", "--admin", f"http://127.0.0.1:{gup.admin[1]}").stdout,
    }
    gup.stop()
    shown["log"] = gup.log
    assert "failed" in shown["log"]
    for where, text in shown.items():
        assert not [hostile for hostile in ("\x1b", "\x07", "y" * 600, "z" * 600) if hostile in text], where
        lines = [line for line in text.splitlines() if "data-columns" not in line]  # charts: numbers alone
        assert all(len(line) < 2500 for line in lines), where
    assert HTML not in shown["page"]
