"""What clients see while the engine is killed, emptied, paused, slow, or given another password: nothing."""

import contextlib
import os
import signal
import threading
import time

import pytest
from cluster.services import PASSWORD, running
from cluster.test_one_fetch import UNLIMITED
from harness.clients import fetch
from harness.content import content_path, noise
from harness.processes import until
from harness.upstreams import Answer

BODY = noise("engine", 200_000)


@pytest.fixture
def site(tmp_path):
    with running(tmp_path) as site:
        for name in ("a", "b"):
            site.start(name, settings=UNLIMITED)
        until(site.all_ask_all, "all ask all", 30)
        yield site


@contextlib.contextmanager
def asking(site):
    """A client at each node asks for something new all the time; all of it must come whole, from one fetch."""
    stopping, failures, paths, slowest = threading.Event(), [], set(), [0.0]

    def ask(number):
        while not stopping.is_set():
            number += 1
            path = content_path("full.dax", f"{{535CB6A4-441F-4E8A-A897-804D{number:08d}}}")
            site.upstream.answer(path, Answer(BODY, etag='"a"'))
            paths.add(path)
            for node in list(site.nodes.values()):
                began = time.monotonic()
                answer = fetch(node.data, path)
                slowest[0] = max(slowest[0], time.monotonic() - began)
                if answer.status != 200 or answer.body != BODY:
                    failures.append((path, answer.status))

    threads = [threading.Thread(target=ask, args=(1_000_000 * first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield paths
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert {path: len(site.upstream.requests(path)) for path in paths} == dict.fromkeys(paths, 1)


def alarmed(site, name="engine-away"):
    return all(node.alarms(name) for node in site.nodes.values())


def quiet(site, name="engine-away"):
    return not any(node.alarms(name) for node in site.nodes.values())


def beats(site):
    """How often each node was heard by the engine: its rows there."""
    with site.valkey.client() as client:
        client.auth(PASSWORD)
        return len(client.keys("gup:{lyon}:*")) > 0


@pytest.mark.parametrize("seconds", [4, pytest.param(30, marks=pytest.mark.long)])
@pytest.mark.parametrize("trouble", ["killed", "paused", "password"])
def test_no_client_notices_that_the_engine_is_away(site, trouble, seconds):
    before = {name: node.log.count("members besides") for name, node in site.nodes.items()}
    with asking(site) as paths:
        until(lambda: len(paths) > 2, "some requests")
        if trouble == "killed":
            site.valkey.kill()
        elif trouble == "paused":
            site.valkey.send(signal.SIGSTOP)
        else:
            with site.valkey.client() as client:
                client.auth(PASSWORD)
                client.config_set("requirepass", "another one")
                for id_ in [row["id"] for row in client.client_list(_type="normal")]:
                    if id_ != str(client.client_id()):
                        client.client_kill_filter(_id=id_)
        asked = len(paths)
        until(lambda: alarmed(site), "an alarm of each node", 30)
        began = time.monotonic()
        until(lambda: time.monotonic() - began >= seconds and len(paths) > asked + 2, "more requests", 60)
        if trouble == "killed":
            site.valkey.start()
            with site.valkey.client() as client:
                client.config_set("requirepass", PASSWORD)
        elif trouble == "paused":
            site.valkey.send(signal.SIGCONT)
        else:
            with site.valkey.client() as client:
                client.auth("another one")
                client.config_set("requirepass", PASSWORD)
        until(lambda: quiet(site), "the alarm ends", 30)
        asked = len(paths)
        until(lambda: len(paths) > asked + 2, "more requests")
    assert site.all_ask_all()
    after = {name: node.log.count("members besides") for name, node in site.nodes.items()}
    assert after == before, "no list has changed"
    assert not any(PASSWORD in node.log or "another one" in node.log for node in site.nodes.values())


def test_no_client_notices_that_the_engine_was_emptied(site):
    before = {name: node.log.count("members besides") for name, node in site.nodes.items()}
    with asking(site) as paths:
        with site.valkey.client() as client:
            client.auth(PASSWORD)
            client.flushall()
        until(lambda: beats(site), "the nodes fill it again", 30)
        asked = len(paths)
        until(lambda: len(paths) > asked + 5, "more requests")
    assert site.all_ask_all()
    assert {name: node.log.count("members besides") for name, node in site.nodes.items()} == before


def test_workers_have_no_connection_to_the_engine(site):
    for node in site.nodes.values():
        for pid in node.workers():
            targets = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            assert not targets & connections_to(site.valkey.port)


def connections_to(port):
    """The sockets, as links of /proc name them, of connections to this port."""
    with open("/proc/net/tcp", encoding="ascii") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return {f"socket:[{row[9]}]" for row in rows if row[2].endswith(f":{port:04X}")}
