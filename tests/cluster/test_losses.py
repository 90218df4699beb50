"""Three real services, of which one joins, is killed, or loses its disk while clients download."""

import os
import shutil
import signal

import pytest
from cluster.services import UNLIMITED, order, owned_by
from cluster.test_one_fetch import bodies, herd
from harness.clients import End, Swarm, body_digest, fetch
from harness.processes import until
from harness.upstreams import Answer, Gate


@pytest.mark.long
def test_a_fourth_node_joins_and_nothing_is_fetched_again(site):
    made = bodies(24, 50_000, 500_000)
    for path, body in made.items():
        site.upstream.answer(path, Answer(body, etag='"a"'))
    herd(site, made, 0)
    site.start("d", settings=UNLIMITED)
    herd(site, made, 0)  # at once: the others may not know it yet
    until(site.all_ask_all, "all ask all", 30)
    moved = [path for path in made if order(path, "abcd")[0] == "d"]
    assert len(moved) > 0
    herd(site, made, 0)
    assert {path: len(site.upstream.requests(path)) for path in made} == dict.fromkeys(made, 1)


def test_an_owner_that_has_lost_its_disk_takes_all_from_the_others(site):
    made = owned_by("a", 12, 300_000)
    for path, body in made.items():
        site.upstream.answer(path, Answer(body, etag='"a"'))
    herd(site, made, 0)
    lost = site.nodes["a"]
    lost.kill()
    shutil.rmtree(lost.cache_dir)
    lost.start()
    herd(site, made, 0)
    until(site.all_ask_all, "all ask all", 30)
    herd(site, made, 0)
    assert {path: len(site.upstream.requests(path)) for path in made} == dict.fromkeys(made, 1)


def begun(site, made, count):
    found = [path for path in made if site.upstream.requests(path)]
    return found if len(found) >= count else None


def resumes_elsewhere(site, client, made, tags):
    """Whether this client, whose node is gone, gets the rest from another one under the same tag."""
    tag, start = client.fields["etag"], client.body_bytes
    fields = {"Range": f"bytes={start}-", "If-Range": tag}
    answer = fetch(site.nodes["b"].data, client.target, fields)
    right = answer.status == 206 and answer.body == made[client.target][start:]
    return right and tag == tags[client.target]


@pytest.mark.long
def test_a_member_whose_workers_are_killed_is_still_the_one_that_fetches(site):
    """Questions wait at its port, which the supervisor holds, until new workers answer them."""
    made = owned_by("a", 4, 300_000)
    for path, body in made.items():
        site.upstream.answer(path, Answer(body, etag='"a"'))
    before = site.nodes["a"].workers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    for path, body in made.items():
        assert site.nodes["b"].get(path).body == body
    assert site.nodes["b"].metrics()("gup_upstream_received_bytes_total") == 0
    assert {path: len(site.upstream.requests(path)) for path in made} == dict.fromkeys(made, 1)
    until(lambda: len(set(site.nodes["a"].workers()) - set(before)) == 2, "successors")


@pytest.mark.long
@pytest.mark.parametrize("size", [1_000_000, 8_000_000], ids=["small", "large"])
def test_a_node_that_is_killed_in_mid_fill_costs_an_overlap_at_most(site, size):
    """Of half of the bodies the next in rank holds nothing: it goes on from what the lowest has.

    A member has a second to say what it holds: among other tests it may be late, and the next asks the WAN.
    """
    made, gates = owned_by("a", 20, size), {}
    for path, body in made.items():
        gates[path] = Gate()
        first = Answer(body, etag='"a"', gates=((size // 2, gates[path]),))
        site.upstream.answer(path, first, Answer(body, etag='"a"'))
    swarms = {name: Swarm(node.data) for name, node in site.nodes.items()}
    try:
        own = [swarms["a"].add(1, path)[0] for path in made]
        theirs = []
        for number, path in enumerate(made):
            _, second, third = order(path)
            for name in (third,) if number % 2 else (second, third):
                theirs += swarms[name].add(2, path)
        streaming = until(lambda: begun(site, made, 8), "as many fills as fill.max")
        reading = [client for client in theirs if client.target in streaming]
        until(lambda: all(client.body_bytes > size // 4 for client in reading), "they have a part")
        tags = {client.target: client.fields["etag"] for client in reading}
        site.nodes["a"].kill()
        for path in streaming:  # the new owner is asked, too
            theirs += swarms[order(path)[1]].add(1, path)
        for gate in gates.values():
            gate.open()
        for name in ("b", "c"):
            swarms[name].wait(timeout_seconds=100)
        swarms["a"].wait(timeout_seconds=100)
    finally:
        for gate in gates.values():
            gate.open()
        for swarm in swarms.values():
            swarm.close()
    assert {(client.status, client.end) for client in theirs} == {(200, End.COMPLETE)}
    assert all(client.digest == body_digest(made[client.target]) for client in theirs)
    resumed = [resumes_elsewhere(site, client, made, tags) for client in own if client.body_bytes]
    assert all(resumed)
    assert resumed
    again = {path: sum(r.body_bytes for r in site.upstream.requests(path)[1:]) for path in streaming}
    assert sum(again.values()) <= len(again) * (0.5 + 0.1) * size
    rest = set(made) - set(streaming)
    assert sum(site.upstream.body_bytes(path) for path in rest) <= 1.1 * len(rest) * size
