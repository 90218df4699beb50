"""Which paths, hosts, methods and framings are served, and which are refused, with a problem document."""

from dataclasses import dataclass

import pytest
from harness.clients import Response, assert_problem, send_raw
from harness.content import noise
from harness.service import Gup
from harness.upstreams import ScriptedUpstream

GUID = "535CB6A4-441F-4e8A-a897-804CD859100E"
FILE = "260801001/xdelta260801001_To_260802001.dax"
DELTA = f"/content/{{{GUID}}}/{FILE}"
BODY = noise("delta", 50_000)
HOST = "Host: gup\r\n"
SHARED = {"site": {"name": "branch-17"}}


@dataclass
class Site:
    gup: Gup
    upstream: ScriptedUpstream

    def raw(self, text: str) -> Response:
        return send_raw(self.gup.data, text.encode("latin-1"))

    def get(self, target: str) -> Response:
        return self.raw(f"GET {target} HTTP/1.1\r\n{HOST}\r\n")

    def last_word(self, text: str) -> Response:
        """The response, after which the connection is closed with nothing more said."""
        client = self.gup.connect()
        client.send(text.encode("latin-1"))
        response = client.response()
        assert client.rest() == b"", text
        return response


@pytest.fixture
def site(shared):
    """Whatever is asked here, nothing but content ever goes out, and only by GET."""
    gup, upstream = shared
    upstream.answer(DELTA, BODY)
    yield Site(gup, upstream)
    escaped = [seen for seen in upstream.seen if "%25" in seen.path and seen.method == "GET"]
    assert len(upstream.requests(DELTA)) + len(escaped) == len(upstream.seen)


def test_all_spellings_are_one_entry(site):
    authority = site.upstream.url.removeprefix("http://")
    spellings = [
        DELTA,
        f"/content/{{{GUID.lower()}}}/{FILE}",
        f"/content/{{{GUID.upper()}}}/{FILE}",
        f"/content/%7B{GUID}%7D/{FILE}",
        f"/content/%7b{GUID.lower()}%7d/{FILE}",
        f"/content/%7B{GUID.replace('5', '%35')}%7D/{FILE}",
        f"/%63ontent/{{{GUID}}}/{FILE}",
        f"http://{authority}{DELTA}",
        f"HTTP://{authority}/content/%7B{GUID.upper()}%7D/{FILE}",
        f"{DELTA}?session=17",
    ]
    responses = [site.get(target) for target in spellings * 2]
    assert [(r.status, r.body == BODY) for r in responses] == [(200, True)] * 20
    assert len({r.etag for r in responses}) == 1
    (asked,) = [seen for seen in site.upstream.seen if "%25" not in seen.path]
    assert "?" not in asked.path
    assert len(site.gup.bodies()) == 1


def test_a_spelling_that_upstream_does_not_have_costs_the_others_nothing(serve):
    """On an upstream that minds case; the wrong spelling is asked first, by GET and by HEAD."""
    gup, upstream = serve()
    upstream.exact = True
    right, wrong = f"/content/{{{GUID.lower()}}}", f"/content/{{{GUID}}}"
    upstream.answer(f"{right}/{FILE}", BODY)
    upstream.answer(f"{right}/1/full.dax", BODY)
    for target in (f"{wrong}/{FILE}", f"{wrong}/1/full.dax"):
        assert_problem(gup.get(target), 404, "upstream-not-found")
        assert gup.get(target, method="HEAD").status == 404
        asked = len(upstream.seen)
        assert_problem(gup.get(target), 404, "upstream-not-found")
        assert len(upstream.seen) == asked, "its own failure is remembered"
        gup.serves(target.replace(GUID, GUID.lower()), BODY)
        gup.wait_stored(target)
        gup.serves(target, BODY)


def test_windows_spellings_are_one_fetch_or_none(serve):
    gup, upstream = serve()
    folder = f"/content/{{{GUID}}}/260801001"
    upstream.answer(f"{folder}/full.dax", BODY)
    for name in ("full.dax", "FULL.DAX", "Full.Dax", "fULL.dAX", "%66ull.dax"):
        gup.serves(f"{folder}/{name}", BODY)
    assert len(upstream.seen) == 1
    assert len(gup.bodies()) == 1
    for end in (".", "%20", "::$INDEX_ALLOCATION", ".%20.", ":x"):
        assert_problem(gup.get(f"/content/{{{GUID}}}{end}/260801001/full.dax"), 400, "bad-path")
        assert_problem(gup.get(f"{folder}/full.dax{end}"), 400, "bad-path")
    assert len(upstream.seen) == 1


ESCAPES = [
    "/content/../../etc/passwd",
    "/content/%2E%2E%2F%2E%2E%2Fetc%2Fpasswd",
    "/content/..%5c..%5cetc%5cpasswd",
    "//etc/passwd",
    "/content/x%0d%0aSet-Cookie:%20a",
    "/content/%zz",
    "/content/%c0%ae%c0%ae/%c0%ae%c0%ae/etc/passwd",
    "/content/{" + GUID + "}/260801001/.full.zip.gup",
    "/content/" + "x" * 300,
]
TWICE_ESCAPED = ["/content/%252e%252e/%252e%252e/etc/passwd", "/content/%25%32%65%25%32%65/passwd"]
NO_CONTENT = ["/", "/secars/secars.dll?h=1", "/content", "/Content/x", "/metrics", "/api/v1/status"]
OTHER_HOSTS = [
    "http://example.com/content/x.txt",
    "http://127.0.0.1:1/content/x.txt",
    "http://127.0.0.1:{port}@example.com/content/x.txt",
    "ftp://127.0.0.1:{port}/content/x.txt",
]


def test_what_leads_elsewhere_or_is_not_content_is_refused_and_never_forwarded(site):
    for target in ESCAPES:
        assert_problem(site.get(target), 400)
    before = site.gup.metric("gup_requests_total", result="refused", code="404")
    for target in NO_CONTENT:
        assert assert_problem(site.get(target), 404, "not-content")["detail"]
    assert site.gup.metric("gup_requests_total", result="refused", code="404") == before + len(NO_CONTENT)
    for target in OTHER_HOSTS:
        response = site.get(target.format(port=site.upstream.port))
        assert response.status in (400, 403), target
        assert_problem(response, response.status)
    assert_problem(site.get(OTHER_HOSTS[0]), 403, "forbidden-host")
    for target in TWICE_ESCAPED:  # decoded once: a strange name below /content/ and nothing else
        assert site.get(target).status in (400, 404)


def test_other_methods_are_refused(site):
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND"):
        response = site.raw(f"{method} {DELTA} HTTP/1.1\r\n{HOST}\r\n")
        assert_problem(response, 405, "method-not-allowed")
        assert sorted((response.header("allow") or "").replace(" ", "").split(",")) == ["GET", "HEAD"]
    connect = site.raw("CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n")
    assert_problem(connect, connect.status)
    assert connect.status in (400, 403, 405)
    assert_problem(site.raw("OPTIONS * HTTP/1.1\r\nHost: gup\r\n\r\n"), 405)


BAD_FRAMING = {  # the rows of the parser's own tests that could smuggle a request, and the limits
    "length and chunks": (f"{HOST}Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", 400),
    "chunks": (f"{HOST}Transfer-Encoding: chunked\r\n", 400),
    "two lengths": (f"{HOST}Content-Length: 3\r\nContent-Length: 4\r\n", 400),
    "a body": (f"{HOST}Content-Length: 3\r\n", 400),
    "bare lf": (f"{HOST}X: a\nY: b\r\n", 400),
    "two hosts": (f"{HOST}{HOST}", 400),
    "too many": (f"{HOST}" + "".join(f"X-{n}: y\r\n" for n in range(300)), 431),
    "too large": (f"{HOST}X: {'y' * 40_000}\r\n", 431),
}
BAD_LINES = {  # the parser may not get as far as the version
    f"GET {DELTA} HTTP/2.0": (400, 505),
    f"GET {DELTA}": (400,),
    "\x16\x03\x01\x02\x00\x01": (400,),
    f"GET /content/{'x' * 9000} HTTP/1.1": (414,),
}
NO_HEADS = [f"GET {DELTA} HTTP/1.1\nHost: gup\n\n", "\x16\x03\x01\x02\0\x01\0\x01\xfc"]
"""A client that ends lines with LF, or speaks TLS, waits for an answer: it would never send more."""


def test_bad_framing_is_refused_and_the_connection_closed(site):
    before = len(site.upstream.seen)
    for name, (fields, status) in BAD_FRAMING.items():
        smuggled = f"GET {DELTA} HTTP/1.1\r\n{HOST}\r\n"  # must never be read as a second request
        response = site.last_word(f"GET {DELTA} HTTP/1.1\r\n{fields}\r\n{smuggled}")
        assert_problem(response, status)
        assert response.header("connection") == "close", name
    for line, statuses in BAD_LINES.items():
        response = site.last_word(f"{line}\r\n{HOST}\r\n")
        assert response.status in statuses, line
        assert_problem(response, response.status)
    for begun in NO_HEADS:
        assert_problem(site.last_word(begun), 400, "bad-request")
    assert len(site.upstream.seen) == before


def test_a_request_that_passed_here_before_is_a_loop(site):
    via = site.get(DELTA).header("via")
    assert "branch-17" in via
    looped = site.raw(f"GET {DELTA} HTTP/1.1\r\n{HOST}Via: 1.1 other, {via}\r\n\r\n")
    assert_problem(looped, 508, "loop")
    assert site.raw(f"GET {DELTA} HTTP/1.1\r\n{HOST}Via: 1.1 other\r\n\r\n").status == 200


def test_a_head_that_never_ends_is_timed_out(serve):
    gup, _ = serve(workers=1, listen={"header_timeout": "300ms", "idle_timeout": "400ms"})
    slow = gup.connect()
    slow.send(b"GET /content/x HTTP/1.1\r\nHost: g")
    assert_problem(slow.response(), 408, "request-timeout")
    assert slow.ended()
    idle = gup.connect()
    assert idle.get("/content/none.txt").status == 404
    assert idle.ended()
    said = gup.connect().rest()
    assert not said or b" 408 " in said
