"""Upstreams that are down, slow, wrong or lying: told in time, to everybody at once, never stored."""

import time

from harness.clients import Ended, Response, assert_problem
from harness.content import BIG, DELTA, content_path, noise, zip_of
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer, Gate, ScriptedUpstream

LENGTH = 2_000_000
HALF = LENGTH // 2
MISSING = "/content/missing.txt"
QUICK = {
    "connect_timeout": "5s",
    "read_timeout": "1s",
    "first_byte_timeout": "1s",
    "give_up": "2s",
    "health_interval": "0s",
}
SHORT = zip_of("short", LENGTH)


def path_of(number: int, file: str = "full.zip") -> str:
    """A path of its own for each case: one service tries them all."""
    return content_path(file, revision=f"2608{number:02}001")


def at_once(gup: Gup, paths: list[str]) -> tuple[list[Response | None], float]:
    """What clients get that all ask at the same moment, None where there was no head; and the seconds."""
    connections, found = [gup.connect() for _ in paths], []
    began = time.monotonic()
    for connection, path in zip(connections, paths, strict=True):
        connection.ask(path)
    for connection in connections:
        try:
            found.append(connection.response())
        except Ended:
            found.append(None)
        connection.close()
    return found, time.monotonic() - began


def test_a_404_or_410_is_passed_on_and_kept_for_all_workers(serve):
    gup, upstream = serve(each=QUICK, cache={"negative_ttl": "3s"})
    for number, (status, slug) in enumerate(((404, "upstream-not-found"), (410, "upstream-gone"))):
        path = path_of(number, "missing.dax")
        upstream.answer(path, Answer(b"no", status))
        began = time.monotonic()
        for response in at_once(gup, [path] * 50)[0]:
            assert_problem(response, status, slug)
        assert gup.get(path).status == status
        assert time.monotonic() - began < 3.0, "the machine was too slow for this test"
        assert len(upstream.requests(path)) == 1
    assert [file.name for file in (gup.cache_dir / "partial").iterdir()] == ["claims"], "it makes no file"
    upstream.answer(path, Answer(b"now it is here", etag='"n"'))
    until(lambda: gup.get(path).body == b"now it is here", "it is asked for again after negative_ttl")
    assert {response.status for response in at_once(gup, [DELTA] * 30)[0]} == {404}
    asked = [seen.path for seen in upstream.requests() if "xdelta" in seen.path]
    assert len(asked) == len(set(asked)) <= 3, "once a spelling"


def test_a_failing_upstream_is_told_at_once_to_all(serve):
    gate = Gate()
    failing = {
        "500": (Answer(b"oops", 500), 502, "upstream-error"),
        "403": (Answer(b"oops", 403), 502, "upstream-refused"),
        "401": (Answer(b"oops", 401), 502, "upstream-refused"),
        "206": (Answer(b"oops", 206), 502, ""),
        "302": (Answer(b"oops", 302), 502, "upstream-refused"),
        "reset": (Answer(reset_at=-1), 502, "upstream-error"),
        "empty": (Answer(b""), 502, "upstream-bad-body"),
        "disguise": (Answer(b"<html>" * 100, content_type="Text/HTML"), 502, "upstream-bad-body"),
        "gzip": (Answer(b"x" * 99, fields=(("Content-Encoding", "gzip"),)), 502, "upstream-bad-body"),
        "silent": (Answer(b"late", head_gate=gate), 504, "upstream-timeout"),
    }
    gup, upstream = serve(each=QUICK, cache={"error_ttl": "50s"})
    for number, (name, (answer, status, slug)) in enumerate(failing.items(), 1):
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
        assert gup.metric("gup_fills_total", outcome="failed") == number, name
        gup.wait_log(f"2608{number:02}001")
    assert gup.bodies() == {}
    assert gup.metric("gup_requests_total", result="error") == 20 * len(failing)
    assert gup.metric("gup_upstream_requests_total", outcome="rejected") >= 3
    gate.open()


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


def test_a_body_that_ends_wrong_is_never_a_complete_200(serve):
    paths = [path_of(number) for number in range(len(BAD_TAILS))]
    answers = dict(zip(paths, BAD_TAILS.values(), strict=True))
    gup, _ = serve(answers, each=QUICK, cache={"error_ttl": "30s"})
    asked = paths * 3
    for path, response in zip(asked, at_once(gup, asked)[0], strict=True):
        if response is None or response.status in (502, 504):
            continue
        assert (response.status, response.complete) == (200, False), (path, response.fields)
        assert response.reset, f"{path}: a clean end may look like a complete body"
        assert answers[path].body.startswith(response.body), path
    gup.wait_metric(0, "gup_fills_in_progress")
    assert gup.bodies() == {}
    assert gup.metric("gup_fills_total", outcome="failed") >= len(paths)
    for path in paths:
        assert gup.get(path).status in (502, 504), path
        gup.wait_log(path.split("/")[3])


def test_redirects_and_cookies_are_not_followed(serve):
    cookie = ("Set-Cookie", "a=b")
    with ScriptedUpstream() as elsewhere:
        elsewhere.answer(DELTA, b"stolen")
        moved = Answer(b"", 302, fields=(("Location", elsewhere.url + DELTA), cookie))
        gup, upstream = serve({DELTA: moved, MISSING: Answer(b"fine", etag='"x"', fields=(cookie,))})
        assert gup.get(DELTA).status == 502
        assert elsewhere.seen == []
    response = gup.get(MISSING, {"Cookie": "c=d", "Authorization": "Basic x"})
    assert response.header("set-cookie") is None
    seen = upstream.requests(MISSING)[0]
    assert (seen.header("cookie"), seen.header("authorization")) == (None, None)
    assert seen.header("accept-encoding") == "identity"


def test_a_client_that_takes_nothing_is_cut(serve):
    body = zip_of("takes nothing", 20_000_000)
    gup, _ = serve({BIG: body}, listen={"write_timeout": "300ms"})
    lazy = gup.connect(receive_buffer_bytes=65_536)
    lazy.begin(BIG)
    gup.wait_stored(BIG)
    gup.wait_metric(0, "gup_client_connections")
    assert len(lazy.rest()) < len(body)
    gup.serves(BIG, body)
