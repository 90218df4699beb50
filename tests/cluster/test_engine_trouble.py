"""What clients see while the engine is killed, emptied, paused, slow, or given another password: nothing.

Nor when its clock jumps, with TLS, and when a replica takes over.
"""

import contextlib
import subprocess
import time
from pathlib import Path

import pytest
from cluster.engines import redis_with_tls, replicated
from cluster.nodes import Valkey
from cluster.relay import Relay
from cluster.services import PASSWORD, UNLIMITED, loaded, running
from harness.needs import program
from harness.processes import until
from harness.upstreams import Authority

NODES = ("a", "b")


def start(site, **how):
    for name in NODES:
        site.start(name, settings=UNLIMITED, **how)
    until(site.all_ask_all, "all ask all", 30)
    until(lambda: [texts[-1] for texts in site.lists().values()] == ["b", "a"], "it is in the logs")


@pytest.fixture
def site(tmp_path):
    with running(tmp_path) as site:
        start(site)
        yield site


def is_filled(site):
    """Whether the nodes' rows are in the engine."""
    with site.valkey.client(PASSWORD) as client:
        return len(client.keys("gup:{lyon}:*")) > 0


# --- it is away: each trouble until it is over


@contextlib.contextmanager
def killed(site):
    site.valkey.kill()
    yield
    site.valkey.start()


@contextlib.contextmanager
def paused(site):
    with site.valkey.paused():
        yield


@contextlib.contextmanager
def other_password(site):
    with site.valkey.client(PASSWORD) as client:
        client.config_set("requirepass", "another one")
        for id_ in [row["id"] for row in client.client_list(_type="normal")]:
            if id_ != str(client.client_id()):
                client.client_kill_filter(_id=id_)
    yield
    with site.valkey.client("another one") as client:
        client.config_set("requirepass", PASSWORD)


def while_it_is_away(site, trouble, seconds):
    """Clients see nothing of it, an alarm tells it at each node, and then all is as before."""
    before = site.lists()
    with loaded(site) as load:
        with trouble:
            until(site.alarmed, "an alarm of each node", 30)
            began = time.monotonic()
            load.more()
            until(lambda: time.monotonic() - began >= seconds, "the trouble lasts", 60)
            load.more()
        until(site.quiet, "the alarm ends", 30)
        until(lambda: all(site.seen_by(name)["engine_error"] is None for name in NODES), "all beat again")
    assert site.all_ask_all()
    assert site.lists() == before, "no list has changed"
    assert not any(PASSWORD in node.log or "another one" in node.log for node in site.nodes.values())


@pytest.mark.long
@pytest.mark.parametrize(
    ("trouble", "seconds"), [(paused, 3), (killed, 30), (paused, 30), (other_password, 30)]
)
def test_no_client_notices_that_the_engine_is_away(site, trouble, seconds):
    while_it_is_away(site, trouble(site), seconds)


@pytest.mark.long
@pytest.mark.parametrize("delay_seconds", [0.2, 2.0])
def test_no_client_notices_that_the_engine_is_slow(tmp_path, delay_seconds):
    @contextlib.contextmanager
    def slow(relay):
        relay.delay_seconds = delay_seconds
        yield
        relay.delay_seconds = 0.0

    with running(tmp_path) as site, Relay(site.valkey.port) as relay:
        start(site, url=f"redis://127.0.0.1:{relay.port}")
        while_it_is_away(site, slow(relay), 10)


# --- it is there, and not as before


def test_no_client_notices_that_the_engine_was_emptied(site):
    before = site.lists()
    with loaded(site) as load:
        with site.valkey.client(PASSWORD) as client:
            client.flushall()
        until(lambda: is_filled(site), "the nodes fill it again", 30)
        load.more()
    assert site.all_ask_all()
    assert site.lists() == before


@pytest.mark.long
@pytest.mark.needs("faketime")
def test_no_client_notices_that_the_engine_s_clock_jumps(tmp_path):
    """An hour and more, back and forth; a node that is killed meanwhile is forgotten all the same."""
    offset = tmp_path / "offset"
    offset.write_text("+0")
    command = [program("faketime"), "-m", "-f", "+0", "printenv", "LD_PRELOAD"]
    env = {
        "LD_PRELOAD": subprocess.check_output(command, text=True).strip(),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    valkey = Valkey(tmp_path / "valkey", password=PASSWORD, env=env)
    with running(tmp_path, valkey) as site:
        start(site)
        before = site.lists()

        def jump(text):
            told = {name: node.log.count("clock jumped") for name, node in site.nodes.items()}
            offset.write_text(text)
            for name, node in site.nodes.items():
                until(lambda name=name, node=node: node.log.count("clock jumped") > told[name], "it is seen")

        with loaded(site) as load:
            for number, text in enumerate(("-3600", "-7200", "+3600", "-1800", "+7200", "+1800")):
                jump(text)
                load.more(200 if number % 2 else 10)  # also within the time in which it is not used yet
                assert site.quiet()
        assert site.lists() == before
        assert site.all_ask_all()
        lost = site.nodes.pop("b")
        lost.kill()
        until(lambda: not site.seen_by("a")["members"][1:], "the list is right", 30)
        site.nodes["b"] = lost
        lost.start()
        until(site.all_ask_all, "all ask all", 30)


@pytest.mark.long
@pytest.mark.needs("redis")
def test_with_tls_it_is_an_engine_like_any_other(tmp_path):
    """Redis. And one with a certificate of somebody else is told, and not used."""
    authority, other = Authority(tmp_path / "tls"), Authority(tmp_path / "other", "another one")
    redis = redis_with_tls(tmp_path / "redis", authority, PASSWORD)
    with running(tmp_path, redis) as site:
        how = {"url": f"rediss://127.0.0.1:{redis.port}", "settings": UNLIMITED}
        for name in NODES:
            site.start(name, ca_file=str(authority.ca), **how)
        until(site.all_ask_all, "all ask all", 30)
        with loaded(site):
            redis.kill()
            redis.start()
        until(lambda: all(site.seen_by(name)["engine_error"] is None for name in NODES), "all beat again", 30)
        astray = site.start("c", ca_file=str(other.ca), **how)
        until(lambda: astray.alarms("engine-away"), "an alarm", 30)
        assert "certificate verify failed" in astray.alarms("engine-away")[0]["text"]
        assert PASSWORD not in astray.log


@pytest.mark.long
def test_no_client_notices_that_a_replica_takes_over(tmp_path):
    """The primary is killed; comes back as a replica; and is made the primary again by hand."""
    with replicated(tmp_path / "engines", PASSWORD) as engines, running(tmp_path, engines.first) as site:
        start(site, **engines.settings)
        before = site.lists()

        def followed(one):
            until(lambda: engines.primary is one, "it is the primary", 60)

            def rows():
                with one.client(PASSWORD) as client:
                    return client.zcard("gup:{lyon}:members") == len(NODES)

            until(rows, "all beat there", 60)

        with loaded(site) as load:
            engines.first.kill()
            followed(engines.second)
            load.more()
            engines.first.start()
            until(engines.is_whole, "the first is a replica", 60)
            with engines.sentinel.client() as client:
                client.sentinel_failover("gup")
            followed(engines.first)
        until(site.quiet, "no alarm", 30)
        assert site.all_ask_all()
        assert site.lists() == before


def test_workers_have_no_connection_to_the_engine(site):
    for node in site.nodes.values():
        for pid in node.workers():
            targets = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
            assert targets
            assert not targets & connections_to(site.valkey.port)


def connections_to(port):
    """The sockets, as links of /proc name them, of connections to this port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {f"socket:[{row[9]}]" for row in rows if row[2].endswith(f":{port:04X}")}
