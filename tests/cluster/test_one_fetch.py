"""Three real services and one upstream: each file crosses the WAN once, whoever asks for it and when."""

import random
import time

import pytest
from cluster.services import UNLIMITED, running
from harness.clients import End, Swarm, body_digest
from harness.content import CONTENT_INFO, INDEX, content_path, noise
from harness.processes import until
from harness.upstreams import Answer, Gate


def bodies(count, smallest, largest):
    """So many files' bodies by path, with sizes in equal steps of a factor."""
    factor = (largest / smallest) ** (1 / (count - 1))
    sizes = [int(smallest * factor**number) for number in range(count)]
    return {
        content_path("full.dax", f"{{535CB6A4-441F-4E8A-A897-804CD85910{number:02d}}}"): noise(
            "one fetch", largest + 1
        )[-size:]
        for number, size in enumerate(sizes)
    }


def herd(site, files, clients, *, seconds=120):
    """So many clients at once at random nodes and for random files, each file at least once at each node."""
    chance, nodes = random.Random(5), list(site.nodes.values())
    wishes = [(node, path) for node in range(len(nodes)) for path in files]
    wishes += [
        (chance.randrange(len(nodes)), chance.choice(list(files))) for _ in range(clients - len(wishes))
    ]
    chance.shuffle(wishes)
    swarms = [Swarm(node.data) for node in nodes]
    try:
        for node, path in wishes:
            swarms[node].add(1, path)
        for swarm in swarms:
            swarm.wait(timeout_seconds=seconds)
    finally:
        for swarm in swarms:
            swarm.close()
    done = [client for swarm in swarms for client in swarm.clients]
    digests = {path: body_digest(body) for path, body in files.items()}
    assert {(client.status, client.end) for client in done} == {(200, End.COMPLETE)}
    assert all(client.digest == digests[client.target] for client in done)
    etags = {(client.target, client.fields["etag"]) for client in done}
    assert len(etags) == len(files), "one ETag a file"


def crossed_once(site, files):
    assert {path: len(site.upstream.requests(path)) for path in files} == dict.fromkeys(files, 1)
    assert {path: site.upstream.body_bytes(path) for path in files} == {
        path: len(body) for path, body in files.items()
    }
    total = sum(map(len, files.values()))
    metrics = [node.metrics() for node in site.nodes.values()]
    assert sum(each("gup_upstream_received_bytes_total") for each in metrics) == total
    assert sum(each("gup_peer_received_bytes_total") for each in metrics) == (len(metrics) - 1) * total
    assert sum(each("gup_peer_sent_bytes_total") for each in metrics) == (len(metrics) - 1) * total


FORMS = pytest.mark.parametrize(
    ("files", "clients", "largest"),
    [(12, 60, 2_000_000), pytest.param(40, 300, 20_000_000, marks=pytest.mark.long)],
    ids=["few", "many"],
)


@FORMS
def test_a_herd_at_three_services_costs_one_fetch_a_file(site, files, clients, largest):
    made = bodies(files, 50_000, largest)
    for path, body in made.items():
        site.upstream.answer(path, Answer(body, etag='"a"'))
    herd(site, made, clients)
    crossed_once(site, made)


@FORMS
def test_who_comes_during_the_fills_or_asks_for_ranges_far_ahead_costs_nothing(site, files, clients, largest):
    """The upstream stops in the middle of each body until clients of all kinds have come."""
    made, gate = bodies(files, 1_000_000, largest), Gate()
    for path, body in made.items():
        site.upstream.answer(path, Answer(body, etag='"a"', gates=((len(body) // 2, gate),)))
    chance, swarms = random.Random(6), [Swarm(node.data) for node in site.nodes.values()]
    try:
        early = [chance.choice(swarms).add(1, path)[0] for path in made]
        until(lambda: sum(client.body_bytes > 0 for client in early) >= min(8, files), "the first fills")
        late = [chance.choice(swarms).add(1, chance.choice(list(made)))[0] for _ in range(clients // 2)]
        ranged = []
        for path in (client.target for client in early if client.body_bytes):
            start = len(made[path]) - 100_000
            fields = {"Range": f"bytes={start}-{start + 49_999}"}
            ranged += [swarm.add(1, path, fields)[0] for swarm in swarms]
        late += [swarm.add(1, path)[0] for swarm in swarms for path in made]
        gate.open()
        for swarm in swarms:
            swarm.wait(timeout_seconds=120)
    finally:
        for swarm in swarms:
            swarm.close()
    assert {(client.status, client.end) for client in (*early, *late)} == {(200, End.COMPLETE)}
    assert all(client.digest == body_digest(made[client.target]) for client in (*early, *late))
    assert {(client.status, client.end) for client in ranged} == {(206, End.COMPLETE)}
    for client in ranged:
        start = len(made[client.target]) - 100_000
        assert client.digest == body_digest(made[client.target][start : start + 50_000])
    crossed_once(site, made)


@pytest.mark.long
def test_index_files_and_the_catalogue_cross_once_a_ttl(tmp_path):
    """The controllers of all nodes read the catalogue, too."""
    paths = {INDEX: CONTENT_INFO, content_path("minitri.flg"): b"x" * 500}
    settings = {**UNLIMITED, "catalog": {"refresh": "1s"}, "cache": {"index_ttl": "3s"}}
    with running(tmp_path) as site:
        for path, body in paths.items():
            site.upstream.answer(path, Answer(body, etag='"a"'))
        for name in ("a", "b", "c"):
            site.start(name, settings=settings)
        until(site.all_ask_all, "all ask all", 30)
        for path in paths:  # what they fetched before they knew each other
            for node in site.nodes.values():
                node.get(path)
        before = {path: len(site.upstream.requests(path)) for path in paths}
        began = time.monotonic()
        while time.monotonic() - began < 10:
            for node in site.nodes.values():
                for path, body in paths.items():
                    assert node.get(path).body == body
        turns = (time.monotonic() - began) / 3 + 1
        for path in paths:
            asked = site.upstream.requests(path)[before[path] :]
            assert 2 <= len(asked) <= turns, path
            assert {request.status for request in asked} == {304}
