"""Starting wrong and stopping right: drain, second instances, bad settings."""

import signal
import time

from harness.commands import command
from harness.content import BIG, DELTA, noise, zip_of
from harness.processes import listens, until
from harness.service import Gup, toml
from harness.upstreams import Answer, Gate

LENGTH = 3_000_000
HALF = LENGTH // 2
BODY = zip_of("stop", LENGTH)
NOWHERE = "http://127.0.0.1:9"


def halfway(gate: Gate) -> Answer:
    return Answer(BODY, etag='"a"', gates=((HALF, gate),))


def drains(gup: Gup, number: signal.Signals = signal.SIGTERM) -> None:
    gup.signal(number)
    until(lambda: not listens(gup.data), "no connection is accepted any more")
    assert gup.process.poll() is None


def test_what_is_being_sent_is_finished(serve):
    """To a fast client of a fill, to one that still waits for its head, to a slow one of a stored body."""
    gate, head_gate, stored = Gate(), Gate(), zip_of("slow", 20_000_000)
    late = Answer(noise("d", 50_000), etag='"d"', head_gate=head_gate)
    other = BIG.replace("260801001", "260802001")
    gup, _ = serve({BIG: halfway(gate), DELTA: late, other: stored})
    gup.serves(other, stored)
    gup.wait_stored(other)
    slow, idle, waiting = gup.connect(receive_buffer_bytes=65_536), gup.connect(), gup.connect()
    slowly = slow.begin(other, 100_000)
    assert idle.get("/content/none.txt").status == 404
    reader, response = gup.begin(BIG, HALF)
    waiting.ask(DELTA)
    head_gate.wait_reached()
    drains(gup)
    assert idle.ended()
    gate.open()
    head_gate.open()
    assert reader.finish(response).body == BODY
    answer = waiting.response()
    assert (answer.status, answer.body, answer.header("connection")) == (200, noise("d", 50_000), "close")
    assert waiting.ended()
    assert slow.finish(slowly).body == stored
    assert slow.ended()
    assert gup.wait() == 0
    assert gup.stored(DELTA)
    assert len([key for key in gup.bodies() if key.endswith("full.zip")]) == 2
    assert gup.parts() == {}


def test_after_drain_timeout_it_ends_and_the_part_is_resumed(serve):
    gate = Gate()
    gup, upstream = serve({BIG: (halfway(gate), BODY)}, listen={"drain_timeout": "300ms"})
    reader, head = gup.begin(BIG, HALF)
    gate.wait_reached()
    began = time.monotonic()
    assert gup.stop() == 0
    assert time.monotonic() - began < 10
    assert reader.rest() == b""
    assert reader.was_reset, "a clean end may look like a complete body"
    gate.open()
    assert sum(gup.parts().values()) >= HALF
    gup.start()
    assert gup.serves(BIG, BODY).etag == head.etag
    second = upstream.requests(BIG)[1]
    assert (second.status, second.header("if-range")) == (206, '"a"')


def test_stop_at_rest_is_quick_and_a_fill_that_nobody_waits_for_does_not_hold_it(serve):
    """All clients left: the part is kept, and what was fetched is not fetched again."""
    gate = Gate()
    gup, upstream = serve({BIG: (halfway(gate), BODY), DELTA: b"delta"})
    idle = gup.connect()
    assert idle.get(DELTA).status == 200
    client, _ = gup.begin(BIG, 1000)
    gate.wait_reached()
    client.close()  # with bytes unread: that is a reset, and needs no further byte to be noticed
    gup.wait_metric(1, "gup_client_connections")
    began = time.monotonic()
    assert gup.stop() == 0
    assert time.monotonic() - began < 10
    assert gup.pids == []
    gate.open()
    gup.start()
    gup.serves(BIG, BODY)
    assert upstream.requests(BIG)[1].status == 206


def test_what_a_client_has_whole_is_there_after_a_stop(serve):
    """The signal comes with the client's last byte: the worker ends after its commit."""
    body = noise("d", 300_000)
    gup, upstream = serve({DELTA: Answer(body, etag='"d"', piece_seconds=0.001)}, workers=1)
    client, response = gup.begin(DELTA)
    assert client.finish(response).body == body
    gup.signal(signal.SIGINT)
    assert gup.wait() == 0
    assert gup.parts() == {}
    upstream.answer(DELTA, Answer(b"", 503))
    gup.start()
    assert gup.serves(DELTA, body).header("cache-status").endswith("; hit")
    assert len(upstream.requests(DELTA)) == 1


def test_wrong_settings_are_named_and_nothing_starts(tmp_path):
    with Gup(tmp_path / "cache", [NOWHERE], settings={"cache": {}}, start=False) as gup:
        (gup.folder / "gup.toml").write_text('[cache]\nmax_size = "x"\n[fill]\nmax = "many"\n')
        gup.launch()
        assert gup.wait(15) == 2
        assert [word for word in ("cache.max_size", "fill.max", "many") if word not in gup.log] == [], gup.log
        assert not (tmp_path / "cache").exists()


def test_a_reload_takes_new_settings_and_keeps_the_old_when_they_are_bad(serve):
    gup, _ = serve(workers=1, cache={"max_size": "50MB"})
    workers = gup.workers()
    gup.rewrite({"cache": {"max_size": "60MB"}})
    gup.wait_metric(60_000_000, "gup_cache_limit_bytes")
    gup.rewrite({"cache": {"max_size": "60 sheep"}})
    gup.wait_metric(0, "gup_config_last_reload_successful")
    gup.wait_log("60 sheep")
    assert gup.metric("gup_cache_limit_bytes") == 60_000_000
    assert gup.get("/content/none.txt").status == 404
    assert gup.workers() == workers


def test_a_reload_tells_what_is_in_force_and_what_waits_for_a_restart(serve):
    gup, _ = serve(workers=1, cache={"max_size": "50MB"})
    changed = {"cache": {"max_size": "60MB"}, "site": {"name": "elsewhere"}, "listen": {"backlog": 7}}
    (gup.folder / "gup.toml").write_text(toml(changed))
    url, token = "http://{}:{}".format(*gup.admin), gup.cache_dir / "run" / "admin-token"
    told = command("reload", "--admin", url, "--token-file", token)
    assert told.returncode == 3, told
    assert told.stdout.splitlines() == [
        "in force now: cache.max_size",
        "waiting for a restart of the service: listen.backlog, site.name",
    ]
    via = gup.get("/content/none.txt").header("via")
    assert "elsewhere" not in f"{via} {gup.status()['site']}", "one name until the restart"
