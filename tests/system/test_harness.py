"""The harness proved without gup: upstreams count right, clients see right, gates hold."""

import pytest
from harness.clients import End, RawConnection, Swarm, fetch
from harness.content import noise
from harness.upstreams import Answer, Gate, ScriptedUpstream


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
        assert (chunked.body, chunked.header("transfer-encoding"), plain.body) == (body, "chunked", body)
        with pytest.raises(AssertionError, match="reset"):
            fetch(address, "/silent")
        clients = [swarm.add(1, path)[0] for path in ("/short", "/reset")]
        swarm.wait()
        assert [client.end for client in clients] == [End.CUT, End.RESET]
