"""Upstreams that are down, slow, wrong or lying: told in time, to everybody at once, never stored."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness.clients import Ended, RawConnection, Response, assert_problem
from harness.processes import free_port
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.swarm import End, Swarm, body_digest
from harness.trees import BIG, DELTA, INDEX, content_path, make_tree, noise, zip_of
from harness.upstreams import Nginx
from harness.waiting import until

LENGTH = 2_000_000
MISSING = "/content/missing.txt"


@dataclass
class Site:
    gup: Gup
    upstream: ScriptedUpstream
    clients: list[RawConnection] = field(default_factory=list)


@contextmanager
def site(folder: Path, *urls: str, cache: dict[str, object] | None = None) -> Iterator[Site]:
    """A service with short timeouts before a scripted upstream (and further ones of lower priority)."""
    with ScriptedUpstream() as upstream:
        upstreams = [
            {
                "url": url,
                "priority": number,
                "connect_timeout": "500ms",
                "read_timeout": "700ms",
                "first_byte_timeout": "700ms",
                "give_up": "2s",
                "health_interval": "0s",
            }
            for number, url in enumerate((upstream.url, *urls))
        ]
        settings = {"upstream": upstreams, "cache": cache or {}}
        with Gup(folder / "cache", settings=settings) as gup:
            yield Site(gup, upstream)


def asked_at_once(gup: Gup, path: str, count: int = 20) -> tuple[list[Response], float]:
    """`count` clients ask at the same moment; their answers and the seconds until the last had one."""
    connections = [gup.connect() for _ in range(count)]
    began = time.monotonic()
    try:
        for connection in connections:
            connection.ask(path)
        return [connection.response() for connection in connections], time.monotonic() - began
    finally:
        for connection in connections:
            connection.close()


def assert_nothing_kept(gup: Gup) -> None:
    assert gup.bodies() == {}


@pytest.mark.parametrize(("status", "slug"), [(404, "upstream-not-found"), (410, "upstream-gone")])
def test_a_404_is_passed_on_and_kept_for_all_workers(tmp_path, status, slug):
    with site(tmp_path, cache={"negative_ttl": "3s"}) as at:
        at.upstream.answer(MISSING, Answer(b"no", status))
        began = time.monotonic()
        responses, _ = asked_at_once(at.gup, MISSING, 40)
        for response in responses:
            assert_problem(response, status, slug)
        for _ in range(10):
            assert at.gup.get(MISSING).status == status
        assert time.monotonic() - began < 3.0, "the machine was too slow for this test"
        assert len(at.upstream.requests(MISSING)) == 1
        until(
            lambda: at.gup.get(MISSING).status == status and len(at.upstream.requests(MISSING)) == 2,
            "it is asked for again after negative_ttl",
        )
        at.upstream.answer(MISSING, Answer(b"now it is here", etag='"n"'))
        until(lambda: at.gup.get(MISSING).body == b"now it is here", "it is found when it is there")


def test_a_missing_delta_is_asked_for_once_a_spelling(tmp_path):
    with site(tmp_path) as at:
        responses, _ = asked_at_once(at.gup, DELTA, 30)
        assert {response.status for response in responses} == {404}
        asked = [seen.path for seen in at.upstream.requests()]
        assert len(asked) == len(set(asked)) <= 3


def reset_head(_: Gate) -> Answer:
    return Answer(reset_at=-1)


def never(gate: Gate) -> Answer:
    return Answer(b"late", head_gate=gate)


def code(status: int) -> Callable[[Gate], Answer]:
    return lambda _: Answer(b"oops", status)


@pytest.mark.parametrize(
    ("answer", "status", "slug"),
    [
        (never, 504, "upstream-timeout"),
        (code(500), 502, "upstream-error"),
        pytest.param(code(503), 502, "upstream-error", marks=pytest.mark.long),
        (code(403), 502, "upstream-refused"),
        (code(204), 502, ""),
        pytest.param(code(206), 502, "", marks=pytest.mark.long),
        pytest.param(code(304), 502, "", marks=pytest.mark.long),
        (code(302), 502, ""),
        pytest.param(code(599), 502, "upstream-error", marks=pytest.mark.long),
        (reset_head, 502, "upstream-unreachable"),
    ],
    ids=["silent", "500", "503", "403", "204", "206", "304", "302", "599", "reset"],
)
def test_a_failing_upstream_is_told_at_once_to_all(tmp_path, answer, status, slug):
    gate = Gate()
    with site(tmp_path, cache={"error_ttl": "20s"}) as at:
        at.upstream.answer(DELTA, answer(gate))
        responses, seconds = asked_at_once(at.gup, DELTA)
        for response in responses:
            document = assert_problem(response, status)
            if slug == "upstream-unreachable":  # no connection, and none that answers, are alike to a client
                assert str(document["type"]).rpartition(":")[2] in (slug, "upstream-error")
            else:
                assert_problem(response, status, slug)
            assert int(response.header("retry-after") or "0") >= 1
        # three tries of 0.7 s, `give_up` 2 s: one wait for all, not one each
        assert seconds < 5
        asked = len(at.upstream.requests(DELTA))
        assert 1 <= asked <= 4
        # who comes later is answered at once, and nobody asks the upstream again
        responses, seconds = asked_at_once(at.gup, DELTA)
        assert {response.status for response in responses} == {status}
        assert seconds < 1
        assert len(at.upstream.requests(DELTA)) == asked
        assert_nothing_kept(at.gup)
        metrics = at.gup.metrics()
        assert metrics("gup_requests_total", result="error", code=str(status)) == 40
        assert metrics("gup_fills_total", outcome="failed") == 1
        gate.open()


def test_an_upstream_that_is_down(tmp_path):
    settings = {"upstream": [{"url": f"http://127.0.0.1:{free_port()}", "give_up": "2s"}]}
    with Gup(tmp_path / "cache", settings=settings) as gup:
        responses, seconds = asked_at_once(gup, DELTA)
        for response in responses:
            assert_problem(response, 502, "upstream-unreachable")
            assert int(response.header("retry-after") or "0") >= 1
        assert seconds < 5
        assert gup.metric("gup_upstream_requests_total", outcome="unreachable") >= 1


def test_an_error_stands_no_longer_than_error_ttl(tmp_path):
    with site(tmp_path, cache={"error_ttl": "300ms"}) as at:
        at.upstream.answer(DELTA, Answer(b"oops", 500))
        assert at.gup.get(DELTA).status == 502
        at.upstream.answer(DELTA, Answer(noise("d", 1000), etag='"d"'))
        until(lambda: at.gup.get(DELTA).body == noise("d", 1000), "it is served when the upstream recovers")


BAD_BODIES: dict[str, Answer] = {
    "empty": Answer(b""),
    "html": Answer(b"<html>log in</html>", content_type="text/html; charset=utf-8"),
    "html in disguise": Answer(b"<html>log in</html>" * 100, content_type="Text/HTML"),
    "gzip": Answer(noise("gzip", 5000), fields=(("Content-Encoding", "gzip"),)),
}


def path_of(number: int, file: str = "full.zip") -> str:
    """A path of its own for each case: one service tries them all."""
    return content_path(file, revision=f"2608{number:02}001")


def test_a_head_that_cannot_be_content_is_502(tmp_path):
    with site(tmp_path, cache={"error_ttl": "20s"}) as at:
        for number, (name, answer) in enumerate(BAD_BODIES.items()):
            path = path_of(number, "xdelta.dax")
            at.upstream.answer(path, answer)
            responses, _ = asked_at_once(at.gup, path)
            for response in responses:
                assert_problem(response, 502, "upstream-bad-body")
                assert response.header("retry-after") is not None, name
            assert len(at.upstream.requests(path)) <= 3, name
            metrics = at.gup.metrics()
            assert metrics("gup_upstream_requests_total", outcome="rejected") >= number + 1, name
            assert metrics("gup_fills_total", outcome="failed") == number + 1, name
            at.gup.wait_log(f"2608{number:02}001")
        assert_nothing_kept(at.gup)


SHORT = zip_of("short", LENGTH)
BAD_TAILS: dict[str, Answer] = {
    "short": Answer(SHORT, announced=LENGTH, close_at=LENGTH // 2),
    "short by one": Answer(SHORT, announced=LENGTH, close_at=LENGTH - 1),
    "reset": Answer(SHORT, reset_at=LENGTH // 2),
    "cut chunks": Answer(SHORT, chunked=True, close_at=LENGTH // 2),
    "no chunks": Answer(SHORT, chunked=True, garbage_at=LENGTH // 2),
    "cut without length": Answer(SHORT, framed=False, close_at=LENGTH // 2),
    "longer than announced": Answer(SHORT, announced=LENGTH - 1000),
    "no zip": Answer(noise("no zip", LENGTH)),
    "zip with a tail": Answer(SHORT[:-22] + b"x" * 22),
}


def test_a_body_that_ends_wrong_is_never_a_complete_200(tmp_path):
    # the same answer for ever, no ranges: nothing can be resumed
    with site(tmp_path, cache={"error_ttl": "30s"}) as at:
        paths = {name: path_of(number) for number, name in enumerate(BAD_TAILS)}
        for name, path in paths.items():
            at.upstream.answer(path, Answer(**{**_fields(BAD_TAILS[name]), "ranges": False}))
        for name, path, response in _answers(at.gup, paths, 4):
            if response is None:
                continue  # the connection was cut before a head
            assert not (response.status == 200 and response.complete), (name, response.fields)
            if response.status == 200:
                assert response.reset, f"{name}: a clean end may look like a complete body"
                assert BAD_TAILS[name].body.startswith(response.body), name
            else:
                assert response.status in (502, 504), (name, path)
        at.gup.wait_metric(0, "gup_fills_in_progress")
        assert_nothing_kept(at.gup)
        assert at.gup.metric("gup_fills_total", outcome="failed") >= len(paths)
        for name, path in paths.items():
            assert at.gup.get(path).status in (502, 504), name
            at.gup.wait_log(path.split("/")[3])
        assert "Traceback" not in at.gup.log


def _fields(answer: Answer) -> dict[str, object]:
    return {name: getattr(answer, name) for name in Answer.__slots__}


def _answers(gup: Gup, paths: dict[str, str], count: int) -> list[tuple[str, str, Response | None]]:
    """What `count` clients of each path get, all asking at once; None where there was no head."""
    connections = [(name, path, gup.connect()) for name, path in paths.items() for _ in range(count)]
    found: list[tuple[str, str, Response | None]] = []
    try:
        for _, path, connection in connections:
            connection.ask(path)
        for name, path, connection in connections:
            try:
                found.append((name, path, connection.response()))
            except Ended:
                found.append((name, path, None))
    finally:
        for _, _, connection in connections:
            connection.close()
    return found


def get_through(at: Site, gate: Gate, body: bytes) -> Response:
    """GET BIG: when the client has the first half, the gate is opened, where the upstream breaks off."""
    with at.gup.connect() as client:
        client.ask(BIG)
        response = client.head()
        assert response.status == 200
        first = client.read(LENGTH // 2)
        assert first == body[: LENGTH // 2]
        gate.open()
        rest = client.rest_of(response, LENGTH // 2)
        response.body = first + rest
        return response


@pytest.mark.parametrize(
    "cut", [{"reset_at": LENGTH // 2}, {"announced": LENGTH, "close_at": LENGTH // 2}], ids=["reset", "end"]
)
def test_a_transfer_that_is_cut_is_resumed_and_clients_notice_nothing(tmp_path, cut):
    body = zip_of("resumed", LENGTH)
    gate = Gate()
    with site(tmp_path) as at, Swarm(at.gup.data) as swarm:
        first = Answer(body, etag='"r"', gates=((LENGTH // 2, gate),), **cut)
        at.upstream.answer(BIG, first, Answer(body, etag='"r"'))
        clients = swarm.add(30, BIG)
        swarm.wait_for(lambda: all(c.body_bytes == LENGTH // 2 for c in clients), "all have the half", 10)
        gate.open()
        swarm.wait(15)
        assert {(c.end, c.digest) for c in clients} == {(End.COMPLETE, body_digest(body))}
        before, second = at.upstream.requests(BIG)
        assert (before.status, second.status) == (200, 206)
        assert second.header("if-range") == '"r"'
        assert second.body_bytes <= LENGTH // 2 + (1 << 20)
        at.gup.wait_stored("full.zip")
        assert at.gup.metric("gup_fill_resumes_total", reason="cut") == 1


def test_an_upstream_that_stalls_is_resumed(tmp_path):
    body, gate = zip_of("resumed", LENGTH), Gate()
    with site(tmp_path) as at, at.gup.connect() as client:
        at.upstream.answer(
            BIG, Answer(body, etag='"r"', gates=((LENGTH // 2, gate),)), Answer(body, etag='"r"')
        )
        response = client.get(BIG)
        assert (response.complete, response.body == body) == (True, True)
        assert at.upstream.requests(BIG)[1].status == 206
        assert at.gup.metric("gup_fill_resumes_total", reason="timeout") == 1
        gate.open()


def test_a_second_upstream_continues_where_the_first_ended(tmp_path):
    body, gate = zip_of("resumed", LENGTH), Gate()
    cut = Answer(body, etag='"1"', gates=((LENGTH // 2, gate),), reset_at=LENGTH // 2)
    with ScriptedUpstream() as second, site(tmp_path, second.url) as at:
        at.upstream.answer(BIG, cut, Answer(b"down", 503))
        second.answer(BIG, Answer(body, etag='"2"'))
        response = get_through(at, gate, body)
        assert (response.status, response.complete, response.body == body) == (200, True, True)
        at.gup.wait_stored("full.zip")
        assert at.gup.get(BIG).etag == response.etag
        assert [seen.status for seen in second.requests(BIG)] in ([206], [200])
        assert at.gup.metric("gup_fill_resumes_total", reason="failover") >= 1


def test_one_that_hangs_in_mid_body_is_asked_after_the_others(tmp_path):
    """Each of its tries would cost the clients `read_timeout` once more."""
    body = zip_of("hangs", LENGTH)
    with ScriptedUpstream() as second, site(tmp_path, second.url) as at:
        at.upstream.answer(BIG, Answer(body, etag='"1"', stall_after=LENGTH // 2))
        second.answer(BIG, Answer(body, etag='"1"'))
        response = at.gup.get(BIG)
        assert (response.status, response.complete, response.body == body) == (200, True, True)
        assert len(at.upstream.requests(BIG)) == 1
        assert [seen.status for seen in second.requests(BIG)] == [206]
        assert at.gup.metric("gup_fill_resumes_total", reason="failover") == 1


def test_a_second_upstream_is_asked_when_the_first_is_down(tmp_path):
    with ScriptedUpstream() as second:
        second.answer(DELTA, Answer(noise("d", 1000), etag='"2"'))
        down = {"url": f"http://127.0.0.1:{free_port()}", "priority": 0, "connect_timeout": "500ms"}
        settings = {"upstream": [down, {"url": second.url, "priority": 1}]}
        with Gup(tmp_path / "cache", settings=settings) as gup:
            assert gup.get(DELTA).body == noise("d", 1000)
            assert len(second.requests(DELTA)) == 1


@pytest.mark.parametrize(
    "liar",
    [
        Answer(SHORT, etag='"r"', range_shift=100_000),
        Answer(SHORT, etag='"r"', range_body=noise("changed", LENGTH)),
        Answer(noise("other", LENGTH), etag='"other"'),
        Answer(SHORT[:-1000], etag='"r"'),
    ],
    ids=["wrong range", "changed bytes", "other content", "other length"],
)
def test_a_resume_with_other_bytes_reaches_nobody(tmp_path, liar):
    with site(tmp_path) as at:
        gate = Gate()
        cut = Answer(SHORT, etag='"r"', gates=((LENGTH // 2, gate),), reset_at=LENGTH // 2)
        at.upstream.answer(BIG, cut, liar)
        response = get_through(at, gate, SHORT)
        assert response.status == 200
        if response.complete:
            assert response.body == SHORT
        else:
            assert response.reset
            assert SHORT.startswith(response.body)
        until(lambda: at.gup.metric("gup_fills_in_progress") == 0, "the fill ended", 10)
        if at.gup.stored("full.zip"):
            assert at.gup.get(BIG).body == SHORT


def test_whole_answers_to_a_resume_are_compared_and_skipped(tmp_path):
    """An upstream without ranges: read from 0, bytes compared, counted as wasted, and the fill goes on."""
    body, gate = zip_of("resumed", LENGTH), Gate()
    cut = Answer(body, etag='"r"', gates=((LENGTH // 2, gate),), reset_at=LENGTH // 2)
    with site(tmp_path) as at:
        at.upstream.answer(BIG, cut, Answer(body, etag='"r"', ranges=False))
        response = get_through(at, gate, body)
        assert (response.complete, response.body == body) == (True, True)
        at.gup.wait_stored("full.zip")
        assert at.gup.metric("gup_upstream_wasted_bytes_total") >= LENGTH // 2 - (1 << 16)


def test_redirects_and_cookies_are_not_followed(tmp_path):
    with ScriptedUpstream() as elsewhere, site(tmp_path) as at:
        elsewhere.answer(DELTA, Answer(b"stolen"))
        at.upstream.answer(
            DELTA, Answer(b"", 302, fields=(("Location", elsewhere.url + DELTA), ("Set-Cookie", "a=b")))
        )
        assert at.gup.get(DELTA).status == 502
        assert elsewhere.seen == []
        at.upstream.answer("/content/x.txt", Answer(b"fine", etag='"x"', fields=(("Set-Cookie", "a=b"),)))
        response = at.gup.get("/content/x.txt", {"Cookie": "c=d", "Authorization": "Basic x"})
        assert response.header("set-cookie") is None
        seen = at.upstream.requests("/content/x.txt")[0]
        assert (seen.header("cookie"), seen.header("authorization")) == (None, None)
        assert seen.header("accept-encoding") == "identity"


def test_a_kept_connection_that_died_is_no_error(tmp_path):
    """The upstream restarts between two requests: what was pooled is dead, and no client sees it."""
    tree = make_tree(tmp_path / "tree", big_bytes=100_000)
    with Nginx(tree, tmp_path / "nginx") as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        assert gup.get(DELTA).status == 200
        for path in (BIG, INDEX):
            upstream.stop()
            upstream.restart()
            for pid in gup.workers():
                with gup.connect_to(pid) as client:
                    response = client.get(path)
                    assert (response.status, response.body) == (200, tree.body(path))


def test_a_client_that_takes_nothing_is_cut(tmp_path):
    body = zip_of("takes nothing", 20_000_000)
    with ScriptedUpstream() as upstream:
        upstream.answer(BIG, Answer(body, etag='"a"'))
        settings = {"listen": {"write_timeout": "300ms"}}
        with Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup:
            with RawConnection(gup.data, receive_buffer_bytes=65_536) as lazy:
                lazy.ask(BIG)
                lazy.head()
                gup.wait_stored("full.zip")
                gup.wait_metric(0, "gup_client_connections")
                assert len(lazy.rest()) < len(body)
            assert gup.get(BIG).body == body
