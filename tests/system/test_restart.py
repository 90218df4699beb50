"""Restarts: of the service with the upstream gone, of a worker killed in a fill, of everything at once."""

import contextlib
import os
import signal
import time

import pytest
from harness.clients import Client, End, body_digest, fetch
from harness.content import BIG, DELTA, INDEX, content_path, noise, zip_of
from harness.disks import flip
from harness.processes import free_port, listens, until
from harness.service import Gup
from harness.upstreams import Answer, Gate

LENGTH = 6_000_000
HALF = LENGTH // 2
BODY = zip_of("restart", LENGTH)
GATES_STAY = {"read_timeout": "1m"}
"""Nothing is looked for too long: upstream says nothing meanwhile."""
OVERLAP_BYTES = 2 << 20
"""More than a takeover may fetch twice: the chunk that was open, and the overlap of 64 KiB."""


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_with_the_upstream_gone_everything_cached_is_served(serve, end):
    bodies = {BIG: BODY, DELTA: noise("d", 200_000), INDEX: noise("i", 4000)}
    gup, upstream = serve(bodies, bind=f"127.0.0.1:{free_port()}", start=False)

    def until_first_hit() -> float:
        began = time.monotonic()
        gup.launch()
        until(lambda: listens(gup.data), "the port is open")  # the ready line may come later
        gup.serves(DELTA, bodies[DELTA])
        took = time.monotonic() - began
        gup.wait_ready()
        return took

    gup.data = ("127.0.0.1", int(gup.command[gup.command.index("--listen") + 1].rpartition(":")[2]))
    empty = until_first_hit()
    tags = {path: gup.serves(path, body).etag for path, body in bodies.items()}
    gup.wait_stored(*bodies)
    upstream.stop()
    first_hits: list[float] = []
    while not first_hits or (min(first_hits) > empty and len(first_hits) < 4):  # the best of a few counts
        assert not getattr(gup, end)()
        first_hits.append(until_first_hit())
    assert min(first_hits) <= 2 * empty + 1.0, "it waits for what is stored, or what a kill has left"
    for path, body in bodies.items():
        assert gup.serves(path, body).etag == tags[path]
        assert gup.get(path, {"If-None-Match": tags[path]}).status == 304


def held_at_half(*then) -> tuple[Gate, tuple]:
    """A gate, and answers: one that stands there when half is sent, then others."""
    gate = Gate()
    return gate, (Answer(BODY, etag='"a"', gates=((HALF, gate),)), *then)


def controllers(gup: Gup) -> set[int]:
    return set(gup.children()) - set(gup.workers())


def beside(gup: Gup, clients: list[Client], leader: int) -> list[Client]:
    """Those that another worker serves."""
    return [c for c in clients if gup.worker_of_port(gup.data[1], c.local_port) != leader]


def test_a_worker_killed_in_a_fill_is_replaced_and_its_fill_taken_over(serve):
    last = Gate()
    gate, answers = held_at_half(Answer(BODY, etag='"a"', gates=((LENGTH - 500_000, last),)))
    gup, upstream = serve({BIG: answers}, each=GATES_STAY)
    workers, swarm = set(gup.workers()), gup.swarm()
    clients = swarm.add(40, BIG)
    gate.wait_reached()
    swarm.reach(HALF, clients)
    leader = gup.leader_of(upstream, BIG)
    (other,) = workers - {leader}
    of_other = beside(gup, clients, leader)
    of_leader = [c for c in clients if c not in of_other]
    assert of_leader
    assert of_other
    idle = gup.connect_to(other)
    assert idle.get("/content/none.txt").status == 404
    gup.kill_worker(leader)
    (successor,) = until(lambda: set(gup.workers()) - workers, "the worker is replaced")
    assert gup.connect_to(successor).get("/content/none.txt").status == 404
    upstream.wait_for_request(BIG, 2)
    last.wait_reached()
    again = swarm.add(len(of_leader), BIG)  # as clients do, while the fill still runs
    last.open()
    swarm.wait()
    assert idle.get("/content/none.txt").status == 404
    assert {c.end for c in of_leader} <= {End.RESET, End.CUT}
    assert {(c.end, c.digest) for c in (*of_other, *again)} == {(End.COMPLETE, body_digest(BODY))}
    assert len({c.fields["etag"] for c in clients + again}) == 1
    gate.open()
    one, two = upstream.requests(BIG)
    assert (two.status, two.header("if-range")) == (206, '"a"')
    assert (one.body_bytes, two.body_bytes <= HALF + OVERLAP_BYTES) == (HALF, True)
    gup.wait_stored(BIG)
    assert gup.metric("gup_worker_restarts_total") == 1
    assert gup.metric("gup_fill_resumes_total", reason="takeover") == 1


def test_a_takeover_needs_no_slot_and_no_patience(serve):
    """One slot, which the next in the queue has at once; and the fill is older than `fill.queue_timeout`."""
    gate, halves = held_at_half(BODY)
    stays, fill = Gate(), {"max": 1, "queue_timeout": 1.0}
    others = [content_path("full.dax", revision=f"2608020{n:02}") for n in range(8)]
    answers = dict.fromkeys(others, Answer(BODY, gates=((100_000, stays),)))
    gup, upstream = serve({**answers, BIG: halves}, each=GATES_STAY, fill=fill)
    swarm, began = gup.swarm(), time.monotonic()
    clients = swarm.add(80, BIG)
    gate.wait_reached()
    swarm.reach(HALF, clients)
    leader = gup.leader_of(upstream, BIG)
    of_other = beside(gup, clients, leader)
    assert len(of_other) >= 20
    until(lambda: time.monotonic() - began > 1.0, "the fill is older than the patience")
    for other in others:
        swarm.add(1, other)
    gup.wait_metric(88, "gup_fill_waiters")
    gup.kill_worker(leader)
    swarm.wait(of_other)
    assert {(c.end, c.digest) for c in of_other} == {(End.COMPLETE, body_digest(BODY))}
    gate.open()
    stays.open()
    gup.wait_stored(BIG)
    gup.wait_metric(0, "gup_fills_in_progress")
    gup.serves(others[-1], BODY)  # no slot is lost


def test_a_fill_that_nobody_waits_for_is_taken_over_too(serve):
    """No follower in the other worker: the controller brings the dead leader's fill to its end."""
    gate, answers = held_at_half(BODY)
    gup, upstream = serve({BIG: answers})
    client, _ = gup.begin(BIG, HALF)
    client.close()
    gup.kill_worker(gup.leader_of(upstream, BIG))
    second = upstream.wait_for_request(BIG, 2)
    gup.wait_stored(BIG)
    gate.open()
    assert second.status == 206
    gup.wait_metric(1, "gup_cache_entries")
    gup.serves(BIG, BODY)
    assert len(upstream.requests(BIG)) == 2


def test_without_its_controller_the_data_plane_goes_on(serve):
    gate, answers = held_at_half()
    gup, _ = serve({BIG: answers, DELTA: BODY[:1000]})
    client, response = gup.begin(BIG, HALF)
    (controller,) = controllers(gup)
    gup.kill_worker(controller)
    gup.serves(DELTA, BODY[:1000])
    gate.open()
    assert client.finish(response).body == BODY
    until(lambda: len(controllers(gup) - {controller}) == 1, "it is replaced")
    until(lambda: ready(gup), "its successor answers")
    assert gup.metric("gup_client_sent_bytes_total") == LENGTH + 1000
    gup.wait_metric(LENGTH + 1000, "gup_cache_size_bytes")


def ready(gup: Gup) -> bool:
    with contextlib.suppress(OSError):
        return fetch(gup.admin, "/readyz").status == 200
    return False


def test_connections_in_a_dead_workers_queue_are_served_by_its_successor(serve):
    gup, upstream = serve({DELTA: noise("d", 200_000)})
    gup.get(DELTA)
    gup.wait_stored(DELTA)
    victim = gup.workers()[0]
    os.kill(victim, signal.SIGSTOP)
    connections = [gup.connect() for _ in range(40)]
    for connection in connections:
        connection.ask(DELTA)
    # half of them, about, wait in the stopped worker's queue
    waiting = [connection for connection in connections if connection.silent_for(0.02)]
    assert 0 < len(waiting) < 40
    gup.kill_worker(victim)
    assert {connection.response().body == noise("d", 200_000) for connection in connections} == {True}
    assert len(upstream.requests(DELTA)) == 1


@pytest.mark.parametrize("where", ["index", "shared"])
def test_damage_on_disk_is_noticed_and_mended(serve, where):
    """Whatever file is damaged while nobody runs: the service starts, and no wrong byte is served."""
    gup, upstream = serve({BIG: BODY})
    gup.serves(BIG, BODY)
    gup.wait_metric(1, "gup_cache_entries")
    assert gup.stop() == 0
    root = gup.cache_dir
    flip(root / "run" / "shared" if where == "shared" else next((root / "index").rglob("*.db")), *range(64))
    gup.start()
    gup.serves(BIG, BODY)
    assert len(upstream.requests(BIG)) == 1
    gup.wait_metric(1, "gup_cache_entries")
    assert where == "shared" or gup.metric("gup_integrity_failures_total", where=where) >= 1
