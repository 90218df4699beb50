"""One budget of the WAN for a site, with real services and a real engine: sums, outbreaks, lost engines."""

import json

import pytest
from cluster.services import owned_by, running
from harness.clients import assert_problem
from harness.content import CONTENT_INFO, INDEX, content_path, noise, zip_of
from harness.processes import until
from harness.upstreams import Answer, Gate

SIZE = 200_000
NAMES = ("a", "b", "c")
FULL = content_path("full.zip", revision="260901001")
BIG = noise("big", 2 * SIZE)
BODY = zip_of("full", 50_000)


@pytest.fixture
def site(tmp_path):
    with running(tmp_path) as started:
        started.upstream.answer(INDEX, CONTENT_INFO)
        started.upstream.answer(FULL, BODY)
        yield started


def start(site, *names, size="1GB", **more):
    settings = {"wan": {"rate": "0"}, "wan.budget": {"bytes": size}, **more}
    for name in names:
        site.start(name, settings=settings)
    until(site.all_ask_all, "all ask all", 30)


def budget(site, name):
    return site.nodes[name].api("/api/v1/budget")[1]


def used(site, name):
    return budget(site, name)["used_bytes"]


def sent(site, *paths):
    return sum(site.upstream.body_bytes(path) for path in paths)


def fetch_own(site, name, count=2):
    """Content that this node fetches for the site; its paths."""
    bodies = owned_by(name, count, SIZE)
    for path, body in bodies.items():
        site.upstream.answer(path, body)
        site.nodes[name].serves(path, body)
    return list(bodies)


@pytest.mark.long
def test_the_used_bytes_of_all_add_up_also_of_one_that_is_killed_in_a_fill(site):
    start(site, *NAMES)
    paths = [path for name in NAMES for path in fetch_own(site, name)]
    for name in NAMES:
        until(lambda name=name: used(site, name) == sent(site, *paths) == 6 * SIZE, f"{name} knows it all")
    # b fetches for a, and is killed in mid-body
    path = content_path("full.dax", "{535CB6A4-441F-4E8A-A897-804C99999999}")
    gate = Gate()
    site.upstream.answer(path, Answer(BIG, etag='"a"', gates=((SIZE, gate),)), Answer(BIG, etag='"a"'))
    site.nodes["b"].begin(path)
    gate.wait_reached()
    paths.append(path)
    until(lambda: used(site, "c") == sent(site, *paths), "c knows of b's fill")
    site.nodes["b"].kill()
    paths += fetch_own(site, "a", 4)[2:]
    until(lambda: used(site, "c") == sent(site, *paths), "what b received counts on")
    # the engine loses everything, and a node comes that was not there
    site.valkey.kill()
    site.valkey.start()
    until(lambda: used(site, "a") == sent(site, *paths), "all is put back", 30)
    site.nodes["b"].start()
    until(site.all_ask_all, "b is back", 30)
    site.nodes["b"].serves(path, BIG)
    for name in NAMES:
        until(lambda name=name: used(site, name) == sent(site, *paths), f"{name} knows it all again", 30)
    assert {row["node"] for row in budget(site, "a")["nodes"]} == set(NAMES)


@pytest.mark.long
def test_what_others_have_used_holds_back_here_and_an_outbreak_opens_it_everywhere(site):
    start(site, *NAMES, size="500kB")
    fetch_own(site, "a", 3)
    for name in NAMES:
        until(lambda name=name: used(site, name) == 3 * SIZE, f"{name} knows it")
    for name in NAMES:
        problem = assert_problem(site.nodes[name].get(FULL), 503, "wan-budget")
        assert problem["budget_bytes"] == 500_000
        site.nodes[name].serves(INDEX, CONTENT_INFO)
    assert not site.upstream.requests(FULL)
    given = {"duration": "1h", "by": "ann", "reason": "worm"}
    status, answer = site.nodes["b"].api("/api/v1/outbreak", "POST", given=given)
    assert (status, answer["unconfirmed"]) == (200, [])
    for name in NAMES:
        site.nodes[name].serves(FULL, BODY)
        assert site.nodes[name].api("/api/v1/outbreak")[1]["outbreak"]["reason"] == "worm"
    site.nodes["c"].kill()
    status, answer = site.nodes["a"].api("/api/v1/outbreak", "DELETE")
    assert status == 200
    site.nodes["c"].start()
    until(site.all_ask_all, "c is back", 30)
    other = content_path("full.zip", revision="260902001")
    for name in NAMES:
        assert site.nodes[name].api("/api/v1/outbreak")[1] == {"outbreak": None}
        assert_problem(site.nodes[name].get(other), 503, "wan-budget")


@pytest.mark.long
def test_without_the_engine_each_goes_on_with_what_it_knows(site):
    start(site, *NAMES)
    paths = fetch_own(site, "a")
    until(lambda: used(site, "b") == sent(site, *paths), "b knows it")
    site.valkey.kill()
    until(lambda: site.seen_by("b")["engine_error"], "the engine is away", 30)
    more = fetch_own(site, "b")
    assert used(site, "b") == sent(site, *paths, *more)
    assert used(site, "a") == sent(site, *paths)
    file = site.nodes["b"].cache_dir / "run" / "wan-budget"
    until(lambda: json.loads(file.read_text())["others"], "what a told is in b's file")  # every ten seconds
    site.nodes["b"].kill()
    site.nodes["b"].start()
    assert used(site, "b") == sent(site, *paths, *more)
    site.valkey.start()
    until(lambda: used(site, "a") == sent(site, *paths, *more), "a hears of it", 30)
