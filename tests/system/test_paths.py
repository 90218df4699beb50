"""Which paths, hosts, methods and framings are served, and which are refused, with a problem document."""

import json
import time
from dataclasses import dataclass

import pytest
from harness.clients import Response, assert_problem, send_raw
from harness.processes import free_port
from harness.scripted import ScriptedUpstream
from harness.service import Gup
from harness.trees import Tree, noise
from harness.upstreams import Nginx, same

GUID = "535CB6A4-441F-4e8a-A897-804CD859100E"
FILE = "260801001/xdelta260801001_To_260802001.dax"
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PROPFIND")
DELTA = f"/content/{{{GUID}}}/{FILE}"


@dataclass(frozen=True)
class Site:
    """Before nginx, another process: its connections are no descriptors that a test leaves behind."""

    gup: Gup
    upstream: Nginx

    def asked(self) -> list[str]:
        """Paths that the upstream was asked for."""
        return [row.path for row in self.upstream.log(methods=METHODS)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths")
    tree = Tree(folder / "tree")
    tree.put(DELTA, noise("delta", 50_000))
    settings = {"site": {"name": "branch-17"}}
    with (
        Nginx(tree, folder / "nginx") as upstream,
        Gup(folder / "cache", [upstream.url], settings=settings) as gup,
    ):
        yield Site(gup, upstream)
        # whatever was asked here, nothing but content ever went out, and only by GET
        for row in upstream.log(methods=METHODS):
            if (row.method, row.path) == ("HEAD", "/content/ContentInfo.txt"):
                continue  # a check of the upstream's health
            assert row.method == "GET"
            assert same(row.path, DELTA) or "%25" in row.path, row


def raw(site: Site, text: str) -> Response:
    return send_raw(site.gup.data, text.encode("latin-1"))


def get_raw(site: Site, target: str, host: str = "gup") -> Response:
    return raw(site, f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n")


def test_all_spellings_are_one_entry(site):
    authority = f"127.0.0.1:{site.upstream.port}"
    spellings = [
        f"/content/{{{GUID}}}/{FILE}",
        f"/content/{{{GUID.lower()}}}/{FILE}",
        f"/content/{{{GUID.upper()}}}/{FILE}",
        f"/content/%7B{GUID}%7D/{FILE}",
        f"/content/%7b{GUID.lower()}%7d/{FILE}",
        f"/content/%7B{GUID.replace('5', '%35')}%7D/{FILE}",
        f"/%63ontent/{{{GUID}}}/{FILE}",
        f"http://{authority}/content/{{{GUID}}}/{FILE}",
        f"HTTP://{authority}/content/%7B{GUID.upper()}%7D/{FILE}",
        f"/content/{{{GUID}}}/{FILE}?session=17",
    ]
    tags = set()
    for target in spellings * 2:
        response = get_raw(site, target)
        assert (response.status, response.body) == (200, noise("delta", 50_000)), target
        tags.add(response.etag)
    assert len(tags) == 1
    assert site.upstream.requests(DELTA) == 1
    assert "?" not in site.upstream.log(DELTA)[0].path
    assert len(site.gup.bodies()) == 1


ESCAPES = [
    "/content/../../etc/passwd",
    "/content/..%2f..%2fetc/passwd",
    "/content/%2e%2e/%2e%2e/etc/passwd",
    "/content/%2E%2E%2F%2E%2E%2Fetc%2Fpasswd",
    "/content/.%2e/%2e./etc/passwd",
    "/content/..\\..\\etc\\passwd",
    "/content/..%5c..%5cetc%5cpasswd",
    "/content/./full.zip",
    "/content//etc/passwd",
    "//etc/passwd",
    "/content/%2fetc/passwd",
    "/content/x%00.zip",
    "/content/x%0d%0aSet-Cookie:%20a",
    "/content/x%7f",
    "/content/%zz",
    "/content/%2",
    "/content/%",
    "/content/%c0%ae%c0%ae/%c0%ae%c0%ae/etc/passwd",
    "/content/%ff%fe",
    "/content/..",
    "/content/...%2f..",
    "/..",
    "/content/.hidden",
    "/content/{" + GUID + "}/260801001/.full.zip.gup",
    "/content/" + "x" * 300,
]


@pytest.mark.parametrize("target", ESCAPES)
def test_paths_that_lead_elsewhere_are_refused(site, target):
    before = site.asked()
    assert_problem(get_raw(site, target), 400)
    assert site.asked() == before


@pytest.mark.parametrize(
    "target", ["/content/%252e%252e/%252e%252e/etc/passwd", "/content/%25%32%65%25%32%65/passwd"]
)
def test_a_path_is_decoded_once(site, target):
    """What is escaped twice is a strange name below /content/ and nothing else."""
    response = get_raw(site, target)
    assert response.status in (400, 404)
    assert b"root:" not in response.body
    for path in site.asked():
        assert "/../" not in path
        assert "%2e%2e" not in path.lower()


@pytest.mark.parametrize(
    "target",
    ["/", "/secars/secars.dll?h=1", "/content", "/index.html", "/Content/x", "/metrics", "/api/v1/status"],
)
def test_what_is_not_content_is_never_forwarded(site, target):
    before = site.asked()
    assert_problem(get_raw(site, target), 404, "not-content")
    assert site.asked() == before


@pytest.mark.parametrize(
    "target",
    [
        "http://example.com/content/x.txt",
        "http://127.0.0.1:1/content/x.txt",
        "http://localhost/content/x.txt",
        "http://127.0.0.1:{port}@example.com/content/x.txt",
        "http://example.com:{port}/content/x.txt",
        "ftp://127.0.0.1:{port}/content/x.txt",
    ],
)
def test_other_hosts_are_refused(site, target):
    before = site.asked()
    response = get_raw(site, target.format(port=site.upstream.port))
    assert response.status in (400, 403), response
    assert_problem(response, response.status)
    assert site.asked() == before


def test_another_authority_is_403(site):
    assert_problem(get_raw(site, "http://example.com/content/x.txt"), 403, "forbidden-host")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND"])
def test_other_methods_are_refused(site, method):
    response = raw(site, f"{method} {DELTA} HTTP/1.1\r\nHost: gup\r\n\r\n")
    assert_problem(response, 405, "method-not-allowed")
    assert sorted((response.header("allow") or "").replace(" ", "").split(",")) == ["GET", "HEAD"]


def test_connect_and_asterisk_are_refused(site):
    connect = raw(site, "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n")
    assert_problem(connect, connect.status)
    assert connect.status in (400, 403, 405)
    asterisk = raw(site, "OPTIONS * HTTP/1.1\r\nHost: gup\r\n\r\n")
    assert_problem(asterisk, 405)


HOST = "Host: gup\r\n"
BAD_FRAMING = {
    "length and chunks": (f"{HOST}Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", 400),
    "chunks": (f"{HOST}Transfer-Encoding: chunked\r\n", 400),
    "odd coding": (f"{HOST}Transfer-Encoding: xchunked\r\n", 400),
    "two lengths": (f"{HOST}Content-Length: 3\r\nContent-Length: 4\r\n", 400),
    "list of lengths": (f"{HOST}Content-Length: 3, 3\r\n", 400),
    "negative length": (f"{HOST}Content-Length: -1\r\n", 400),
    "signed length": (f"{HOST}Content-Length: +1\r\n", 400),
    "no number": (f"{HOST}Content-Length: x\r\n", 400),
    "a body": (f"{HOST}Content-Length: 3\r\n", 400),
    "bare lf": (f"{HOST}X: a\nY: b\r\n", 400),
    "bare cr": (f"{HOST}X: a\rY: b\r\n", 400),
    "folded line": (f"{HOST}X: a\r\n b\r\n", 400),
    "space before colon": (f"{HOST}X : a\r\n", 400),
    "no name": (f"{HOST}: a\r\n", 400),
    "no colon": (f"{HOST}nothing\r\n", 400),
    "nul": (f"{HOST}X: a\0b\r\n", 400),
    "no host": ("X: a\r\n", 400),
    "two hosts": (f"{HOST}{HOST}", 400),
    "bad host": ("Host: a b\r\n", 400),
    "host with path": ("Host: a/b\r\n", 400),
    "too many": (f"{HOST}" + "".join(f"X-{n}: y\r\n" for n in range(300)), 431),
    "too large": (f"{HOST}X: {'y' * 40_000}\r\n", 431),
}


@pytest.mark.parametrize("name", BAD_FRAMING)
def test_bad_framing_is_refused_and_the_connection_closed(site, name):
    fields, status = BAD_FRAMING[name]
    before = site.asked()
    with site.gup.connect() as client:
        # what follows must never be read as a second request
        smuggled = f"GET {DELTA} HTTP/1.1\r\nHost: gup\r\n\r\n"
        client.send(f"GET {DELTA} HTTP/1.1\r\n{fields}\r\n{smuggled}".encode("latin-1"))
        response = client.response()
        assert_problem(response, status)
        assert response.header("connection") == "close"
        assert client.rest() == b""
    assert site.asked() == before


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (f"GET {DELTA} HTTP/2.0", 505),
        (f"GET {DELTA} HTTP/1.2", 505),
        (f"GET {DELTA} HTTP/9.9", 505),
        (f"GET {DELTA} XTTP/1.1", 400),
        (f"GET {DELTA}", 400),
        (f"GET  {DELTA} HTTP/1.1", 400),
        (f"G\x01T {DELTA} HTTP/1.1", 400),
        ("GET  HTTP/1.1", 400),
        ("\x16\x03\x01\x02\x00\x01", 400),
        (f"GET /content/{'x' * 9000} HTTP/1.1", 414),
    ],
)
def test_bad_request_lines(site, line, status):
    with site.gup.connect() as client:
        client.send(f"{line}\r\n{HOST}\r\n".encode("latin-1"))
        response = client.response()
        if status == 505:
            # the parser may not get as far as the version
            assert response.status in (400, 505)
        else:
            assert response.status == status
        assert_problem(response, response.status)
        assert client.rest() == b""


@pytest.mark.parametrize(
    "begun", [f"GET {DELTA} HTTP/1.1\nHost: gup\n\n", "\x16\x03\x01\x02\0\x01\0\x01\xfc"]
)
def test_what_has_no_end_and_is_no_head_is_refused_at_once(site, begun):
    """A client that ends lines with LF, or speaks TLS, waits for an answer: it would never send more."""
    with site.gup.connect() as client:
        client.send(begun.encode("latin-1"))
        assert_problem(client.response(), 400, "bad-request")
        assert client.rest() == b""


def test_a_request_that_passed_here_before_is_a_loop(site):
    via = get_raw(site, DELTA).header("via")
    assert via is not None
    assert "branch-17" in via
    looped = raw(site, f"GET {DELTA} HTTP/1.1\r\nHost: gup\r\nVia: 1.1 other, {via}\r\n\r\n")
    assert_problem(looped, 508, "loop")
    assert raw(site, f"GET {DELTA} HTTP/1.1\r\nHost: gup\r\nVia: 1.1 other\r\n\r\n").status == 200


def test_a_problem_says_what_and_where(site):
    document = assert_problem(get_raw(site, "/secars/x"), 404, "not-content")
    assert document["detail"]
    assert json.dumps(document)
    refused = site.gup.metric("gup_requests_total", result="refused", code="404")
    assert_problem(get_raw(site, "/secars/x"), 404, "not-content")
    assert site.gup.metric("gup_requests_total", result="refused", code="404") == refused + 1


def test_a_head_that_never_ends_is_timed_out(tmp_path):
    with ScriptedUpstream() as upstream:
        settings = {"listen": {"header_timeout": "300ms", "idle_timeout": "400ms"}}
        with Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup:
            with gup.connect() as slow:
                slow.send(b"GET /content/x HTTP/1.1\r\nHost: g")
                assert_problem(slow.response(), 408, "request-timeout")
                assert slow.ended()
            with gup.connect() as idle:
                assert idle.get("/content/none.txt").status == 404
                assert idle.ended()
            with gup.connect() as silent:
                said = silent.rest()
                assert not said or b" 408 " in said


def test_two_that_face_each_other_do_not_loop(tmp_path):
    port = free_port()
    one = {"site": {"name": "one"}}
    other = {"site": {"name": "other"}}
    with (
        Gup(tmp_path / "one", [f"http://127.0.0.1:{port}"], settings=one) as first,
        Gup(tmp_path / "other", [first.url], settings=other, start=False) as second,
    ):
        second.command[second.command.index("--listen") + 1] = f"127.0.0.1:{port}"
        second.start()
        began = time.monotonic()
        assert_problem(first.get(DELTA), 508, "loop")
        assert time.monotonic() - began < 10
        assert first.metric("gup_requests_total", result="refused", code="508") >= 1
