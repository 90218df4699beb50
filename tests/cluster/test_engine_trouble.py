"""What clients see while the engine is killed, emptied, paused, slow, or given another password: nothing."""

import contextlib
import itertools
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from cluster.services import PASSWORD, UNLIMITED, running
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
        until(lambda: [texts[-1] for texts in lists(site).values()] == ["b", "a"], "it is in the logs")
        yield site


@contextlib.contextmanager
def asking(site):
    """A client at each node asks for something new all the time: all must come whole, from one fetch."""
    stopping, failures, paths = threading.Event(), [], set()

    def ask(number):
        while not stopping.is_set():
            number += 1
            path = content_path("full.dax", f"{{535CB6A4-441F-4E8A-A897-804D{number:08d}}}")
            site.upstream.answer(path, Answer(BODY, etag='"a"'))
            paths.add(path)
            for node in list(site.nodes.values()):
                answer = fetch(node.data, path)
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


def lists(site):
    """The members that each node had, one after the other."""
    told = {name: re.findall(r"members besides \w: (.*)", node.log) for name, node in site.nodes.items()}
    return {name: [one for one, _ in itertools.groupby(texts)] for name, texts in told.items()}


def is_filled(site):
    """Whether the nodes' rows are in the engine."""
    with site.valkey.client(PASSWORD) as client:
        return len(client.keys("gup:{lyon}:*")) > 0


LONG = [(trouble, 30) for trouble in ("killed", "paused", "password")]


@pytest.mark.parametrize(
    ("trouble", "seconds"), [pytest.param(*row, marks=pytest.mark.long) for row in [("paused", 3), *LONG]]
)
def test_no_client_notices_that_the_engine_is_away(site, trouble, seconds):
    before = lists(site)
    with asking(site) as paths:
        until(lambda: len(paths) > 2, "some requests")
        if trouble == "killed":
            site.valkey.kill()
        elif trouble == "paused":
            site.valkey.send(signal.SIGSTOP)
        else:
            with site.valkey.client(PASSWORD) as client:
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
            with site.valkey.client("another one") as client:
                client.config_set("requirepass", PASSWORD)
        until(lambda: quiet(site), "the alarm ends", 30)
        asked = len(paths)
        until(lambda: len(paths) > asked + 2, "more requests")
    assert site.all_ask_all()
    assert lists(site) == before, "no list has changed"
    assert not any(PASSWORD in node.log or "another one" in node.log for node in site.nodes.values())


def test_no_client_notices_that_the_engine_was_emptied(site):
    before = lists(site)
    with asking(site) as paths:
        with site.valkey.client(PASSWORD) as client:
            client.flushall()
        until(lambda: is_filled(site), "the nodes fill it again", 30)
        asked = len(paths)
        until(lambda: len(paths) > asked + 5, "more requests")
    assert site.all_ask_all()
    assert lists(site) == before


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
