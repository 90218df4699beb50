"""The settings that administrators know from the vendor's own provider, each against real processes."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness.clients import RawConnection, assert_problem
from harness.content import DELTA, INDEX, content_path, noise, zip_of
from harness.processes import free_port, quiet_clock, until
from harness.service import Gup

MB = 1_000_000
FULL, OTHER, MEDIUM, MISS = (content_path("full.zip", revision=f"26080{n}001") for n in range(1, 5))
SIZES = {FULL: 20 * MB, OTHER: 20 * MB, MEDIUM: MB, MISS: 20 * MB}
SMALL = {DELTA: noise("delta", 200_000), INDEX: noise("index", 600_000)}
# Each connection of this machine counts as a client of its own.
SHARED = {
    "clients": {"max_downloads": 1, "queue": 8, "shared": ["127.0.0.0/8"]},
    "listen": {"write_timeout": "1m"},
}


def downloads(gup: Gup) -> tuple[float, float]:
    """How many are under way, and how many wait."""
    metrics = gup.metrics()
    return metrics("gup_client_downloads_in_progress"), metrics("gup_client_downloads_queued")


def all_gone(gup: Gup) -> None:
    until(lambda: downloads(gup) == (0, 0), "nobody downloads any more")


def warm(gup: Gup, upstream) -> None:
    """All but MISS is in the store, and in every worker's hot cache as far as it goes."""
    for path, body in {**{path: zip_of(path, size) for path, size in SIZES.items()}, **SMALL}.items():
        upstream.answer(path, body)
    for pid in gup.workers():
        client = gup.connect_to(pid)
        for path in (FULL, OTHER, MEDIUM, DELTA, INDEX) * 2:
            assert client.get(path).complete
        client.close()
    all_gone(gup)


def slow_reader(gup: Gup, path: str = OTHER, pid: int = 0) -> RawConnection:
    """A client that has asked and takes the head and no more: the sockets' buffers hold less than 20 MB."""
    client = gup.connect_to(pid) if pid else gup.connect(receive_buffer_bytes=16_384)
    client.begin(path)
    return client


def waiting(gup: Gup, path: str = FULL, pid: int = 0, headers: dict | None = None) -> RawConnection:
    """A client that has asked and stands in the queue."""
    before = downloads(gup)[1]
    client = gup.connect_to(pid) if pid else gup.connect()
    client.ask(path, headers)
    gup.wait_metric(before + 1, "gup_client_downloads_queued")
    return client


@pytest.fixture
def gup(shared):
    """One download at once, eight wait."""
    gup, upstream = shared
    if not upstream.seen:
        warm(gup, upstream)
    all_gone(gup)
    yield gup
    gup.close_clients()
    all_gone(gup)


def test_the_port_is_the_one_that_is_set(serve):
    port = free_port()
    gup, _ = serve({DELTA: b"delta"}, bind="", workers=1, listen={"address": "127.0.0.1", "port": port})
    assert gup.data == ("127.0.0.1", port)
    gup.serves(DELTA, b"delta")


def test_only_so_many_download_at_once_and_small_ones_pass(gup):
    reader = slow_reader(gup)
    queued = [waiting(gup) for _ in range(4)]
    assert downloads(gup) == (1, 4)
    for client in map(gup.connect_to, gup.workers()):
        assert {path: client.get(path).body for path in SMALL} == SMALL
    assert gup.get(FULL, method="HEAD").status == 200, "a head needs no slot"
    assert all(client.silent_for(0.01) for client in queued)
    limits = gup.status()["limits"]
    assert (limits["downloads"], limits["queue"]) == ({"limit": 1, "used": 1}, {"limit": 8, "used": 4})
    queued.pop().close()
    gup.wait_metric(3, "gup_client_downloads_queued", timeout_seconds=2)
    reader.close()
    assert all(client.response().complete for client in queued)


def test_the_queue_is_first_come_first_served_over_all_workers(gup):
    served, (one, other) = slow_reader(gup), gup.workers()
    before = gup.metric("gup_requests_total", code="200", result="hit")
    clients = [waiting(gup, pid=pid) for pid in (one, one, other, one, other, other, one, other)]
    for number, client in enumerate(clients, 1):
        served.close()
        assert client.head().status == 200, "the next one is served"
        assert downloads(gup) == (1, len(clients) - number), "and nobody else"
        served = client
    served.close()
    all_gone(gup)
    assert gup.metric("gup_requests_total", code="200", result="hit") == before + len(clients)


def test_beyond_the_queue_it_is_503_with_retry_after(gup):
    slow_reader(gup)
    for _ in range(8):
        waiting(gup)
    before = gup.metrics()
    for client in map(gup.connect_to, gup.workers()):
        response = client.get(FULL)
        assert_problem(response, 503, "overloaded")
        assert 1 <= int(response.header("retry-after") or 0) <= 300
        assert client.get(DELTA).complete, "the connection goes on"
    assert_problem(gup.get(FULL, {"Range": "bytes=0-400000"}), 503, "overloaded")  # not from the hot cache
    after = gup.metrics()
    for more, labels in ((3, {"result": "refused", "code": "503"}), (2, {"result": "hit"})):
        assert after("gup_requests_total", **labels) == before("gup_requests_total", **labels) + more
    assert downloads(gup) == (1, 8)


def test_a_miss_takes_a_slot_and_its_fill_needs_none(gup):
    reader, client = slow_reader(gup), waiting(gup, MISS)
    until(lambda: any(MISS.split("/")[3] in key for key in gup.bodies()), "it is fetched meanwhile")
    gup.wait_metric(0, "gup_fills_in_progress")
    assert client.silent_for(0.05)
    reader.close()
    assert client.response().body == zip_of(MISS, 20 * MB)


def test_pipelined_requests_each_take_their_turn(gup):
    reader, client = slow_reader(gup), waiting(gup, MEDIUM)
    for path in (DELTA, MEDIUM, INDEX):
        client.ask(path)
    assert client.silent_for(0.05), "answers keep their order"
    assert downloads(gup) == (1, 1)
    reader.close()
    assert [len(client.response().body) for _ in range(4)] == [MB, 200_000, MB, 600_000]


@pytest.mark.parametrize("fields", [{}, {"Range": "bytes=1000-"}])
def test_what_leaves_at_once_when_its_turn_has_come_is_followed_by_the_next_answer(gup, fields):
    client = gup.connect()
    for _ in range(20):  # its buffers have grown by then
        assert client.get(MEDIUM).complete
    reader = slow_reader(gup)
    client.ask(MEDIUM, fields)
    gup.wait_metric(1, "gup_client_downloads_queued")
    reader.close()
    assert client.response().complete
    assert [client.get(path).complete for path in (MEDIUM, DELTA)] == [True, True]


def test_a_killed_worker_gives_its_slots_and_its_queue_back(serve):
    gup, upstream = serve(clients={"max_downloads": 1, "queue": 8})
    warm(gup, upstream)
    doomed, other = gup.workers()
    slow_reader(gup, FULL, doomed)
    dead = [waiting(gup, pid=doomed) for _ in range(2)]
    alive = [waiting(gup, pid=other) for _ in range(2)]
    gup.kill_worker(doomed)
    assert all(client.response().complete for client in alive)
    assert all(client.ended() for client in dead)
    until(lambda: len(gup.workers()) == 2, "the worker is replaced")
    assert gup.get(FULL).complete


def test_a_reload_changes_how_many_may_and_with_no_queue_whoever_finds_no_slot_is_refused(serve):
    each_its_own = {"shared": ["127.0.0.0/8"]}
    gup, upstream = serve(clients={"max_downloads": 1, "queue": 5, **each_its_own})
    warm(gup, upstream)
    slow_reader(gup)
    clients = [waiting(gup) for _ in range(3)]
    gup.reload(clients={"max_downloads": 0, **each_its_own})
    until(lambda: downloads(gup)[1] == 0, "nobody waits, although the first still reads")
    assert all(client.response().complete for client in clients)
    assert gup.status()["limits"]["downloads"]["limit"] is None
    gup.reload(clients={"max_downloads": 1, "queue": 0, **each_its_own})  # and the first still reads
    until(lambda: gup.get(FULL).status == 503, "the limit and no queue")
    gup.close_clients()
    until(lambda: gup.get(FULL).status == 200, "the slot is free")
    gup.reload(clients={"max_downloads": 1, "queue": 5, **each_its_own}, listen={"write_timeout": "1s"})
    until(lambda: gup.status()["limits"]["queue"]["limit"] == 5, "a queue again")
    slow_reader(gup)
    assert waiting(gup).response().complete, "a client that takes nothing loses its slot"


def test_a_stop_turns_away_who_waits_and_lets_the_others_end(serve):
    gup, upstream = serve(clients={"max_downloads": 1, "queue": 5})
    warm(gup, upstream)
    reader = gup.connect(receive_buffer_bytes=16_384)
    begun, client = reader.begin(FULL), waiting(gup)
    gup.process.terminate()
    assert_problem(client.response(), 503, "draining")
    assert reader.finish(begun).complete
    assert gup.wait() == 0


def seconds_of(gup: Gup, path: str, body: bytes) -> float:
    began = time.monotonic()
    gup.serves(path, body)
    return time.monotonic() - began


def test_each_connection_has_its_own_rate(serve):
    body = zip_of(FULL, 5 * MB)
    gup, _ = serve({FULL: body}, clients={"rate": "2MB/s"})
    took = [9.0]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):  # the best counts: a busy machine makes it late
            if max(took) > 4.0:
                took = list(pool.map(lambda _: seconds_of(gup, FULL, body), range(2)))
                assert min(took) >= 2.1, took
    assert max(took) <= 4.0, took
    assert gup.status()["limits"]["client_rate_bytes_per_second"] == {"limit": 2 * MB}
    assert gup.metric("gup_bandwidth_limit_bytes_per_second", direction="client") == 2 * MB


def test_a_rate_holds_for_small_answers_together_and_no_time_out_cuts_it(serve):
    gup, _ = serve(SMALL, workers=1, clients={"rate": "400kB/s"}, listen={"write_timeout": "200ms"})
    client = gup.connect()
    for _ in range(5):
        assert client.get(DELTA).complete
    began, quiet = time.monotonic(), quiet_clock()
    assert all(client.get(DELTA).complete for _ in range(3))
    assert time.monotonic() - began >= 1.2
    assert quiet_clock() - quiet <= 2.5


def test_a_new_rate_holds_for_new_connections(serve):
    body = zip_of(FULL, 5 * MB)
    gup, _ = serve({FULL: body, **SMALL}, clients={"rate": 0})
    gup.serves(FULL, body)
    old = gup.connect()
    old.get(DELTA)
    gup.reload(clients={"rate": "2MB/s"})
    until(lambda: seconds_of(gup, FULL, body) > 1.0, "a new connection is paced", 20)
    began = quiet_clock()
    assert old.get(FULL).complete
    assert quiet_clock() - began < 2.0, "paced it takes 2.5 s"
