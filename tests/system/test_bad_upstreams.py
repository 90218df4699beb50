"""Upstreams that are down, slow, wrong or lying: told in time, to everybody at once, never stored."""

import time

import pytest
from harness.clients import Ended, Response, assert_problem, fetch
from harness.commands import on
from harness.content import BIG, DELTA, content_path, name_of, noise, zip_of
from harness.internals import Routes, Variant
from harness.processes import quiet_clock, until
from harness.service import Gup
from harness.upstreams import Answer, Gate, Over, RawUpstream, Request, ScriptedUpstream, ok

LENGTH = 2_000_000
HALF = LENGTH // 2
OTHER = "/content/other.txt"
QUICK = {
    "connect_timeout": "5s",
    "read_timeout": "1s",
    "first_byte_timeout": "1s",
    "give_up": "2s",
    "health_interval": "0s",
}
RAW = {"connect_timeout": "5s", "read_timeout": "500ms", "health_interval": "0s"}
SHARED = {"each": QUICK, "cache": {"negative_ttl": "5s", "error_ttl": "50s"}}
SHORT = zip_of("short", LENGTH)
SILENT = Gate()


def path_of(number: int, file: str = "full.zip") -> str:
    """A path of its own for each case: one service tries them all."""
    return content_path(file, revision=f"26{number // 100 + 1:02}{number % 100 + 1:02}001")


def at_once(gup: Gup, paths: list[str]) -> tuple[list[Response | None], float]:
    """What clients get that all ask at the same moment, None where there was no head; and the seconds."""
    connections, found = [gup.connect() for _ in paths], []
    began = quiet_clock()
    for connection, path in zip(connections, paths, strict=True):
        connection.ask(path)
    for connection in connections:
        try:
            found.append(connection.response())
        except Ended:
            found.append(None)
        connection.close()
    return found, quiet_clock() - began


@pytest.mark.parametrize(("status", "slug"), [(404, "upstream-not-found"), (410, "upstream-gone")])
def test_a_404_or_410_is_passed_on_and_kept_for_all_workers(shared, status, slug):
    gup, upstream = shared
    path, unknown = path_of(status, "missing.dax"), path_of(status, "unknown.dax")
    upstream.answer(path, Answer(b"no", status))
    began = time.monotonic()
    for response in at_once(gup, [path] * 50)[0]:
        assert_problem(response, status, slug)
    assert gup.get(path).status == status
    assert time.monotonic() - began < 5.0, "the machine was too slow for this test"
    assert len(upstream.requests(path)) == 1
    assert not list((gup.cache_dir / "partial").glob(f"{Routes().route(path).key(Variant()).id}.*"))
    upstream.answer(path, Answer(b"now it is here", etag='"n"'))
    until(lambda: gup.get(path).body == b"now it is here", "it is asked for again after negative_ttl")
    assert {response.status for response in at_once(gup, [unknown] * 30)[0]} == {404}
    asked = [seen.path for seen in upstream.requests(unknown)]
    assert len(asked) == len(set(asked)) <= 3, "once a spelling"


FAILING = {
    "500": (Answer(b"oops", 500), 502, "upstream-error"),
    "403": (Answer(b"oops", 403), 502, "upstream-refused"),
    "401": (Answer(b"oops", 401), 502, "upstream-refused"),
    "206": (Answer(b"oops", 206), 502, ""),
    "302": (Answer(b"oops", 302), 502, "upstream-refused"),
    "reset": (Answer(reset_at=-1), 502, "upstream-error"),
    "empty": (Answer(b""), 502, "upstream-bad-body"),
    "disguise": (Answer(b"<html>" * 100, content_type="Text/HTML"), 502, "upstream-bad-body"),
    "gzip": (Answer(b"x" * 99, fields=(("Content-Encoding", "gzip"),)), 502, "upstream-bad-body"),
    "silent": (Answer(b"late", head_gate=SILENT), 504, "upstream-timeout"),
}


def test_a_failing_upstream_is_told_at_once_to_all(shared):
    gup, upstream = shared
    before = gup.metrics()
    for number, (name, (answer, status, slug)) in enumerate(FAILING.items(), 1):
        path = path_of(number, "xdelta1_To_2.dax")
        upstream.answer(path, answer)
        responses, seconds = at_once(gup, [path] * 10)
        for response in responses:
            assert_problem(response, status, slug)
            assert int(response.header("retry-after") or "0") >= 1, name
        assert seconds < 6, "three tries of 1 s, `give_up` 2 s: one wait for all, not one each"
        asked = len(upstream.requests(path))
        assert 1 <= asked <= 4, name
        responses, seconds = at_once(gup, [path] * 10)
        assert {response.status for response in responses} == {status}, name
        assert seconds < 1, "who comes later is answered at once"
        assert len(upstream.requests(path)) == asked, name
        failed = gup.metric("gup_fills_total", outcome="failed")
        assert failed - before("gup_fills_total", outcome="failed") == number, name
        gup.wait_log(path.split("/")[3])
        assert not any(path.split("/")[3] in key for key in gup.bodies())
    errors = gup.metric("gup_requests_total", result="error") - before("gup_requests_total", result="error")
    assert errors == 20 * len(FAILING)
    assert gup.metric("gup_upstream_requests_total", outcome="rejected") >= 3
    SILENT.open()


def test_an_error_stands_no_longer_than_error_ttl(serve):
    gup, upstream = serve({DELTA: Answer(b"oops", 500)}, each=QUICK, cache={"error_ttl": "300ms"})
    assert gup.get(DELTA).status == 502
    upstream.answer(DELTA, noise("d", 1000))
    until(lambda: gup.get(DELTA).body == noise("d", 1000), "it is served when the upstream recovers")


BAD_TAILS = {  # no ranges, and the same answer for ever: nothing can be resumed
    "short": Answer(SHORT, announced=LENGTH, close_at=HALF, ranges=False),
    "reset": Answer(SHORT, reset_at=HALF, ranges=False),
    "cut chunks": Answer(SHORT, chunked=True, close_at=HALF, ranges=False),
    "cut without length": Answer(SHORT, framed=False, close_at=HALF, ranges=False),
    "longer than announced": Answer(SHORT, announced=LENGTH - 1000, ranges=False),
    "zip with a tail": Answer(SHORT[:-22] + b"x" * 22, ranges=False),
}


def test_a_body_that_ends_wrong_is_never_a_complete_200(shared):
    gup, upstream = shared
    answers = {path_of(20 + number): answer for number, answer in enumerate(BAD_TAILS.values())}
    for path, answer in answers.items():
        upstream.answer(path, answer)
    before, asked = gup.metric("gup_fills_total", outcome="failed"), list(answers) * 3
    for path, response in zip(asked, at_once(gup, asked)[0], strict=True):
        if response is None or response.status in (502, 504):
            continue
        assert (response.status, response.complete) == (200, False), (path, response.fields)
        assert response.reset, f"{path}: a clean end may look like a complete body"
        assert answers[path].body.startswith(response.body), path
    gup.wait_metric(0, "gup_fills_in_progress")
    assert not [path for path in answers if any(path.split("/")[3] in key for key in gup.bodies())]
    assert gup.metric("gup_fills_total", outcome="failed") - before >= len(answers)
    for path in answers:
        assert gup.get(path).status in (502, 504), path
        gup.wait_log(path.split("/")[3])


def test_redirects_and_cookies_are_not_followed(shared):
    gup, upstream = shared
    cookie = ("Set-Cookie", "a=b")
    with ScriptedUpstream() as elsewhere:
        elsewhere.answer(DELTA, b"stolen")
        upstream.answer(DELTA, Answer(b"", 302, fields=(("Location", elsewhere.url + DELTA), cookie)))
        told = str(assert_problem(gup.get(DELTA), 502, "upstream-refused")["detail"])
        assert told.endswith(f"set upstream.url to the final address (Location: {elsewhere.url}{DELTA})"), (
            told
        )
        gup.wait_log(f"Location: {elsewhere.url}")
        assert elsewhere.seen == []
    upstream.answer(OTHER, Answer(b"fine", etag='"x"', fields=(cookie,)))
    response = gup.get(OTHER, {"Cookie": "c=d", "Authorization": "Basic x"})
    assert response.header("set-cookie") is None
    seen = upstream.requests(OTHER)[0]
    assert (seen.header("cookie"), seen.header("authorization")) == (None, None)
    assert seen.header("accept-encoding") == "identity"


def test_neither_side_s_cache_directives_are_heeded_and_none_is_passed_on(shared):
    gup, upstream = shared
    path, directives = path_of(300), {"Cache-Control": "no-store, max-age=0", "Expires": "0", "Vary": "*"}
    upstream.answer(
        path, Answer(SHORT, etag='"d"', fields=tuple({**directives, "Pragma": "no-cache"}.items()))
    )
    gup.serves(path, SHORT)
    gup.wait_stored(path)
    asks = (
        {},
        {"Cache-Control": "no-cache"},
        {"Cache-Control": "no-store, max-age=0"},
        {"Pragma": "no-cache"},
    )
    for headers in asks:
        answer = gup.serves(path, SHORT, headers)
        assert answer.header("cache-status") == "gup; hit", headers
        assert [name for name in (*directives, "Pragma") if answer.header(name)] == []
    (asked,) = upstream.requests(path)
    assert [name for name in ("cache-control", "pragma") if asked.header(name)] == []


def test_a_client_that_takes_nothing_is_cut(serve):
    body = zip_of("takes nothing", 20_000_000)
    gup, _ = serve({BIG: body}, listen={"write_timeout": "300ms"})
    lazy = gup.connect(receive_buffer_bytes=65_536)
    lazy.begin(BIG)
    gup.wait_stored(BIG)
    gup.wait_metric(0, "gup_client_connections")
    assert len(lazy.rest()) < len(body)
    gup.serves(BIG, body)


ANSI, HTML, LONG = "\x1b[2J\x1b]0;owned\x07", "<script>alert(1)</script>", "y" * 100_000
HOSTILE = {
    "control bytes": Answer(b"x", fields=(("Content-Encoding", f"g{ANSI}{HTML}\xff"),)),
    "invalid UTF-8": Answer(b"x", content_type=f"text/html; {HTML}; \xff\xfe"),
    "100 kB": Answer(b"x", fields=(("X-Long", LONG),)),
    "4 kB": Answer(b"x", fields=(("Content-Encoding", HTML + "z" * 4000),)),
    "reason": Answer(b"x", 502, reason=f"{HTML}{ANSI}"),
}


def test_no_output_shows_more_of_what_an_upstream_wrote_than_it_may(serve):
    gup, upstream = serve(workers=1, each=RAW)
    for number, answer in enumerate(HOSTILE.values(), 1):
        path = path_of(number, "full.dax")
        upstream.answer(path, answer)
        told = str(assert_problem(gup.get(path), 502)["detail"])
        assert told.isprintable()
        assert len(told.encode()) <= 512
        failures = until(lambda n=number: len(f := gup.status()["failures"]) >= n and f, "it is heard of")
    shown = {
        "api": str(failures),
        "page": fetch(gup.admin, "/").body.decode(),
        "table": on(gup, "status").stdout,
    }
    gup.stop()
    shown["log"] = gup.log
    assert "failed" in shown["log"]
    for where, text in shown.items():
        assert not [hostile for hostile in ("\x1b", "\x07", "y" * 600, "z" * 600) if hostile in text], where
        lines = [line for line in text.splitlines() if "data-columns" not in line]  # charts: numbers alone
        assert all(len(line) < 2500 for line in lines), where
    assert HTML not in shown["page"]


# --- connections: a client's pause, an end that nobody told, a trickle


def test_a_client_that_pauses_is_not_upstreams_silence(serve):
    """The body is passed through at the client's pace: it stops for longer than read_timeout."""
    body = noise("pass", 8_000_000)
    upstream = RawUpstream(lambda talk: talk.send(ok(body)))
    gup, _ = serve(before=upstream, workers=1, each=RAW, cache={"max_size": "1MB"})
    client, response = gup.begin(path_of(1, "full.dax"), 100_000)
    time.sleep(1.0)  # the case itself
    assert client.finish(response).body == body


def test_an_unsure_end_is_passed_on_as_one_and_told(serve):
    bodies = {"dax": noise("unsure", 500_000), "zip": zip_of("unsure", 500_000)}

    def answer(talk: Request) -> None:
        talk.send(b"HTTP/1.0 200 OK\r\n\r\n" + (bodies[talk.path[-3:]] if talk.method == "GET" else b""))
        raise Over

    gup, _ = serve(before=RawUpstream(answer), workers=1, each=RAW | {"read_timeout": "1s"})
    files = [
        (file, version) for file in (name_of(DELTA), "full.dax", "full.zip") for version in ("1.1", "1.0")
    ]
    for number, (file, version) in enumerate(files):
        path, client = path_of(number, file), gup.connect()
        client.ask(path, version=f"HTTP/{version}")
        response = client.response()
        assert (response.status, response.complete) == (200, False), "no clean end where it is not known"
        assert bodies[path[-3:]].startswith(response.body)
        until(lambda: not gup.parts(), "its part is gone")
        assert_problem(gup.get(path), 502, "upstream-unsure-end")
    assert gup.bodies() == {}
    gup.wait_log("closed the connection, without a Content-Length")
    (alarm,) = until(lambda: gup.alarms("unsure-end"), "the alarm stands")
    assert alarm["text"].startswith("u0 sent 500000 bytes")


def test_a_trickle_gives_its_slot_to_others(serve):
    """A byte per 0.1 s, and one slot for fulls: the next full has it when the trickle is found out."""

    def answer(talk: Request) -> None:
        if not talk.path.endswith("full.zip"):
            talk.send(ok(b"another full"))
            return
        talk.send(ok(noise("t", 100_000))[:20_000])
        while True:
            talk.send(b"x")
            talk.pause(0.1)

    each, limits = RAW | {"min_rate": "1kB/s"}, {"max": 1, "queue_timeout": "20s"}
    gup, _ = serve(before=RawUpstream(answer), workers=1, each=each, fill=limits)
    client, _ = gup.begin(path_of(1))
    began = quiet_clock()
    gup.serves(path_of(2, "full.dax"), b"another full")
    assert quiet_clock() - began < 15
    assert len(client.read(10)) == 10, "whoever reads the trickle still does"
