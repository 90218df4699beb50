import http.client
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.errors import PROBLEMS, Problem
from gup.server.problem import clean, field_lines, render, render_parts, status_line

DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
VIA = "1.1 branch (gup)"


class Wire:
    """As much of a socket as http.client reads from."""

    def __init__(self, text):
        self.makefile = lambda _mode: io.BytesIO(text)


def received(problem, *, instance=None, head_only=False, keep_alive=True):
    wire = render(problem, date=DATE, via=VIA, instance=instance, head_only=head_only, keep_alive=keep_alive)
    response = http.client.HTTPResponse(Wire(wire), method="HEAD" if head_only else "GET")
    response.begin()
    return response, response.read()


@pytest.mark.parametrize("slug", PROBLEMS)
def test_every_problem_can_be_told(slug):
    response, body = received(Problem(slug, "Why."), instance="/content/a?b")
    assert response.status == PROBLEMS[slug].status
    assert response.reason
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["Content-Length"] == str(len(body))
    assert response.headers["Cache-Status"] == f"gup; detail={slug}"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Date"] == DATE
    assert response.headers["Via"] == VIA
    assert response.headers["Retry-After"] is None
    assert json.loads(body) == {
        "type": f"urn:gup:problem:{slug}",
        "title": PROBLEMS[slug].title,
        "status": PROBLEMS[slug].status,
        "detail": "Why.",
        "instance": "/content/a?b",
    }


@pytest.mark.parametrize(("keep_alive", "connection"), [(True, "keep-alive"), (False, "close")])
def test_a_problem_says_whether_the_connection_stays(keep_alive, connection):
    response, _ = received(Problem("not-content", "No."), keep_alive=keep_alive)
    assert response.headers["Connection"] == connection


@pytest.mark.parametrize(("seconds", "told"), [(0, "0"), (0.2, "1"), (2, "2"), (2.0001, "3"), (-1, "0")])
def test_nobody_comes_back_too_early(seconds, told):
    response, _ = received(Problem("overloaded", "Full.", retry_after_seconds=seconds))
    assert response.headers["Retry-After"] == told


def test_a_problems_own_fields_are_told():
    problem = Problem(
        "method-not-allowed", "No.", headers=(("Allow", "GET, HEAD"), ("X", "a\r\nSet-Cookie: b"))
    )
    response, _ = received(problem)
    assert response.headers["Allow"] == "GET, HEAD"
    assert response.headers["X"] == "a  Set-Cookie: b"
    assert response.headers["Set-Cookie"] is None


def test_extensions_are_members_that_replace_no_standard_one():
    problem = Problem("rule-refused", "No.", extensions={"rule": "version", "status": 200, "odd": {1}})
    _, body = received(problem)
    document = json.loads(body)
    assert document["rule"] == "version"
    assert document["status"] == 403
    assert document["odd"] == "{1}"
    assert "instance" not in document


def test_the_answer_to_head_is_the_head_alone():
    problem = Problem("not-content", "No.")
    head, body = render_parts(problem, date=DATE, via=VIA, instance=None, keep_alive=True)
    asked = {"date": DATE, "via": VIA, "instance": None, "keep_alive": True}
    assert render(problem, head_only=True, **asked) == head
    assert render(problem, head_only=False, **asked) == head + body
    assert head.endswith(b"\r\n\r\n")
    response, nothing = received(problem, head_only=True)
    assert response.headers["Content-Length"] == str(len(body))
    assert nothing == b""


def test_status_lines():
    assert status_line(206) == b"HTTP/1.1 206 Partial Content\r\n"


@given(st.text())
def test_no_value_ends_its_line(value):
    line = field_lines([("X", value)])
    assert line.startswith(b"X: ")
    assert line.endswith(b"\r\n")
    assert not set(line[:-2]) & {0, 10, 13}
    assert len(clean(value)) == len(value)


@given(st.text(), st.text())
def test_any_words_are_told(detail, instance):
    _, body = received(Problem("bad-path", detail), instance=instance)
    document = json.loads(body)
    assert (document["detail"], document["instance"]) == (detail, instance)
