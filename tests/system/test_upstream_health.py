"""What takes an upstream away and what does not; Retry-After and wrong bodies, remembered: real processes."""

import itertools
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.clients import Response, assert_problem, fetch
from harness.processes import free_port
from harness.scripted import Answer, ScriptedUpstream
from harness.service import Gup
from harness.trees import BIG, DELTA, INDEX, content_path, noise, zip_of
from harness.waiting import until

QUICK = {"connect_timeout": "500ms", "read_timeout": "1s"}
OTHERS = 100


def path_of(number: int, file: str = "full.dax") -> str:
    return content_path(file, revision=f"26{number:03}001")


@contextmanager
def site(
    folder: Path, *urls: str, cache: dict[str, object] | None = None, fill: int = 8, **each: str
) -> Iterator[Gup]:
    """A service of two workers before these upstreams, the first preferred."""
    tables = [
        {"name": f"u{number}", "url": url, "priority": number, **QUICK, **each}
        for number, url in enumerate(urls)
    ]
    settings = {"upstream": tables, "cache": cache or {}, "fill": {"max": fill}}
    with Gup(folder / "cache", settings=settings) as gup:
        yield gup


def get_from(gup: Gup, path: str, source: str) -> Response:
    """GET as the client of this loopback address."""
    return fetch(gup.data, path, source=source)


def state_of(gup: Gup, name: str = "u0") -> str:
    return next(str(row["state"]) for row in gup.status()["upstreams"] if row["name"] == name)


# --- what takes nothing away


def test_checks_that_are_answered_503_take_nothing_away(tmp_path):
    with ScriptedUpstream() as upstream, site(tmp_path, upstream.url, health_interval="50ms") as gup:
        upstream.answer(INDEX, Answer(b"", 503))
        for number in range(20):
            upstream.answer(path_of(number), Answer(noise(f"{number}", 500), etag=f'"{number}"'))
        until(lambda: len(upstream.requests(INDEX, method="HEAD")) >= 8, "it was checked")
        assert {gup.get(path_of(number)).status for number in range(20)} == {200}
        assert state_of(gup) == "up"


def test_the_path_of_checks_is_a_setting(tmp_path):
    settings = {"health_interval": "50ms", "health_path": "/alive"}
    with ScriptedUpstream() as upstream, site(tmp_path, upstream.url, **settings) as gup:
        until(lambda: upstream.requests("/alive", method="HEAD"), "it was checked")
        until(lambda: state_of(gup) == "up", "404 is an answer")
        assert {seen.path for seen in upstream.seen} == {"/alive"}


FAULTS = (
    Answer(reset_at=-1),
    Answer(b"oops", 500),
    Answer(b"<html>", content_type="text/html"),
    Answer(b"x" * 9, chunked=True, garbage_at=3),
)


def test_one_client_s_failing_names_take_the_upstream_from_nobody(tmp_path):
    """146 names that fail in all ways, asked for by one client, while another asks for what is there."""
    names = [path_of(number) for number in range(146)]
    wanted = [path_of(500 + number) for number in range(OTHERS)]
    with ScriptedUpstream() as upstream, site(tmp_path, upstream.url, fill=64, health_interval="0s") as gup:
        for name, fault in zip(names, itertools.cycle(FAULTS), strict=False):
            upstream.answer(name, fault)
        for path in wanted:
            upstream.answer(path, Answer(noise(path, 500), etag='"x"'))
        with ThreadPoolExecutor(16) as attackers:
            attack = [attackers.submit(get_from, gup, name, "127.0.0.2") for name in names]
            served = [get_from(gup, path, "127.0.0.3").status for path in wanted]
        assert served == [200] * OTHERS
        assert {one.result().status for one in attack} == {502}
        assert state_of(gup) == "up"


def test_three_tries_of_one_file_make_nobody_doubtful(tmp_path):
    with ScriptedUpstream() as upstream, site(tmp_path, upstream.url, health_interval="0s") as gup:
        upstream.answer(DELTA, Answer(reset_at=-1))
        for source in ("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"):
            assert get_from(gup, DELTA, source).status == 502
        assert len(upstream.requests(DELTA)) >= 3
        assert state_of(gup) != "doubtful"


# --- what takes it away for all


def tries(gup: Gup) -> float:
    return gup.metric("gup_upstream_requests_total", upstream="u0", outcome="unreachable")


def test_a_refused_connection_answers_everybody_at_once_and_is_tried_again_soon(tmp_path):
    port = free_port()
    with site(tmp_path, f"http://127.0.0.1:{port}", health_interval="0s") as gup:
        assert_problem(gup.get(DELTA), 502, "upstream-unreachable")
        assert state_of(gup) == "down"
        began, before, answered = time.monotonic(), tries(gup), 0
        while time.monotonic() - began < 4:
            asked = time.monotonic()
            response = gup.get(path_of(answered))
            assert time.monotonic() - asked < 0.5
            assert_problem(response, 502, "upstream-unreachable")
            assert 1 <= int(response.header("retry-after") or 0) <= 5
            answered += 1
        took = time.monotonic() - began
        assert answered > 40
        assert 1 <= tries(gup) - before <= took + 1, "one trial at a time, not one each"
        assert not list((gup.cache_dir / "partial").glob("*.state")), "nothing is kept for each name"
        with ScriptedUpstream(port=port) as upstream:
            upstream.answer(DELTA, Answer(noise("d", 1000), etag='"d"'))
            back = time.monotonic()
            until(lambda: gup.get(DELTA).body == noise("d", 1000), "it is back", 8)
            assert time.monotonic() - back < 6
        gup.wait_log("upstream u0 is down")
        gup.wait_log("upstream u0 is up again")


@contextmanager
def black_hole() -> Iterator[str]:
    """A listener that neither takes nor refuses connections: its queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        held = [socket.socket() for _ in range(4)]
        for one in held:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}"
        for one in held:
            one.close()


def test_a_black_hole_costs_one_connect_timeout_and_then_nobody_waits(tmp_path):
    with black_hole() as url, site(tmp_path, url, health_interval="0s") as gup:
        began = time.monotonic()
        assert_problem(gup.get(DELTA), 502, "upstream-unreachable")
        assert time.monotonic() - began < 2.5
        slow = 0
        for number in range(50):
            asked = time.monotonic()
            assert_problem(gup.get(path_of(number)), 502, "upstream-unreachable")
            slow += time.monotonic() - asked > 0.3
        assert slow <= 1, "who makes the trial"


def test_a_stale_index_is_served_at_once_while_the_only_upstream_is_away(tmp_path):
    upstream = ScriptedUpstream()
    with site(tmp_path, upstream.url, cache={"index_ttl": "50ms"}, health_interval="0s") as gup:
        upstream.answer(INDEX, Answer(b"index", etag='"i"'))
        assert gup.get(INDEX).status == 200
        gup.wait_stored("ContentInfo.txt")
        upstream.stop()
        assert gup.get(DELTA).status == 502
        until(lambda: "stale" in (gup.get(INDEX).header("cache-status") or ""), "it is stale")
        began = time.monotonic()
        for _ in range(50):
            response = gup.get(INDEX)
            assert (response.status, response.body) == (200, b"index")
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("way", ["refused", "black hole"])
def test_half_a_part_and_nobody_there_is_told_in_time_and_the_part_is_kept(tmp_path, way):
    body = noise("half", 4_000_000)
    with black_hole() as hole, ScriptedUpstream() as upstream:
        upstream.answer(BIG.replace(".zip", ".dax"), Answer(body, etag='"h"', stall_after=2_000_000))
        path = BIG.replace(".zip", ".dax")
        with site(tmp_path, upstream.url) as gup:
            with gup.connect() as client:
                client.ask(path)
                client.head()
                client.read(1_500_000)
            gup.kill()
            (part,) = gup.parts().items()
        gone = hole if way == "black hole" else f"http://127.0.0.1:{free_port()}"
        with site(tmp_path, gone, health_interval="0s") as gup:
            for _ in range(2):
                began = time.monotonic()
                response = gup.get(path)
                assert_problem(response, 502, "upstream-unreachable")
                assert int(response.header("retry-after") or 0) >= 1
                assert time.monotonic() - began < 2.5
            (kept,) = gup.parts()
            assert kept == part[0]
        upstream.answer(path, Answer(body, etag='"h"'))
        with site(tmp_path, upstream.url) as gup:
            assert gup.get(path).body == body
            assert upstream.requests(path)[-1].status == 206


# --- Retry-After


def test_retry_after_is_kept_by_all_workers_and_told_to_clients(tmp_path):
    with ScriptedUpstream() as upstream, site(tmp_path, upstream.url, cache={"error_ttl": "100ms"}) as gup:
        upstream.answer(DELTA, Answer(b"busy", 503, fields=(("Retry-After", "120"),)))
        upstream.answer(path_of(1), Answer(noise("1", 500), etag='"1"'))
        response = gup.get(DELTA)
        assert_problem(response, 502, "upstream-error")
        assert 110 <= int(response.header("retry-after") or 0) <= 120
        for pid in gup.workers():
            for _ in range(3):
                with gup.connect_to(pid) as client:
                    again = client.get(DELTA)
                assert 100 <= int(again.header("retry-after") or 0) <= 120
        assert gup.get(path_of(1)).status == 200, "other files are asked for"
        time_passed = until(lambda: gup.get(path_of(2)).status == 404, "another request after error_ttl")
        assert time_passed
        assert len(upstream.requests(DELTA)) == 1


def test_retry_after_s_end_is_waited_for(tmp_path):
    with ScriptedUpstream() as upstream, site(tmp_path, upstream.url, cache={"error_ttl": "20ms"}) as gup:
        upstream.answer(
            DELTA, Answer(b"busy", 429, fields=(("Retry-After", "1"),)), Answer(noise("d", 500), etag='"d"')
        )
        began = time.monotonic()
        assert gup.get(DELTA).status == 502
        until(lambda: gup.get(DELTA).status == 200, "it is asked again")
        assert time.monotonic() - began >= 0.9
        assert len(upstream.requests(DELTA)) == 2


def test_another_upstream_is_asked_meanwhile(tmp_path):
    with ScriptedUpstream() as one, ScriptedUpstream() as two, site(tmp_path, one.url, two.url) as gup:
        one.answer(DELTA, Answer(b"busy", 503, fields=(("Retry-After", "60"),)))
        two.answer(DELTA, Answer(b"oops", 500), Answer(noise("d", 500), etag='"d"'))
        assert gup.get(DELTA).status == 502
        until(lambda: gup.get(DELTA).status == 200, "the second has it")
        assert len(one.requests(DELTA)) == 1


# --- bodies that can't be


def test_a_zip_without_its_end_is_fetched_once_and_then_waited_for(tmp_path):
    bad, good = noise("no zip", 10_000_000), zip_of("right", 300_000)
    with ScriptedUpstream() as upstream, site(tmp_path, upstream.url, cache={"error_ttl": "50ms"}) as gup:
        upstream.answer(BIG, Answer(bad, etag='"bad"'))
        response = gup.get(BIG)
        assert not (response.status == 200 and response.complete)
        until(
            lambda: len(upstream.requests(BIG)) >= 5 or gup.get(BIG).status == 200, "heads are asked for", 15
        )
        asked = [seen.at for seen in upstream.requests(BIG)]
        waits = [later - earlier for earlier, later in itertools.pairwise(asked[1:])]
        assert all(wait >= 0.05 * 2**number for number, wait in enumerate(waits, 1)), waits
        received = gup.metric("gup_upstream_received_bytes_total", purpose="fill")
        assert 10_000_000 <= received <= 10_300_000, "its body was read once"
        assert gup.metric("gup_upstream_wasted_bytes_total", reason="rejected") == 10_000_000
        (alarm,) = until(
            lambda: [a for a in gup.api("/api/v1/alarms")[1]["alarms"] if a["name"] == "bad-content"],
            "an alarm is raised",
        )
        assert "u0" in alarm["text"]
        assert "full.zip" in alarm["text"]
        upstream.answer(BIG, Answer(good, etag='"good"'))
        until(lambda: gup.get(BIG).body == good, "another body is a new chance", 15)
        until(
            lambda: not [a for a in gup.api("/api/v1/alarms")[1]["alarms"] if a["name"] == "bad-content"],
            "the alarm ends",
            30,
        )


def test_what_was_wrong_is_remembered_by_all_workers_and_over_a_restart(tmp_path):
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(noise("no zip", 200_000), etag='"bad"'))
        with site(tmp_path, upstream.url, cache={"error_ttl": "100ms"}) as gup:
            assert not gup.get(BIG).complete
            for pid in gup.workers():
                with gup.connect_to(pid) as client:
                    until(lambda c=client: "still" in str(c.get(BIG).body), "its head is known again")
            assert gup.stop() == 0
            gup.start()
            until(lambda: "still" in str(gup.get(BIG).body), "its head is known again")
            assert gup.metric("gup_upstream_wasted_bytes_total", reason="rejected") == 200_000


def test_another_upstream_s_body_is_taken_in_place_of_a_wrong_one(tmp_path):
    good = zip_of("right", 300_000)
    with (
        ScriptedUpstream() as one,
        ScriptedUpstream() as two,
        site(tmp_path, one.url, two.url, cache={"error_ttl": "500ms"}) as gup,
    ):
        one.answer(BIG, Answer(noise("no zip", 300_000), etag='"bad"'))
        two.answer(BIG, Answer(good, etag='"good"'))
        until(lambda: gup.get(BIG).body == good, "the second has it")
        assert len(two.requests(BIG)) == 1
        assert sum(seen.body_bytes for seen in one.requests(BIG)[1:]) <= 300_000
