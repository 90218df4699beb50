"""Restarts: of the service with the upstream gone, of a worker killed in a fill, of everything at once."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.clients import Ended, RawConnection, fetch
from harness.processes import listens
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.swarm import End, Swarm, body_digest
from harness.trees import BIG, DELTA, INDEX, content_path, make_tree, zip_of
from harness.upstreams import Nginx
from harness.waiting import until

ALONE = pytest.mark.alone

LENGTH = 6_000_000
GATES_STAY = "1m"
"""A `read_timeout` for which nothing is looked for too long: upstream says nothing meanwhile."""
OVERLAP_BYTES = 2 << 20
"""More than a takeover may fetch twice: the chunk that was open, and the overlap of 64 KiB."""


def new_worker(gup: Gup, before: set[int]) -> set[int]:
    """Workers that were not there before."""
    return set(gup.workers()) - before


@ALONE
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_with_the_upstream_gone_everything_cached_is_served(tmp_path, end):
    tree = make_tree(tmp_path / "tree", big_bytes=LENGTH)
    paths = (BIG, DELTA, INDEX)
    with Nginx(tree, tmp_path / "nginx") as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        gup.command[gup.command.index("--listen") + 1] = f"127.0.0.1:{gup.data[1]}"
        tags = {}
        for path in paths:
            gup.get(path)
            gup.wait_stored(path.rpartition("/")[2])
            tags[path] = gup.get(path).etag
        upstream.stop()
        first_hits = [9.0]
        # the best of a few, and a second more than a quiet machine needs: other work there must not decide
        while min(first_hits) > 1.0 and len(first_hits) < 4:
            if end == "stop":
                assert gup.stop() == 0
            else:
                gup.kill()
            first_hits.append(_seconds_to_first_hit(gup, tree.body(DELTA)))
            for path in paths:
                response = gup.get(path)
                assert (response.status, response.body == tree.body(path)) == (200, True)
                assert response.etag == tags[path]
                assert fetch(gup.data, path, {"If-None-Match": tags[path]}).status == 304
        assert min(first_hits) <= 2.0, first_hits


def _seconds_to_first_hit(gup: Gup, body: bytes) -> float:
    """From the command to a whole answer, on a port known before; the ready line may come later."""
    began = time.monotonic()
    gup.launch()
    until(lambda: listens(gup.data), "the port is open")
    assert gup.get(DELTA).body == body
    took = time.monotonic() - began
    gup.wait_ready()
    return took


@ALONE
def test_a_worker_killed_in_a_fill_is_replaced_and_its_fill_taken_over(tmp_path):
    body, gate, last = zip_of("takeover", LENGTH), Gate(), Gate()
    half = LENGTH // 2
    with ScriptedUpstream() as upstream:
        upstream.answer(
            BIG,
            Answer(body, etag='"a"', gates=((half, gate),)),
            Answer(body, etag='"a"', gates=((LENGTH - 500_000, last),)),
        )
        settings = {"upstream": [{"url": upstream.url, "read_timeout": GATES_STAY}]}
        with Gup(tmp_path / "cache", settings=settings) as gup, Swarm(gup.data) as swarm:
            workers = set(gup.workers())
            clients = swarm.add(40, BIG)
            gate.wait_reached()
            swarm.wait_for(lambda: all(c.body_bytes == half for c in clients), "all have the half", 10)
            leader = gup.worker_of_port(upstream.requests(BIG)[0].peer_port, upstream.port)
            (other,) = workers - {leader}
            of_leader = [c for c in clients if gup.worker_of_port(gup.data[1], c.local_port) == leader]
            of_other = [c for c in clients if c not in of_leader]
            assert of_leader
            assert of_other
            with gup.connect_to(other) as idle:
                assert idle.get("/content/none.txt").status == 404
                killed_at = time.monotonic()
                gup.kill_worker(leader)
                (successor,) = until(lambda: new_worker(gup, workers), "the worker is replaced", 5)
                with gup.connect_to(successor) as fresh:
                    assert fresh.get("/content/none.txt").status == 404
                replaced_after = time.monotonic() - killed_at
                upstream.wait_for_request(BIG, 2)
                last.wait_reached()
                # clients of the dead worker come again, as clients do, while the fill still runs
                again = swarm.add(len(of_leader), BIG)
                last.open()
                swarm.wait(20)
                assert idle.get("/content/none.txt").status == 404
            assert replaced_after <= 1.0
            assert {c.end for c in of_leader} <= {End.RESET, End.CUT}
            for client in (*of_other, *again):
                assert (client.end, client.digest) == (End.COMPLETE, body_digest(body))
            assert len({c.fields["etag"] for c in clients + again}) == 1
            gate.open()
            first, second = upstream.requests(BIG)
            assert (second.status, second.header("if-range")) == (206, '"a"')
            assert first.body_bytes == half
            assert second.body_bytes <= half + OVERLAP_BYTES
            gup.wait_stored("full.zip")
            assert gup.metric("gup_worker_restarts_total") == 1
            assert gup.metric("gup_fill_resumes_total", reason="takeover") == 1


@ALONE
def test_a_takeover_needs_no_place_and_no_patience(tmp_path):
    """One place, which the next in the queue has at once; and the fill is older than `fill.queue_timeout`."""
    body, gate, stays = zip_of("takeover", LENGTH), Gate(), Gate()
    half, patience_seconds = LENGTH // 2, 1.0
    others = [content_path("full.dax", revision=f"2608020{n:02}") for n in range(8)]
    settings = {"fill": {"max": 1, "queue_timeout": f"{patience_seconds:g}s"}}
    with ScriptedUpstream() as upstream:
        settings |= {"upstream": [{"url": upstream.url, "read_timeout": GATES_STAY}]}
        upstream.answer(BIG, Answer(body, etag='"a"', gates=((half, gate),)), Answer(body, etag='"a"'))
        for other in others:
            upstream.answer(other, Answer(body, gates=((100_000, stays),)))
        with Gup(tmp_path / "cache", settings=settings) as gup, Swarm(gup.data) as swarm:
            clients, began = swarm.add(80, BIG), time.monotonic()
            gate.wait_reached()
            swarm.wait_for(lambda: all(c.body_bytes == half for c in clients), "all have the half", 10)
            leader = gup.worker_of_port(upstream.requests(BIG)[0].peer_port, upstream.port)
            of_other = [c for c in clients if gup.worker_of_port(gup.data[1], c.local_port) != leader]
            assert len(of_other) >= 20
            until(lambda: time.monotonic() - began > patience_seconds, "the fill is older than the patience")
            for other in others:
                swarm.add(1, other)
            gup.wait_metric(88, "gup_fill_waiters")
            gup.kill_worker(leader)
            swarm.wait(30, of_other)
            assert {(c.end, c.digest) for c in of_other} == {(End.COMPLETE, body_digest(body))}
            gate.open()
            stays.open()
            gup.wait_stored("full.zip")
            gup.wait_metric(0, "gup_fills_in_progress")
            assert gup.get(others[-1]).body == body, "no place is lost"


def test_a_fill_that_nobody_waits_for_is_taken_over_too(tmp_path):
    """No follower in the other worker: the controller brings the dead leader's fill to its end."""
    body, gate = zip_of("orphan", LENGTH), Gate()
    half = LENGTH // 2
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', gates=((half, gate),)), Answer(body, etag='"a"'))
        with Gup(tmp_path / "cache", [upstream.url]) as gup:
            with gup.connect() as client:
                client.ask(BIG)
                client.head()
                assert client.read(half) == body[:half]
            gup.kill_worker(gup.worker_of_port(upstream.requests(BIG)[0].peer_port, upstream.port))
            second = upstream.wait_for_request(BIG, 2)
            gup.wait_stored("full.zip")
            gate.open()
            assert second.status == 206
            gup.wait_metric(1, "gup_cache_entries")
            assert gup.get(BIG).body == body
            assert len(upstream.requests(BIG)) == 2


def test_without_its_controller_the_data_plane_goes_on(tmp_path):
    body, gate = zip_of("controller", LENGTH), Gate()
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', gates=((LENGTH // 2, gate),)))
        upstream.answer(DELTA, Answer(body[:1000], etag='"a"'))
        with Gup(tmp_path / "cache", [upstream.url]) as gup, gup.connect() as client:
            client.ask(BIG)
            head = client.head()
            gate.wait_reached()
            (controller,) = set(gup.children()) - set(gup.workers())
            gup.kill_worker(controller)
            assert gup.get(DELTA).body == body[:1000]
            gate.open()
            assert client.finish(head).body == body
            until(lambda: len(set(gup.children()) - set(gup.workers()) - {controller}) == 1, "it is replaced")
            until(lambda: _metrics_answer(gup), "its successor answers")
            assert gup.metric("gup_client_sent_bytes_total") == LENGTH + 1000
            until(lambda: gup.metric("gup_cache_size_bytes") == LENGTH + 1000, "it knows what was stored")


def _metrics_answer(gup: Gup) -> bool:
    try:
        return fetch(gup.admin, "/readyz").status == 200
    except OSError:
        return False


def test_connections_in_a_dead_workers_queue_are_served_by_its_successor(tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=100_000)
    with Nginx(tree, tmp_path / "nginx") as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        gup.get(DELTA)
        gup.wait_stored(DELTA.rpartition("/")[2])
        victim = gup.workers()[0]
        os.kill(victim, signal.SIGSTOP)
        connections = [RawConnection(gup.data) for _ in range(40)]
        try:
            for connection in connections:
                connection.ask(DELTA)
            # half of them, about, wait in the stopped worker's queue
            waiting = [connection for connection in connections if connection.silent_for(0.02)]
            assert 0 < len(waiting) < 40
            gup.kill_worker(victim)
            for connection in connections:
                response = connection.response()
                assert (response.status, response.complete) == (200, True)
                assert response.body == tree.body(DELTA)
        finally:
            for connection in connections:
                connection.close()
        assert upstream.requests(DELTA) == 1


def test_after_a_power_cut_a_fill_is_resumed(tmp_path):
    body, gate = zip_of("power", LENGTH), Gate()
    half = LENGTH // 2
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', gates=((half, gate),)), Answer(body, etag='"a"'))
        with Gup(tmp_path / "cache", [upstream.url]) as gup:
            with gup.connect() as client:
                client.ask(BIG)
                etag = client.head().etag
                assert client.read(half) == body[:half]
                gate.wait_reached()
                gup.kill()
            gate.open()
            assert sum(gup.parts().values()) == half
            gup.start()
            response = gup.get(BIG)
            assert (response.status, response.body == body, response.etag) == (200, True, etag)
            second = upstream.wait_for_request(BIG, 2)
            assert second.status == 206
            assert second.body_bytes <= half + OVERLAP_BYTES
            gup.wait_stored("full.zip")
            assert len(upstream.requests(BIG)) == 2
            assert gup.get(BIG).etag == etag


def test_a_damaged_part_is_not_taken_over_blindly(tmp_path):
    """Bytes of a part that changed on disk while nobody ran never reach a client."""
    body, gate = zip_of("damaged", LENGTH), Gate()
    half = LENGTH // 2
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', gates=((half, gate),)), Answer(body, etag='"a"'))
        with Gup(tmp_path / "cache", [upstream.url]) as gup:
            with gup.connect() as client:
                client.ask(BIG)
                assert client.head().status == 200
                assert client.read(half) == body[:half]
                gate.wait_reached()
                gup.kill()
            gate.open()
            (part,) = (tmp_path / "cache" / "partial").glob("*.part")
            with part.open("r+b") as file:
                file.seek(1_200_000)
                file.write(b"damage")
            gup.start()
            response = gup.get(BIG)
            assert (response.status, response.complete) == (200, True)
            assert response.body == body
            gup.wait_stored("full.zip")
            assert gup.get(BIG).body == body
            assert gup.metric("gup_integrity_failures_total", where="part") >= 1


def test_without_its_supervisor_nothing_stays(tmp_path):
    """kill -9 of the supervisor alone: its children end, and a new start serves at once."""
    tree = make_tree(tmp_path / "tree", big_bytes=100_000)
    with Nginx(tree, tmp_path / "nginx") as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        gup.get(DELTA)
        gup.wait_stored(DELTA.rpartition("/")[2])
        gup.signal(signal.SIGKILL)
        gup.wait()
        until(lambda: not gup.pids, "the children end too", 5)
        upstream.stop()
        gup.start()
        assert gup.get(DELTA).body == tree.body(DELTA)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("body", marks=pytest.mark.long),
        pytest.param("record", marks=pytest.mark.long),
        "index",
        "shared",
    ],
)
def test_damage_on_disk_is_noticed_and_mended(tmp_path, where):
    """Whatever file is damaged while nobody runs: the service starts, and no wrong byte is served."""
    body = zip_of("mended", LENGTH)
    root = tmp_path / "cache"
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"'))
        with Gup(root, [upstream.url]) as gup:
            assert gup.get(BIG).body == body
            gup.wait_stored("full.zip")
            until(lambda: gup.metric("gup_cache_entries") == 1, "the controller knows it")
            assert gup.stop() == 0
            files = {
                "body": next((root / "content").rglob("full.zip")),
                "record": next((root / "content").rglob(".full.zip.gup")),
                "index": next((root / "index").rglob("*.db")),
                "shared": root / "run" / "shared",
            }
            _damage(files[where])
            gup.start()
            for _ in range(2):
                until(lambda: _whole(gup, body, may_be_cut=where == "body"), "it is served whole", 5)
            assert len(upstream.requests(BIG)) == (2 if where in ("body", "record") else 1)
            until(lambda: gup.metric("gup_cache_entries") == 1, "the controller knows it")
            if where != "shared":
                assert gup.metric("gup_integrity_failures_total", where=where) >= 1


def _whole(gup: Gup, body: bytes, *, may_be_cut: bool) -> bool:
    """Whether BIG is served whole. Damage found in a body cuts it; a wrong byte never passes."""
    response = gup.get(BIG)
    assert response.status == 200
    if may_be_cut and not response.complete:
        assert response.reset
        assert body.startswith(response.body)
        return False
    assert (response.complete, response.body == body) == (True, True)
    return True


def _damage(file: Path) -> None:
    """Overwrite some bytes in the middle; the times stay, as with a bad disk."""
    stat = file.stat()
    with file.open("r+b") as opened:
        opened.seek(stat.st_size // 2)
        opened.write(b"\xa5" * min(64, stat.st_size // 4))
        if stat.st_size > 10_000 and file.suffix != ".zip":
            opened.seek(0)
            opened.write(b"\xa5" * 64)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def fetch_with_resume(gup: Gup, path: str, deadline: float) -> tuple[bytes, int]:
    """A client as they are: cut, it asks again for the rest, under the same validator. Body and tries."""
    got, etag, tries = b"", "", 0
    while time.monotonic() < deadline:
        tries += 1
        headers = {"Range": f"bytes={len(got)}-", "If-Range": etag} if got and etag else {}
        try:
            with gup.connect(5) as client:
                client.ask(path, headers)
                response = client.head()
                if response.status not in (200, 206):
                    client.finish(response)
                    continue
                if response.status == 200:
                    got = b""
                etag = response.etag
                total = int((response.header("content-range") or "").rpartition("/")[2] or 0)
                total = total or int(response.header("content-length") or 0)
                got += client.read(total - len(got))
                if len(got) == total:
                    return got, tries
        except (OSError, Ended):
            continue
    raise AssertionError(f"not whole in time: {len(got)} bytes after {tries} tries")


@pytest.mark.long
def test_workers_killed_again_and_again(tmp_path):
    """Six fills, twelve clients that resume, six kills: every byte right, little fetched twice."""
    bodies = {
        content_path("full.zip", revision=f"26080{n}001"): zip_of(f"chaos {n}", LENGTH) for n in range(6)
    }
    with ScriptedUpstream() as upstream:
        for path, body in bodies.items():
            # 6 MB in pieces of 16 KiB: about 2 s a body
            upstream.answer(path, Answer(body, etag='"c"', piece_seconds=0.005))
        with (
            Gup(tmp_path / "cache", [upstream.url]) as gup,
            ThreadPoolExecutor(12) as pool,
        ):
            deadline = time.monotonic() + 40
            running = [
                (path, pool.submit(fetch_with_resume, gup, path, deadline)) for path in (*bodies, *bodies)
            ]
            for number in range(6):
                goal = sum(map(upstream.body_bytes, bodies)) + 2_000_000
                until(lambda goal=goal: sum(map(upstream.body_bytes, bodies)) > goal, "the fills go on")
                victims = until(lambda: len(gup.workers()) == 2 and gup.workers(), "both workers are there")
                gup.kill_worker(victims[number % 2])
            tries = 0
            for path, future in running:
                got, tried = future.result()
                assert got == bodies[path]
                tries += tried
            assert tries > len(running), "no client was cut: nothing was tested"
            until(lambda: not gup.parts(), "all fills have ended")
            for path, body in bodies.items():
                assert gup.get(path).body == body
                assert upstream.body_bytes(path) <= LENGTH + 7 * OVERLAP_BYTES
            assert gup.metric("gup_worker_restarts_total") == 6
