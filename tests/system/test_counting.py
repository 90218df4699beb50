"""What is counted equals what clients and upstreams counted themselves, to the byte, whoever dies."""

import re

from harness.clients import fetch
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup, Metrics
from harness.swarm import End, Swarm
from harness.trees import BIG, DELTA, INDEX, make_tree, zip_of
from harness.upstreams import Nginx
from harness.waiting import until

LENGTH = 3_000_000


def sent(metrics: Metrics) -> float:
    return metrics("gup_client_sent_bytes_total")


def received(metrics: Metrics) -> float:
    return metrics("gup_upstream_received_bytes_total")


def test_bytes_and_requests_equal_what_both_sides_counted(tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=LENGTH)
    with (
        Nginx(tree, tmp_path / "nginx") as upstream,
        Gup(tmp_path / "cache", [upstream.url]) as gup,
        Swarm(gup.data) as swarm,
    ):
        swarm.add(25, BIG)
        swarm.add(25, DELTA)
        swarm.add(10, INDEX)
        swarm.wait(20)
        for name in ("full.zip", DELTA.rpartition("/")[2], "ContentInfo.txt"):
            gup.wait_stored(name)
        etag = gup.get(DELTA).etag
        client_bytes = sum(client.body_bytes for client in swarm.clients) + 200_000
        for start in range(0, LENGTH, 100_000):
            client_bytes += len(gup.get(BIG, {"Range": f"bytes={start}-{start + 49_999}"}).body)
        for _ in range(10):
            assert gup.get(DELTA, {"If-None-Match": etag}).status == 304
            assert gup.get(DELTA, method="HEAD").status == 200
        with gup.connect() as client:
            for _ in range(30):
                client_bytes += len(client.get(DELTA).body)
        metrics = gup.metrics()
        assert sent(metrics) == client_bytes
        assert received(metrics) == sum(row.body_bytes for row in upstream.log())
        assert received(metrics) == LENGTH + 200_000 + len(tree.body(INDEX))
        assert metrics("gup_upstream_received_bytes_total", purpose="index") == len(tree.body(INDEX))
        # 60 of the swarm, one for the tag, 30 ranges, 10 conditions, 10 HEADs, 30 on one connection
        assert metrics("gup_requests_total") == 60 + 1 + 30 + 10 + 10 + 30
        assert metrics("gup_requests_total", code="304") == 10
        assert metrics("gup_requests_total", code="206") == 30
        assert metrics("gup_requests_total", result="miss") == 3
        assert metrics("gup_fills_total", outcome="committed") == 3
        assert metrics("gup_upstream_requests_total", outcome="ok") == 3


def test_counts_outlive_a_killed_worker_and_a_restart(tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=LENGTH)
    with Nginx(tree, tmp_path / "nginx") as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        client_bytes = 0
        requests = 0
        assert len(gup.get(BIG).body) == LENGTH
        gup.wait_stored("full.zip")
        client_bytes, requests = LENGTH, 1
        for _ in range(2):
            victim = gup.workers()[0]
            for pid in gup.workers():
                with gup.connect_to(pid) as client:
                    for _ in range(5):
                        client_bytes += len(client.get(BIG).body)
                        requests += 1
            gup.kill_worker(victim)
            until(lambda pid=victim: pid not in gup.workers() and len(gup.workers()) == 2, "it is replaced")
            metrics = gup.metrics()
            assert sent(metrics) == client_bytes
            assert metrics("gup_requests_total") == requests
            assert received(metrics) == LENGTH == upstream.body_bytes(BIG)
        before = gup.status()
        assert before["totals"]["since_start"]["client_sent_bytes"] == client_bytes
        assert before["totals"]["since_install"]["client_sent_bytes"] == client_bytes
        assert gup.stop() == 0
        gup.start()
        after = gup.status()
        assert after["totals"]["since_start"]["client_sent_bytes"] == 0
        assert after["totals"]["since_install"]["client_sent_bytes"] == client_bytes
        assert after["totals"]["since_install"]["upstream_received_bytes"] == LENGTH
        assert sent(gup.metrics()) == client_bytes
        client_bytes += len(gup.get(BIG).body)
        gup.kill()
        gup.start()
        assert gup.status()["totals"]["since_install"]["client_sent_bytes"] == client_bytes


def test_a_client_that_leaves_is_counted_with_what_it_was_sent(tmp_path):
    body, gate = zip_of("leaves", LENGTH), Gate()
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', gates=((LENGTH // 2, gate),)))
        with Gup(tmp_path / "cache", [upstream.url]) as gup, Swarm(gup.data) as swarm:
            clients = swarm.add(5, BIG)
            gate.wait_reached()
            swarm.wait_for(lambda: all(c.body_bytes == LENGTH // 2 for c in clients), "all have the half", 10)
            # what is sent while the transfer runs is counted while it runs
            gup.wait_metric(5 * LENGTH // 2, "gup_client_sent_bytes_total")
            assert gup.metric("gup_fill_waiters") == 5
            assert gup.metric("gup_fills_in_progress") == 1
            leaving = swarm.add(1, BIG, leave_after_bytes=1000)
            swarm.wait(10, leaving)
            gate.open()
            swarm.wait(10)
            assert [client.end for client in clients] == [End.COMPLETE] * 5
            gup.wait_metric(0, "gup_fill_waiters")
            gup.wait_metric(0, "gup_fills_in_progress")
            counted = sent(gup.metrics())
            assert 5 * LENGTH + 1000 <= counted <= 6 * LENGTH


def test_connections_are_a_gauge_over_all_workers(tmp_path):
    with ScriptedUpstream() as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        connections = [gup.connect() for _ in range(20)]
        for connection in connections:
            assert connection.get("/content/none.txt").status == 404
        gup.wait_metric(20, "gup_client_connections")
        for connection in connections:
            connection.close()
        gup.wait_metric(0, "gup_client_connections")


def test_gauges_of_a_killed_worker_do_not_stay(tmp_path):
    with ScriptedUpstream() as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        connections = [gup.connect() for _ in range(20)]
        for connection in connections:
            assert connection.get("/content/none.txt").status == 404
        victim = gup.workers()[0]
        others = sum(gup.worker_of(connection) != victim for connection in connections)
        gup.kill_worker(victim)
        gup.wait_metric(others, "gup_client_connections")
        for connection in connections:
            connection.close()
        gup.wait_metric(0, "gup_client_connections")


def test_health_readiness_and_metrics_page(tmp_path):
    with ScriptedUpstream() as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        assert fetch(gup.admin, "/healthz").status == 200
        until(lambda: fetch(gup.admin, "/readyz").status == 200, "it is ready")
        metrics = gup.metrics()
        assert len(metrics.samples) <= 500
        for name in ("gup_requests_total", "gup_client_sent_bytes_total", "gup_fills_total"):
            assert set(metrics.series(name).values()) == {0}
        # never a path, a client or a revision as a label
        gup.get(DELTA)
        text = gup.metrics().text
        assert "260801001" not in text
        assert not re.search(rf"127\.0\.0\.1(?!:{upstream.port})", text)
        status = gup.status()
        assert sorted(worker["pid"] for worker in status["workers"]) == gup.workers()
        assert status["site"]
        # the control plane is not on the data plane's port, nor the other way round
        assert gup.get("/metrics").status == 404
        assert fetch(gup.admin, DELTA).status == 404
