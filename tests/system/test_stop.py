"""Starting on odd machines, and stopping right: drains, parts that are resumed."""

import os
import signal
import time
from email.utils import formatdate

import pytest
from harness.clients import address_of
from harness.commands import command
from harness.content import BIG, CONTENT_INFO, DELTA, INDEX, noise, zip_of
from harness.processes import free_port, listens, quiet_clock, until
from harness.service import READY, REPOSITORY, toml
from harness.upstreams import Answer, Elsewhere, Gate

LENGTH = 3_000_000
HALF = LENGTH // 2
BODY = zip_of("stop", LENGTH)

REFUSING = """
import resource


def refused(*_):
    raise PermissionError(1, "Operation not permitted")


resource.getrlimit = lambda _: (1000, 2000)  # a soft limit below the hard one: it would be raised
resource.setrlimit = refused
"""
"""A `sitecustomize` that refuses setrlimit as a sandbox does, or a hard limit above `fs.nr_open`."""


def halfway(gate: Gate) -> Answer:
    return Answer(BODY, etag='"a"', gates=((HALF, gate),))


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
    gup.signal(signal.SIGTERM)
    until(lambda: not listens(gup.data), "no connection is accepted any more")
    assert gup.process.poll() is None
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


@pytest.mark.parametrize("waited_for", [True, False])
def test_it_ends_with_a_fill_under_way_and_the_part_is_resumed(serve, waited_for):
    """After drain_timeout where a client reads on, at once where all have left."""
    gate, listen = Gate(), {"drain_timeout": "300ms" if waited_for else "30s"}
    gup, upstream = serve({BIG: (halfway(gate), BODY), DELTA: b"delta"}, listen=listen)
    idle = gup.connect()
    assert idle.get(DELTA).status == 200
    reader, head = gup.begin(BIG, HALF if waited_for else 1000)
    gate.wait_reached()
    if not waited_for:
        reader.close()  # with bytes unread: that is a reset, and needs no further byte to be noticed
        gup.wait_metric(1, "gup_client_connections")
    began = quiet_clock()
    assert gup.stop() == 0
    assert quiet_clock() - began < 10
    assert gup.pids == []
    if waited_for:
        assert reader.rest() == b""
        assert reader.was_reset, "a clean end may look like a complete body"
    gate.open()
    assert sum(gup.parts().values()) >= HALF
    gup.start()
    assert gup.serves(BIG, BODY).etag == head.etag
    second = upstream.requests(BIG)[1]
    assert (second.status, second.header("if-range")) == (206, '"a"')


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


def test_where_the_limit_of_open_files_cannot_be_raised_every_process_lives(serve, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(REFUSING)
    env = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPOSITORY)))}
    gup, _ = serve({BIG: BODY}, env=env)
    gup.serves(BIG, BODY)
    assert gup.metric("gup_worker_restarts_total") == 0
    assert gup.log.count("the limit of open files stays at 1000: setrlimit:") == 1


def test_what_cannot_work_is_told_at_the_start_and_by_the_check(serve, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "holiday.jpg").touch()
    yesterday = formatdate(time.time() - 86_400, usegmt=True)
    catalogue = Answer(CONTENT_INFO, fields=(("Date", yesterday),))
    cache = {"directory": str(tmp_path / "cache"), "min_free": "900TB"}
    gup, _ = serve({INDEX: catalogue}, workers=1, each={"health_interval": "1s"}, cache=cache)
    at_once = ("900TB, and the file system of", "not gup's (holiday.jpg)")
    assert [words for words in at_once if words not in gup.log] == []
    gup.wait_log("clock is 1 d ahead of that of u0:")
    checked = command("config", "check", gup.folder / "gup.toml")
    assert checked.returncode == 0
    assert [words for words in at_once if words not in checked.stderr] == []


def test_an_upstream_that_nobody_can_reach_is_told_at_the_start(serve):
    gup, _ = serve(before=Elsewhere(free_port()), workers=1, catalog={"refresh": "1h"})
    gup.wait_log("alarm no-upstream: no upstream answers")


def test_a_reload_tells_what_is_in_force_and_what_waits_for_a_restart(serve):
    gup, _ = serve(workers=1, cache={"max_size": "50MB"})
    changed = {"cache": {"max_size": "60MB"}, "site": {"name": "elsewhere"}, "listen": {"backlog": 7}}
    (gup.folder / "gup.toml").write_text(toml(changed))
    url, token = "http://{}:{}".format(*gup.admin), gup.cache_dir / "run" / "admin-token"
    told = command("reload", "--admin", url, "--token-file", token)
    assert told.returncode == 3, told
    assert told.stdout.splitlines() == [
        "in force now: cache.max_size",
        "restart the service for: listen.backlog, site.name",
    ]
    via = gup.get("/content/none.txt").header("via")
    assert "elsewhere" not in f"{via} {gup.status()['site']}", "one name until the restart"


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(300)
def test_any_number_of_workers_serves(serve):
    """45 of them filled the shared page of an earlier release, and the next died at each start."""
    gup, upstream = serve({BIG: BODY}, workers=64, start=False)
    gup.launch()
    found = until(lambda: READY.search(gup.log), "gup's ready line", 240)
    assert found[3] == "64"
    gup.data, gup.admin = address_of(found[1]), address_of(found[2])
    assert len(gup.workers()) == 64
    assert {gup.get(BIG).body for _ in range(4 * 64)} == {BODY}
    assert gup.metric("gup_worker_restarts_total") == 0
    assert len(upstream.requests(BIG)) == 1
