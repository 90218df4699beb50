"""Nodes of a cluster as real services with two workers each; with a real engine, and an upstream in here."""

import itertools
import json
import random
import re
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager

from cluster.nodes import Valkey
from harness.clients import fetch
from harness.content import content_path, noise
from harness.processes import free_port, until
from harness.service import REPOSITORY, Gup
from harness.upstreams import Answer, ScriptedUpstream

from gup.cluster.ownership import ranked
from gup.content.key import Variant
from gup.content.routes import Routes

PASSWORD = "the-engines-password"
UNLIMITED = {"wan": {"rate": "0"}, "fill": {"range_wait": "100s"}}
"""Settings of nodes that fetch as fast as they can, and wait for ranges rather than fetch them alone."""


@contextmanager
def running(folder, valkey=None):
    """A site without nodes, to be started by the test; with this engine, or one without TLS."""
    if valkey is None:
        valkey = Valkey(folder / "valkey", password=PASSWORD)
    try:
        with ScriptedUpstream() as upstream, ExitStack() as stack:
            yield Site(folder, valkey, upstream, stack)
    finally:
        valkey.kill()


class Site:
    def __init__(self, folder, valkey, upstream, stack):
        (folder / "secret").write_text("a-secret-of-the-site\n")
        (folder / "password").write_text(PASSWORD + "\n")
        self.folder, self.valkey, self.upstream, self.stack = folder, valkey, upstream, stack
        self.nodes = {}

    def start(self, name, *, settings=None, called=None, env=None, urls=None, workers=2, **changes):
        """A node called `name`; `settings` beside the cluster's, and `changes` of those.

        It is known here as `called`, where two have one name. `urls` are its upstreams.
        """
        port = free_port()
        cluster = {
            "url": f"redis://127.0.0.1:{self.valkey.port}",
            "password_file": str(self.folder / "password"),
            "site": "lyon",
            "node": name,
            "address": f"http://127.0.0.1:{port}",
            "listen": f"127.0.0.1:{port}",
            "secret_file": str(self.folder / "secret"),
            "member_timeout": "2s",
            **changes,
        }
        settings = {
            "wan": {"rate": "1MB/s"},
            "catalog": {"refresh": "0s"},
            **(settings or {}),
            "cluster": cluster,
        }
        made = Gup(
            self.folder / (called or name),
            [self.upstream.url] if urls is None else urls,
            settings=settings,
            env=env,
            workers=workers,
        )
        self.nodes[called or name] = self.stack.enter_context(made)
        return made

    def seen_by(self, name):
        """What this node's API says of the cluster."""
        with urllib.request.urlopen(f"{self.nodes[name].admin_url}/api/v1/cluster", timeout=10) as answer:
            return json.load(answer)

    def page_of(self, name):
        """Its page's HTML."""
        with urllib.request.urlopen(self.nodes[name].admin_url + "/", timeout=10) as answer:
            return answer.read().decode()

    def asked_by(self, name):
        members = self.seen_by(name)["members"]
        return {member["name"] for member in members if member["askable"]} - {name}

    def lists(self):
        """The members that each node had besides itself, one list after the other."""
        told = {name: re.findall(r"members besides \w: (.*)", node.log) for name, node in self.nodes.items()}
        return {name: [one for one, _ in itertools.groupby(texts)] for name, texts in told.items()}

    def alarmed(self, name="engine-away"):
        return all(node.alarms(name) for node in self.nodes.values())

    def quiet(self, name="engine-away"):
        return not any(node.alarms(name) for node in self.nodes.values())

    def all_ask_all(self):
        names = set(self.nodes)
        return all(self.asked_by(name) == names - {name} for name in names)


def order(path, names=("a", "b", "c")):
    """The nodes as the key of `path` ranks them."""
    return ranked(Routes().route(path).key(Variant()).text, names)


def owned_by(name, count, size, *, names=("a", "b", "c")):
    """So many bodies by path that this node fetches."""
    found, number = {}, 0
    while len(found) < count:
        path = content_path("full.dax", f"{{535CB6A4-441F-4E8A-A897-804C{number:08d}}}")
        number += 1
        if order(path, names)[0] == name:
            found[path] = random.Random(path).randbytes(size)
    return found


def other_clock(folder, seconds):
    """What an interpreter has in its environment for a wall clock that is so many seconds ahead.

    Under libfaketime Python's time.sleep() fails, so that each interpreter shifts its own.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import time\n"
        "seconds, ns = time.time, time.time_ns\n"
        f"time.time = lambda: seconds() + {seconds}\n"
        f"time.time_ns = lambda: ns() + {seconds} * 10**9\n"
    )
    return {"PYTHONPATH": f"{folder}:{REPOSITORY}"}


class Load:
    """Clients that ask every node for one new file after the other, until `stop`; each answer is compared."""

    BODY = noise("load", 200_000)

    def __init__(self, site, clients=2):
        self._site, self._stopping = site, threading.Event()
        self.paths, self.failures, self.seconds = [], [], []
        """`paths` were asked for at all nodes; `seconds` is how long each answer took."""
        self._threads = [
            threading.Thread(target=self._ask, args=(1_000_000 * first,)) for first in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, number):
        while not self._stopping.is_set():
            number += 1
            path = content_path("full.dax", f"{{535CB6A4-441F-4E8A-A897-804D{number:08d}}}")
            self._site.upstream.answer(path, Answer(self.BODY, etag='"a"'))
            for name, node in list(self._site.nodes.items()):
                began = time.monotonic()
                try:
                    answer = fetch(node.data, path)
                    if (answer.status, answer.body) != (200, self.BODY):
                        self.failures.append((name, path, answer.status, answer.fields))
                except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure
                    self.failures.append((name, path, repr(error)))
                self.seconds.append(time.monotonic() - began)
            self.paths.append(path)

    def more(self, count=3, timeout_seconds=60):
        """Until so many more files were asked for at all nodes."""
        goal = len(self.paths) + count
        until(lambda: len(self.paths) >= goal or self.failures, "more requests", timeout_seconds)

    def stop(self):
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def fetches(self):
        """How often upstream was asked for each file."""
        return [len(self._site.upstream.requests(path)) for path in self.paths]


@contextmanager
def loaded(site, *, most=1, **how):
    """Load meanwhile: every answer is whole, and no file crosses the WAN more often than `most`."""
    load = Load(site, **how)
    try:
        load.more()
        yield load
        load.more()
    finally:
        load.stop()
    fetches = load.fetches()
    print(  # noqa: T201 - the figures
        f"{len(load.seconds)} answers, the slowest after {max(load.seconds):.2f} s; "
        f"{len(load.paths)} files, {sum(fetches) / len(fetches):.3f} fetches each"
    )
    assert load.failures == []
    assert max(fetches) <= most
