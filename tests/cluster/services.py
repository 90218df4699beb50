"""Nodes of a cluster as real services with two workers each; with a real engine, and an upstream in here."""

import json
import random
import urllib.request
from contextlib import ExitStack, contextmanager

from cluster.nodes import Valkey
from harness.content import content_path
from harness.processes import free_port
from harness.service import Gup
from harness.upstreams import ScriptedUpstream

from gup.cluster.order import ranked
from gup.content.key import Variant
from gup.content.routes import Routes

PASSWORD = "the-engines-password"
UNLIMITED = {"wan": {"rate": "0"}, "fill": {"range_wait": "100s"}}
"""Settings of nodes that fetch as fast as they can, and wait for ranges rather than fetch them alone."""


@contextmanager
def running(folder):
    """A site without nodes, to be started by the test."""
    valkey = Valkey(folder / "valkey")
    with valkey.client() as client:
        client.config_set("requirepass", PASSWORD)
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

    def start(self, name, *, settings=None, **changes):
        """A node called `name`; `settings` beside the cluster's, and `changes` of those."""
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
        gup = self.stack.enter_context(Gup(self.folder / name, [self.upstream.url], settings=settings))
        self.nodes[name] = gup
        return gup

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
