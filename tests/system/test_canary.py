"""`rules.canary` through real processes: a subnet gets each new revision first."""

import json
import time

from harness.clients import fetch
from harness.commands import on
from harness.content import CONTENT_INFO, INDEX, MONIKER, content_path, zip_of
from harness.processes import until

OLD, NEW, NEWER = "260801001", "260801002", "260802001"
FULLS = {revision: content_path("full.zip", revision=revision) for revision in (OLD, NEW, NEWER, "latest")}
TO_NEW = content_path(f"xdelta{OLD}_To_{NEW}.dax", revision=OLD)
FILES = {path: zip_of(path, 20_000) for path in (*FULLS.values(), TO_NEW)} | {INDEX: CONTENT_INFO}
FIRST, OTHER = "127.0.0.2", "127.0.0.1"
CANARY = {"subnets": ["127.0.0.2/31"], "wait": "1h"}


SETTINGS = {"workers": {"count": 2}, "rules": {"canary": CANARY}}


def get(gup, path, source=OTHER, **headers):
    return fetch(gup.data, path, headers=headers, source=source)


def of_each_worker(gup, path):
    return [gup.connect_to(pid).get(path) for pid in gup.workers()]


def refused(answer, status=403):
    assert answer.status == status, answer
    assert answer.header("content-type") == "application/problem+json"
    return json.loads(answer.body)


def waiting(gup):
    return {row["revision"]: row["opens_at"] for row in gup.status()["canary"]}


def serve_with_old(serve, files=FILES, cache=None):
    """The old revision is open to all."""
    gup, upstream = serve(files, cache=cache or {}, **SETTINGS)
    assert get(gup, FULLS[OLD], FIRST).body == FILES[FULLS[OLD]]
    until(lambda: OLD in waiting(gup), "it is known")
    done = on(gup, "release", MONIKER, OLD)
    assert done.stdout.startswith("open to all: "), done
    return gup, upstream


def test_a_new_revision_goes_to_the_canary_first_and_to_all_after_the_wait(serve):
    gup, upstream = serve_with_old(serve)
    for _ in range(3):
        assert get(gup, FULLS[NEW], FIRST).body == FILES[FULLS[NEW]]
        assert get(gup, TO_NEW, FIRST).body == FILES[TO_NEW]
    until(lambda: NEW in waiting(gup), "it is known")
    began = gup.status()["started_at"]
    assert began + 3600 <= waiting(gup)[NEW] <= time.time() + 3600
    gup.serves(INDEX, CONTENT_INFO)
    asked = len(upstream.requests())
    for answer in of_each_worker(gup, TO_NEW):
        problem = refused(answer)
        assert (problem["type"], problem["newest"]) == ("urn:gup:problem:canary", OLD)
        assert 3500 <= int(answer.header("retry-after")) <= 3600
    assert gup.metric("gup_rule_refusals_total", rule="canary", mode="enforce") == 2
    for path in (FULLS[OLD], INDEX):
        assert all(answer.body == FILES[path] for answer in of_each_worker(gup, path))
    assert "get it first" in on(gup, "why", FULLS[NEW]).stdout
    assert f"{NEW}, first to 127.0.0.2/31" in on(gup, "holds").stdout
    assert NEW in on(gup, "status").stdout
    assert f"{NEW}" in fetch(gup.admin, "/").body.decode()
    assert len(upstream.requests()) == asked
    gup.reload(rules={"canary": CANARY | {"wait": "1ms"}})
    until(lambda: not waiting(gup), "the wait is over")
    for path in (TO_NEW, FULLS[NEW], FULLS["latest"]):
        for _ in range(3):
            assert all(answer.body == FILES[path] for answer in of_each_worker(gup, path))


def test_a_full_package_that_must_wait_is_redirected_to_the_newest_for_all_some_times(serve):
    """Not for a part of it, which would be mixed with another body's, and not for ever."""
    gup, _ = serve_with_old(serve)
    assert get(gup, FULLS[NEW], FIRST).complete
    until(lambda: NEW in waiting(gup), "it is known")
    client = gup.connect_to(gup.workers()[0])
    until(lambda: refused(client.get(FULLS[NEW], {"Range": "bytes=5-"}))["newest"] == OLD, "it is told")
    for path in (FULLS[NEW], FULLS["latest"], FULLS[NEW]):
        answer = client.get(path)
        problem = refused(answer, 307)
        assert problem["type"] == "urn:gup:problem:newest-in-place"
        assert problem["first"] == ["127.0.0.2/31"]
        assert client.get(answer.header("location")).body == FILES[FULLS[OLD]]
    for path in (FULLS[NEW], FULLS["latest"]):
        answer = client.get(path)
        assert refused(answer)["newest"] == OLD
        assert answer.header("link").endswith('; rel="alternate"')


def test_the_wait_begins_when_upstream_has_it_whoever_asks(serve):
    """A client that asks for what is not there, or not there yet, does not shorten the wait."""
    files = {path: body for path, body in FILES.items() if path != FULLS[NEWER]}
    gup, upstream = serve_with_old(serve, files, {"negative_ttl": "300ms"})
    for path in (FULLS[NEWER], content_path("full.zip", revision="99999999999")):
        refused(get(gup, path, Range="bytes=0-"))
        until(lambda path=path: upstream.requests(path, method="HEAD"), "upstream was asked")
        assert not upstream.requests(path)
    refused(get(gup, TO_NEW))
    until(lambda: set(waiting(gup)) == {NEW}, "only what is there waits")
    upstream.answer(FULLS[NEWER], FILES[FULLS[NEWER]])
    until(lambda: get(gup, FULLS[NEWER], FIRST).body == FILES[FULLS[NEWER]], "it is there now")
    until(lambda: set(waiting(gup)) == {NEW, NEWER}, "now it waits")


def test_what_waits_is_known_after_restarts_and_kills_and_what_is_old_stays_open(serve):
    gup, _ = serve_with_old(serve)
    assert get(gup, FULLS[NEW], FIRST).complete
    until(lambda: NEW in waiting(gup), "it is known")
    before = waiting(gup)
    for end in (gup.stop, gup.kill):
        end()
        gup.start()
        assert waiting(gup) == before
        refused(get(gup, TO_NEW))
        assert get(gup, FULLS[OLD]).complete
        assert get(gup, TO_NEW, FIRST).complete


def test_a_hold_comes_before_the_canary_and_both_can_be_released(serve):
    gup, _ = serve_with_old(serve)
    assert get(gup, TO_NEW, FIRST).complete
    until(lambda: NEW in waiting(gup), "it is known")
    assert on(gup, "hold", MONIKER, NEW, "--by", "ann", "--reason", "crashes").returncode == 0
    assert refused(get(gup, TO_NEW, FIRST))["held_by"] == "ann"
    assert refused(get(gup, TO_NEW))["held_by"] == "ann"
    assert on(gup, "release", MONIKER, NEW).returncode == 0
    assert get(gup, TO_NEW).body == FILES[TO_NEW]
    assert on(gup, "release", MONIKER, NEW).returncode == 1


def test_with_rules_reported_only_all_get_it_and_it_is_counted(serve):
    gup, _ = serve(FILES, rules={"mode": "report", "canary": CANARY})
    assert get(gup, FULLS[NEW]).body == FILES[FULLS[NEW]]
    assert gup.metric("gup_rule_refusals_total", rule="canary", mode="report") == 1


def test_what_was_stored_before_a_canary_was_set_is_not_new(serve):
    """A client that had it keeps on getting it, from the first request on."""
    gup, _ = serve(FILES, workers={"count": 2})
    gup.serves(FULLS[NEW], FILES[FULLS[NEW]])
    until(lambda: gup.api(f"/api/v1/content?revision={NEW}")[1]["matching"], "it is in the index")
    time_stored = time.time()
    until(lambda: time.time() > time_stored + 1.5, "the controller has looked", timeout_seconds=5)
    gup.reload(rules={"canary": CANARY | {"wait": "1s"}})
    assert all(answer.body == FILES[FULLS[NEW]] for answer in of_each_worker(gup, FULLS[NEW]))
    refused(get(gup, FULLS[NEWER]))
