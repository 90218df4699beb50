"""The disk is full, read-only, broken or slow: hits go on, what can't be stored is delivered."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.clients import Ended
from harness.disks import small_disk
from harness.faults import planned
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.swarm import End, Swarm, body_digest
from harness.trees import BIG, content_path, noise, zip_of
from harness.waiting import until

MB = 1 << 20
BODY = zip_of("disk", 3 * MB)
SETTINGS = {"cache": {"min_free": 0, "error_ttl": "100ms"}, "clients": {"allow": ["127.0.0.0/8"]}}
KEPT = content_path("xdelta260601001_To_260602001.dax", revision="260602001")


def file_of(path: str) -> str:
    return path.rpartition("/")[2]


def bodies_of(gup: Gup, path: str) -> list[str]:
    """The stored bodies of this file and revision."""
    return [key for key in gup.bodies() if key.endswith("/".join(path.rsplit("/", 2)[1:]))]


def right(gup: Gup, path: str, body: bytes) -> None:
    answer = gup.get(path)
    assert (answer.status, answer.complete, answer.body == body) == (200, True, True), (path, answer.status)


def stored_soon(gup: Gup, path: str, body: bytes) -> None:
    """Asked again and again: as soon as an error stands no more, it is stored."""

    def ask_again() -> bool:
        right(gup, path, body)
        return bool(bodies_of(gup, path))

    until(ask_again, f"{path} is stored")


def keep_one(gup: Gup, upstream: ScriptedUpstream) -> bytes:
    """A stored and pinned body, for hits."""
    body = noise("kept", 300_000)
    upstream.answer(KEPT, Answer(body, etag='"kept"'))
    right(gup, KEPT, body)
    gup.wait_stored(file_of(KEPT))
    until(lambda: gup.metric("gup_cache_entries") == 1, "the controller knows it")
    (key,) = gup.bodies()
    assert (
        gup.api(f"/api/v1/content/{key.replace('{', '%7B').replace('}', '%7D')}/pin", method="PUT")[0] == 200
    )
    return body


def refusing(tmp_path: Path) -> tuple[list[str], Callable[[str], Path], list[dict]]:
    """Faults by name, each while its flag's file exists."""
    part, sums, any_file = "partial/*.part", "partial/*.sums", "*/*/*"
    changing = ["pwrite", "write", "rename", "unlink", "mkdir", "ftruncate", "utime"]
    faults = {
        "no room for the part": [("open", part, "ENOSPC")],
        "no room at the first byte": [("pwrite", part, "ENOSPC")],
        "quota in the middle": [("pwrite", part, "EDQUOT", 5)],
        "error in the middle": [("pwrite", part, "EIO", 5)],
        "no room for sums": [("write", sums, "ENOSPC")],
        "no room for the state": [("open", "partial/*.state.tmp", "ENOSPC")],
        "half a state": [
            ("write", "partial/*.state.tmp", "short:7", 1, "nth"),
            ("write", "partial/*.tmp", "ENOSPC"),
        ],
        "no room for the record": [("write", "partial/*.gup.tmp", "ENOSPC")],
        "no rename": [("rename", "content/*/*/*/*/*", "EIO")],
        "read-only": [
            (changing, any_file, "EROFS"),
            ("open", "partial/*.tmp", "EROFS"),
            ("open", part, "EROFS"),
            ("open", "run/streams", "EROFS"),
        ],
    }

    def flag(name: str) -> Path:
        return tmp_path / name.replace(" ", "-")

    rules = [
        {"call": call, "path": path, "do": do, "while": str(flag(name)), **_when(*at)}
        for name, each in faults.items()
        for call, path, do, *at in each
    ]
    return list(faults), flag, rules


def _when(number: int | None = None, how: str = "from") -> dict[str, int]:
    return {how: number} if number is not None else {}


def test_whatever_write_is_refused_clients_get_their_bytes_and_hits_go_on(tmp_path):
    names, flag, rules = refusing(tmp_path)
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=SETTINGS, workers=1, env=planned(*rules)) as gup,
    ):
        kept = keep_one(gup, upstream)
        pids = gup.pids
        for number, name in enumerate(names, 1):
            path = content_path("full.zip", revision=f"2608010{number:02}")
            upstream.answer(path, Answer(BODY, etag='"x"'))
            flag(name).touch()
            right(gup, path, BODY)
            right(gup, KEPT, kept)
            until(lambda n=number: gup.metric("gup_fills_total", outcome="unstorable") >= n, name)
            assert len(upstream.requests(path)) == 1, name
            assert not bodies_of(gup, path), name
            flag(name).unlink()
            stored_soon(gup, path, BODY)
            until(lambda: not gup.parts(), f"{name}: nothing is left in partial/")
        assert gup.pids == pids, "nothing was restarted"


def test_room_is_made_by_eviction_and_the_write_tried_again(tmp_path):
    once = {
        "call": "pwrite",
        "path": "partial/*.part",
        "do": "ENOSPC",
        "nth": 4,
        "while": str(tmp_path / "on"),
    }
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=SETTINGS, workers=1, env=planned(once)) as gup,
    ):
        old = content_path("xdelta260701001_To_260702001.dax", revision="260702001")
        upstream.answer(old, Answer(noise("old", MB), etag='"old"'))
        right(gup, old, noise("old", MB))
        gup.wait_stored(file_of(old))
        until(lambda: gup.metric("gup_cache_entries") == 1, "the controller knows it")
        (tmp_path / "on").touch()
        upstream.answer(BIG, Answer(BODY, etag='"x"', piece_seconds=0.001))
        right(gup, BIG, BODY)
        gup.wait_stored("full.zip")
        metrics = gup.metrics()
        assert metrics("gup_evictions_total", reason="free") == 1
        assert metrics("gup_fills_total", outcome="unstorable") == 0
        assert not gup.stored(file_of(old))


def test_a_full_disk_serves_hits_passes_misses_on_and_recovers_by_itself(tmp_path):
    with (
        small_disk(tmp_path / "cache", "12m") as disk,
        ScriptedUpstream() as upstream,
        Gup(disk.root, [upstream.url], settings=SETTINGS, workers=2) as gup,
    ):
        kept = keep_one(gup, upstream)
        pids = gup.pids
        disk.fill()
        upstream.answer(BIG, Answer(BODY, etag='"x"'))
        for _ in range(3):
            right(gup, BIG, BODY)
            right(gup, KEPT, kept)
        until(lambda: refusals(gup) >= {"content", "index"}, "the status tells of it")
        gup.wait_log("not written: index")
        assert gup.log.count("not written: index") == 1
        assert gup.metric("gup_requests_total", result="bypass") == 3
        gup.stop()
        gup.start()
        right(gup, KEPT, kept)
        right(gup, BIG, BODY)
        pids = gup.pids
        disk.free()
        stored_soon(gup, BIG, BODY)
        until(lambda: not refusals(gup), "the status tells that it is over", 30)
        assert gup.pids == pids, "nothing was restarted"


def test_what_can_not_fit_evicts_nothing(tmp_path):
    """Room for it would not be there if all that is stored had gone: hits of that go on."""
    delta = content_path("xdelta260701001_To_260801001.dax")
    with (
        small_disk(tmp_path / "cache", "12m") as disk,
        ScriptedUpstream() as upstream,
        Gup(disk.root, [upstream.url], settings=SETTINGS, workers=1) as gup,
    ):
        upstream.answer(delta, Answer(noise("delta", 300_000), etag='"delta"'))
        right(gup, delta, noise("delta", 300_000))
        until(lambda: gup.metric("gup_cache_entries") == 1, "the controller knows it")
        upstream.answer(BIG, Answer(zip_of("large", 16 * MB), etag='"x"'))
        right(gup, BIG, zip_of("large", 16 * MB))
        disk.fill()
        small = content_path("full.zip", revision="260601001")
        upstream.answer(small, Answer(BODY, etag='"y"'))
        right(gup, small, BODY)
        right(gup, delta, noise("delta", 300_000))
        assert gup.metric("gup_evictions_total") == 0
        assert len(upstream.requests(delta)) == 1


def refusals(gup: Gup) -> set[str]:
    return {row["what"] for row in gup.status()["disk"]["refusals"]}


def test_without_inodes_old_bodies_make_way(tmp_path):
    with (
        small_disk(tmp_path / "cache", "64m", inodes=400) as disk,
        ScriptedUpstream() as upstream,
        Gup(disk.root, [upstream.url], settings=SETTINGS, workers=1) as gup,
    ):
        for number in range(4):
            path = content_path(f"xdelta26070{number}001_To_260801001.dax")
            upstream.answer(path, Answer(noise(path, MB), etag='"old"'))
            right(gup, path, noise(path, MB))
            gup.wait_stored(file_of(path))
        until(lambda: gup.metric("gup_cache_entries") == 4, "the controller knows them")
        disk.take_inodes()
        upstream.answer(BIG, Answer(BODY, etag='"x"'))
        stored_soon(gup, BIG, BODY)
        assert 1 <= gup.metric("gup_evictions_total", reason="free") <= 4


@pytest.mark.parametrize("errno", [pytest.param("ENOSPC", marks=pytest.mark.long), "EIO"])
def test_attached_clients_go_on_when_the_disk_refuses_in_mid_body(tmp_path, errno):
    on = tmp_path / "on"
    rule = {"call": "pwrite", "path": "partial/*.part", "do": errno, "while": str(on)}
    body, gate = zip_of("attached", 8 * MB), Gate()
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=SETTINGS, workers=1, env=planned(rule)) as gup,
        Swarm(gup.data) as swarm,
    ):
        upstream.answer(BIG, Answer(body, etag='"x"', gates=((2 * MB, gate),)))
        clients = swarm.add(20, BIG)
        slow = gup.connect()
        slow.ask(BIG)
        until(lambda: all(client.body_bytes > MB for client in clients), "all are attached")
        on.touch()
        gate.open()
        head = slow.head()
        slow.finish(head)
        swarm.wait(20, clients)
        assert {(c.end, c.status, c.digest) for c in clients} == {(End.COMPLETE, 200, body_digest(body))}
        assert (head.complete, head.body == body) == (True, True)
        assert {c.fields["etag"] for c in clients} == {head.etag}
        assert len(upstream.requests(BIG)) == 1
        slow.close()
        until(lambda: gup.metric("gup_fill_waiters") == 0, "nobody waits")
        on.unlink()
        stored_soon(gup, BIG, body)
        assert gup.get(BIG).etag == head.etag


def test_two_hundred_clients_of_two_workers_share_one_download_on_a_full_disk(tmp_path):
    body, gate = zip_of("full", 4 * MB), Gate()
    with (
        small_disk(tmp_path / "cache", "12m") as disk,
        ScriptedUpstream() as upstream,
        Gup(disk.root, [upstream.url], settings=SETTINGS, workers=2) as gup,
        Swarm(gup.data) as swarm,
    ):
        disk.fill()
        upstream.answer(BIG, Answer(body, etag='"x"', gates=((2 * MB, gate),)))
        readers = [gup.connect_to(worker) for worker in gup.workers()]
        for reader in readers:
            reader.ask(BIG)
        heads = [reader.head() for reader in readers]
        clients = swarm.add(200, BIG)
        until(lambda: all(client.body_bytes > MB for client in clients), "all have some of it", 30)
        gate.open()
        swarm.wait(30, clients)
        assert {(c.end, c.status, c.digest) for c in clients} == {(End.COMPLETE, 200, body_digest(body))}
        for reader, head in zip(readers, heads, strict=True):
            reader.finish(head)
            assert (head.complete, head.body == body) == (True, True)
            reader.close()
        for worker in gup.workers():
            with gup.connect_to(worker) as late:
                assert late.get(BIG).body == body
        assert len(upstream.requests(BIG)) == 1
        assert gup.metric("gup_client_sent_bytes_total", source="bypass") == 204 * len(body)
        assert gup.metric("gup_requests_total", result="bypass", code="200") == 204
        assert gup.metric("gup_fills_total", outcome="unstorable") >= 1
        assert gup.metric("gup_fills_total", outcome="failed") == 0
        key = f"any/any{BIG.removeprefix('/content')}".replace("{", "%7B").replace("}", "%7D")
        assert gup.api(f"/api/v1/content/{key}", method="DELETE")[0] == 200
        right(gup, BIG, body)
        assert len(upstream.requests(BIG)) == 2, "what was purged is not served from memory"


@contextlib.contextmanager
def shared_by_two_workers(tmp_path: Path, body: bytes, later: Gate):
    """A fill whose disk refuses in mid-body, read in the worker that leads it and in the other one."""
    on, gate = tmp_path / "on", Gate()
    rule = {"call": "pwrite", "path": "partial/*.part", "do": "EIO", "while": str(on)}
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=SETTINGS, workers=2, env=planned(rule)) as gup,
        contextlib.ExitStack() as connections,
    ):
        gates = ((2 * MB, gate), (3 * MB, later))
        upstream.answer(BIG, Answer(body, etag='"x"', gates=gates), Answer(body, etag='"x"'))
        one, two = gup.workers()
        leaders = connections.enter_context(gup.connect_to(one))
        follower = connections.enter_context(gup.connect_to(two))
        leaders.ask(BIG)
        head = leaders.head()
        follower.ask(BIG)
        other = follower.head()
        gate.wait_reached()
        on.touch()
        gate.open()
        later.wait_reached()
        until(lambda: gup.metric("gup_fills_total", outcome="unstorable") == 1, "it goes on in memory")
        yield gup, upstream, (leaders, head), (follower, other)


def test_readers_in_other_workers_go_on_when_the_disk_refuses_in_mid_body(tmp_path):
    body, later = zip_of("others", 8 * MB), Gate()
    with shared_by_two_workers(tmp_path, body, later) as (gup, upstream, *readers):
        later.open()
        for connection, head in readers:
            connection.finish(head)
            assert (head.complete, head.body == body) == (True, True)
        assert readers[0][1].etag == readers[1][1].etag
        assert len(upstream.requests(BIG)) == 1
        assert gup.metric("gup_fills_total", outcome="failed") == 0


def test_when_the_leader_of_a_body_in_memory_dies_its_readers_are_cut_and_resume(tmp_path):
    body, later = zip_of("others", 8 * MB), Gate()
    with shared_by_two_workers(tmp_path, body, later) as (gup, _, leaders, (follower, head)):
        gup.kill_worker(gup.workers()[0])
        with contextlib.suppress(Ended):
            follower.finish(head)
        assert (head.complete, head.reset) == (False, True)
        assert head.body
        assert body.startswith(head.body)
        later.open()
        with gup.connect() as again:
            answer = again.get(BIG, {"Range": f"bytes={len(head.body)}-", "If-Range": head.etag})
        assert (answer.status, answer.complete) == (206, True)
        assert head.body + answer.body == body
        leaders[0].close()


def test_a_broken_body_is_never_whole_when_it_is_passed_on_from_memory(tmp_path):
    bad = noise("no zip", 2 * MB)
    settings = {**SETTINGS, "cache": {**SETTINGS["cache"], "max_size": "1MB"}}
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings, workers=1) as gup,
    ):
        upstream.answer(BIG, Answer(bad, etag='"x"'))
        with gup.connect() as client:
            answer = client.get(BIG)
        assert (answer.complete, answer.reset) == (False, True)
        assert len(answer.body) <= len(bad) - 4096


def test_of_too_large_a_body_four_clients_at_once_are_passed_through(tmp_path):
    body, ends = zip_of("too large", 6 * MB), Gate()
    settings = {**SETTINGS, "cache": {**SETTINGS["cache"], "max_size": "1MB"}}
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings, workers=2) as gup,
        Swarm(gup.data) as swarm,
    ):
        upstream.answer(BIG, Answer(body, etag='"x"', gates=((3 * MB, ends),)))
        together = swarm.add(12, BIG)
        until(lambda: sum(c.end is not None for c in together) == 8, "all but four are refused")
        refused = [c for c in together if c.end is not None]
        assert {(c.status, "retry-after" in c.fields) for c in refused} == {(503, True)}
        ends.open()
        swarm.wait(20, together)
        served = [c for c in together if c not in refused]
        assert {(c.end, c.digest) for c in served} == {(End.COMPLETE, body_digest(body))}
        asked = len(upstream.requests(BIG))
        assert 5 <= asked <= 6, "one of each worker that finds out, and one for each client that is served"
        assert gup.metric("gup_fills_total", outcome="unstorable") >= 1
        right(gup, BIG, body)
        assert not gup.parts()


@pytest.mark.parametrize(
    ("call", "path", "times", "asked"),
    [
        pytest.param("pread", "full.zip", 1, [], id="a body once", marks=pytest.mark.long),
        pytest.param("pread", "full.zip", 3, [], id="a body, and once when all of it is looked at"),
        pytest.param("pread", "full.zip", 4, [None], id="a body, and twice when all of it is looked at"),
        pytest.param("sendfile", "full.zip", 1, [], id="a body while it is sent"),
        pytest.param("open", ".*.gup", 2, [None], id="a record", marks=pytest.mark.long),
    ],
)
def test_what_can_not_be_read_is_damage(tmp_path, call, path, times, asked):
    """`asked`: the ranges that are fetched again. Reads fail at 0 only: later chunks are looked at beside."""
    on = tmp_path / "on"
    rule = {"call": call, "path": path, "do": "EIO", "while": str(on), "process": "worker", "nth": 1}
    rules = [rule | ({"offset": 0} if call.startswith("pread") else {}) for _ in range(times)]
    body = zip_of("disk", MB if call == "sendfile" else 3 * MB)
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=SETTINGS, workers=1, env=planned(*rules)) as gup,
    ):
        upstream.answer(BIG, Answer(body, etag='"x"'))
        right(gup, BIG, body)
        gup.wait_stored("full.zip")
        if call == "open":
            (worker,) = gup.workers()
            gup.kill_worker(worker)
            until(lambda: gup.workers() not in ([], [worker]), "its successor")
        on.touch()
        with gup.connect() as client, contextlib.suppress(Ended):
            answer = client.get(BIG)
            whole = call != "sendfile"
            assert (answer.status, answer.complete) == (200, whole), answer.body[:999]
            assert answer.body == body if answer.complete else answer.reset and body.startswith(answer.body)
        if asked:
            until(lambda: gup.metric("gup_integrity_failures_total") >= 1, "the damage is counted")
        right(gup, BIG, body)
        assert [request.header("range") for request in upstream.requests(BIG)[1:]] == asked
        gup.wait_stored("full.zip")


def test_what_can_not_be_read_while_its_commit_still_ends_is_mended_after_it(tmp_path):
    """The body is there with its record, and the rest of its commit hangs: its fill holds the key."""
    on, asleep = tmp_path / "on", tmp_path / "asleep"
    bad = {"call": "pread", "path": "full.zip", "do": "EIO", "while": str(on), "process": "worker", "nth": 1}
    slow = {
        "call": "unlink",
        "path": "partial/*.sums",
        "do": "sleep:1.5",
        "once": str(asleep),
        "process": "worker",
    }
    rules = [slow, *[bad | {"offset": 0} for _ in range(4)]]
    body = zip_of("disk", 3 * MB)
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=SETTINGS, workers=1, env=planned(*rules)) as gup,
    ):
        upstream.answer(BIG, Answer(body, etag='"x"'))
        right(gup, BIG, body)
        gup.wait_stored("full.zip")
        until(asleep.exists, "the commit hangs")
        on.touch()
        began = time.monotonic()
        right(gup, BIG, body)
        assert time.monotonic() - began < 4
        assert len(upstream.requests(BIG)) <= 2, "it is fetched again once at most"


def test_a_slow_disk_holds_up_no_hit(tmp_path):
    on = tmp_path / "on"
    rules = [
        {"call": call, "path": "partial/*", "do": "sleep:0.5", "while": str(on)}
        for call in ("pwrite", "fsync")
    ]
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=SETTINGS, workers=1, env=planned(*rules)) as gup,
        Swarm(gup.data) as swarm,
    ):
        kept = keep_one(gup, upstream)
        upstream.answer(BIG, Answer(zip_of("slow", MB // 4), etag='"x"'))
        on.touch()
        (client,) = swarm.add(1, BIG)
        upstream.wait_for_request(BIG)
        slowest = 0.0
        hits = 0
        while client.end is None:
            began = time.monotonic()
            right(gup, KEPT, kept)
            slowest, hits = max(slowest, time.monotonic() - began), hits + 1
        assert (client.end, client.digest) == (End.COMPLETE, body_digest(zip_of("slow", MB // 4)))
        assert hits > 20
        assert slowest < 0.4
        on.unlink()
        gup.wait_stored("full.zip")


def test_new_entries_are_not_synced_one_by_one(tmp_path):
    """So a disk that syncs slowly holds nothing up: the controller syncs the file system now and then."""
    log = tmp_path / "syncs"
    calls = ["fsync", "fdatasync"]
    rule = {"call": calls, "path": "*", "do": "pass", "process": "worker", "log": str(log)}
    paths = [content_path(f"xdelta26060100{n}_To_260602001.dax", revision="260602001") for n in range(8)]
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=SETTINGS, workers=1, env=planned(rule)) as gup,
    ):
        for n, path in enumerate(paths):
            upstream.answer(path, Answer(noise(path, 50_000 + n), etag='"x"'))
            right(gup, path, noise(path, 50_000 + n))
        upstream.answer(BIG, Answer(zip_of("synced", 3 * MB), etag='"x"'))
        right(gup, BIG, zip_of("synced", 3 * MB))
        until(lambda: len(gup.bodies()) == 9, "all are stored")
        lines = log.read_text().splitlines() if log.exists() else []
        assert [line for line in lines if "/run/" not in line] == []
        until((gup.cache_dir / "run" / "synced").exists, "the controller has synced")
