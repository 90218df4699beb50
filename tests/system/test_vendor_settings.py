"""The settings that administrators know from the vendor's own provider, each against real processes."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from harness.clients import RawConnection, assert_problem
from harness.processes import free_port
from harness.scripted import Answer, ScriptedUpstream
from harness.service import Gup
from harness.trees import DELTA, INDEX, content_path, noise, zip_of
from harness.waiting import until

MB = 1_000_000
FULL = content_path("full.zip")
OTHER = content_path("full.zip", revision="260802001")
SMALL_WINDOW_BYTES = 16_384


@contextmanager
def service(tmp_path, settings, *, big_bytes=20 * MB, other_bytes=20 * MB, **how) -> Iterator[Gup]:
    """A service whose upstream has two fulls, a delta and an index file."""
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings, **how) as gup,
    ):
        upstream.answer(FULL, Answer(zip_of(FULL, big_bytes), etag='"full"'))
        upstream.answer(OTHER, Answer(zip_of(OTHER, other_bytes), etag='"other"'))
        upstream.answer(DELTA, Answer(noise("delta", 200_000), etag='"d"'))
        upstream.answer(INDEX, Answer(noise("index", 600_000), etag='"i"'))
        yield gup


def warm(gup: Gup) -> None:
    """Everything is in the store, and in every worker's hot table as far as it goes."""
    for path in (FULL, DELTA, INDEX):
        for pid in gup.workers():
            with gup.connect_to(pid) as client:
                for _ in range(2):
                    assert client.get(path).complete
    until(lambda: downloads(gup) == (0, 0), "nobody downloads any more")


def downloads(gup: Gup) -> tuple[float, float]:
    """How many are under way, and how many wait."""
    metrics = gup.metrics()
    return metrics("gup_client_downloads_in_progress"), metrics("gup_client_downloads_queued")


def slow_reader(gup: Gup, path: str = OTHER) -> RawConnection:
    """A client that has asked and takes the head and no more: the sockets' buffers hold less than 20 MB."""
    client = RawConnection(gup.data, 15, SMALL_WINDOW_BYTES)
    client.ask(path)
    assert client.head().status == 200
    return client


def waiting(gup: Gup, stack: ExitStack, path: str = FULL, pid: int | None = None) -> RawConnection:
    """A client that has asked and stands in the queue."""
    before = downloads(gup)[1]
    client = stack.enter_context(gup.connect() if pid is None else gup.connect_to(pid))
    client.ask(path)
    gup.wait_metric(before + 1, "gup_client_downloads_queued")
    return client


# --- port, size, age


def test_the_port_is_the_one_that_is_set(tmp_path):
    port = free_port()
    settings = {"listen": {"address": "127.0.0.1", "port": port}}
    with service(tmp_path, settings, start=False) as gup:
        at = gup.command.index("--listen")
        del gup.command[at : at + 2]
        gup.start()
        assert gup.data == ("127.0.0.1", port)
        assert gup.get(DELTA).status == 200


def test_the_disk_cache_stays_under_its_size(tmp_path):
    settings = {"cache": {"max_size": "3MB"}}
    with service(tmp_path, settings, big_bytes=2 * MB, other_bytes=2 * MB) as gup:
        for path in (FULL, OTHER):
            assert gup.get(path).complete
        until(lambda: sum(gup.bodies().values()) <= 3 * MB, "the size is under its limit")
        gup.wait_metric(1, "gup_evictions_total", reason="size")
        assert gup.status()["limits"]["cache_size_bytes"]["limit"] == 3 * MB
        assert gup.metric("gup_cache_limit_bytes") == 3 * MB
        until(
            lambda: gup.status()["limits"]["cache_size_bytes"]["used"] == sum(gup.bodies().values()) > 0,
            "what is used is shown",
        )


def test_content_that_nobody_uses_is_deleted(tmp_path):
    with service(tmp_path, {"cache": {"max_unused": "2s"}}) as gup:
        assert gup.get(DELTA).complete
        gup.wait_stored(DELTA.rpartition("/")[2])
        began = time.monotonic()
        until(lambda: not gup.bodies(), "the body is deleted", 20)
        assert time.monotonic() - began > 1.0
        gup.wait_metric(1, "gup_evictions_total", reason="unused")
        assert gup.metric("gup_evicted_bytes_total", reason="unused") == 200_000
        assert gup.get(DELTA).complete, "it comes again when it is asked for"


# --- simultaneous downloads


def test_only_so_many_download_at_once_and_small_ones_pass(tmp_path):
    settings = {"clients": {"max_downloads": 2, "queue": 10}}
    with service(tmp_path, settings) as gup, ExitStack() as stack:
        warm(gup)
        readers = [stack.enter_context(slow_reader(gup)) for _ in range(2)]
        queued = [waiting(gup, stack) for _ in range(4)]
        assert downloads(gup) == (2, 4)
        for path in (DELTA, INDEX):
            for pid in gup.workers():
                with gup.connect_to(pid) as client:
                    assert client.get(path).complete
        assert gup.get(FULL, method="HEAD").status == 200, "a head needs no slot"
        assert all(client.silent_for(0.01) for client in queued)
        limits = gup.status()["limits"]
        assert limits["downloads"] == {"limit": 2, "used": 2}
        assert limits["queue"] == {"limit": 10, "used": 4}
        for client in (*readers, *queued):
            client.close()
        until(lambda: downloads(gup) == (0, 0), "all are gone")


@pytest.mark.alone
def test_the_queue_is_first_come_first_served_over_all_workers(tmp_path):
    settings = {"clients": {"max_downloads": 1, "queue": 50}}
    with service(tmp_path, settings) as gup, ExitStack() as stack:
        warm(gup)
        served = stack.enter_context(slow_reader(gup))
        one, other = gup.workers()
        before = gup.metric("gup_requests_total", code="200", result="hit")
        clients = [waiting(gup, stack, pid=pid) for pid in (one, one, other, one, other, other, one, other)]
        for number, client in enumerate(clients, 1):
            served.close()
            assert client.head().status == 200, "the next one is served"
            assert downloads(gup) == (1, len(clients) - number), "and nobody else"
            served = client
        served.close()
        until(lambda: downloads(gup) == (0, 0), "all are served")
        assert gup.metric("gup_requests_total", code="200", result="hit") == before + len(clients)


def test_beyond_the_queue_it_is_503_with_retry_after(tmp_path):
    settings = {"clients": {"max_downloads": 1, "queue": 2}}
    with service(tmp_path, settings) as gup, ExitStack() as stack:
        warm(gup)
        stack.enter_context(slow_reader(gup))
        for _ in range(2):
            waiting(gup, stack)
        before = gup.metric("gup_requests_total", result="hit")
        for pid in gup.workers():
            with gup.connect_to(pid) as client:
                response = client.get(FULL)
                assert_problem(response, 503, "overloaded")
                assert 1 <= int(response.header("retry-after") or 0) <= 300
                assert client.get(DELTA).complete, "the connection goes on"
        with gup.connect() as client:  # not from the hot cache
            assert_problem(client.get(FULL, {"Range": "bytes=0-400000"}), 503, "overloaded")
        assert gup.metric("gup_requests_total", result="refused", code="503") == 3
        assert gup.metric("gup_requests_total", result="hit") == before + 2, "the refused are no hits"
        assert downloads(gup) == (1, 2)


def test_with_no_queue_whoever_finds_no_slot_is_refused(tmp_path):
    with service(tmp_path, {"clients": {"max_downloads": 1, "queue": 0}}) as gup, ExitStack() as stack:
        warm(gup)
        reader = stack.enter_context(slow_reader(gup))
        assert_problem(gup.get(FULL), 503, "overloaded")
        reader.close()
        until(lambda: gup.get(FULL).status == 200, "the slot is free")


def test_who_leaves_the_queue_frees_its_place_at_once(tmp_path):
    settings = {"clients": {"max_downloads": 1, "queue": 1}}
    with service(tmp_path, settings) as gup, ExitStack() as stack:
        warm(gup)
        reader = stack.enter_context(slow_reader(gup))
        client = waiting(gup, stack)
        client.close()
        gup.wait_metric(0, "gup_client_downloads_queued", timeout_seconds=1)
        client = waiting(gup, stack)
        reader.close()
        assert client.response().complete
        until(lambda: downloads(gup) == (0, 0), "all are gone")


def test_a_miss_takes_a_slot_as_well(tmp_path):
    settings = {"clients": {"max_downloads": 1, "queue": 5}}
    with service(tmp_path, settings) as gup, ExitStack() as stack:
        reader = stack.enter_context(slow_reader(gup, OTHER))
        client = waiting(gup, stack)
        gup.wait_stored("full.zip")
        gup.wait_metric(0, "gup_fills_in_progress")  # fills need no slot
        assert client.silent_for(0.05)
        reader.close()
        response = client.response()
        assert response.complete
        assert response.body == zip_of(FULL, 20 * MB)
        until(lambda: downloads(gup) == (0, 0), "all are gone")


def test_pipelined_requests_each_take_their_turn(tmp_path):
    settings = {"clients": {"max_downloads": 1, "queue": 5}}
    with service(tmp_path, settings, big_bytes=MB) as gup, ExitStack() as stack:
        warm(gup)
        reader = stack.enter_context(slow_reader(gup))
        client = waiting(gup, stack)
        for path in (DELTA, FULL, INDEX):
            client.ask(path)
        assert client.silent_for(0.05), "answers keep their order"
        assert downloads(gup) == (1, 1)
        reader.close()
        assert [len(client.response().body) for _ in range(4)] == [MB, 200_000, MB, 600_000]
        until(lambda: downloads(gup) == (0, 0), "all are gone")


@pytest.mark.parametrize("fields", [{}, {"Range": "bytes=1000-"}])
def test_what_leaves_at_once_when_its_turn_has_come_is_followed_by_the_next_answer(tmp_path, fields):
    settings = {"clients": {"max_downloads": 1, "queue": 5}}
    with service(tmp_path, settings, big_bytes=300_000, workers=1) as gup, ExitStack() as stack:
        warm(gup)
        client = stack.enter_context(gup.connect())
        for _ in range(20):  # its buffers have grown by then
            assert client.get(FULL).complete
        reader = stack.enter_context(slow_reader(gup))
        client.ask(FULL, fields)
        gup.wait_metric(1, "gup_client_downloads_queued")
        reader.close()
        assert client.response().complete
        for path in (FULL, DELTA):
            assert client.get(path).complete
        until(lambda: downloads(gup) == (0, 0), "all are gone")


def test_a_client_that_takes_nothing_loses_its_slot(tmp_path):
    settings = {"clients": {"max_downloads": 1, "queue": 5}, "listen": {"write_timeout": "1s"}}
    with service(tmp_path, settings) as gup, ExitStack() as stack:
        warm(gup)
        stack.enter_context(slow_reader(gup))
        assert waiting(gup, stack).response().complete


def test_a_killed_worker_gives_its_slots_and_its_queue_back(tmp_path):
    settings = {"clients": {"max_downloads": 2, "queue": 4}}
    with service(tmp_path, settings) as gup, ExitStack() as stack:
        warm(gup)
        doomed, other = gup.workers()
        for _ in range(2):
            reader = stack.enter_context(gup.connect_to(doomed))
            reader.ask(FULL)
            assert reader.head().status == 200
        dead = [waiting(gup, stack, pid=doomed) for _ in range(2)]
        alive = [waiting(gup, stack, pid=other) for _ in range(2)]
        gup.kill_worker(doomed)
        for client in alive:
            assert client.response().complete
        assert all(client.ended() for client in dead)
        until(lambda: downloads(gup) == (0, 0), "the gauges are right again")
        until(lambda: len(gup.workers()) == 2, "the worker is replaced")
        assert gup.get(FULL).complete


def test_a_reload_changes_how_many_may(tmp_path):
    settings = {"clients": {"max_downloads": 1, "queue": 5}}
    with service(tmp_path, settings, big_bytes=3 * MB) as gup, ExitStack() as stack:
        warm(gup)
        stack.enter_context(slow_reader(gup))
        clients = [waiting(gup, stack) for _ in range(3)]
        (gup.folder / "gup.toml").write_text("[clients]\nmax_downloads = 0\n")
        began = time.monotonic()
        gup.api("/api/v1/reload", method="POST")
        until(lambda: downloads(gup)[1] == 0, "nobody waits", 5)
        assert time.monotonic() - began < 3.0
        assert all(client.response().complete for client in clients)
        assert gup.status()["limits"]["downloads"]["limit"] is None


def test_a_stop_turns_away_who_waits_and_lets_the_others_end(tmp_path):
    settings = {"clients": {"max_downloads": 1, "queue": 5}}
    with service(tmp_path, settings) as gup, ExitStack() as stack:
        warm(gup)
        reader = RawConnection(gup.data, 15, SMALL_WINDOW_BYTES)
        stack.enter_context(reader)
        reader.ask(FULL)
        begun = reader.head()
        client = waiting(gup, stack)
        gup.process.terminate()
        assert_problem(client.response(), 503, "draining")
        assert reader.finish(begun).complete
        assert gup.wait() == 0


# --- rates


def test_the_wan_rate_is_kept_over_all_fills(tmp_path):
    with service(tmp_path, None, big_bytes=3 * MB, other_bytes=3 * MB, env={"GUP_WAN__RATE": "2MB/s"}) as gup:
        began = time.monotonic()
        threads = [threading.Thread(target=gup.get, args=(path,)) for path in (FULL, OTHER)]
        for thread in threads:
            thread.start()
        until(lambda: gup.status()["limits"]["wan_rate_bytes_per_second"]["used"] > 1.2 * MB, "it is shown")
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
        assert 2.7 < took < 4.5, "6 MB at 2 MB/s; a busy machine may be slower, never faster"
        assert gup.metric("gup_bandwidth_limit_bytes_per_second", direction="upstream") == 2 * MB
        assert gup.status()["limits"]["wan_rate_bytes_per_second"]["limit"] == 2 * MB


def test_each_connection_has_its_own_rate(tmp_path: Path) -> None:
    with service(tmp_path, {"clients": {"rate": "1MB/s"}}, big_bytes=5 * MB) as gup:
        took: list[float] = []
        threads = [threading.Thread(target=lambda: took.append(_seconds(gup, FULL))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert took == [pytest.approx(5.0, rel=0.15)] * 2
        assert gup.status()["limits"]["client_rate_bytes_per_second"] == {"limit": MB}
        assert gup.metric("gup_bandwidth_limit_bytes_per_second", direction="client") == MB


def _seconds(gup: Gup, path: str) -> float:
    began = time.monotonic()
    with gup.connect() as client:
        response = client.get(path)
    assert response.complete
    assert response.body == zip_of(path, 5 * MB)
    return time.monotonic() - began


def test_a_rate_holds_for_small_answers_together_and_no_time_out_cuts_it(tmp_path):
    settings = {"clients": {"rate": "100kB/s"}, "listen": {"write_timeout": "200ms"}}
    with service(tmp_path, settings) as gup:
        assert gup.get(DELTA).complete
        with gup.connect() as client:
            for _ in range(5):
                assert client.get(DELTA).complete
            began = time.monotonic()
            assert client.get(DELTA).complete
            assert time.monotonic() - began == pytest.approx(2.0, rel=0.15)


def test_a_new_rate_holds_for_new_connections(tmp_path):
    with service(tmp_path, {"clients": {"rate": 0}}, big_bytes=5 * MB) as gup:
        warm(gup)
        with gup.connect() as old:
            old.get(DELTA)
            (gup.folder / "gup.toml").write_text('[clients]\nrate = "2MB/s"\n')
            gup.api("/api/v1/reload", method="POST")
            until(lambda: _is_paced(gup), "a new connection is paced", 5)
            began = time.monotonic()
            assert old.get(FULL).complete
            assert time.monotonic() - began < 2.0, "paced it takes 2.5 s"


def _is_paced(gup: Gup) -> bool:
    began = time.monotonic()
    with gup.connect() as client:
        client.ask(FULL)
        response = client.head()
        client._socket.settimeout(0.3)
        try:
            client.finish(response)
        except TimeoutError:
            return True
    return time.monotonic() - began > 1.0
