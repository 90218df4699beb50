"""The harness proved without gup: upstreams count right, clients see right, gates hold."""

import os
import re
from pathlib import Path

import pytest
from harness.clients import End, RawConnection, Swarm, fetch
from harness.content import noise
from harness.processes import command_line, open_files, until
from harness.service import Gup
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


def seen_in_proc(gup: Gup) -> list[tuple[object, ...]]:
    """What tells its processes apart from outside, without numbers and names that differ at each start."""
    found = []
    for pid in gup.pids:
        text = Path(f"/proc/{pid}/status").read_text()
        status = re.findall(r"^((?:Umask|SigBlk|SigIgn|SigCgt|Seccomp):.*)", text, re.MULTILINE)
        kinds = ("socket:", "pipe:", "anon_inode:", "/memfd:", "/dev/")  # others come and go
        files = {re.sub(r"\d+", "", file) for file in open_files(pid) if file.startswith(kinds)}
        command = [word for word in command_line(pid) if word and not re.search(r"\d", word)]
        found.append(
            (command, status, files, os.getpgid(pid) == pid, Path(f"/proc/{pid}/cwd").readlink().name)
        )
    return [found[0], *sorted(found[1:], key=str)]


def ready(gup):
    return sum(row["ready"] for row in gup.status()["workers"])


@pytest.mark.long
def test_a_service_off_the_template_is_one_that_an_interpreter_was_started_for(tmp_path, monkeypatch):
    seen, messages = [], []
    for starts in ("template", "python"):
        monkeypatch.setenv("GUP_TEST_STARTS", starts)
        with Gup(tmp_path / starts / "cache", ["http://127.0.0.1:9"]) as gup:
            gup.wait_log("read 0 bodies")
            seen.append(seen_in_proc(gup))
            gup.kill_worker(gup.workers()[0])
            gup.wait_metric(1, "gup_worker_restarts_total")
            until(lambda: ready(gup) == 2, "it is replaced")
            assert gup.stop() == 0
            messages.append(re.findall(r"gup.process.supervisor.*?: (\w+ \w*)", gup.log))
    assert seen[0] == seen[1]
    assert sorted(messages[0]) == sorted(messages[1])
