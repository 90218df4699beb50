"""Nodes of a cluster as real services with two workers each; with a real engine, and an upstream in here."""

import json
import urllib.request
from contextlib import ExitStack, contextmanager

from cluster.nodes import Valkey
from harness.processes import free_port
from harness.service import Gup
from harness.upstreams import ScriptedUpstream

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

    def asked_by(self, name):
        members = self.seen_by(name)["members"]
        return {member["name"] for member in members if member["askable"]} - {name}

    def all_ask_all(self):
        names = set(self.nodes)
        return all(self.asked_by(name) == names - {name} for name in names)
