"""Several upstreams, TLS with a private CA, a web proxy, extra headers, reload: with real processes."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from harness.certificates import Authority
from harness.clients import assert_problem
from harness.processes import free_port
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup, toml
from harness.trees import BIG, DELTA, content_path, make_tree, noise, zip_of
from harness.upstreams import Nginx
from harness.waiting import until
from harness.web_proxy import WebProxy

LENGTH = 3_000_000
INDEX = "/content/ContentInfo.txt"
QUICK = {"connect_timeout": "500ms", "read_timeout": "2s", "give_up": "10s"}


def upstream_of(gup: Gup, name: str) -> dict:
    return next(row for row in gup.status()["upstreams"] if row["name"] == name)


# --- choice and health


def test_weights_share_content_out_and_a_key_stays_with_its_upstream(tmp_path):
    paths = [content_path("full.dax", revision=f"2608{number:02}001") for number in range(1, 31)]
    with ScriptedUpstream() as one, ScriptedUpstream() as two:
        for number, path in enumerate(paths):
            for upstream in (one, two):
                upstream.answer(path, Answer(noise(f"weights {number}", 500), etag=f'"{number}"'))
        settings = {
            "upstream": [
                {"name": "one", "url": one.url, "weight": 1},
                {"name": "two", "url": two.url, "weight": 3},
            ]
        }
        asked = []
        for run in range(2):  # a second site of the same settings prefers the same
            one.seen.clear()
            two.seen.clear()
            with Gup(tmp_path / f"cache{run}", settings=settings) as gup:
                for number, path in enumerate(paths):
                    assert gup.get(path).body == noise(f"weights {number}", 500)
            assert len(one.requests()) + len(two.requests()) == len(paths)
            asked.append({seen.path for seen in two.requests()})
        assert asked[0] == asked[1]
        assert 15 <= len(asked[0]) <= 29


def test_a_dead_upstream_costs_no_timeout_each_time_and_comes_back(tmp_path):
    port = free_port()
    tree = make_tree(tmp_path / "tree", big_bytes=100_000)
    settings = {
        "upstream": [{"name": "only", "url": f"http://127.0.0.1:{port}", "health_interval": "60s", **QUICK}],
        "cache": {"error_ttl": "1s"},
    }
    with Gup(tmp_path / "cache", settings=settings) as gup:
        assert_problem(gup.get(DELTA), 502, "upstream-unreachable")
        until(lambda: upstream_of(gup, "only")["state"] == "down", "it is known to be down")
        row = upstream_of(gup, "only")
        assert row["up"] is False
        assert row["since"] <= time.time() + 1
        until(lambda: upstream_of(gup, "only")["last_error"], "its last error is told")
        assert "can't be reached" in upstream_of(gup, "only")["last_error"]
        assert gup.metric("gup_upstream_up", upstream="only") == 0

        before = gup.metric("gup_upstream_requests_total", upstream="only")
        began = time.monotonic()
        for number in range(60):
            response = gup.get(content_path("full.zip", revision=f"26{number:02}01001"))
            assert_problem(response, 502, "upstream-unreachable")
            assert int(response.header("retry-after") or 0) >= 1
        took = time.monotonic() - began
        tried = gup.metric("gup_upstream_requests_total", upstream="only") - before
        # a trial a second by requests (each tries three times), and the controller's checks
        assert tried <= 6 + 5 * took
        with Nginx(tree, tmp_path / "nginx", extra=f"listen 127.0.0.1:{port};"):
            until(lambda: upstream_of(gup, "only")["state"] == "up", "two checks in a row were good", 30)
            assert gup.metric("gup_upstream_up", upstream="only") == 1
            assert gup.get(BIG).body == tree.body(BIG)
        gup.wait_log("upstream only is down")
        gup.wait_log("upstream only is up again")


def test_the_controller_finds_a_dead_upstream_before_any_request_does(tmp_path):
    with ScriptedUpstream() as second:
        second.answer(DELTA, Answer(noise("d", 1000), etag='"2"'))
        dead = {"name": "dead", "url": f"http://127.0.0.1:{free_port()}", "health_interval": "300ms", **QUICK}
        settings = {"upstream": [dead, {"name": "second", "url": second.url, "priority": 1}]}
        with Gup(tmp_path / "cache", settings=settings) as gup:
            until(lambda: upstream_of(gup, "dead")["state"] == "down", "checked and found down")
            tried = gup.metric("gup_upstream_requests_total", upstream="dead")
            assert gup.get(DELTA).body == noise("d", 1000)
            assert gup.metric("gup_upstream_requests_total", upstream="dead") - tried <= 1
            assert upstream_of(gup, "second")["up"] is True


# --- reload


def test_changed_upstreams_take_effect_in_running_workers(tmp_path):
    gate, body = Gate(), zip_of("reload", LENGTH)
    with ScriptedUpstream() as old, ScriptedUpstream() as new:
        old.answer(BIG, Answer(body, etag='"a"', gates=((LENGTH // 2, gate),)))
        new.answer(DELTA, Answer(noise("d", 1000), etag='"d"'))
        table = {"name": "manager", "url": old.url}
        with Gup(tmp_path / "cache", settings={"upstream": [table]}) as gup, gup.connect() as client:
            pids = gup.workers()
            client.ask(BIG)
            response = client.head()
            first = client.read(LENGTH // 2)
            text = toml({"upstream": [{**table, "url": new.url}]}) + 'headers = {X-Site = "berlin"}'
            (gup.folder / "gup.toml").write_text(text)
            gup.signal(signal.SIGHUP)
            until(lambda: upstream_of(gup, "manager")["url"] == new.url, "the settings are read again")
            for pid in pids:
                with gup.connect_to(pid) as other:
                    until(lambda c=other: c.get(DELTA).status == 200, "its workers ask the new one", 15)
            gate.open()
            assert first + client.rest_of(response, LENGTH // 2) == body
            assert gup.workers() == pids
            assert [seen.header("x-site") for seen in new.requests(DELTA)] == ["berlin"]


# --- TLS


@dataclass
class Secure:
    """An nginx with TLS; `url` by address, as the certificate may or may not have it."""

    url: str
    ca: Path
    nginx: Nginx


@contextmanager
def secure(folder: Path, names: str = "IP:127.0.0.1") -> Iterator[Secure]:
    authority, port = Authority(folder / "tls"), free_port()
    tree = make_tree(folder / "tree", big_bytes=LENGTH)
    extra = f"listen 127.0.0.1:{port} ssl; " + authority.server(names)
    with Nginx(tree, folder / "nginx", extra=extra) as nginx:
        yield Secure(f"https://127.0.0.1:{port}", authority.ca, nginx)


def tls_gup(folder: Path, url: str, **more: object) -> Gup:
    return Gup(folder / "cache", settings={"upstream": [{"name": "manager", "url": url, **QUICK, **more}]})


def test_an_upstream_with_a_certificate_of_the_own_ca(tmp_path):
    with secure(tmp_path) as at, tls_gup(tmp_path, at.url, ca_file=str(at.ca)) as gup:
        assert gup.get(BIG).body == at.nginx.tree.body(BIG)
        assert gup.get(DELTA).body == at.nginx.tree.body(DELTA)
        assert [row.status for row in at.nginx.log(BIG)] == [200]


@pytest.mark.parametrize("trust", ["system", "another"])
def test_a_certificate_of_an_unknown_ca_is_refused(tmp_path, trust):
    more = {"ca_file": str(Authority(tmp_path / "other", "another").ca)} if trust == "another" else {}
    with secure(tmp_path) as at, tls_gup(tmp_path, at.url, **more) as gup:
        document = assert_problem(gup.get(DELTA), 502, "upstream-unreachable")
        assert "certificate refused" in str(document["detail"])
        until(lambda: "certificate refused" in gup.log, "the log tells it")
        assert at.nginx.log() == []
        until(lambda: upstream_of(gup, "manager")["last_error"], "the error stands in the status")
        assert "certificate refused" in upstream_of(gup, "manager")["last_error"]
        assert gup.metric("gup_upstream_requests_total", outcome="unreachable") == 1, "one try tells all"


def test_a_certificate_of_another_name_is_refused(tmp_path):
    with (
        secure(tmp_path, "DNS:manager.example,IP:127.0.0.9") as at,
        tls_gup(tmp_path, at.url, ca_file=str(at.ca)) as gup,
    ):
        document = assert_problem(gup.get(DELTA), 502, "upstream-unreachable")
        assert "certificate refused" in str(document["detail"])
        assert "127.0.0.1" in str(document["detail"])
        assert at.nginx.log() == []


def test_a_certificate_is_not_looked_at_when_told_so(tmp_path):
    with secure(tmp_path, "DNS:other") as at, tls_gup(tmp_path, at.url, verify_tls=False) as gup:
        assert gup.get(DELTA).body == at.nginx.tree.body(DELTA)


def test_a_server_that_speaks_no_tls_is_told(tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=100_000)
    with (
        Nginx(tree, tmp_path / "nginx") as plain,
        tls_gup(tmp_path, plain.url.replace("http:", "https:")) as gup,
    ):
        document = assert_problem(gup.get(DELTA), 502, "upstream-unreachable")
        assert "TLS" in str(document["detail"])


# --- a web proxy on the way


def test_content_comes_through_a_web_proxy(tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=LENGTH)
    with (
        Nginx(tree, tmp_path / "nginx") as nginx,
        WebProxy("gup:tops3cret") as proxy,
        tls_gup(tmp_path, nginx.url, proxy=proxy.url) as gup,
    ):
        assert gup.get(BIG).body == tree.body(BIG)
        assert gup.get(DELTA).body == tree.body(DELTA)
        assert {(m, unquote(urlsplit(t).path)) for m, t, _ in proxy.seen} == {("GET", BIG), ("GET", DELTA)}
        assert all(target.startswith(nginx.url) for _, target, _ in proxy.seen)
        assert "tops3cret" not in gup.log


def test_tls_goes_through_a_web_proxy_in_a_tunnel(tmp_path):
    with (
        secure(tmp_path) as at,
        WebProxy() as proxy,
        tls_gup(tmp_path, at.url, proxy=proxy.url, ca_file=str(at.ca)) as gup,
    ):
        assert gup.get(BIG).body == at.nginx.tree.body(BIG)
        authority = at.url.removeprefix("https://")
        assert [(method, target) for method, target, _ in proxy.seen] == [("CONNECT", authority)]
        assert all("x-secret" not in fields for _, _, fields in proxy.seen)


@pytest.mark.parametrize("tls", [pytest.param(False, marks=pytest.mark.long), True], ids=["http", "https"])
def test_a_proxy_that_refuses_or_is_away_is_told(tmp_path, tls):
    scheme = "https" if tls else "http"
    url = f"{scheme}://127.0.0.1:{free_port()}"
    gone = f"http://127.0.0.1:{free_port()}"
    with tls_gup(tmp_path / "gone", url, proxy=gone) as gup:
        document = assert_problem(gup.get(DELTA), 502, "upstream-unreachable")
        assert "web proxy" in str(document["detail"])
    with WebProxy("right:tops3cret") as proxy:
        wrong = proxy.url.replace("right", "wrong")
        with tls_gup(tmp_path / "refused", url, proxy=wrong) as gup:
            document = assert_problem(gup.get(DELTA), 502)
            assert "407" in str(document["detail"])
            assert "tops3cret" not in gup.log + str(document)


# --- extra headers


def test_extra_headers_reach_upstream_and_nobody_else(tmp_path):
    with ScriptedUpstream() as upstream:
        upstream.answer(DELTA, Answer(noise("d", 1000), etag='"d"'))
        settings = {
            "upstream": [{"name": "manager", "url": upstream.url, "proxy": "http://u:tops3cret@127.0.0.1:9"}],
            "log": {"level": "debug"},
        }
        text = (
            toml(settings)
            .replace('proxy = "http://u:tops3cret@127.0.0.1:9"', "")
            .replace("[log]", 'headers = {Authorization = "Bearer s3same"}\n[log]')
        )
        gup = Gup(tmp_path / "cache", settings=settings, start=False)
        file = gup.folder / "gup.toml"
        file.write_text(text)
        with gup:
            gup.start()
            response = gup.get(DELTA)
            assert response.body == noise("d", 1000)
            assert upstream.requests(DELTA)[0].header("authorization") == "Bearer s3same"
            assert all("s3same" not in value for _, value in response.fields)
            assert "s3same" not in gup.log
            assert "s3same" not in str(gup.status())
        file.write_text(text.replace("headers =", 'proxy = "http://u:tops3cret@127.0.0.1:9"\nheaders ='))
        command = [sys.executable, "-m", "gup", "config", "show", str(file)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, env={**gup._env})
        assert "Authorization" in shown.stdout
        assert "s3same" not in shown.stdout
        assert "tops3cret" not in shown.stdout


def test_what_a_check_found_is_shown_as_the_last_error(tmp_path):
    settings = {
        "upstream": [
            {"name": "spare", "url": f"http://127.0.0.1:{free_port()}", "health_interval": "1s"},
        ]
    }
    with Gup(tmp_path / "cache", settings=settings, workers=1) as gup:
        until(lambda: "can't be reached" in (gup.status()["upstreams"][0]["last_error"] or ""), "the error")
        assert gup.metric("gup_events_lost_total") == 0


def test_a_spoilt_ca_file_is_refused_by_a_reload_and_never_told_as_the_disks(tmp_path):
    """Each process reads the file when it first connects: one that was spoilt since is named, as the file."""
    authority, ca = Authority(tmp_path / "tls"), tmp_path / "ca.pem"
    good = authority.ca.read_bytes()
    with ScriptedUpstream(authority.context()) as at:
        for path in (DELTA, BIG, INDEX):
            at.answer(path, Answer(zip_of(path, 1000), etag='"a"'))
        ca.write_bytes(good)
        table = {"name": "manager", "url": at.url, **QUICK, "ca_file": str(ca)}
        settings = {"upstream": [table], "cache": {"error_ttl": "0s"}}
        with Gup(tmp_path / "cache", settings=settings, workers=1) as gup:
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
