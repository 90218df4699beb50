"""Several upstreams, TLS with a private CA, a web proxy, extra headers, reload: with real processes."""

from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

import pytest
from harness.clients import assert_problem
from harness.commands import command
from harness.content import BIG, DELTA, INDEX, make_tree, noise, zip_of
from harness.processes import free_port, until
from harness.service import Gup, toml
from harness.upstreams import Answer, Authority, Gate, Nginx, ScriptedUpstream, WebProxy

LENGTH = 3_000_000
BODY = zip_of("upstreams", LENGTH)
QUICK = {"connect_timeout": "5s", "read_timeout": "5s", "give_up": "10s"}


def test_changed_upstreams_take_effect_in_running_workers_with_headers_that_nobody_else_sees(serve):
    """The service shows them neither in answers nor in log, status and settings."""
    gate, secret = Gate(), "Bearer s3same"
    gup, old = serve(
        {BIG: Answer(BODY, etag='"a"', gates=((LENGTH // 2, gate),))}, each=QUICK, log={"level": "debug"}
    )
    with ScriptedUpstream() as new:
        new.answer(DELTA, noise("d", 1000))
        pids = gup.workers()
        client, response = gup.begin(BIG, LENGTH // 2)
        file = gup.folder / "gup.toml"
        text = toml({"log": {"level": "debug"}, "upstream": [{"name": "u0", **QUICK, "url": new.url}]})
        file.write_text(f'{text}headers = {{X-Site = "berlin", Authorization = "{secret}"}}\n')
        assert gup.api("/api/v1/reload", "POST")[0] == 200
        until(lambda: gup.upstream()["url"] == new.url, "the settings are read again")
        for other in map(gup.connect_to, pids):
            until(lambda other=other: other.get(DELTA).status == 200, "its workers ask the new one", 15)
        gate.open()
        assert client.finish(response).body == BODY
        assert gup.workers() == pids
        (asked,) = new.requests(DELTA)
        assert (asked.header("x-site"), asked.header("authorization")) == ("berlin", secret)
        assert "s3same" not in f"{gup.get(DELTA).fields} {gup.log} {gup.status()}"
    file.write_text(f'{file.read_text()}proxy = "http://u:tops3cret@127.0.0.1:9"\n')
    shown = command("config", "show", file).stdout
    assert [word in shown for word in ("Authorization", "s3same", "tops3cret")] == [True, False, False]
    assert len(old.requests(BIG)) == 1


@contextmanager
def secure(folder, *names: str):
    """An nginx with TLS, its URL by address, as the certificate may or may not have it, and its CA's file."""
    authority, port = Authority(folder / "tls"), free_port()
    tree = make_tree(folder / "tree", big_bytes=LENGTH)
    extra = f"listen 127.0.0.1:{port} ssl; " + authority.server(*names)
    with Nginx(tree, folder / "nginx", extra=extra) as nginx:
        yield nginx, f"https://127.0.0.1:{port}", str(authority.ca)


def before(folder, url: str, **more) -> Gup:
    return Gup(
        folder / "cache", workers=1, settings={"upstream": [{"name": "u0", "url": url, **QUICK, **more}]}
    )


def refused(gup: Gup, *words: str, status: int = 502) -> None:
    """DELTA can't be had, and the problem says why."""
    told = str(assert_problem(gup.get(DELTA), status)["detail"])
    assert [word for word in words if word not in told] == [], told


@pytest.mark.needs("nginx")
def test_an_upstream_with_a_certificate_of_the_own_ca_and_a_tunnel_through_a_web_proxy(tmp_path):
    with secure(tmp_path) as (nginx, url, ca):
        with before(tmp_path / "direct", url, ca_file=ca) as gup:
            gup.serves(BIG, nginx.tree.body(BIG))
        with WebProxy() as proxy, before(tmp_path / "proxy", url, proxy=proxy.url, ca_file=ca) as gup:
            gup.serves(BIG, nginx.tree.body(BIG))
            assert [(seen.method, seen.path) for seen in proxy.seen] == [
                ("CONNECT", url.removeprefix("https://"))
            ]
        assert [row.status for row in nginx.log(BIG)] == [200, 200]


@pytest.mark.needs("nginx")
@pytest.mark.parametrize("trust", ["system", "another", "name"])
def test_a_certificate_of_an_unknown_ca_or_of_another_name_is_refused(tmp_path, trust):
    names = ("manager.example", "127.0.0.9") if trust == "name" else ()
    with secure(tmp_path, *names) as (nginx, url, ca):
        other = str(Authority(tmp_path / "other", "another").ca)
        more = {"system": {}, "another": {"ca_file": other}, "name": {"ca_file": ca}}[trust]
        with before(tmp_path, url, **more) as gup:
            refused(gup, "certificate refused", *["127.0.0.1"] * (trust == "name"))
            gup.wait_log("certificate refused")
            assert nginx.log() == []
            until(lambda: "certificate refused" in (gup.upstream()["last_error"] or ""), "the status tells")
            tries = gup.metric("gup_upstream_requests_total", outcome="unreachable")
            assert 1 <= tries <= 2, "one try tells all; on a busy machine a check may have been due since"
        if trust == "name":
            with before(tmp_path / "lax", url, verify_tls=False) as gup:
                gup.serves(DELTA, nginx.tree.body(DELTA))
            with before(tmp_path / "plain", nginx.url.replace("http:", "https:")) as gup:
                refused(gup, "TLS")


def test_a_spoilt_ca_file_is_refused_by_a_reload_and_never_told_as_the_disks(serve, tmp_path):
    """Each process reads the file when it first connects: one that was spoilt since is named, as the file."""
    authority, ca = Authority(tmp_path / "tls"), tmp_path / "ca.pem"
    good = authority.ca.read_bytes()
    ca.write_bytes(good)
    each, cache = QUICK | {"ca_file": str(ca)}, {"error_ttl": "0s"}
    gup, at = serve(before=ScriptedUpstream(authority.context()), each=each, cache=cache, workers=1)
    settings = {"upstream": [{"name": "u0", "url": at.url, **each}], "cache": cache}
    for path in (DELTA, BIG, INDEX):
        at.answer(path, zip_of(path, 1000))
    assert gup.get(DELTA).status == 200
    ca.write_text("nothing")
    gup.rewrite(settings)
    gup.wait_log(f"settings not reloaded: upstream#1.ca_file: '{ca}' holds no certificate")
    assert gup.get(BIG).status == 200, "what was loaded holds"
    gup.kill_worker(gup.workers()[0])
    until(lambda: gup.metric("gup_worker_restarts_total") == 1 and gup.workers(), "another worker")

    def told() -> bool:
        document = assert_problem(gup.get(INDEX), 502, "upstream-unreachable")
        return f"upstream.ca_file: '{ca}' holds no certificate" in str(document["detail"])

    until(told, "the worker's own trial tells why")  # the controller's may have been before it
    assert gup.status()["disk"]["refusals"] == []
    assert gup.metric("gup_fills_total", outcome="unstorable") == 0
    ca.write_bytes(good)
    gup.rewrite(settings)
    gup.wait_log("settings reloaded")
    until(lambda: gup.get(INDEX).status == 200, "the file that was mended is read again")


@pytest.mark.needs("nginx")
def test_content_comes_through_a_web_proxy_and_one_that_refuses_or_is_away_is_told(tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=LENGTH)
    with Nginx(tree, tmp_path / "nginx") as nginx, WebProxy("gup:tops3cret") as proxy:
        with before(tmp_path, nginx.url, proxy=proxy.url) as gup:
            gup.serves(BIG, tree.body(BIG))
            gup.serves(DELTA, tree.body(DELTA))
            asked = {(seen.method, unquote(urlsplit(seen.path).path)) for seen in proxy.seen}
            assert asked == {("GET", BIG), ("GET", DELTA)}
            assert all(seen.path.startswith(nginx.url) for seen in proxy.seen)
            assert "tops3cret" not in gup.log
        url, wrong = f"https://127.0.0.1:{free_port()}", proxy.url.replace("gup:", "wrong:")
        with before(tmp_path / "refused", url, proxy=wrong) as gup:
            refused(gup, "407")
            assert "tops3cret" not in f"{gup.log} {gup.get(DELTA).body}"
    with before(tmp_path / "gone", url, proxy=f"http://127.0.0.1:{free_port()}") as gup:
        refused(gup, "web proxy")
