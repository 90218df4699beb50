"""The harness proved without gup: upstreams count right, clients see right, gates hold."""

import pytest
from harness.clients import RawConnection, fetch, send_raw
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import parse_metrics, toml
from harness.swarm import End, Swarm, body_digest
from harness.trees import BIG, DELTA, make_tree, noise
from harness.upstreams import Nginx
from harness.waiting import until


def test_a_swarm_on_a_stock_server_is_counted_to_the_byte(tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=1_000_000)
    with Nginx(tree, tmp_path / "nginx") as upstream, Swarm(("127.0.0.1", upstream.port)) as swarm:
        swarm.add(20, BIG)
        early = swarm.add(3, BIG, leave_after_bytes=1000)
        swarm.wait()
        assert {client.end for client in early} == {End.LEFT}
        whole = [client for client in swarm.clients if client.end is End.COMPLETE]
        assert [client.digest for client in whole] == [body_digest(tree.body(BIG))] * 20
        until(lambda: upstream.requests(BIG) == 23, "all requests are logged")
        assert upstream.body_bytes(BIG) >= 20_000_000


def test_nginx_logs_ranges_and_comes_back_on_its_port(tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=100_000)
    with Nginx(tree, tmp_path / "nginx") as upstream:
        address = ("127.0.0.1", upstream.port)
        assert fetch(address, DELTA, {"Range": "bytes=5-9"}).body == tree.body(DELTA)[5:10]
        row = until(lambda: upstream.log(DELTA), "it is logged")[0]
        assert (row.status, row.body_bytes, row.range) == (206, 5, "bytes=5-9")
        with RawConnection(address) as client:  # pipelined responses are read apart
            for _ in range(3):
                client.ask(DELTA)
            assert [client.response().body for _ in range(3)] == [tree.body(DELTA)] * 3
        assert send_raw(address, b"GET / HTTP/1.1\r\n\r\n").status == 400
        upstream.stop()
        with pytest.raises(ConnectionRefusedError):
            fetch(address, DELTA)
        upstream.restart()
        assert fetch(address, DELTA, method="HEAD").header("content-length") == "200000"


def test_the_scripted_upstream_stops_at_gates_and_counts():
    body, middle, shut = noise("gated", 100_000), Gate(), Gate()
    with ScriptedUpstream() as upstream, RawConnection(("127.0.0.1", upstream.port)) as client:
        upstream.answer("/content/x", Answer(body, etag='"1"', gates=((50_000, middle),)))
        response = client.begin("/content/x", 50_000)
        assert client.silent_for(0.1)
        assert upstream.requests("/content/x")[0].body_bytes == 50_000
        middle.open()
        assert client.finish(response).body == body
        assert client.get("/content/x", {"Range": "bytes=99990-", "If-Range": '"1"'}).status == 206
        assert client.get("/content/x", {"Range": "bytes=99990-", "If-Range": '"2"'}).status == 200
        assert client.get("/content/x", {"If-None-Match": '"1"'}).status == 304
        assert client.get("/content/y").status == 404
        assert [seen.body_bytes for seen in upstream.requests("/content/x")] == [100_000, 10, 100_000, 0]
        upstream.answer("/x", Answer(b"x", head_gate=shut))
        client.ask("/x")
        shut.wait_reached()  # a shut gate does not hold the end of a test
    assert upstream.requests("/x")[0].body_bytes == 0


def test_the_scripted_upstream_cuts_lies_and_chunks():
    body = noise("cut", 500_000)
    with ScriptedUpstream() as upstream, Swarm(("127.0.0.1", upstream.port)) as swarm:
        address = ("127.0.0.1", upstream.port)
        upstream.answer("/reset", Answer(body, reset_at=200_000))
        upstream.answer("/short", Answer(body, close_at=20_000))
        upstream.answer("/long", Answer(body, announced=40_000))
        upstream.answer("/chunked", Answer(body, chunked=True))
        upstream.answer("/plain", Answer(body, framed=False))
        upstream.answer("/silent", Answer(reset_at=-1))
        reset, short = fetch(address, "/reset"), fetch(address, "/short")
        assert (reset.complete, reset.reset) == (False, True)
        assert (short.complete, short.body) == (False, body[:20_000])
        assert fetch(address, "/long").body == body[:40_000]
        chunked, plain = fetch(address, "/chunked"), fetch(address, "/plain")
        assert (chunked.body, chunked.chunked, plain.body) == (body, True, body)
        with pytest.raises(AssertionError, match="reset"):
            fetch(address, "/silent")
        clients = [swarm.add(1, path)[0] for path in ("/short", "/reset")]
        swarm.wait()
        assert [client.end for client in clients] == [End.CUT, End.RESET]


def test_metrics_and_settings_are_read_and_written():
    metrics = parse_metrics('# TYPE a counter\na_total{x="1"} 2\na_total{x="2"} 3\n')
    assert (metrics("a_total"), metrics("a_total", x="2")) == (5, 3)
    with pytest.raises(AssertionError, match="no series"):
        metrics("b")
    text = '[cache]\nmax_size = "1GB"\n[[upstream]]\nurl = "u"\n'
    assert toml({"cache": {"max_size": "1GB"}, "upstream": [{"url": "u"}]}) == text
