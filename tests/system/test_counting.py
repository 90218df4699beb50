"""What is counted equals what clients and upstreams counted themselves, to the byte, whoever dies."""

import re

import pytest
from harness.clients import End, fetch
from harness.content import BIG, DELTA, INDEX, make_tree, zip_of
from harness.processes import until
from harness.upstreams import Answer, Gate, Nginx

LENGTH = 3_000_000


@pytest.mark.needs("nginx")
def test_bytes_and_requests_equal_what_both_sides_counted(serve, tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=LENGTH)
    gup, upstream = serve(before=Nginx(tree, tmp_path / "nginx"))
    swarm = gup.swarm()
    for count, path in ((25, BIG), (25, DELTA), (10, INDEX)):
        swarm.add(count, path)
    swarm.wait()
    gup.wait_stored(BIG, DELTA, INDEX)
    etag = gup.get(DELTA).etag
    client_bytes = sum(client.body_bytes for client in swarm.clients) + 200_000
    for start in range(0, LENGTH, 100_000):
        client_bytes += len(gup.get(BIG, {"Range": f"bytes={start}-{start + 49_999}"}).body)
    assert {gup.get(DELTA, {"If-None-Match": etag}).status for _ in range(10)} == {304}
    assert {gup.get(DELTA, method="HEAD").status for _ in range(10)} == {200}
    client = gup.connect()
    client_bytes += sum(len(client.get(DELTA).body) for _ in range(30))
    gup.wait_metric(client_bytes, "gup_client_sent_bytes_total")  # counted after it was sent
    metrics, index = gup.metrics(), len(tree.body(INDEX))
    received = metrics("gup_upstream_received_bytes_total")
    assert received == sum(row.body_bytes for row in upstream.log()) == LENGTH + 200_000 + index
    assert metrics("gup_upstream_received_bytes_total", purpose="index") == index
    # 60 of the swarm, one for the tag, 30 ranges, 10 conditions, 10 HEADs, 30 on one connection
    assert metrics("gup_requests_total") == 60 + 1 + 30 + 10 + 10 + 30
    for labels, count in (({"code": "304"}, 10), ({"code": "206"}, 30), ({"result": "miss"}, 3)):
        assert metrics("gup_requests_total", **labels) == count, labels
    assert metrics("gup_fills_total", outcome="committed") == 3
    assert metrics("gup_upstream_requests_total", outcome="ok") == 3


def test_counts_outlive_a_killed_worker_and_a_restart(serve):
    gup, upstream = serve({BIG: zip_of("counts", LENGTH)})
    sent, requests = len(gup.get(BIG).body), 1
    gup.wait_stored(BIG)
    for _ in range(2):
        victim = gup.workers()[0]
        for pid in gup.workers():
            client = gup.connect_to(pid)
            sent += sum(len(client.get(BIG).body) for _ in range(5))
            requests += 5
        gup.kill_worker(victim)
        until(lambda pid=victim: pid not in gup.workers() and len(gup.workers()) == 2, "it is replaced")
        metrics = gup.metrics()
        assert metrics("gup_client_sent_bytes_total") == sent
        assert metrics("gup_requests_total") == requests
        assert metrics("gup_upstream_received_bytes_total") == LENGTH == upstream.body_bytes(BIG)

    def totals(since: str, what: str = "client_sent_bytes") -> int:
        return gup.status()["totals"][since][what]

    assert totals("since_start") == totals("since_install") == sent
    assert gup.stop() == 0
    gup.start()
    assert (totals("since_start"), totals("since_install")) == (0, sent)
    assert totals("since_install", "upstream_received_bytes") == LENGTH
    assert gup.metric("gup_client_sent_bytes_total") == sent
    sent += len(gup.get(BIG).body)
    gup.kill()
    gup.start()
    assert totals("since_install") == sent


def test_a_client_that_leaves_is_counted_with_what_it_was_sent(serve):
    gate = Gate()
    answer = Answer(zip_of("leaves", LENGTH), etag='"a"', gates=((LENGTH // 2, gate),))
    gup, _ = serve({BIG: answer})
    swarm = gup.swarm()
    clients = swarm.add(5, BIG)
    gate.wait_reached()
    swarm.reach(LENGTH // 2, clients)
    gup.wait_metric(5 * LENGTH // 2, "gup_client_sent_bytes_total")  # counted while the transfer runs
    assert (gup.metric("gup_fill_waiters"), gup.metric("gup_fills_in_progress")) == (5, 1)
    swarm.wait(swarm.add(1, BIG, leave_after_bytes=1000))
    gate.open()
    swarm.wait()
    assert [client.end for client in clients] == [End.COMPLETE] * 5
    gup.wait_metric(0, "gup_fill_waiters")
    gup.wait_metric(0, "gup_fills_in_progress")
    assert 5 * LENGTH + 1000 <= gup.metric("gup_client_sent_bytes_total") <= 6 * LENGTH


def test_a_new_service_is_ready_and_counts_connections_over_all_workers(serve):
    gup, upstream = serve()
    assert fetch(gup.admin, "/healthz").status == 200
    until(lambda: fetch(gup.admin, "/readyz").status == 200, "it is ready")
    metrics = gup.metrics()
    assert fetch(gup.admin, "/metrics").header("content-type").startswith("text/plain")
    assert len(metrics.samples) <= 500
    assert (metrics("gup_site_info", site=gup.status()["site"]), metrics("gup_cache_entries")) == (1, 0)
    assert metrics("gup_disk_free_bytes") > 0
    until(lambda: gup.metric("gup_upstream_up") == 1, "the upstream is up")
    for name in ("gup_requests_total", "gup_client_sent_bytes_total", "gup_fills_total"):
        assert set(metrics.series(name).values()) == {0}
    gup.get(DELTA)
    text = gup.metrics().text  # never a path, a client or a revision as a label
    assert "260801001" not in text
    assert not re.search(rf"127\.0\.0\.1(?!:{upstream.port})", text)
    status = gup.status()
    assert sorted(worker["pid"] for worker in status["workers"]) == gup.workers()
    assert status["site"]
    # the control plane is not on the data plane's port, nor the other way round
    assert gup.get("/metrics").status == fetch(gup.admin, DELTA).status == 404
    gup.wait_metric(0, "gup_client_connections")
    connections = [gup.connect() for _ in range(20)]
    assert {connection.get("/content/none.txt").status for connection in connections} == {404}
    gup.wait_metric(20, "gup_client_connections")
    victim = gup.workers()[0]
    others = sum(gup.worker_of(connection) != victim for connection in connections)
    gup.kill_worker(victim)
    gup.wait_metric(others, "gup_client_connections")
    gup.close_clients()
    gup.wait_metric(0, "gup_client_connections")
