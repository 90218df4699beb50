"""Holds on one gup alone, through real processes: a revision on hold is given to no new request."""

import json
import threading
from urllib.parse import quote

import pytest
from harness.clients import fetch
from harness.commands import on
from harness.content import CONTENT_INFO, INDEX, MONIKER, content_path, zip_of
from harness.processes import until
from harness.upstreams import Answer, Gate

GOOD, BAD, NEXT = "260801001", "260801002", "260802001"
FULL, DELTA = (
    content_path("full.zip", revision=BAD),
    content_path(f"xdelta{GOOD}_To_{BAD}.dax", revision=GOOD),
)
AWAY = content_path(f"xdelta{BAD}_To_{NEXT}.dax", revision=BAD)
OLDER = content_path("full.zip", revision=GOOD)
LATEST = content_path("full.zip", revision="latest")
FILES = {path: zip_of(path, 20_000) for path in (FULL, DELTA, AWAY, OLDER, LATEST)} | {INDEX: CONTENT_INFO}
TWO = {"workers": {"count": 2}}
PILOT = "127.0.0.2"


def hold(gup, *flags):
    done = on(gup, "hold", MONIKER, BAD, "--by", "ann", "--reason", "crashes clients", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(answer, *statuses):
    assert answer.status in (statuses or (403,)), answer
    assert answer.header("content-type") == "application/problem+json"
    return json.loads(answer.body)


def asked_of_each_worker(gup, path):
    return [gup.connect_to(pid).get(path) for pid in gup.workers()]


def test_a_revision_on_hold_is_given_to_no_new_request(serve):
    """What was ready-made in the hot cache of a worker is not either; all else is as before."""
    gup, upstream = serve(FILES, **TWO)
    for path, body in FILES.items():
        for _ in range(3):
            for answer in asked_of_each_worker(gup, path):
                assert answer.body == body
    gup.wait_stored(OLDER)
    asked = len(upstream.requests())
    assert "crashes clients" in hold(gup)
    for path in (FULL, DELTA, LATEST):
        for answer in asked_of_each_worker(gup, path):
            problem = refused(answer, 403, 307)
            assert (answer.status == 307) == (path != DELTA)
            assert (problem["held_by"], problem["reason"]) == ("ann", "crashes clients")
            assert (problem["revision"], problem["stream"]) == (BAD, MONIKER)
        assert gup.get(path, method="HEAD").status == (403 if path == DELTA else 307)
    for path in (AWAY, OLDER, INDEX):
        for answer in asked_of_each_worker(gup, path):
            assert answer.body == FILES[path]
    assert len(upstream.requests()) == asked
    assert gup.metric("gup_rule_refusals_total", rule="hold", mode="enforce") == 9
    assert on(gup, "release", MONIKER, BAD).returncode == 0
    for path in (FULL, DELTA, LATEST):
        for answer in asked_of_each_worker(gup, path):
            assert answer.body == FILES[path]
    assert len(upstream.requests()) == asked


def test_excepted_clients_get_it_and_no_other_one_after_them(serve):
    """The answer to one client is not learned for another with the same head."""
    gup, _ = serve(FILES, **TWO)
    hold(gup, "--except", "127.0.0.2/31", "--except", "10.0.0.0/8")
    for _ in range(3):
        for path in (FULL, DELTA):
            assert fetch(gup.data, path, source=PILOT).body == FILES[path]
            refused(fetch(gup.data, path, source="127.0.0.4"))
            refused(gup.get(path))


def test_a_hold_survives_restarts_and_the_death_of_each_process(serve):
    gup, _ = serve(FILES, **TWO)
    hold(gup)
    assert gup.stop() == 0
    gup.start()
    refused(gup.get(FULL))
    gup.kill()
    gup.start()
    for answer in asked_of_each_worker(gup, FULL):
        refused(answer)
    done = on(gup, "holds")
    for part in (MONIKER, BAD, "ann", "crashes clients"):
        assert part in done.stdout
    assert "ON HOLD" in on(gup, "status").stdout
    assert "On hold for all clients" in on(gup, "why", FULL).stdout
    assert "crashes clients" in fetch(gup.admin, "/").body.decode()
    assert on(gup, "release", MONIKER, BAD).returncode == 0
    assert on(gup, "release", MONIKER, BAD).returncode == 1
    gup.kill()
    gup.start()
    gup.serves(FULL, FILES[FULL])
    assert on(gup, "holds").stdout == ""


def test_who_reads_it_already_gets_the_rest(serve):
    gate = Gate()
    body = zip_of("big", 4_000_000)
    gup, _ = serve({FULL: Answer(body, gates=((2_000_000, gate),))}, **TWO)
    reader, response = gup.begin(FULL, 1_000_000)
    gate.wait_reached()
    hold(gup)
    refused(gup.get(FULL))
    gate.open()
    assert reader.finish(response).body == body
    refused(gup.get(FULL, {"Range": "bytes=10-20"}))


def test_no_answer_of_the_revision_begins_after_the_command_has_ended(serve):
    """Clients that ask without a pause while it is put on hold, over connections that stay open."""
    gup, _ = serve(FILES, **TWO)
    done, late, began = threading.Event(), [], threading.Barrier(5)

    def ask(pid):
        connection = gup.connect_to(pid)
        assert connection.get(DELTA).status == 200
        began.wait()
        while True:
            was_done = done.is_set()
            answer = connection.get(DELTA)
            if was_done:
                late.append(answer.status)
                return

    threads = [threading.Thread(target=ask, args=(pid,)) for pid in gup.workers() * 2]
    for thread in threads:
        thread.start()
    began.wait()
    hold(gup)
    done.set()
    for thread in threads:
        thread.join(30)
    assert late == [403] * 4


def test_a_product_may_be_named_and_what_may_be_had_instead_is_told(serve):
    gup, _ = serve(FILES, catalog={"refresh": "1h"}, **TWO)
    gup.serves(OLDER, FILES[OLDER])
    until(lambda: gup.api(f"/api/v1/content?revision={GOOD}")[1]["matching"], "it is in the index")
    done = on(gup, "hold", "SEPC Virus Definitions Win32 14.3 RU2", BAD, "--json")
    assert [one["stream"] for one in json.loads(done.stdout)["holds"]] == [MONIKER]
    client = gup.connect_to(gup.workers()[0])
    for _ in range(3):
        answer = client.get(FULL)
        problem = refused(answer, 307)
        assert (problem["newest"], problem["type"]) == (GOOD, "urn:gup:problem:newest-in-place")
        assert client.get(answer.header("location")).body == FILES[OLDER]
    for answer in (client.get(FULL), client.get(FULL, {"Range": "bytes=5-"}), client.get(DELTA)):
        assert refused(answer)["newest"] == GOOD
    answer = client.get(FULL)
    assert answer.header("link").startswith(f"<{quote(OLDER)}>;")


def test_another_gup_is_not_redirected_and_stores_nothing_under_the_wrong_name(serve):
    gup, _ = serve(FILES, **TWO)
    gup.serves(OLDER, FILES[OLDER])
    until(lambda: gup.api(f"/api/v1/content?revision={GOOD}")[1]["matching"], "it is in the index")
    hold(gup)
    answer = gup.get(FULL, {"Via": "1.1 branch (gup)"})
    assert refused(answer)["newest"] == GOOD


def test_a_client_with_a_networks_length_is_not_taken_for_the_network(shared):
    gup, _ = shared
    done = on(gup, "hold", MONIKER, BAD, "--except", "10.0.0.1/8")
    assert done.returncode == 2
    assert "10.0.0.1/8 is no network: give 10.0.0.0/8, or 10.0.0.1" in " ".join(
        done.stderr.replace("│", " ").split()
    )
    assert gup.api("/api/v1/holds")[1] == {"holds": [], "canary": []}


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"stream": "nothing", "revision": BAD}, 404),
        ({"stream": MONIKER, "revision": "latest"}, 400),
        ({"stream": MONIKER}, 400),
        ({"stream": MONIKER, "revision": BAD, "except_subnets": ["10.0.0/8"]}, 400),
        ({"stream": MONIKER, "revision": BAD, "reason": "x" * 501}, 400),
    ],
)
def test_what_is_wrong_is_said(shared, given, status):
    gup, _ = shared
    assert gup.api("/api/v1/holds", "POST", given=given)[0] == status
    assert gup.api("/api/v1/holds")[1] == {"holds": [], "canary": []}
