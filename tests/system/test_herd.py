"""One fetch for everybody: herds on one file, whenever they come and whenever they leave."""

import statistics
import time

import pytest
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.swarm import Client, End, Swarm, body_digest
from harness.trees import BIG, BIG_BYTES, content_path, make_tree, noise, zip_of
from harness.upstreams import Nginx, PythonHttp
from harness.waiting import until

pytestmark = pytest.mark.alone

CLIENTS = 500
FIRST_BYTE_SECONDS = 0.1
BODY_BYTES = 4_000_000


def assert_right(clients: list[Client], body: bytes) -> None:
    """Every client has all bytes, and they are these."""
    assert [client.end for client in clients] == [End.COMPLETE] * len(clients)
    assert {client.body_bytes for client in clients} == {len(body)}
    assert {client.digest for client in clients} == {body_digest(body)}


def attached(gup: Gup, count: int) -> None:
    gup.wait_metric(count, "gup_fill_waiters")


@pytest.mark.parametrize("server", ["nginx", pytest.param("python", marks=pytest.mark.long)])
def test_500_clients_make_one_request_upstream(tmp_path, server):
    tree = make_tree(tmp_path / "tree")
    # 20 MB in about 2 s: long enough for every client to meet the fill
    upstream = (
        Nginx(tree, tmp_path / "up", rate="10m") if server == "nginx" else PythonHttp(tree, tmp_path / "up")
    )
    with upstream, Gup(tmp_path / "cache", [upstream.url]) as gup, Swarm(gup.data) as swarm:
        assert len(gup.workers()) == 2
        swarm.add(CLIENTS, BIG)
        assert_right(swarm.wait(50), tree.body(BIG))
        until(lambda: upstream.requests(BIG), "the upstream's log is written")
        assert upstream.requests(BIG) == 1
        assert upstream.body_bytes(BIG) == BIG_BYTES
        if server == "nginx":
            # its log tells to the millisecond when the fill ended: first bytes came long before
            ended_at = upstream.log(BIG)[0].ended_at - (time.time() - time.monotonic())
            assert max(client.first_byte_at for client in swarm.clients) < ended_at
        gup.wait_stored("full.zip")
        metrics = gup.metrics()
        assert metrics("gup_client_sent_bytes_total") == CLIENTS * BIG_BYTES
        assert metrics("gup_upstream_received_bytes_total") == BIG_BYTES
        assert metrics("gup_requests_total", result="miss", code="200") == 1
        assert metrics("gup_requests_total", code="200") == CLIENTS


def test_first_bytes_come_within_100_ms_of_the_upstreams_own(tmp_path):
    body = zip_of("first byte", BODY_BYTES)
    head, middle = Gate(), Gate()
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', head_gate=head, gates=((100_000, middle),)))
        with Gup(tmp_path / "cache", [upstream.url]) as gup, Swarm(gup.data) as swarm:
            clients = swarm.add(CLIENTS, BIG)
            attached(gup, CLIENTS)
            head.open()
            swarm.wait_for(lambda: all(c.body_bytes for c in clients), "all have a first byte", 10)
            began = upstream.requests(BIG)[0].first_byte_at
            assert statistics.median(c.first_byte_at for c in clients) - began <= FIRST_BYTE_SECONDS
            middle.open()
            assert_right(swarm.wait(20), body)
            assert len(upstream.requests(BIG)) == 1


def test_whatever_is_published_reaches_everybody_while_the_fill_stands_still(tmp_path):
    body = zip_of("stands", BODY_BYTES)
    offsets = [500_000, 1_000_000, 2_000_000, 3_000_000]
    gates = [Gate() for _ in offsets]
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', gates=tuple(zip(offsets, gates, strict=True))))
        with Gup(tmp_path / "cache", [upstream.url]) as gup, Swarm(gup.data) as swarm:
            for offset, gate in zip(offsets, gates, strict=True):
                # clients arrive through the whole length of the fill
                swarm.add(40, BIG)
                gate.wait_reached()
                swarm.wait_for(
                    lambda offset=offset: all(c.body_bytes == offset for c in swarm.clients),
                    f"all have the first {offset} bytes while the upstream waits there",
                    10,
                )
                gate.open()
            assert_right(swarm.wait(20), body)
            swarm.add(40, BIG)
            assert_right(swarm.wait(20), body)
            assert len(upstream.requests(BIG)) == 1
            assert upstream.body_bytes(BIG) == BODY_BYTES
            assert gup.metric("gup_upstream_received_bytes_total") == BODY_BYTES


def test_the_first_client_leaves_at_a_tenth_and_nobody_notices(tmp_path):
    body = zip_of("leaves", BODY_BYTES)
    tenth, half = Gate(), Gate()
    gates = ((BODY_BYTES // 10, tenth), (BODY_BYTES // 2, half))
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', gates=gates))
        with Gup(tmp_path / "cache", [upstream.url]) as gup, Swarm(gup.data) as swarm:
            first = swarm.add(1, BIG, leave_after_bytes=BODY_BYTES // 10)
            tenth.wait_reached()
            others = swarm.add(50, BIG)
            swarm.wait(10, first)
            assert first[0].end is End.LEFT
            swarm.wait_for(
                lambda: all(c.body_bytes == BODY_BYTES // 10 for c in others), "the others follow", 10
            )
            tenth.open()
            half.wait_reached()
            half.open()
            assert_right(swarm.wait(20, others), body)
            assert len(upstream.requests(BIG)) == 1
            assert not upstream.requests(BIG)[0].aborted
            gup.wait_stored("full.zip")


def test_all_clients_leave_and_the_fill_still_finishes(tmp_path):
    body = zip_of("all leave", BODY_BYTES)
    half = Gate()
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', gates=((BODY_BYTES // 2, half),)))
        with Gup(tmp_path / "cache", [upstream.url]) as gup, Swarm(gup.data) as swarm:
            swarm.add(50, BIG, leave_after_bytes=BODY_BYTES // 4)
            swarm.wait(20)
            gup.wait_metric(0, "gup_client_connections")
            assert gup.metric("gup_fills_in_progress") == 1
            half.open()
            gup.wait_stored("full.zip")
            gup.wait_metric(0, "gup_fills_in_progress")
            upstream.stop()
            late = gup.get(BIG)
            assert (late.status, late.body == body) == (200, True)
            assert "hit" in (late.header("cache-status") or "")
            assert len(upstream.requests(BIG)) == 1


def test_many_files_at_once_are_each_fetched_once(tmp_path):
    paths = [content_path(f"xdelta26070{n}001_To_260801001.dax") for n in range(12)]
    with ScriptedUpstream() as upstream:
        for path in paths:
            upstream.answer(path, Answer(noise(path, 100_000), etag='"x"'))
        with Gup(tmp_path / "cache", [upstream.url]) as gup, Swarm(gup.data) as swarm:
            of_path = {path: swarm.add(15, path) for path in paths}
            swarm.wait(20)
            for path, clients in of_path.items():
                assert_right(clients, noise(path, 100_000))
                assert len(upstream.requests(path)) == 1
            assert gup.metric("gup_upstream_received_bytes_total") == 12 * 100_000


def test_a_body_of_unknown_length_is_shared_too(tmp_path):
    """Chunked upstream: nobody knows the length before the end, yet it streams, once for all."""
    body = zip_of("unknown", BODY_BYTES)
    middle = Gate()
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, chunked=True, gates=((1_000_000, middle),)))
        with (
            Gup(tmp_path / "cache", [upstream.url]) as gup,
            gup.connect() as one,
            gup.connect() as other,
        ):
            for client in (one, other):
                client.ask(BIG)
            heads = [client.head() for client in (one, other)]
            for head in heads:
                assert head.status == 200
                assert head.header("transfer-encoding") == "chunked"
                assert head.header("etag") is None
                assert head.header("accept-ranges") is None
            middle.open()
            for client, head in zip((one, other), heads, strict=True):
                assert client.finish(head).body == body
                assert head.complete
            gup.wait_stored("full.zip")
            assert gup.get(BIG, {"Range": "bytes=10-19"}).body == body[10:20]
            assert len(upstream.requests(BIG)) == 1


def test_a_herd_of_ranges_is_one_fetch_too(tmp_path):
    """Clients that resume, all at other places, on a body that is not here yet."""
    tree = make_tree(tmp_path / "tree", big_bytes=BODY_BYTES)
    body = tree.body(BIG)
    with (
        Nginx(tree, tmp_path / "nginx") as upstream,
        Gup(tmp_path / "cache", [upstream.url]) as gup,
        Swarm(gup.data) as swarm,
    ):
        starts = range(0, BODY_BYTES, 100_000)
        of_start = {start: swarm.add(2, BIG, {"Range": f"bytes={start}-"}) for start in starts}
        swarm.wait(20)
        for start, clients in of_start.items():
            for client in clients:
                assert (client.status, client.end) == (206, End.COMPLETE)
                assert client.digest == body_digest(body[start:])
        gup.wait_stored("full.zip")
        assert upstream.requests(BIG) == 1
        assert upstream.body_bytes(BIG) == BODY_BYTES


def test_a_chain_of_two_is_one_fetch_at_each(tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=BODY_BYTES)
    with (
        Nginx(tree, tmp_path / "nginx") as upstream,
        Gup(tmp_path / "near", [upstream.url], settings={"site": {"name": "near"}}) as near,
        Gup(tmp_path / "far", [near.url], settings={"site": {"name": "far"}}) as far,
        Swarm(far.data) as swarm,
    ):
        swarm.add(50, BIG)
        assert_right(swarm.wait(20), tree.body(BIG))
        via = swarm.clients[0].fields["via"]
        assert "far" in via
        assert upstream.requests(BIG) == 1
        assert near.metric("gup_client_sent_bytes_total") == BODY_BYTES
        assert far.metric("gup_upstream_received_bytes_total") == BODY_BYTES
