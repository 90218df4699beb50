"""Through real processes: deltas fetched ahead, content that an operator wants, storms of fulls, alarms."""

import contextlib
import json
import re
import subprocess
import time

import pytest
from harness.clients import RawConnection
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.swarm import Swarm
from harness.trees import CONTENT_INFO, INDEX, MONIKER, OTHER_MONIKER, content_path, noise, zip_of
from harness.waiting import until

OLD = [f"26010{day}001" for day in range(1, 6)]
A, B, C = "260110001", "260111001", "260112001"
PATCHES = "{11111111-2222-3333-4444-555555555555}"
CATALOGUE = CONTENT_INFO + f"{PATCHES}: SEPC Client Patch Win64 14.3 RU2 - Patch - English\r\n".encode()
PREFETCHING = {"catalog": {"refresh": "1h"}}


def delta(old: str, new: str, moniker: str = MONIKER, *, under_new: bool = False) -> str:
    return content_path(f"xdelta{old}_To_{new}.dax", moniker, new if under_new else old)


def full(revision: str, moniker: str = MONIKER) -> str:
    return content_path("full.zip", moniker, revision)


def publish(upstream: ScriptedUpstream, *paths: str, size: int = 20_000) -> None:
    for path in paths:
        upstream.answer(path, Answer(noise(path, size), etag=f'"{path}"'))


def service(tmp_path, upstream: ScriptedUpstream, **settings) -> Gup:
    upstream.answer(INDEX, Answer(CATALOGUE, etag='"catalogue"'))
    gup = Gup(tmp_path / "cache", [upstream.url], settings={**PREFETCHING, **settings})
    until(lambda: gup.status()["upstreams"][0]["catalogue"], "the catalogue is known")
    return gup


def wanted(gup: Gup) -> dict[str, str]:
    """What became of each file that was to be fetched ahead."""
    code, found = gup.api("/api/v1/prefetch?limit=1000")
    assert code == 200, found
    return {row["key"].rpartition("/")[2]: row["outcome"] for row in found["wanted"]}


def settled(gup: Gup, *files: str) -> dict[str, str]:
    """The outcomes, when these files have one."""

    def look():
        found = wanted(gup)
        ended = all(found.get(file, "queued") not in ("queued", "fetching") for file in files)
        return found if ended else None

    return until(look, f"{files} are fetched ahead, or not")


def deltas_stored(gup: Gup) -> int:
    return sum(path.endswith(".dax") for path in gup.bodies())


def cache_status(gup: Gup, path: str) -> str | None:
    answer = gup.get(path)
    assert (answer.status, answer.complete) == (200, True), answer
    return answer.header("cache-status")


def name(path: str) -> str:
    return path.rpartition("/")[2]


def test_the_first_of_a_morning_fetches_for_all_others(tmp_path):
    first, others = delta(OLD[0], B), [delta(old, B) for old in (*OLD[1:], A)]
    patches = [delta(OLD[0], A, PATCHES), delta(OLD[1], A, PATCHES), delta(OLD[0], B, PATCHES)]
    with ScriptedUpstream() as upstream:
        publish(upstream, *(delta(old, A) for old in OLD), first, *others[1:], *patches)
        publish(upstream, delta(OLD[1], B, PATCHES), delta(OLD[1], B, OTHER_MONIKER))
        with service(tmp_path, upstream) as gup:
            # yesterday: clients of five revisions come to A, one after the other; nobody knows of the others
            for old in OLD:
                assert cache_status(gup, delta(old, A)) == "gup; fwd=uri-miss; stored"
            for path in patches:
                cache_status(gup, path)
            until(lambda: deltas_stored(gup) == 8, "all is stored")
            assert wanted(gup) == {}
            # today: the first one names B
            assert cache_status(gup, first) == "gup; fwd=uri-miss; stored"
            outcomes = settled(gup, *map(name, others))
            assert outcomes == {name(others[0]): "absent"} | dict.fromkeys(map(name, others[1:]), "stored")
            for path in others[1:]:
                assert cache_status(gup, path) == "gup; hit"
            assert [len(upstream.requests(path)) for path in (first, *others)] == [1] * 6
            # client patches that nobody asked for are nobody's business
            assert len(upstream.requests(delta(OLD[1], B, PATCHES))) == 0
            assert [row["why"] for row in gup.api("/api/v1/prefetch")[1]["left_out"]] == [
                "client patches are fetched when a client asks for them"
            ]
            metrics = gup.metrics()
            received = "gup_upstream_received_bytes_total"
            assert 0 <= metrics(received, purpose="prefetch") - 4 * 20_000 < 1000  # the 404 has a body too
            assert metrics(received, purpose="fill") == (5 + 3 + 1) * 20_000
            # what is known outlives a restart, and nothing is done twice
            gup.stop()
            publish(upstream, delta(B, C), delta(OLD[0], C))
            gup.start()
            until(lambda: gup.status()["ready"], "it is ready again")
            assert cache_status(gup, delta(OLD[2], B)) == "gup; hit"
            assert wanted(gup).keys() == outcomes.keys()
            publish(upstream, delta(A, C))
            assert cache_status(gup, delta(A, C)) == "gup; fwd=uri-miss; stored"
            now = settled(gup, *(name(delta(old, C)) for old in (*OLD, B)))
            assert {file for file, outcome in now.items() if outcome == "stored"} - outcomes.keys() == {
                name(delta(B, C)),
                name(delta(OLD[0], C)),
            }
            assert [len(upstream.requests(path)) for path in (first, *others)] == [1] * 6


@pytest.mark.long
def test_the_folder_and_the_spelling_are_those_of_the_traffic_and_disabled_means_nothing(tmp_path):
    spelled = OTHER_MONIKER.lower()
    with ScriptedUpstream() as upstream:
        upstream.exact = True
        paths = [delta(old, A, spelled, under_new=True) for old in OLD[:3]]
        first, *others = [delta(old, B, spelled, under_new=True) for old in OLD[:3]]
        publish(upstream, *paths, first, *others)
        settings = {"prefetch": {"enabled": False}}
        with service(tmp_path, upstream, **settings) as gup:
            for path in (*paths, first):
                cache_status(gup, path)
            until(lambda: deltas_stored(gup) == 4, "all is stored")
            assert wanted(gup) == {}
            assert gup.metric("gup_upstream_received_bytes_total", purpose="prefetch") == 0
            gup.rewrite({**PREFETCHING, "prefetch": {"enabled": True}})
            settled(gup, *map(name, others))
            assert [cache_status(gup, path) for path in others] == ["gup; hit", "gup; hit"]
            assert [len(upstream.requests(path)) for path in others] == [1, 1]


def test_a_delta_that_is_not_there_costs_one_fast_answer_and_one_request(tmp_path):
    path = delta(OLD[0], B)
    settings = {"cache": {"negative_ttl": "60s"}}
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup,
        Swarm(gup.data) as swarm,
    ):
        began = time.monotonic()
        clients = swarm.wait(30, swarm.add(100, path))
        assert {client.status for client in clients} == {404}
        assert time.monotonic() - began < 5.0
        began = time.monotonic()
        assert gup.get(path).status == 404
        assert time.monotonic() - began < 1.0
        assert len(upstream.requests(path)) == 1


def test_a_client_hurries_what_is_being_fetched_ahead(tmp_path):
    """What is fetched ahead stands still while a client's full streams; asked for, it goes on."""
    gate, blocking = Gate(), full(A)
    big = delta(A, B)
    with ScriptedUpstream() as upstream:
        body = noise(big, 2_000_000)
        upstream.answer(big, Answer(body, etag='"big"', piece_seconds=0.02))
        upstream.answer(blocking, Answer(zip_of("blocking", 300_000), etag='"f"', gates=((100_000, gate),)))
        with service(tmp_path, upstream) as gup, gup.connect() as client, gup.connect() as other:
            code, found = gup.api("/api/v1/prefetch", method="POST", given={"path": big})
            assert (code, found["wanted"][0]["by"]) == (202, "operator")
            upstream.wait_for_request(big)
            client.ask(blocking)
            gate.wait_reached()
            until(lambda: gup.metric("gup_fills_in_progress") == 2, "both are under way")
            still = until(lambda: stands_still(gup), "it gives way to the client's fill")
            assert still < len(body)
            other.ask(big)
            answer = other.response()
            assert answer.header("cache-status") == "gup; fwd=uri-miss; collapsed"
            assert answer.body == body
            assert len(upstream.requests(big)) == 1
            gate.open()
            assert client.response().complete
            assert settled(gup, name(big)) == {name(big): "stored"}


def ordered(gup: Gup, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`gup prefetch`, as an operator calls it on the service's machine."""
    command = [*Gup.PROGRAM, "prefetch", *arguments, "--admin", f"{gup.admin[0]}:{gup.admin[1]}"]
    token = ["--token-file", str(gup.cache_dir / "run" / "admin-token")]
    return subprocess.run(
        [*command, *token], capture_output=True, text=True, timeout=60, check=False, cwd=gup.folder
    )


def test_an_operator_has_files_fetched_before_the_morning(tmp_path):
    with ScriptedUpstream() as upstream:
        publish(upstream, delta(A, B), delta(A, B, PATCHES))
        with service(tmp_path, upstream, prefetch={"enabled": False}) as gup:
            paths = delta(A, B), delta(A, B, PATCHES)
            done = ordered(gup, *paths)
            assert (done.returncode, done.stderr) == (0, "")
            assert [line.split(": ")[1] for line in done.stdout.splitlines()] == ["fetched and stored"] * 2
            assert [cache_status(gup, path) for path in paths] == ["gup; hit"] * 2
            again = ordered(gup, delta(A, B), delta(A, C), "--json")
            assert again.returncode == 1
            rows = json.loads(again.stdout)["wanted"]
            assert [row["outcome"] for row in rows] == ["present", "absent"]
            assert ordered(gup, delta(A, B), "--no-wait").returncode == 0
            for arguments, told in (
                (("/etc/passwd",), "can't be fetched: This path is none of the content"),
                ((delta(A, B), "--language", "French"), "no upstream has 'French'; there is 'any' and 'any'"),
            ):
                refused = ordered(gup, *arguments)
                assert refused.returncode == 1
                assert told in refused.stderr, refused.stderr
            code, found = gup.api("/api/v1/prefetch", method="POST", given={"file": "x"})
            assert (code, "path" in found["detail"]) == (400, True), found
            assert [len(upstream.requests(path)) for path in paths] == [1, 1]


def alarms(gup: Gup) -> dict[str, dict]:
    code, found = gup.api("/api/v1/alarms")
    assert code == 200, found
    return {alarm["name"]: alarm for alarm in found["alarms"]}


def test_a_storm_tells_who_how_many_and_what_it_costs(tmp_path):
    """Most clients ask while the full is still arriving; the last ones are hits, in the hot cache too."""
    body, gate = zip_of("storm", 300_000), Gate()
    with ScriptedUpstream() as upstream, contextlib.ExitStack() as stack:
        publish(upstream, delta(A, B), size=2_000)
        upstream.answer(full(B), Answer(body, etag='"f"', gates=((100_000, gate),)))
        gup = stack.enter_context(service(tmp_path, upstream))
        cache_status(gup, delta(A, B))
        assert alarms(gup) == {}
        clients = [
            stack.enter_context(RawConnection(gup.data, source=f"127.0.0.{2 + number % 3}"))
            for number in range(9)
        ]
        for client in clients:
            client.ask(full(B))
        gup.wait_metric(9, "gup_fill_waiters")
        gate.open()
        assert all(client.response().body == body for client in clients)
        gup.wait_stored("full.zip")
        for _ in range(6):
            assert clients[0].get(full(B)).header("cache-status") == "gup; hit"
        storm = until(lambda: alarms(gup).get("full-storm"), "the alarm has begun", 20)
        product = "SEPC Virus Definitions Win32 14.3 RU2"
        assert gup.metric("gup_full_storm", product=product) == 1
        assert storm["severity"] == "warning"
        until(lambda: "15 full packages" in alarms(gup)["full-storm"]["text"], "all are counted")
        text = alarms(gup)["full-storm"]["text"]
        who = re.match(r"3 clients \((.+)\) asked for 15 full packages of ", text)
        assert who, text
        assert sorted(who[1].split(", ")) == ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
        assert "against 1 deltas" in text
        assert "4.5 MB over the LAN, 300 kB over the WAN; as deltas of 2.0 kB on average it would be" in text
        gup.wait_log("a storm of fulls: ")
        gup.wait_log("alarm full-storm: ")
        assert [alarm["name"] for alarm in gup.status()["alarms"]] == ["full-storm"]


def test_alarms_begin_and_end_with_their_causes(tmp_path):
    with ScriptedUpstream() as upstream:
        settings = {"upstream": [{"url": upstream.url, "health_interval": "1s", "connect_timeout": "1s"}]}
        with Gup(tmp_path / "cache", settings={**settings, "fill": {"max": 8}}) as gup:
            until(lambda: gup.status()["upstreams"][0]["state"] == "up", "the upstream is known to be up")
            assert alarms(gup) == {}
            gup.kill_worker(gup.workers()[0])
            gup.rewrite({**settings, "fill": {"max": 0}})
            until(lambda: {"workers-restarting", "reload-failed"} <= alarms(gup).keys(), "both have begun")
            gup.rewrite({**settings, "fill": {"max": 8}})
            until(lambda: "reload-failed" not in alarms(gup), "the settings are right again")
            upstream.stop()
            found = until(lambda: alarms(gup).get("no-upstream"), "nobody answers", 30)
            assert found["severity"] == "critical"
            assert found["what_to_do"].startswith("Look whether the WAN stands")
            assert abs(found["since"] - time.time()) < 60
            assert next(iter(alarms(gup))) == "no-upstream"
            until(lambda: f"alarm no-upstream: {found['text']}" in gup.log, "the log has it")
            assert re.search("alarm reload-failed is over, after [0-9]+ s", gup.log)


def stands_still(gup: Gup) -> int | None:
    """The bytes received ahead, when they do not grow within a while."""

    def received() -> int:
        return int(gup.metric("gup_upstream_received_bytes_total", purpose="prefetch"))

    before, began = received(), time.monotonic()
    while time.monotonic() - began < 0.5:
        if received() != before:
            return None
    return before or None


@pytest.mark.alone
def test_a_clients_miss_is_not_slowed_by_what_is_fetched_ahead(tmp_path, figures):
    ahead, asked, body = full(A), full(B), zip_of("asked", 3_000_000)
    with ScriptedUpstream() as upstream:
        upstream.answer(ahead, Answer(noise("ahead", 60_000_000), etag='"a"'))
        upstream.answer(asked, Answer(body, etag='"b"'))
        with service(tmp_path, upstream, wan={"rate": "1MB/s"}) as gup:
            assert gup.api("/api/v1/prefetch", method="POST", given={"path": ahead})[0] == 202
            received = "gup_upstream_received_bytes_total"
            until(lambda: gup.metric(received, purpose="prefetch") > 500_000, "it is under way")
            began, before = time.monotonic(), gup.metric(received, purpose="prefetch")
            assert gup.get(asked).body == body
            took = time.monotonic() - began
            meanwhile = gup.metric(received, purpose="prefetch") - before
            figures(f"a miss at 1 MB/s: {len(body) / took / 1e6:.2f} MB/s; {meanwhile:.0f} B ahead meanwhile")
            assert len(body) / took >= 0.8 * 1_000_000
            until(
                lambda: gup.metric(received, purpose="prefetch") > before + meanwhile + 200_000, "it goes on"
            )
