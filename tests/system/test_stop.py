"""Starting wrong and stopping right: drain, second instances, bad settings."""

import os
import signal
import subprocess
import time

import pytest
from harness.clients import RawConnection
from harness.processes import free_port, listens
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.trees import BIG, DELTA, noise, zip_of
from harness.waiting import until

LENGTH = 3_000_000
NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_being_sent_is_finished(tmp_path, number):
    body, gate = zip_of("drain", LENGTH), Gate()
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', gates=((LENGTH // 2, gate),)))
        with (
            Gup(tmp_path / "cache", [upstream.url]) as gup,
            gup.connect() as reader,
            gup.connect() as idle,
        ):
            assert idle.get("/content/none.txt").status == 404
            reader.ask(BIG)
            head = reader.head()
            assert reader.read(LENGTH // 2) == body[: LENGTH // 2]
            gate.wait_reached()
            gup.signal(number)
            until(lambda: not listens(gup.data), "no connection is accepted any more", 5)
            assert idle.ended()
            assert gup.process.poll() is None
            gate.open()
            assert reader.read(LENGTH // 2) == body[LENGTH // 2 :]
            assert head.header("content-length") == str(LENGTH)
            assert gup.wait() == 0
            assert gup.stored("full.zip")
            assert gup.parts() == {}


def test_a_large_body_to_a_slow_client_is_finished(tmp_path):
    body = zip_of("slow", 20_000_000)
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"'))
        with Gup(tmp_path / "cache", [upstream.url]) as gup:
            gup.get(BIG)
            gup.wait_stored("full.zip")
            with RawConnection(gup.data, receive_buffer_bytes=65_536) as reader:
                reader.ask(BIG)
                reader.head()
                assert reader.read(100_000) == body[:100_000]
                gup.signal(signal.SIGTERM)
                until(lambda: not listens(gup.data), "no connection is accepted any more", 5)
                assert reader.read(19_900_000) == body[100_000:]
                assert reader.ended()
            assert gup.wait() == 0


def test_after_drain_timeout_it_ends_and_the_part_is_resumed(tmp_path):
    body, gate = zip_of("part", LENGTH), Gate()
    settings = {"listen": {"drain_timeout": "300ms"}}
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', gates=((LENGTH // 2, gate),)), Answer(body, etag='"a"'))
        with Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup:
            with gup.connect() as reader:
                reader.ask(BIG)
                head = reader.head()
                assert reader.read(LENGTH // 2) == body[: LENGTH // 2]
                gate.wait_reached()
                began = time.monotonic()
                assert gup.stop() == 0
                assert time.monotonic() - began < 5
                assert reader.rest() == b""
                assert reader.was_reset, "a clean end may look like a complete body"
            gate.open()
            assert sum(gup.parts().values()) >= LENGTH // 2
            gup.start()
            again = gup.get(BIG)
            assert (again.body == body, again.etag) == (True, head.etag)
            second = upstream.requests(BIG)[1]
            assert (second.status, second.header("if-range")) == (206, '"a"')


def test_stop_at_rest_is_quick_and_leaves_nothing(tmp_path):
    with ScriptedUpstream() as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        upstream.answer(DELTA, Answer(noise("d", 1000), etag='"d"'))
        with gup.connect() as idle:
            assert idle.get(DELTA).status == 200
            began = time.monotonic()
            assert gup.stop() == 0
            assert time.monotonic() - began < 3
        assert gup.pids == []


def test_a_second_instance_on_one_cache_directory_refuses(tmp_path):
    with (
        Gup(tmp_path / "cache", [NOWHERE]) as gup,
        Gup(tmp_path / "cache", [NOWHERE], start=False) as second,
    ):
        second.folder = tmp_path / "second"
        second.folder.mkdir()
        began = time.monotonic()
        second.launch()
        status = second.wait(15)
        assert status == 1
        assert time.monotonic() - began < 10
        said = [line for line in second.log.splitlines() if str(tmp_path / "cache") in line]
        assert any(str(gup.process.pid) in line for line in said), second.log
        assert gup.get("/content/none.txt").status in (502, 504)


def test_a_second_instance_on_one_port_refuses(tmp_path):
    with Gup(tmp_path / "cache", [NOWHERE]) as gup:
        with Gup(tmp_path / "other", [NOWHERE], start=False) as second:
            at = second.command.index("--listen") + 1
            second.command[at] = f"127.0.0.1:{gup.data[1]}"
            second.launch()
            assert second.wait(15) != 0
            assert str(gup.data[1]) in second.log
        assert gup.get("/content/none.txt").status in (502, 504)


BAD_SETTINGS = {
    "unknown key": ('[cache]\nmax_sise = "1GB"\n', ["cache.max_sise"]),
    "unknown section": ('[cash]\nmax_size = "1GB"\n', ["cash"]),
    "bad size": ('[cache]\nmax_size = "1 lot"\n', ["cache.max_size", "1 lot", "20GB"]),
    "bad duration": ('[cache]\nnegative_ttl = "soon"\n', ["cache.negative_ttl", "soon", "10s"]),
    "bad rate": ('[clients]\nrate = "8MB"\n', ["clients.rate", "8MB", "8MB/s"]),
    "bad port": ("[listen]\nadmin_port = 70000\n", ["listen.admin_port", "70000"]),
    "bad network": ('[clients]\nallow = ["10.0.0.0/99"]\n', ["clients.allow", "10.0.0.0/99"]),
    "bad mode": ('[rules]\nmode = "maybe"\n', ["rules.mode", "maybe", "enforce"]),
    "bad url": ('[[upstream]]\nurl = "manager:8014"\n', ["upstream", "url", "manager:8014"]),
    "no toml": ("[cache\n", ["gup.toml"]),
    "two at once": (
        '[cache]\nmax_size = "x"\n[fill]\nmax = "many"\n',
        ["cache.max_size", "fill.max", "many"],
    ),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_named_and_nothing_starts(tmp_path, name):
    text, named = BAD_SETTINGS[name]
    file = tmp_path / "gup.toml"
    file.write_text(text)
    port = free_port()
    with Gup(tmp_path / "cache", start=False) as gup:
        flags = ["--config", str(file), "--cache-dir", str(tmp_path / "cache"), "--listen"]
        gup.command = [*gup.command[:4], *flags, f"127.0.0.1:{port}"]
        if name != "bad url":
            gup.command += ["--upstream", NOWHERE]
        gup.launch()
        assert gup.wait(15) == 2
        for word in named:
            assert word in gup.log, gup.log
        assert "Traceback" not in gup.log
        assert not (tmp_path / "cache").exists()
        assert not listens(("127.0.0.1", port))


def test_a_bad_environment_is_named(tmp_path):
    with Gup(tmp_path / "cache", [NOWHERE], env={"GUP_CACHE__MAX_SIZE": "much"}, start=False) as gup:
        gup.launch()
        assert gup.wait(15) == 2
        assert "much" in gup.log
        assert "max_size" in gup.log.lower()


def test_no_upstream_is_refused(tmp_path):
    with Gup(tmp_path / "cache", start=False) as gup:
        gup.launch()
        assert gup.wait(15) == 2
        assert "upstream" in gup.log


def test_a_cache_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "cache").write_text("mine")
    with Gup(tmp_path / "cache", [NOWHERE], start=False) as gup:
        gup.launch()
        assert gup.wait(15) in (1, 2)
        assert str(tmp_path / "cache") in gup.log
        assert "Traceback" not in gup.log
    assert (tmp_path / "cache").read_text() == "mine"


def test_a_reload_takes_new_settings_and_keeps_the_old_when_they_are_bad(tmp_path):
    with ScriptedUpstream() as upstream:
        settings = {"cache": {"max_size": "50MB"}, "upstream": [{"url": upstream.url}]}
        with Gup(tmp_path / "cache", settings=settings) as gup:
            file = gup.folder / "gup.toml"
            good = file.read_text()
            workers = gup.workers()
            file.write_text(good.replace("50MB", "60MB"))
            gup.signal(signal.SIGHUP)
            gup.wait_metric(60_000_000, "gup_cache_limit_bytes")
            file.write_text(good.replace("50MB", "60 sheep"))
            gup.signal(signal.SIGHUP)
            gup.wait_metric(0, "gup_config_last_reload_successful")
            gup.wait_log("60 sheep")
            assert gup.metric("gup_cache_limit_bytes") == 60_000_000
            assert gup.get("/content/none.txt").status == 404
            assert gup.workers() == workers


def test_help_and_version_start_nothing():
    for flag in ("--help", "--version"):
        done = subprocess.run(
            [*Gup.PROGRAM, flag], capture_output=True, timeout=20, check=False, env={**os.environ}
        )
        assert done.returncode == 0
        assert done.stdout


def test_a_request_that_still_waits_for_its_head_is_answered(tmp_path):
    gate = Gate()
    with ScriptedUpstream() as upstream:
        upstream.answer(DELTA, Answer(noise("d", 50_000), etag='"d"', head_gate=gate))
        with Gup(tmp_path / "cache", [upstream.url]) as gup, gup.connect() as client:
            client.ask(DELTA)
            gate.wait_reached()
            gup.signal(signal.SIGTERM)
            until(lambda: not listens(gup.data), "no connection is accepted any more", 5)
            gate.open()
            response = client.response()
            assert (response.status, response.body) == (200, noise("d", 50_000))
            assert response.header("connection") == "close"
            assert client.ended()
            assert gup.wait() == 0
            assert gup.stored(DELTA.rpartition("/")[2])


def test_a_fill_that_nobody_waits_for_does_not_hold_the_stop(tmp_path):
    """All clients left: the part is kept, and what was fetched is not fetched again."""
    body, gate, point = zip_of("left", LENGTH), Gate(), LENGTH // 2
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"', gates=((point, gate),)), Answer(body, etag='"a"'))
        with Gup(tmp_path / "cache", [upstream.url]) as gup:
            with gup.connect() as client:
                client.ask(BIG)
                client.head()
                gate.wait_reached()
                # it closes with bytes unread: that is a reset, and needs no further byte to be noticed
                assert client.read(1000) == body[:1000]
            gup.wait_metric(0, "gup_client_connections")
            began = time.monotonic()
            assert gup.stop() == 0
            assert time.monotonic() - began < 10
            gate.open()
            gup.start()
            assert gup.get(BIG).body == body
            assert upstream.requests(BIG)[1].status == 206


@pytest.mark.parametrize(
    "answer",
    [
        Answer(noise("d", 5000), etag='"d"'),
        Answer(noise("d", 300_000), etag='"d"', piece_seconds=0.001),
        Answer(noise("d", 2_500_000), etag='"d"'),
        Answer(noise("d", 1_500_000), chunked=True),
    ],
    ids=["small", "in pieces", "large", "of unknown length"],
)
def test_what_a_client_has_whole_is_there_after_a_stop(tmp_path, answer):
    """SIGTERM comes with the client's last byte: the worker ends after its commit."""
    with ScriptedUpstream() as upstream:
        upstream.answer(DELTA, answer)
        with Gup(tmp_path / "cache", [upstream.url]) as gup:
            with gup.connect() as client:
                client.ask(DELTA)
                assert client.response().body == answer.body
                gup.signal(signal.SIGTERM)
            assert gup.wait() == 0
            assert gup.parts() == {}
            upstream.answer(DELTA, Answer(b"", 503))
            gup.start()
            response = gup.get(DELTA)
            assert (response.status, response.body == answer.body) == (200, True)
            assert response.header("cache-status").endswith("; hit")
            assert len(upstream.requests(DELTA)) == 1
