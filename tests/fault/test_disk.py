"""The disk is full, read-only, broken or slow: hits go on, what can't be stored is delivered."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from harness.clients import Client, End, Ended, body_digest
from harness.content import BIG, content_path, noise, zip_of
from harness.disks import SmallDisk, small_disk
from harness.faults import planned
from harness.processes import quiet_clock, until
from harness.service import Gup
from harness.upstreams import Answer, Gate

MB = 1 << 20
BODY = zip_of("disk", 3 * MB)
SETTINGS = {"cache": {"min_free": 0, "error_ttl": "100ms"}, "clients": {"allow": ["127.0.0.0/8"]}}
TOO_LARGE = {**SETTINGS, "cache": {**SETTINGS["cache"], "max_size": "1MB"}}
KEPT = content_path("xdelta260601001_To_260602001.dax", revision="260602001")
KEPT_BODY = noise("kept", 300_000)
OLD = content_path("xdelta260701001_To_260702001.dax", revision="260702001")
PART = "partial/*.part"


@pytest.fixture
def disk(tmp_path, request) -> Iterator[SmallDisk]:
    """What the service of the test stores on: 12 MB, or as the test's parameter says."""
    with small_disk(tmp_path / "cache", **getattr(request, "param", {"size": "12m"})) as small:
        yield small


def bodies_of(gup: Gup, path: str) -> list[str]:
    """The stored bodies of this file and revision."""
    return [key for key in gup.bodies() if key.endswith("/".join(path.rsplit("/", 2)[1:]))]


def stored_soon(gup: Gup, path: str, body: bytes) -> None:
    """Asked again and again: as soon as an error stands no more, it is stored."""
    until(lambda: gup.serves(path, body) and bodies_of(gup, path), f"{path} is stored")


def keep_one(gup: Gup) -> None:
    """A stored and pinned body, for hits."""
    gup.serves(KEPT, KEPT_BODY)
    gup.wait_metric(1, "gup_cache_entries")
    (key,) = gup.bodies()
    assert gup.api(f"/api/v1/content/{quote(key)}/pin", "PUT")[0] == 200


def all_right(clients: list[Client], body: bytes) -> None:
    assert {(c.end, c.status, c.digest) for c in clients} == {(End.COMPLETE, 200, body_digest(body))}


def unstorable(gup: Gup) -> float:
    return gup.metric("gup_fills_total", outcome="unstorable")


def refusing(tmp_path: Path) -> tuple[list[str], Callable[[str], Path], list[dict]]:
    """Faults by name, each while its flag's file exists."""
    part, sums, any_file = "partial/*.part", "partial/*.sums", "*/*/*"
    changing = ["pwrite", "write", "rename", "unlink", "mkdir", "ftruncate", "utime"]
    faults = {
        "no room for the part": [("open", part, "ENOSPC")],
        "no room at the first byte": [("pwrite", part, "ENOSPC")],
        "quota in the middle": [("pwrite", part, "EDQUOT", 2)],
        "error in the middle": [("pwrite", part, "EIO", 2)],
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


def test_whatever_write_is_refused_clients_get_their_bytes_and_hits_go_on(serve, tmp_path):
    names, flag, rules = refusing(tmp_path)
    gup, upstream = serve({KEPT: KEPT_BODY}, workers=1, env=planned(*rules), **SETTINGS)
    keep_one(gup)
    pids = gup.pids
    for number, name in enumerate(names, 1):
        path = content_path("full.zip", revision=f"2608010{number:02}")
        upstream.answer(path, BODY)
        flag(name).touch()
        gup.serves(path, BODY)
        gup.serves(KEPT, KEPT_BODY)
        until(lambda n=number: unstorable(gup) >= n, name)
        assert len(upstream.requests(path)) == 1, name
        assert not bodies_of(gup, path), name
        flag(name).unlink()
        stored_soon(gup, path, BODY)
        until(lambda: not gup.parts(), f"{name}: nothing is left in partial/")
    assert gup.pids == pids, "nothing was restarted"


def test_room_is_made_by_eviction_and_the_write_tried_again(serve, tmp_path):
    once = {"call": "pwrite", "path": PART, "do": "ENOSPC", "nth": 4, "while": str(tmp_path / "on")}
    answers = {OLD: noise("old", MB), BIG: Answer(BODY, etag='"x"', piece_seconds=0.001)}
    gup, _ = serve(answers, workers=1, env=planned(once), **SETTINGS)
    gup.serves(OLD, noise("old", MB))
    gup.wait_metric(1, "gup_cache_entries")
    (tmp_path / "on").touch()
    gup.serves(BIG, BODY)
    gup.wait_stored(BIG)
    assert (gup.metric("gup_evictions_total", reason="free"), unstorable(gup)) == (1, 0)
    assert not gup.stored(OLD)


def refusals(gup: Gup) -> set[str]:
    return {row["what"] for row in gup.status()["disk"]["refusals"]}


@pytest.mark.needs("mount")
def test_a_full_disk_serves_hits_passes_misses_on_and_recovers_by_itself(disk, serve):
    """Room for what can't fit would not be there if all that is stored had gone: it evicts nothing."""
    large = content_path("full.zip", revision="260601001")
    gup, upstream = serve({KEPT: KEPT_BODY, BIG: BODY, large: zip_of("large", 16 * MB)}, **SETTINGS)
    keep_one(gup)
    gup.serves(large, zip_of("large", 16 * MB))
    disk.fill()
    for _ in range(3):
        gup.serves(BIG, BODY)
        gup.serves(KEPT, KEPT_BODY)
    until(lambda: refusals(gup) >= {"content", "index"}, "the status tells of it")
    gup.wait_log("not written: index")
    assert gup.log.count("not written: index") == 1
    assert gup.metric("gup_requests_total", result="bypass") >= 3
    assert gup.metric("gup_evictions_total") == 0
    gup.stop()
    gup.start()
    gup.serves(KEPT, KEPT_BODY)
    gup.serves(BIG, BODY)
    pids = gup.pids
    disk.free()
    stored_soon(gup, BIG, BODY)
    until(lambda: not refusals(gup), "the status tells that it is over", 30)
    assert gup.pids == pids, "nothing was restarted"
    assert len(upstream.requests(KEPT)) == 1


@pytest.mark.parametrize("disk", [{"size": "64m", "inodes": 400}], indirect=True)
@pytest.mark.needs("mount")
def test_without_inodes_old_bodies_make_way(disk, serve):
    old = {path: noise(path, MB) for path in (content_path(f"xdelta{n}_To_9.dax") for n in range(4))}
    gup, _ = serve({**old, BIG: BODY}, workers=1, **SETTINGS)
    for path, body in old.items():
        gup.serves(path, body)
    gup.wait_metric(4, "gup_cache_entries")
    disk.take_inodes()
    stored_soon(gup, BIG, BODY)
    assert 1 <= gup.metric("gup_evictions_total", reason="free") <= 4


@pytest.mark.needs("mount")
def test_two_hundred_clients_of_two_workers_share_one_download_on_a_full_disk(disk, serve):
    body, gate = zip_of("full", 4 * MB), Gate()
    gup, upstream = serve({BIG: Answer(body, etag='"x"', gates=((2 * MB, gate),))}, **SETTINGS)
    disk.fill()
    readers, swarm = [gup.begin(BIG, pid=pid) for pid in gup.workers()], gup.swarm()
    clients = swarm.add(200, BIG)
    until(lambda: all(client.body_bytes > MB for client in clients), "all have some of it", 30)
    gate.open()
    swarm.wait(clients)
    all_right(clients, body)
    for reader, response in readers:
        assert reader.finish(response).body == body
        reader.close()
    for pid in gup.workers():
        assert gup.connect_to(pid).get(BIG).body == body
    assert len(upstream.requests(BIG)) == 1
    assert gup.metric("gup_client_sent_bytes_total", source="bypass") == 204 * len(body)
    assert gup.metric("gup_requests_total", result="bypass", code="200") == 204
    assert unstorable(gup) >= 1
    assert gup.metric("gup_fills_total", outcome="failed") == 0
    key = quote(f"any/any{BIG.removeprefix('/content')}")
    assert gup.api(f"/api/v1/content/{key}", "DELETE")[0] == 200
    gup.serves(BIG, body)
    assert len(upstream.requests(BIG)) == 2, "what was purged is not served from memory"


@pytest.mark.parametrize("leader", ["lives", "dies"])
def test_readers_in_both_workers_when_the_disk_refuses_in_mid_body(serve, tmp_path, leader):
    """They go on; when the worker that has the body in its memory dies, they are cut, and resume."""
    on, gate, later, body = tmp_path / "on", Gate(), Gate(), zip_of("others", 8 * MB)
    rule = {"call": "pwrite", "path": PART, "do": "EIO", "while": str(on)}
    answers = Answer(body, etag='"a"', gates=((2 * MB, gate), (3 * MB, later))), body
    gup, upstream = serve({BIG: answers}, env=planned(rule), **SETTINGS)
    one, two = gup.workers()
    (first, led), (follower, read) = (gup.begin(BIG, pid=pid) for pid in (one, two))
    gate.wait_reached()
    on.touch()
    gate.open()
    later.wait_reached()
    until(lambda: unstorable(gup) == 1, "it goes on in memory")
    if leader == "lives":
        later.open()
        assert first.finish(led).body == follower.finish(read).body == body
        assert led.etag == read.etag
        assert len(upstream.requests(BIG)) == 1
        assert gup.metric("gup_fills_total", outcome="failed") == 0
        gup.close_clients()
        gup.wait_metric(0, "gup_fill_waiters")
        on.unlink()
        stored_soon(gup, BIG, body)
        assert gup.get(BIG).etag == led.etag
        assert len(upstream.requests(BIG)) == 1, "what is in memory is stored from there"
        gup.wait_metric(1, "gup_fills_total", outcome="committed")
        return
    read.body += follower.read(2_500_000 - len(read.body))  # it reads what is in memory
    gup.kill_worker(one)
    with contextlib.suppress(Ended):
        follower.finish(read)
    assert (read.complete, read.reset) == (False, True)
    assert read.body
    assert body.startswith(read.body)
    later.open()
    answer = gup.get(BIG, {"Range": f"bytes={len(read.body)}-", "If-Range": read.etag})
    had = read.body if answer.status == 206 else b""  # what is only passed through comes whole, as a 200
    assert (answer.complete, had + answer.body == body) == (True, True)
    assert answer.status in (200, 206)


def test_of_too_large_a_body_four_clients_at_once_are_passed_through_and_a_broken_one_is_cut(serve):
    body, bad, ends = zip_of("too large", 6 * MB), noise("no zip", 2 * MB), Gate()
    broken = content_path("full.zip", revision="260601001")
    answer = Answer(body, etag='"x"', gates=((3 * MB, ends),))
    gup, upstream = serve({BIG: answer, broken: bad}, **TOO_LARGE)
    swarm = gup.swarm()
    together = swarm.add(12, BIG)
    until(lambda: sum(c.end is not None for c in together) == 8, "all but four are refused")
    refused = [c for c in together if c.end is not None]
    assert {(c.status, "retry-after" in c.fields) for c in refused} == {(503, True)}
    ends.open()
    swarm.wait(together)
    all_right([c for c in together if c not in refused], body)
    asked = len(upstream.requests(BIG))
    assert 5 <= asked <= 6, "one of each worker that finds out, and one for each client that is served"
    assert unstorable(gup) >= 1
    gup.serves(BIG, body)
    assert not gup.parts()
    cut = gup.get(broken)
    assert (cut.complete, cut.reset, len(cut.body) <= len(bad) - 4096) == (False, True, True)


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
def test_what_can_not_be_read_is_damage(serve, tmp_path, call, path, times, asked):
    """`asked`: the ranges that are fetched again. Reads fail at 0 only: later chunks are looked at beside."""
    on = tmp_path / "on"
    rule = {"call": call, "path": path, "do": "EIO", "while": str(on), "process": "worker", "nth": 1}
    rules = [rule | ({"offset": 0} if call.startswith("pread") else {}) for _ in range(times)]
    body = zip_of("disk", MB if call == "sendfile" else 3 * MB)
    gup, upstream = serve({BIG: body}, workers=1, env=planned(*rules), **SETTINGS)
    gup.serves(BIG, body)
    gup.wait_stored(BIG)
    if call == "open":
        (worker,) = gup.workers()
        gup.kill_worker(worker)
        until(lambda: gup.workers() not in ([], [worker]), "its successor")
    on.touch()
    with contextlib.suppress(Ended):
        answer = gup.get(BIG)
        assert (answer.status, answer.complete) == (200, call != "sendfile"), answer.body[:999]
        assert answer.body == body if answer.complete else answer.reset and body.startswith(answer.body)
    if asked:
        until(lambda: gup.metric("gup_integrity_failures_total") >= 1, "the damage is counted")
    gup.serves(BIG, body)
    assert [request.header("range") for request in upstream.requests(BIG)[1:]] == asked
    gup.wait_stored(BIG)


def test_what_can_not_be_read_while_its_commit_still_ends_is_mended_after_it(serve, tmp_path):
    """The body is there with its record, and the rest of its commit hangs: its fill holds the key."""
    on, asleep = tmp_path / "on", tmp_path / "asleep"
    bad = {"call": "pread", "path": "full.zip", "do": "EIO", "while": str(on), "nth": 1, "offset": 0}
    slow = {"call": "unlink", "path": "partial/*.sums", "do": "sleep:1.5", "once": str(asleep)}
    rules = [rule | {"process": "worker"} for rule in (slow, bad, bad, bad, bad)]
    gup, upstream = serve({BIG: BODY}, workers=1, env=planned(*rules), **SETTINGS)
    gup.serves(BIG, BODY)
    gup.wait_stored(BIG)
    until(asleep.exists, "the commit hangs")
    on.touch()
    began = quiet_clock()
    gup.serves(BIG, BODY)
    assert quiet_clock() - began < 4
    assert len(upstream.requests(BIG)) <= 2, "it is fetched again once at most"


def test_a_slow_disk_holds_up_no_hit(serve, tmp_path):
    on, body = tmp_path / "on", zip_of("slow", MB // 4)
    rule = {"call": ["pwrite", "fsync"], "path": "partial/*", "do": "sleep:0.5", "while": str(on)}
    gup, upstream = serve({KEPT: KEPT_BODY, BIG: body}, workers=1, env=planned(rule), **SETTINGS)
    keep_one(gup)
    on.touch()
    (client,) = gup.swarm().add(1, BIG)
    upstream.wait_for_request(BIG)
    took = []
    while client.end is None:
        began = quiet_clock()
        gup.serves(KEPT, KEPT_BODY)
        took.append(quiet_clock() - began)
    all_right([client], body)
    assert len(took) > 20
    assert max(took) < 0.4
    on.unlink()
    gup.wait_stored(BIG)


def test_new_entries_are_not_synced_one_by_one(serve, tmp_path):
    """So a disk that syncs slowly holds nothing up: the controller syncs the file system now and then."""
    log = tmp_path / "syncs"
    calls = ["fsync", "fdatasync"]
    rule = {"call": calls, "path": "*", "do": "pass", "process": "worker", "log": str(log)}
    paths = [content_path(f"xdelta26060100{n}_To_260602001.dax", revision="260602001") for n in range(8)]
    bodies = {path: noise(path, 50_000) for path in paths} | {BIG: BODY}
    gup, _ = serve(bodies, workers=1, env=planned(rule), **SETTINGS)
    for path, body in bodies.items():
        gup.serves(path, body)
    until(lambda: len(gup.bodies()) == 9, "all are stored")
    lines = log.read_text().splitlines() if log.exists() else []
    assert [line for line in lines if "/run/" not in line] == []
    until((gup.cache_dir / "run" / "synced").exists, "the controller has synced")
