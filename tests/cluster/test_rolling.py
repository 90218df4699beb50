"""Changed node by node while clients are served: settings, versions, the secret. Not one request fails."""

import contextlib
import shutil
import tomllib
from contextlib import ExitStack
from urllib.parse import quote

import pytest
from cluster.services import PASSWORD, UNLIMITED, loaded, running
from harness.content import content_path, zip_of
from harness.processes import until
from harness.service import REPOSITORY
from harness.steady import Steady
from harness.upstreams import Answer

from gup.cluster.signing import Signer

LARGE = content_path("full.zip")
BODIES = {LARGE: zip_of("rolling", 1_000_000)} | {
    content_path("full.dax", revision=f"26080{number}001"): bytes([number]) * 50_000 for number in range(1, 5)
}
NODES = ("a", "b", "c")


@contextlib.contextmanager
def served(site, **how):
    """Clients of all nodes, with connections kept and new, small bodies and a slow large one."""
    until(site.all_ask_all, "all ask all", 60)
    for path, body in BODIES.items():
        site.upstream.answer(path, Answer(body, etag='"a"'))
        for node in site.nodes.values():
            node.serves(path, body)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(Steady(node.data, BODIES, lazy=5, new=1, slow=2, large=LARGE, rate=500_000))
            for node in site.nodes.values()
        ]
        yield stack.enter_context(loaded(site, **how))
    for each in clients:
        assert each.failures == []
        assert min(each.done[kind] for kind in ("lazy", "new", "slow")) >= 1
        assert each.closed == 0, "connections go on"
    assert {path: len(site.upstream.requests(path)) for path in BODIES} == dict.fromkeys(BODIES, 1)


def asked(site):
    return {name: site.asked_by(name) for name in NODES}


ALL = {"a": {"b", "c"}, "b": {"a", "c"}, "c": {"a", "b"}}
STEPS = {
    "a": {"a": set(), "b": {"c"}, "c": {"b"}},
    "b": {"a": {"b"}, "b": {"a"}, "c": set()},
    "c": ALL,
}
"""Who asks whom when the nodes were changed up to this one."""


@pytest.mark.long
def test_upstreams_are_changed_node_by_node(tmp_path):
    """Nodes with the old ones fetch for each other, and those with the new ones."""
    with running(tmp_path) as site:
        first, second = (
            {"upstream": [{"url": f"http://{host}:{site.upstream.port}", "name": "manager"}]}
            for host in ("127.0.0.1", "localhost")
        )
        for name in NODES:
            site.start(name, settings={**UNLIMITED, **first}, urls=[])
        with served(site, most=2):
            for name, expected in STEPS.items():
                node = site.nodes[name]
                settings = tomllib.loads((node.folder / "gup.toml").read_text())
                node.reload(**settings | second)
                until(lambda expected=expected: asked(site) == expected, f"after {name}", 60)


@pytest.mark.long
@pytest.mark.timeout(240)
def test_versions_are_changed_node_by_node(tmp_path):
    """First with the protocol of before, then with another, whose nodes are asked by their like alone."""
    folder = tmp_path / "installed"
    shutil.copytree(REPOSITORY / "gup", folder / "gup", ignore=shutil.ignore_patterns("*.pyc*"))
    env = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def install(name, old, new):
        file = folder / "gup" / name
        assert old in file.read_text()
        (folder / "new").write_text(file.read_text().replace(old, new))
        (folder / "new").rename(file)

    def upgrade(name, version):
        node = site.nodes[name]
        before = node.status()
        assert node.api("/api/v1/upgrade", "POST")[1]["upgraded"]
        assert node.wait_replaced(before, 2)["version"] == version

    with running(tmp_path) as site:
        for name in NODES:
            site.start(name, settings=UNLIMITED, env=env)
        with served(site, most=2):
            install("__init__.py", "__version__ = ", '__version__ = "98" or ')
            upgrade("a", "98")
            until(site.all_ask_all, "all ask all", 60)
            install("__init__.py", '"98"', '"99"')
            install("cluster/membership.py", "PROTOCOL = 1", "PROTOCOL = 2")
            for name, expected in STEPS.items():
                upgrade(name, "99")
                until(lambda expected=expected: asked(site) == expected, f"after {name}", 60)


def all_rows_signed(site, secret):
    signer = Signer("lyon", (secret.encode(),))
    with site.valkey.client(PASSWORD) as client:
        rows = {name: client.get(f"gup:{{lyon}}:members:{name}") for name in NODES}
    return all(row and signer.unseal(f"row of {name}", row) for name, row in rows.items())


@pytest.mark.long
def test_the_secret_is_changed_node_by_node(tmp_path):
    """Each node has a file of its own, and is told at another time. No order is taken for a forgery."""
    old, new = "a-secret-of-the-site", "another-secret-of-it"
    with running(tmp_path) as site:
        for name in NODES:
            (tmp_path / f"{name}.secret").write_text(old + "\n")
            site.start(name, settings=UNLIMITED, secret_file=str(tmp_path / f"{name}.secret"))
        with served(site) as load:
            key = quote(f"any/any{LARGE.removeprefix('/content')}")
            assert site.nodes["a"].api(f"/api/v1/content/{key}/pin", "PUT")[0] == 200
            before = site.lists()
            for lines in ((old, new), (new, old), (new,)):
                for name in NODES:
                    (tmp_path / f"{name}.secret").write_text("\n".join(lines) + "\n")
                    assert site.nodes[name].api("/api/v1/reload", "POST")[0] == 200
                    assert site.all_ask_all()
                until(lambda sign=lines[0]: all_rows_signed(site, sign), "all sign with the first", 30)
                load.more(10)
            assert site.lists() == before

            def signed_anew():
                with site.valkey.client(PASSWORD) as client:
                    texts = [fields["order"] for _, fields in client.xrange("gup:{lyon}:orders")]
                signer = Signer("lyon", (new.encode(),))
                return {signer.unseal("order", text) is not None for text in texts} == {True}

            until(signed_anew, "the pin has the new signature", 60)
        assert site.quiet("row-forged")
