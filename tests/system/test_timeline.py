"""The timeline of a real service over kills and restarts, asked by command as an auditor does."""

import csv
import io
import json
import time
from itertools import pairwise

import pytest
from harness.clients import fetch
from harness.commands import on
from harness.content import INDEX, MONIKER, noise, zip_of
from harness.faults import WallClock
from harness.processes import until
from harness.upstreams import Answer

CATALOGUE = f"{MONIKER}: SEPC Virus Definitions Win64 14.3 - MicroDefs - SymAllLanguages\r\n".encode()
HOUR, DAY = 3600, 86400
NAMES = [time.strftime("%y%m%d", time.gmtime(time.time() - days * DAY)) + "001" for days in (4, 3, 2, 1)]
FULLS = [f"/content/{MONIKER}/{name}/full.zip" for name in NAMES]
DELTAS = [f"/content/{MONIKER}/{before}/xdelta{before}_To_{after}.dax" for before, after in pairwise(NAMES)]
ANSWERS = {
    INDEX: Answer(CATALOGUE),
    **{path: Answer(zip_of(path, 9000), etag='"f"') for path in FULLS},
    **{path: Answer(noise(path, 3000), etag='"d"') for path in DELTAS},
}


def take(gup, client, target, **headers):
    answer = fetch(gup.data, target, headers, source=f"127.0.0.{client}")
    assert answer.status in (200, 206)


def report(gup, *arguments):
    done = on(gup, "report", "timeline", *arguments)
    assert done.returncode == 0, done
    return done.stdout


def had(gup, client, at):
    """Revision and way, as the command tells."""
    text = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))
    (row,) = json.loads(report(gup, "--client", f"127.0.0.{client}", "--at", text, "--json"))["standings"]
    return row["revision"], row["how"]


@pytest.mark.long
@pytest.mark.parametrize("addresses", ["full", "hashed"])
def test_what_a_client_had_at_any_moment(serve, tmp_path, addresses):
    clock = WallClock(tmp_path / "clock")
    clock.set(-3 * DAY)
    gup, _ = serve(
        ANSWERS, rules={"mode": "off"}, env=clock.env, workers=2,
        reports={"addresses": addresses}, site={"time_zone": "UTC"},
    )  # fmt: skip

    def known(client, revision):
        path = f"/api/v1/report/timeline?client=127.0.0.{client}"
        until(lambda: revision in {row["revision"] for row in gup.api(path)[1]["standings"]}, revision)

    begin = time.time() - 3 * DAY
    take(gup, 2, FULLS[0])
    known(2, NAMES[0])
    gup.kill()  # a moment later: it is written when it is told
    gup.start()
    clock.set(-2 * DAY)
    take(gup, 2, DELTAS[0])
    take(gup, 3, DELTAS[1], Range="bytes=0-99")  # states what it has, and gets a part only
    known(2, NAMES[1])
    known(3, NAMES[1])
    assert gup.stop() == 0
    clock.set(-1 * DAY)
    gup.start()
    take(gup, 2, DELTAS[1])
    known(2, NAMES[2])
    (controller,) = set(gup.children()) - set(gup.workers())
    gup.kill_worker(controller)
    until(lambda: set(gup.children()) - set(gup.workers()) - {controller}, "another controller")
    clock.set(0)
    take(gup, 2, FULLS[0])  # set up anew
    known(2, NAMES[0])

    expected = {
        -HOUR: (None, None),
        HOUR: (NAMES[0], "taken"),
        DAY + HOUR: (NAMES[1], "taken"),
        2 * DAY + HOUR: (NAMES[2], "taken"),
    }
    assert {after: had(gup, 2, begin + after) for after in expected} == expected
    assert had(gup, 2, time.time() - 1) in ((NAMES[0], "taken"), (NAMES[2], "taken"))
    assert had(gup, 3, begin + DAY + HOUR) == (NAMES[1], "stated")
    table = report(gup, "--client", "127.0.0.2", "--days", "9")
    assert [table.count(name) for name in NAMES[:3]] == [2, 1, 1]
    assert "Taken does not mean installed" in table
    assert ("127.0.0.2" in table) == (addresses == "full")
    rows = list(csv.DictReader(io.StringIO(report(gup, "--client", "127.0.0.2", "--days", "9", "--csv"))))
    assert [row["revision"] for row in rows if row["line"] == "change"] == [NAMES[0], *NAMES[2::-1]]
    assert all("not proof of installation" in row["meaning"] for row in rows if row["line"] == "change")
    assert "no record of" in report(gup, "--client", "127.0.0.99")
    wrong = on(gup, "report", "timeline", "--client", "localhost")
    assert (wrong.returncode, "neither an address" in wrong.stderr) == (1, True)
    assert "is in the future" in on(gup, "report", "timeline", "--at", "2099-01-01").stderr
    shares = json.loads(report(gup, "--days", "7", "--json"))["shares"]
    assert {row["clients"] for row in shares if row["product"] is None} >= {0}


def test_without_addresses_it_says_so(serve):
    gup, _ = serve(ANSWERS, rules={"mode": "off"}, reports={"addresses": "off"})
    take(gup, 2, FULLS[0])
    assert "reports.addresses is off" in report(gup, "--client", "127.0.0.2")
    assert "reports.addresses is off" in report(gup) or "no clients were counted" in report(gup)


def test_the_statement_of_a_month(serve, tmp_path):
    gup, _ = serve(
        ANSWERS,
        rules={"mode": "off"},
        site={"time_zone": "UTC"},
        reports={"price_per_gb": 1000, "currency": "EUR"},
    )
    for path in FULLS:
        for client in (2, 3):
            take(gup, client, path)
    sent = sum(2 * len(ANSWERS[path].body) for path in FULLS)
    gup.wait_metric(sent, "gup_client_sent_bytes_total")
    month = time.strftime("%Y-%m", time.gmtime())
    figures = json.loads(on(gup, "report", "statement", "--month", month, "--json").stdout)
    traffic = figures["traffic"]
    assert (traffic["sent_bytes"], figures["so_far"]) == (sent, True)
    assert traffic["received_bytes"] == gup.metrics()("gup_upstream_received_bytes_total")
    assert figures["saved_money"] == f"{traffic['saved_bytes'] / 1e6:.2f}"
    file = tmp_path / "month.html"
    done = on(gup, "report", "statement", "--month", month, "--output", file)
    assert (done.returncode, done.stdout) == (0, "")
    text = file.read_text()
    assert text.startswith("<!doctype html>")
    assert f"{figures['saved_money']} EUR" in text
    assert "The month is not over" in text
    assert "<!doctype html>" in on(gup, "report", "statement", "--month", month).stdout
    page = fetch(gup.admin, "/").body.decode()
    assert f"/api/v1/report/statement?month={month}" in page
    for wrong, words in (
        ("2099-01", "has not begun"),
        ("1999-01", "nothing to tell"),
        ("May", "not a month"),
    ):
        done = on(gup, "report", "statement", "--month", wrong)
        assert (done.returncode, words in done.stderr) == (1, True), done
    done = on(gup, "report", "statement", "--month", month, "--output", tmp_path / "none" / "x.html")
    assert (done.returncode, "can't be written" in done.stderr) == (1, True)
