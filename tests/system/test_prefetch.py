"""Through real processes: deltas prefetched, content that an operator wants, storms of fulls, alarms."""

import functools
import json
import re
import time

import pytest
from harness.commands import on
from harness.content import CONTENT_INFO, INDEX, MONIKER, OTHER_MONIKER, content_path, name_of, noise, zip_of
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer, Gate

OLD = [f"26010{day}001" for day in range(1, 6)]
A, B, C = "260110001", "260111001", "260112001"
PATCHES = "{11111111-2222-3333-4444-555555555555}"
CATALOGUE = CONTENT_INFO + f"{PATCHES}: SEPC Client Patch Win64 14.3 RU2 - Patch - English\r\n".encode()
RECEIVED = "gup_upstream_received_bytes_total"


def delta(old: str, new: str, moniker: str = MONIKER, *, under_new: bool = False) -> str:
    return content_path(f"xdelta{old}_To_{new}.dax", moniker, new if under_new else old)


def full(revision: str, moniker: str = MONIKER) -> str:
    return content_path("full.zip", moniker, revision)


def published(*paths: str, size: int = 20_000) -> dict[str, bytes]:
    return {path: noise(path, size) for path in paths}


@pytest.fixture
def site(serve):
    """`serve` with a catalogue, which is known when the service is there."""

    def start(answers, **settings):
        gup, upstream = serve({**answers, INDEX: CATALOGUE}, catalog={"refresh": "1h"}, **settings)
        until(lambda: gup.upstream()["catalogue"], "the catalogue is known")
        return gup, upstream

    return start


def wanted(gup: Gup) -> dict[str, str]:
    """What became of each file that was to be prefetched."""
    code, found = gup.api("/api/v1/prefetch?limit=1000")
    assert code == 200, found
    return {name_of(row["key"]): row["outcome"] for row in found["wanted"]}


def settled(gup: Gup, *paths: str) -> dict[str, str]:
    """The outcomes, when these have one."""

    def look():
        found = wanted(gup)
        ended = all(found.get(name_of(path), "queued") not in ("queued", "fetching") for path in paths)
        return found if ended else None

    return until(look, f"{paths} are prefetched, or not")


def asked(gup: Gup, *paths: str) -> list[str]:
    """Cache-Status of each, which is there."""
    answers = [gup.get(path) for path in paths]
    assert {(answer.status, answer.complete) for answer in answers} == {(200, True)}
    return [answer.header("cache-status").removeprefix("gup; ") for answer in answers]


def deltas_stored(gup: Gup, count: int) -> None:
    until(lambda: sum(path.endswith(".dax") for path in gup.bodies()) == count, "all is stored")


MISS = "fwd=uri-miss; stored"


def test_the_first_of_a_morning_fetches_for_all_others(site):
    first, others = delta(OLD[0], B), [delta(old, B) for old in (*OLD[1:], A)]
    patches = [delta(OLD[0], A, PATCHES), delta(OLD[1], A, PATCHES), delta(OLD[0], B, PATCHES)]
    yesterday = [delta(old, A) for old in OLD]
    unasked = delta(OLD[1], B, PATCHES)
    there = (*yesterday, first, *others[1:], *patches, unasked, delta(OLD[1], B, OTHER_MONIKER))
    gup, upstream = site(published(*there))
    # yesterday: clients of five revisions come to A, one after the other; nobody knows of the others
    assert asked(gup, *yesterday, *patches) == [MISS] * 8
    deltas_stored(gup, 8)
    assert wanted(gup) == {}
    # today: the first one names B
    assert asked(gup, first) == [MISS]
    outcomes = settled(gup, *others)
    assert outcomes == {name_of(others[0]): "absent"} | dict.fromkeys(map(name_of, others[1:]), "stored")
    assert asked(gup, *others[1:]) == ["hit"] * 4
    assert [len(upstream.requests(path)) for path in (first, *others)] == [1] * 6
    # client patches that nobody asked for are nobody's business
    assert upstream.requests(unasked) == []
    left_out = [row["why"] for row in gup.api("/api/v1/prefetch")[1]["left_out"]]
    assert left_out == ["client patches are fetched when a client asks for them"]
    metrics = gup.metrics()
    assert 0 <= metrics(RECEIVED, purpose="prefetch") - 4 * 20_000 < 1000  # the 404 has a body too
    assert metrics(RECEIVED, purpose="fill") == (5 + 3 + 1) * 20_000
    # what is known outlives a restart, and nothing is done twice
    gup.stop()
    for path, body in published(delta(B, C), delta(OLD[0], C), delta(A, C)).items():
        upstream.answer(path, body)
    gup.start()
    until(lambda: gup.status()["ready"], "it is ready again")
    assert asked(gup, delta(OLD[2], B)) == ["hit"]
    assert wanted(gup).keys() == outcomes.keys()
    assert asked(gup, delta(A, C)) == [MISS]
    now = settled(gup, *(delta(old, C) for old in (*OLD, B)))
    stored = {file for file, outcome in now.items() if outcome == "stored"} - outcomes.keys()
    assert stored == {name_of(delta(B, C)), name_of(delta(OLD[0], C))}
    assert [len(upstream.requests(path)) for path in (first, *others)] == [1] * 6


def test_the_folder_and_the_spelling_are_those_of_the_traffic_and_disabled_means_nothing(site):
    spelled = OTHER_MONIKER.lower()
    paths = [delta(old, A, spelled, under_new=True) for old in OLD[:3]]
    first, *others = [delta(old, B, spelled, under_new=True) for old in OLD[:3]]
    gup, upstream = site(published(*paths, first, *others), workers=1, prefetch={"enabled": False})
    upstream.exact = True
    asked(gup, *paths, first)
    deltas_stored(gup, 4)
    assert wanted(gup) == {}
    assert gup.metric(RECEIVED, purpose="prefetch") == 0
    gup.rewrite({"catalog": {"refresh": "1h"}, "prefetch": {"enabled": True}})
    settled(gup, *others)
    assert asked(gup, *others) == ["hit", "hit"]
    assert [len(upstream.requests(path)) for path in others] == [1, 1]


def test_a_client_promotes_a_background_fill(site):
    """It stands still while a client's full streams; asked for, it goes on."""
    gate, big, body = Gate(), delta(A, B), noise("big", 2_000_000)
    blocking = Answer(zip_of("blocking", 300_000), etag='"f"', gates=((100_000, gate),))
    gup, upstream = site({big: Answer(body, etag='"big"', piece_seconds=0.02), full(A): blocking})
    code, found = gup.api("/api/v1/prefetch", "POST", given={"path": big})
    assert (code, found["wanted"][0]["by"]) == (202, "operator")
    upstream.wait_for_request(big)
    client, response = gup.begin(full(A))
    gate.wait_reached()
    gup.wait_metric(2, "gup_fills_in_progress")
    assert until(lambda: stands_still(gup), "it yields to the client's fill") < len(body)
    assert gup.serves(big, body).header("cache-status") == "gup; fwd=uri-miss; collapsed"
    assert len(upstream.requests(big)) == 1
    gate.open()
    assert client.finish(response).complete
    assert settled(gup, big) == {name_of(big): "stored"}


def stands_still(gup: Gup) -> int | None:
    """The bytes prefetched, when they do not grow within a while."""
    before, began = gup.metric(RECEIVED, purpose="prefetch"), time.monotonic()
    while time.monotonic() - began < 0.5:
        if gup.metric(RECEIVED, purpose="prefetch") != before:
            return None
    return int(before) or None


def test_an_operator_has_files_fetched_before_the_morning(site):
    paths = delta(A, B), delta(A, B, PATCHES)
    gup, upstream = site(published(*paths), workers=1, prefetch={"enabled": False})

    ordered = functools.partial(on, gup, "prefetch")
    done = ordered(*paths)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(": ")[1] for line in done.stdout.splitlines()] == ["fetched and stored"] * 2
    assert asked(gup, *paths) == ["hit"] * 2
    again = ordered(delta(A, B), delta(A, C), "--json")
    outcomes = [row["outcome"] for row in json.loads(again.stdout)["wanted"]]
    assert (again.returncode, outcomes) == (1, ["present", "absent"])
    assert ordered(delta(A, B), "--no-wait").returncode == 0
    for arguments, told in (
        (("/etc/passwd",), "can't be fetched: This path is not content that gup serves"),
        ((delta(A, B), "--language", "French"), "no upstream has 'French'; there is 'any' and 'any'"),
    ):
        refused = ordered(*arguments)
        assert (refused.returncode, told in refused.stderr) == (1, True), refused.stderr
    code, found = gup.api("/api/v1/prefetch", "POST", given={"file": "x"})
    assert (code, "path" in found["detail"]) == (400, True), found
    assert [len(upstream.requests(path)) for path in paths] == [1, 1]


def test_a_storm_tells_who_how_many_and_what_it_costs(site):
    """Most clients ask while the full is still arriving; the last ones are hits, in the hot cache too."""
    body, gate = zip_of("storm", 300_000), Gate()
    answers = {full(B): Answer(body, etag='"f"', gates=((100_000, gate),))}
    gup, _ = site({**answers, **published(delta(A, B), size=2_000)})
    asked(gup, delta(A, B))
    assert gup.alarms() == []
    clients = [gup.connect(source=f"127.0.0.{2 + number % 3}") for number in range(9)]
    for client in clients:
        client.ask(full(B))
    gup.wait_metric(9, "gup_fill_waiters")
    gate.open()
    assert all(client.response().body == body for client in clients)
    gup.wait_stored(full(B))
    for _ in range(6):
        assert clients[0].get(full(B)).header("cache-status") == "gup; hit"
    until(lambda: gup.alarms("full-storm"), "the alarm has begun", 20)
    assert gup.metric("gup_full_storm", product="SEPC Virus Definitions Win32 14.3 RU2") == 1
    until(lambda: "15 full packages" in gup.alarms("full-storm")[0]["text"], "all are counted")
    (storm,) = gup.alarms()
    costs = "4.5 MB over the LAN, 300 kB over the WAN; as deltas of 2.0 kB on average it would be"
    told = rf"3 clients \((.+)\) requested 15 full packages of .*against 1 deltas.*{re.escape(costs)}"
    who = re.match(told, storm["text"])
    assert (storm["severity"], sorted(who[1].split(", "))) == ("warning", [f"127.0.0.{n}" for n in (2, 3, 4)])
    gup.wait_log("a storm of fulls: ")
    gup.wait_log("alarm full-storm: ")
    assert [alarm["name"] for alarm in gup.status()["alarms"]] == ["full-storm"]


def test_alarms_begin_and_end_with_their_causes(serve):
    gup, upstream = serve(each={"health_interval": "1s", "connect_timeout": "1s"}, fill={"max": 8})
    settings = {"upstream": [{"url": upstream.url, "health_interval": "1s", "connect_timeout": "1s"}]}
    until(lambda: gup.upstream()["state"] == "up", "the upstream is known to be up")
    assert gup.alarms() == []
    gup.kill_worker(gup.workers()[0])
    gup.rewrite({**settings, "fill": {"max": 0}})
    until(lambda: len(gup.alarms("workers-restarting", "reload-failed")) == 2, "both have begun")
    gup.rewrite({**settings, "fill": {"max": 8}})
    until(lambda: not gup.alarms("reload-failed"), "the settings are right again")
    upstream.stop()
    (found,) = until(lambda: gup.alarms("no-upstream"), "nobody answers", 30)
    assert found["severity"] == "critical"
    assert found["what_to_do"].startswith("Check the WAN link")
    assert abs(found["since"] - time.time()) < 60
    assert gup.alarms()[0]["name"] == "no-upstream"
    gup.wait_log(f"alarm no-upstream: {found['text']}")
    assert re.search("alarm reload-failed is over, after [0-9]+ s", gup.log)


def test_a_clients_miss_is_not_slowed_by_what_is_fetched_ahead(site):
    """It gets the link. On a busy machine it may be late for its next slice: the best of a few counts."""
    body, rates = zip_of("asked", 1_500_000), [0.0]
    misses = [content_path("full.zip", revision=f"2609010{number:02}") for number in range(5)]
    answers = {full(A): Answer(noise("ahead", 60_000_000), etag='"a"'), **dict.fromkeys(misses, body)}
    gup, _ = site(answers, wan={"rate": "1MB/s"})
    assert gup.api("/api/v1/prefetch", "POST", given={"path": full(A)})[0] == 202
    until(lambda: gup.metric(RECEIVED, purpose="prefetch") > 300_000, "it is under way")
    while misses and max(rates) < 800_000:
        began = time.monotonic()
        gup.serves(misses.pop(), body)
        rates.append(len(body) / (time.monotonic() - began))
    assert max(rates) >= 800_000, rates
    now = gup.metric(RECEIVED, purpose="prefetch")
    until(lambda: gup.metric(RECEIVED, purpose="prefetch") > now + 200_000, "it goes on")
