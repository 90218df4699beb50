"""Reports and the log of a real service, as an administrator reads them: figures that add up, whole lines."""

import csv
import io
import json
import os
import re
import socket
import subprocess
from collections import Counter

import pytest
from harness.content import zip_of
from harness.processes import until
from harness.service import REPOSITORY, Gup
from harness.upstreams import Answer, Gate, ScriptedUpstream
from typer.testing import CliRunner

from gup.cli.app import app

MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
PATCHES = "{0C2A4E6D-1111-4222-8333-444455556666}"
CATALOGUE = (
    f"{MONIKER}: SEPC Virus Definitions Win64 14.3 - MicroDefs - SymAllLanguages\r\n"
    f"{PATCHES}: SEPC Client Patch 14.3 RU2 - Patch - English\r\n"
).encode()
FULL = f"/content/{MONIKER}/260801001/full.zip"
DELTA = f"/content/{MONIKER}/260801001/xdelta260801001_To_260801002.dax"
PATCH = f"/content/{PATCHES}/260801001/full.zip"
BAD = f"/content/{MONIKER}/260801009/full.zip"
BODY = zip_of("reports", 300_000)


@pytest.fixture(scope="module")
def upstream():
    with ScriptedUpstream() as found:
        found.answer("/content/ContentInfo.txt", Answer(CATALOGUE))
        found.answer(FULL, Answer(BODY, etag='"f"'))
        found.answer(DELTA, Answer(b"delta" * 400, etag='"d"'))
        found.answer(BAD, Answer(b"no archive" * 60, etag='"b"'))
        found.answer(PATCH, Answer(zip_of("patch", 9000), etag='"p"'))
        yield found


def take(gup, client, target, build="", span=None):
    """One whole answer for the machine with the address 127.0.0.`client`."""
    headers = {"User-Agent": f"SEP/{build}"} if build else {}
    if span:
        headers["Range"] = f"bytes={span}"
    lines = [f"GET {target} HTTP/1.1", "Host: gup", *(f"{k}: {v}" for k, v in headers.items())]
    with socket.create_connection(gup.data, 15, (f"127.0.0.{client}", 0)) as sock:
        sock.sendall(("\r\n".join([*lines, "Connection: close"]) + "\r\n\r\n").encode())
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 206")), answer[:200]
    return len(answer.partition(b"\r\n\r\n")[2])


def lines(path, logger):
    """The log's lines of one logger, each of which must be whole."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in found if line["logger"] == logger]


def report(gup, *arguments):
    url = f"http://{gup.admin[0]}:{gup.admin[1]}"
    command = [*gup.PROGRAM, "report", *arguments, "--admin", url]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=env, check=True).stdout


def counters(gup):
    metrics = gup.metrics()
    wasted = metrics.series("gup_upstream_wasted_bytes_total")
    return {
        "sent_bytes": metrics("gup_client_sent_bytes_total"),
        "received_bytes": metrics("gup_upstream_received_bytes_total"),
        "wasted_bytes": sum(wasted.values()),
        "streams": {
            direction: metrics(f"gup_stream_{direction}_bytes_total") for direction in ("sent", "received")
        },
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
    return sums | {
        "streams": {way: sum(row[f"{way}_bytes"] for row in rows) for way in ("sent", "received")},
    }


def test_records_figures_and_lines_of_one_morning(upstream, tmp_path):
    log = tmp_path / "gup.log"
    settings = {
        "log": {"access": "all", "format": "json", "destination": str(log)},
        "catalog": {"refresh": "1h"},
        "rules": {"mode": "off"},
    }
    with Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup:
        sent = sum(take(gup, client, FULL, "14.3.4615.2000") for client in (2, 3, 4))
        sent += take(gup, 2, DELTA, "14.3.4615.2000")
        sent += take(gup, 5, FULL, span="0-99999") + take(gup, 5, FULL, span="100000-")
        sent += take(gup, 6, FULL, span="0-99999")
        sent += sum(take(gup, client, PATCH, "14.3.4615.2000") for client in (3, 4))
        until(
            lambda: gup.api("/api/v1/report/clients")[1]["pending"] == 2,
            "two took the patch and state the build of before",
        )
        sent += take(gup, 4, DELTA, "14.3.4615.2100")  # restarted

        def known():
            _, found = gup.api("/api/v1/report/content")
            by_moniker = {row["moniker"]: row for row in found["content"]}
            if by_moniker.get(MONIKER, {}).get("type") is None:
                return None  # the catalogue is not read yet
            rows = {row["revision"]: row for row in by_moniker[MONIKER]["revisions"]}
            done = rows.get("260801002", {}).get("took") == 2 and rows.get("260801001", {}).get("took") == 4
            return by_moniker if done and by_moniker.get(PATCHES, {}).get("clients") == 2 else None

        content = until(known, "all takes are known")[MONIKER]
        assert content["product"] == "SEPC Virus Definitions Win64 14.3"
        assert (content["clients"], content["current"], content["behind"]) == (5, 2, 3)
        assert {row["address"]: row["revision"] for row in content["lagging"]} == {
            "127.0.0.3": "260801001",
            "127.0.0.5": "260801001",
            "127.0.0.6": None,
        }
        _, restarts = gup.api("/api/v1/report/clients")
        assert [(row["address"], row["state"]) for row in restarts["restart_pending"]] == [
            ("127.0.0.3", "pending")
        ]
        assert gup.get(BAD).status == 502
        assert gup.get("/content/none.txt").status == 404

        def wanted():
            row = next(
                row for row in gup.api("/api/v1/report/content")[1]["content"] if row["moniker"] == MONIKER
            )
            return row if row["newest_asked"] == "260801009" else None

        content = until(wanted, "a revision that upstream has and can not give is known as wanted")
        assert (content["clients"], content["behind"], content["newest_held"]) == (6, 6, "260801002")

        _check_lines(log, sent)
        _check_ledger(gup, sent)
        _check_commands(gup)


def _check_lines(log, sent):
    until(lambda: len(lines(log, "gup.access")) >= 12, "all lines are there")
    access = lines(log, "gup.access")
    assert len(access) == 12
    assert sum(line["bytes"] for line in access) == sent
    first = next(line for line in access if line["client"] == "127.0.0.2")
    assert (first["result"], first["status"], first["complete"]) == ("miss", 200, True)
    assert first["key"].endswith(f"{MONIKER}/260801001/full.zip")
    assert first["version"] == "14.3.4615.2000"
    assert 0 <= first["first_byte_seconds"] <= first["seconds"] < 60
    assert Counter(line["result"] for line in access)["error"] == 2
    assert {line["status"] for line in access} == {200, 206, 404, 502}
    fills = {(line["outcome"], line["key"].rpartition("/")[2]) for line in lines(log, "gup.fill")}
    assert {("stored", "full.zip"), ("failed", "none.txt")} <= fills


def _check_ledger(gup, sent):
    """Savings and history are the counters exactly: at once, after a stop, after kill -9 of a part or all."""
    before = counters(gup)
    assert before["sent_bytes"] == sent
    assert before["wasted_bytes"] >= 600
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
    assert "127.0.0.3" in report(gup, "clients")
    table = report(gup, "content")
    assert "SEPC Virus Definitions Win64 14.3" in table
    assert "1 revision" in table
    asked = json.loads(report(gup, "savings", "--json"))
    rows = list(csv.DictReader(io.StringIO(report(gup, "savings", "--csv"))))
    assert sum(int(row["sent_bytes"]) for row in rows) == asked["since_install"]["sent_bytes"]


def test_a_log_is_rotated_sampled_and_tells_of_clients_that_leave(upstream, tmp_path):
    log = tmp_path / "gup.log"
    settings = {
        "log": {"format": "json", "destination": str(log), "access_sample": 10},
        "reports": {"addresses": "hashed"},
        "rules": {"mode": "off"},
    }
    gate = Gate()
    slow = f"/content/{MONIKER}/260801003/full.zip"
    upstream.answer(slow, Answer(BODY, etag='"s"', gates=((150_000, gate),)))
    with Gup(tmp_path / "cache", [upstream.url], workers=1, settings=settings) as gup:
        with gup.connect() as connection:
            assert connection.get(DELTA).status == 200
            gup.wait_stored(DELTA.rpartition("/")[2])
            for _ in range(40):
                assert connection.get(DELTA).status == 200
        until(lambda: len(lines(log, "gup.access")) == 5, "the miss and four of forty hits are logged")
        kept = tmp_path / "gup.log.1"
        log.rename(kept)
        leaving = gup.connect()
        leaving.ask(slow)
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
        hashes = {line["client"] for line in access}
        assert len(hashes) == 1
        assert hashes.pop().startswith("h-")
        assert gup.stop() == 0
        for path in (kept, log):
            assert "127.0.0.1" not in {line.get("client") for line in lines(path, "gup.access")}
        files = list((tmp_path / "cache" / "reports").glob("stats.db*"))
        assert files
        # The upstream is called by its address, in the names of the counters.
        assert not any(re.search(rb'(?<!upstream=")127\.0\.0\.1', path.read_bytes()) for path in files)


def test_a_log_that_nobody_reads_holds_nobody_up(upstream, tmp_path):
    """It goes to a pipe that is full: clients are served, and when somebody reads, all lines are there."""
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    settings = {
        "log": {"access": "all", "format": "json", "destination": str(fifo)},
        "rules": {"mode": "off"},
    }
    with (
        os.fdopen(os.open(fifo, os.O_RDWR | os.O_NONBLOCK), "rb", 0) as reader,
        Gup(tmp_path / "cache", [upstream.url], workers=1, settings=settings) as gup,
        gup.connect() as connection,
    ):
        for _ in range(800):  # far more than a pipe's 64 KiB
            assert connection.get(DELTA).status == 200
        text = bytearray()

        def all_read():
            while piece := reader.read(1 << 16):
                text.extend(piece)
            return text.count(b'"gup.access"') == 800 and text.endswith(b"\n")

        until(all_read, "every line has come")
        assert {json.loads(line)["status"] for line in text.splitlines() if b'"gup.access"' in line} == {200}
        assert gup.stop() == 0


def test_a_report_has_one_form_at_a_time():
    result = CliRunner().invoke(app, ["report", "savings", "--csv", "--json"])
    assert result.exit_code == 2
    assert "--csv and --json: one of them" in result.output


def test_a_log_that_cannot_be_opened_stops_the_start_and_a_reload_is_refused(upstream, tmp_path):
    settings = {"log": {"destination": str(tmp_path / "none" / "gup.log")}}
    with Gup(tmp_path / "cache", [upstream.url], workers=1, settings=settings, start=False) as gup:
        gup.launch()
        assert gup.wait() == 2
        gup.wait_log("log.destination: ")
        gup.wait_log("can't be written to: there is no folder")
    good = {"log": {"destination": "stderr"}}
    with Gup(tmp_path / "other", [upstream.url], workers=1, settings=good) as gup:
        gup.rewrite(settings)
        until(lambda: "settings not reloaded: log.destination: " in gup.log, "the reload is refused")
        gup.wait_metric(0, "gup_config_last_reload_successful")
        assert gup.get(DELTA).status == 200
