"""Reports and the log of a real service, as an administrator reads them: figures that add up, whole lines."""

import csv
import functools
import io
import json
import os
import re
import time
from collections import Counter

import pytest
from harness.clients import fetch
from harness.commands import command, on
from harness.content import INDEX, MONIKER, zip_of
from harness.faults import WallClock
from harness.processes import until
from harness.upstreams import Answer, Gate

PATCHES = "{0C2A4E6D-1111-4222-8333-444455556666}"
CATALOGUE = (
    f"{MONIKER}: SEPC Virus Definitions Win64 14.3 - MicroDefs - SymAllLanguages\r\n"
    f"{PATCHES}: SEPC Client Patch 14.3 RU2 - Patch - English\r\n"
).encode()
FULL, BAD, SLOW = (f"/content/{MONIKER}/26080100{n}/full.zip" for n in (1, 9, 3))
DELTA = f"/content/{MONIKER}/260801001/xdelta260801001_To_260801002.dax"
PATCH = f"/content/{PATCHES}/260801001/full.zip"
BODY = zip_of("reports", 300_000)
BUILD = "14.3.4615.2000"
ANSWERS = {
    INDEX: Answer(CATALOGUE),
    FULL: Answer(BODY, etag='"f"'),
    DELTA: Answer(b"delta" * 400, etag='"d"'),
    BAD: Answer(b"no archive" * 60, etag='"b"'),
    PATCH: Answer(zip_of("patch", 9000), etag='"p"'),
}


def take(gup, client, target, build="", **headers):
    """One whole answer for the machine with the address 127.0.0.`client`; its length."""
    agent = {"User-Agent": f"SEP/{build}"} if build else {}
    answer = fetch(gup.data, target, {**agent, **headers}, source=f"127.0.0.{client}")
    assert (answer.status in (200, 206), answer.complete) == (True, True), answer.status
    return len(answer.body)


def lines(path, logger):
    """The log's lines of one logger, each of which must be whole."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in found if line["logger"] == logger]


@pytest.fixture
def logging(serve, tmp_path):
    """A service with a log in JSON, and the log's path."""

    def start(log, **settings):
        path = tmp_path / "gup.log"
        log = {"format": "json", "destination": str(path), **log}
        gup, upstream = serve(ANSWERS, log=log, rules={"mode": "off"}, **settings)
        return gup, upstream, path

    return start


def counters(gup):
    metrics = gup.metrics()
    return {
        "sent_bytes": metrics("gup_client_sent_bytes_total"),
        "received_bytes": metrics("gup_upstream_received_bytes_total"),
        "wasted_bytes": sum(metrics.series("gup_upstream_wasted_bytes_total").values()),
        "streams": [metrics(f"gup_stream_{direction}_bytes_total") for direction in ("sent", "received")],
    }


def ledger(gup):
    """The savings' sums, in the form of `counters`."""
    status, found = gup.api("/api/v1/savings?days=1000")
    assert status == 200, found
    days = found["days"]
    sums = {name: sum(day[name] for day in days) for name in ("sent_bytes", "received_bytes", "wasted_bytes")}
    assert {name: found["since_install"][name] for name in sums} == sums
    rows = [row for day in days for row in day["streams"]]
    assert sum(row["wasted_bytes"] for row in rows) == sums["wasted_bytes"]
    return sums | {"streams": [sum(row[f"{way}_bytes"] for row in rows) for way in ("sent", "received")]}


def content(gup):
    """The report's rows by moniker."""
    return {row["moniker"]: row for row in gup.api("/api/v1/report/content")[1]["content"]}


def test_records_figures_and_lines_of_one_morning(logging):
    gup, _, log = logging({"access": "all"}, catalog={"refresh": "1h"})
    sent = sum(take(gup, client, FULL, BUILD) for client in (2, 3, 4)) + take(gup, 2, DELTA, BUILD)
    for client, span in ((5, "0-99999"), (5, "100000-"), (6, "0-99999")):
        sent += take(gup, client, FULL, Range=f"bytes={span}")
    sent += sum(take(gup, client, PATCH, BUILD) for client in (3, 4))
    pending = functools.partial(gup.api, "/api/v1/report/clients")
    until(lambda: pending()[1]["pending"] == 2, "two took the patch and state the build of before")
    sent += take(gup, 4, DELTA, "14.3.4615.2100")  # restarted

    def known():
        found = content(gup)
        if found.get(MONIKER, {}).get("type") is None:
            return None  # the catalogue is not read yet
        took = {row["revision"]: row["took"] for row in found[MONIKER]["revisions"]}
        done = (took.get("260801002"), took.get("260801001")) == (2, 4)
        return found if done and found.get(PATCHES, {}).get("clients") == 2 else None

    row = until(known, "all takes are known")[MONIKER]
    assert row["product"] == "SEPC Virus Definitions Win64 14.3"
    assert (row["clients"], row["current"], row["behind"]) == (5, 2, 3)
    lagging = {"127.0.0.3": "260801001", "127.0.0.5": "260801001", "127.0.0.6": None}
    assert {row["address"]: row["revision"] for row in row["lagging"]} == lagging
    restarts = [(row["address"], row["state"]) for row in pending()[1]["restart_pending"]]
    assert restarts == [("127.0.0.3", "pending")]
    assert [gup.get(path).status for path in (BAD, "/content/none.txt")] == [502, 404]
    wanted = "a revision that upstream has and can not give is known as wanted"
    until(lambda: content(gup)[MONIKER]["newest_asked"] == "260801009", wanted)
    row = content(gup)[MONIKER]
    assert (row["clients"], row["behind"], row["newest_held"]) == (6, 6, "260801002")

    _check_lines(log, sent)
    _check_ledger(gup, sent)
    _check_commands(gup)


def _check_lines(log, sent):
    until(lambda: len(lines(log, "gup.access")) >= 12, "all lines are there")
    access = lines(log, "gup.access")
    assert (len(access), sum(line["bytes"] for line in access)) == (12, sent)
    first = next(line for line in access if line["client"] == "127.0.0.2")
    assert (first["result"], first["status"], first["complete"]) == ("miss", 200, True)
    assert first["key"].endswith(f"{MONIKER}/260801001/full.zip")
    assert first["version"] == BUILD
    assert 0 <= first["first_byte_seconds"] <= first["seconds"] < 60
    assert Counter(line["result"] for line in access)["error"] == 2
    assert {line["status"] for line in access} == {200, 206, 404, 502}
    fills = {(line["outcome"], line["key"].rpartition("/")[2]) for line in lines(log, "gup.fill")}
    assert {("stored", "full.zip"), ("failed", "none.txt")} <= fills


def _check_ledger(gup, sent):
    """Savings and history are the counters exactly: at once, after a stop, after kill -9 of a part or all."""
    before = counters(gup)
    assert (before["sent_bytes"], before["wasted_bytes"] >= 600) == (sent, True)
    assert ledger(gup) == before
    assert gup.stop() == 0
    gup.start()
    assert ledger(gup) == before == counters(gup)
    (controller,) = set(gup.children()) - set(gup.workers())
    gup.kill_worker(controller)
    sent += take(gup, 7, FULL)  # what is counted meanwhile belongs to them too
    until(lambda: set(gup.children()) - set(gup.workers()) - {controller}, "another controller")
    gup.wait_metric(sent, "gup_client_sent_bytes_total")
    sent += take(gup, 7, FULL)
    gup.kill()
    gup.start()
    after = counters(gup)
    assert after["sent_bytes"] == sent
    assert ledger(gup) == after
    totals = gup.status()["totals"]["since_install"]
    for span, step in {"hour": 60, "day": 60, "week": 3600, "quarter": 3600}.items():
        history = gup.api(f"/api/v1/history?span={span}")[1]
        points = history["points"]
        assert history["step_seconds"] == step
        assert all(point["at"] % step == 0 for point in points)
        for name in ("client_sent_bytes", "upstream_received_bytes", "saved_bytes"):
            assert sum(point[name] for point in points) == totals[name], (span, name)
        assert sum(point["requests"]["hit"] for point in points) == totals["requests"]["hit"]
        assert sum(sum(point["fills"].values()) for point in points) == totals["fills"] >= 1


def _check_commands(gup):
    def report(*arguments):
        done = on(gup, "report", *arguments)
        assert done.returncode == 0, done
        return done.stdout

    assert "127.0.0.3" in report("clients")
    table = report("content")
    assert "SEPC Virus Definitions Win64 14.3" in table
    assert "1 revision" in table
    asked = json.loads(report("savings", "--json"))
    rows = list(csv.DictReader(io.StringIO(report("savings", "--csv"))))
    assert sum(int(row["sent_bytes"]) for row in rows) == asked["since_install"]["sent_bytes"]
    both = command("report", "savings", "--csv", "--json")
    assert (both.returncode, "use --csv or --json, not both" in both.stderr) == (2, True), both


def test_a_log_is_rotated_sampled_and_tells_of_clients_that_leave(logging):
    gup, upstream, log = logging({"access_sample": 10}, workers=1, reports={"addresses": "hashed"})
    gate = Gate()
    upstream.answer(SLOW, Answer(BODY, etag='"s"', gates=((150_000, gate),)))
    connection = gup.connect()
    gup.serves(DELTA, b"delta" * 400)
    gup.wait_stored(DELTA)
    assert {connection.get(DELTA).status for _ in range(40)} == {200}
    until(lambda: len(lines(log, "gup.access")) == 5, "the miss and four of forty hits are logged")
    kept = log.with_name("gup.log.1")
    log.rename(kept)
    leaving = gup.connect()
    leaving.ask(SLOW)
    gate.wait_reached()
    leaving.close()
    until(lambda: log.exists() and lines(log, "gup.access"), "a new file with the client that left")
    gate.open()
    gup.wait_stored("full.zip")
    left = lines(log, "gup.access")[0]
    assert (left["result"], left["complete"]) in (("miss", False), ("gone", False))
    assert left["bytes"] < len(BODY)
    access = lines(kept, "gup.access")
    assert [line["result"] for line in access] == ["miss", *["hit"] * 4]
    assert {line["one_in"] for line in access[1:]} == {10}
    (hashed,) = {line["client"] for line in access}
    assert hashed.startswith("h-")
    assert gup.stop() == 0
    for path in (kept, log):
        assert "127.0.0.1" not in {line.get("client") for line in lines(path, "gup.access")}
    files = list((gup.cache_dir / "reports").glob("stats.db*"))
    assert files
    # the names of the counters hold the upstream's address
    assert not any(re.search(rb'(?<!upstream=")127\.0\.0\.1', path.read_bytes()) for path in files)


def test_a_log_that_nobody_reads_holds_nobody_up(logging, tmp_path):
    """It goes to a pipe that is full: clients are served, and when somebody reads, all lines are there."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with os.fdopen(os.open(fifo, os.O_RDWR | os.O_NONBLOCK), "rb", 0) as reader:
        gup, _, _ = logging({"access": "all", "destination": str(fifo)}, workers=1)
        connection = gup.connect()
        assert {connection.get(DELTA).status for _ in range(800)} == {200}  # far more than a pipe's 64 KiB
        text = bytearray()

        def all_read():
            while piece := reader.read(1 << 16):
                text.extend(piece)
            return text.count(b'"gup.access"') == 800 and text.endswith(b"\n")

        until(all_read, "every line has come")
        assert {json.loads(line)["status"] for line in text.splitlines() if b'"gup.access"' in line} == {200}
        assert gup.stop() == 0


def test_a_reload_with_a_log_that_can_not_be_opened_is_refused(serve, tmp_path):
    gup, _ = serve(ANSWERS, workers=1, log={"destination": "stderr"})
    workers = gup.workers()
    gup.rewrite({"log": {"destination": str(tmp_path / "none" / "gup.log")}})
    gup.wait_log("settings not reloaded: log.destination: ")
    gup.wait_metric(0, "gup_config_last_reload_successful")
    assert (gup.get(DELTA).status, gup.workers()) == (200, workers)


def test_reports_are_right_again_when_a_clock_that_was_40_days_ahead_is_put_back(serve, tmp_path):
    clock = WallClock(tmp_path / "clock")
    gup, _ = serve(ANSWERS, rules={"mode": "off"}, workers=1, env=clock.env)

    def asked(path):
        return gup.api(f"/api/v1/{path}")[1]

    def standings():
        return {
            row["address"]: row["revision"]
            for stream in asked("report/content")["content"]
            for row in stream["lagging"]
        }

    sent = take(gup, 2, FULL)
    until(lambda: standings().keys() == set() and asked("clients")["clients"], "the first is known")
    assert asked("savings")["today"]["sent_bytes"] == sent
    clock.set(40 * 86400)
    sent += take(gup, 2, DELTA) + take(gup, 3, DELTA)
    until(lambda: len(asked("clients")["clients"]) == 2, "the second is known")
    assert asked("savings")["since_install"]["sent_bytes"] == sent
    clock.set(0)
    sent += take(gup, 2, FULL)
    until(lambda: standings() == {"127.0.0.2": "260801001"}, "who took the older revision last stands at it")
    savings, now = asked("savings"), time.time()
    assert savings["today"]["sent_bytes"] == savings["since_install"]["sent_bytes"] == sent
    assert len(savings["days"]) == 1
    for span in ("hour", "week"):
        points = asked(f"history?span={span}")["points"]
        assert sum(point["client_sent_bytes"] for point in points) == sent
    until(lambda: all(row["seen_at"] <= now + 30 for row in asked("clients")["clients"]), "nobody is ahead")
    assert asked("clients")["seen"]["1d"] <= 2
