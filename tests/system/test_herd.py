"""One fetch for everybody: herds on one file, whenever they come and whenever they leave."""

import statistics
import time

import pytest
from harness.clients import Client, End, body_digest
from harness.content import BIG, BIG_BYTES, content_path, make_tree, noise, zip_of
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer, Gate, Nginx

CLIENTS = 500
LENGTH = 4_000_000
BODY = zip_of("herd", LENGTH)
LEFT, RANGED = content_path("left.zip"), content_path("ranged.zip")
RECEIVED = "gup_upstream_received_bytes_total"


def assert_right(clients: list[Client], body: bytes = BODY) -> None:
    """Every client has all bytes, and they are these."""
    assert {(client.end, client.body_bytes) for client in clients} == {(End.COMPLETE, len(body))}
    assert {client.digest for client in clients} == {body_digest(body)}


@pytest.mark.alone
@pytest.mark.needs("nginx")
def test_500_clients_make_one_request_upstream(tmp_path):
    tree = make_tree(tmp_path / "tree")
    # 20 MB in about 2 s: long enough for every client to meet the fill
    with Nginx(tree, tmp_path / "up", rate="10m") as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        swarm = gup.swarm()
        swarm.add(CLIENTS, BIG)
        assert_right(swarm.wait(), tree.body(BIG))
        until(lambda: upstream.requests(BIG), "the upstream's log is written")
        assert (upstream.requests(BIG), upstream.body_bytes(BIG)) == (1, BIG_BYTES)
        # its log tells to the millisecond when the fill ended: first bytes came long before
        ended_at = upstream.log(BIG)[0].ended_at - (time.time() - time.monotonic())
        assert max(client.first_byte_at for client in swarm.clients) < ended_at
        gup.wait_stored(BIG)
        gup.wait_metric(CLIENTS * BIG_BYTES, "gup_client_sent_bytes_total")  # counted after it was sent
        metrics = gup.metrics()
        assert metrics(RECEIVED) == BIG_BYTES
        assert metrics("gup_requests_total", result="miss", code="200") == 1
        assert metrics("gup_requests_total", code="200") == CLIENTS


@pytest.mark.alone
def test_first_bytes_come_within_100_ms_of_the_upstreams_own(serve):
    """For half of them, and in the best of a few herds: on a busy machine one may be late."""
    gup, upstream = serve()
    delays, swarm = [9.0], gup.swarm()
    for path in (content_path("full.zip", revision=f"2609010{number:02}") for number in range(5)):
        head, middle = Gate(), Gate()
        upstream.answer(path, Answer(BODY, etag='"a"', head_gate=head, gates=((100_000, middle),)))
        clients = swarm.add(CLIENTS, path)
        gup.wait_metric(CLIENTS, "gup_fill_waiters")
        head.open()
        until(lambda clients=clients: all(c.body_bytes for c in clients), "all have a first byte")
        began = upstream.requests(path)[0].first_byte_at
        delays.append(statistics.median(c.first_byte_at for c in clients) - began)
        middle.open()
        assert_right(swarm.wait(clients))
        assert len(upstream.requests(path)) == 1
        if delays[-1] <= 0.1:
            break
    assert min(delays) <= 0.1, delays


def test_whatever_is_published_reaches_everybody_while_the_fill_stands_still(shared):
    """Clients arrive through the whole length of the fill; the very first leaves, and nobody notices."""
    gates = {offset: Gate() for offset in (400_000, 1_000_000, 2_000_000, 3_000_000)}
    gup, upstream = shared
    upstream.answer(BIG, Answer(BODY, etag='"a"', gates=tuple(gates.items())))
    swarm, before = gup.swarm(), gup.metric(RECEIVED)
    first, clients = swarm.add(1, BIG, leave_after_bytes=400_000), []
    for offset, gate in gates.items():
        clients = [*clients, *swarm.add(40, BIG)]
        gate.wait_reached()
        swarm.reach(offset, clients)  # while the upstream waits there
        assert swarm.wait(first)[0].end is End.LEFT
        gate.open()
    assert_right(swarm.wait(clients))
    assert_right(swarm.wait(swarm.add(40, BIG)))
    (asked,) = upstream.requests(BIG)
    assert (asked.aborted, asked.body_bytes) == (False, LENGTH)
    assert gup.metric(RECEIVED) - before == LENGTH


def test_all_clients_leave_and_the_fill_still_finishes(shared):
    half, (gup, upstream) = Gate(), shared
    upstream.answer(LEFT, Answer(BODY, etag='"a"', gates=((LENGTH // 2, half),)))
    swarm = gup.swarm()
    swarm.wait(swarm.add(50, LEFT, leave_after_bytes=LENGTH // 4))
    assert gup.metric("gup_fills_in_progress") == 1
    half.open()
    gup.wait_stored(LEFT)
    # one that had read all there was has only closed its side: that shows when more is sent to it
    gup.wait_metric(0, "gup_client_connections")
    gup.wait_metric(0, "gup_fills_in_progress")
    # a worker that followed the fill may look at its end a moment later
    until(lambda: "hit" in gup.serves(LEFT, BODY).header("cache-status"), "it is a hit in every worker")
    assert len(upstream.requests(LEFT)) == 1


def test_many_files_at_once_and_a_herd_of_ranges_are_each_fetched_once(shared):
    """Clients that resume, all at other places, on a body that is not here yet."""
    bodies = {
        path: noise(path, 100_000) for path in (content_path(f"xdelta{n}_To_99.dax") for n in range(12))
    }
    gup, upstream = shared
    for path, body in {**bodies, RANGED: BODY}.items():
        upstream.answer(path, body)
    swarm, before = gup.swarm(), gup.metric(RECEIVED)
    of_path = {path: swarm.add(15, path) for path in bodies}
    of_start = {n: swarm.add(2, RANGED, {"Range": f"bytes={n}-"}) for n in range(0, LENGTH, 100_000)}
    swarm.wait()
    for path, clients in of_path.items():
        assert_right(clients, bodies[path])
        assert len(upstream.requests(path)) == 1
    for start, clients in of_start.items():
        assert {(c.status, c.end) for c in clients} == {(206, End.COMPLETE)}
        assert {c.digest for c in clients} == {body_digest(BODY[start:])}
    gup.wait_stored(RANGED)
    assert [seen.status for seen in upstream.requests(RANGED)] == [200]
    assert gup.metric(RECEIVED) - before == 12 * 100_000 + LENGTH
