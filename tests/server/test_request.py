import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gup.errors import PROBLEMS, Problem
from gup.server.request import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_TARGET_BYTES,
    Request,
    check_begun,
    check_method,
    closes,
    find_head_end,
    parse_head,
    skip_leading_newlines,
    too_large,
)

HOST = b"Host: gup\r\n"


def get(*lines, line=b"GET /content/a HTTP/1.1", host=HOST):
    return line + b"\r\n" + host + b"".join(field + b"\r\n" for field in lines) + b"\r\n"


def problem_of(call, *arguments):
    with pytest.raises(Problem) as caught:
        call(*arguments)
    return caught.value


# --- well-formed heads


def test_a_head_is_taken_apart():
    request = parse_head(get(b"User-Agent: \t x y\t ", b"X-Empty:", b"Accept:a", b"ACCEPT: b\xff"))
    assert request == Request(
        method="GET",
        target=b"/content/a",
        minor_version=1,
        headers=(
            ("host", "gup"),
            ("user-agent", "x y"),
            ("x-empty", ""),
            ("accept", "a"),
            ("accept", "b\xff"),
        ),
        keep_alive=True,
    )
    assert request.header("accept") == "a, b\xff"
    assert request.header("x-empty") == ""
    assert request.header("range") is None


@pytest.mark.parametrize(
    ("line", "target"),
    [
        (b"GET /a?b=c HTTP/1.1", b"/a?b=c"),
        (b"HEAD /{a}|\\%zz HTTP/1.1", b"/{a}|\\%zz"),
        (b"GET http://manager:8014/content/a HTTP/1.1", b"http://manager:8014/content/a"),
        (b"GET * HTTP/1.1", b"*"),
        (b"OPTIONS * HTTP/1.1", b"*"),
        (b"CONNECT manager:443 HTTP/1.1", b"manager:443"),
        (b"CONNECT / HTTP/1.1", b"/"),
        (b"GET /#a HTTP/1.1", b"/#a"),
        (b"GET /" + b"a" * (MAX_TARGET_BYTES - 1) + b" HTTP/1.1", b"/" + b"a" * (MAX_TARGET_BYTES - 1)),
    ],
)
def test_targets_are_handed_on_as_they_came(line, target):
    assert parse_head(get(line=line)).target == target


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [
        (b"1.1", None, True),
        (b"1.1", b"keep-alive", True),
        (b"1.1", b"close", False),
        (b"1.1", b"Upgrade, CLOSE", False),
        (b"1.1", b"closed", True),
        (b"1.1", b"clo\xffse,,", True),
        (b"1.0", None, False),
        (b"1.0", b"Keep-Alive", True),
        (b"1.0", b"keep-alive\t, close", False),
    ],
)
def test_the_connection_lives_on_or_not(version, connection, keep_alive):
    fields = [] if connection is None else [b"Connection: " + connection]
    request = parse_head(get(*fields, line=b"GET / HTTP/" + version))
    assert request.keep_alive is keep_alive
    assert request.minor_version == int(version[2:])


def test_a_repeated_connection_field_counts_as_one():
    assert not parse_head(get(b"Connection: keep-alive", b"Connection: close")).keep_alive


@pytest.mark.parametrize(
    "fields",
    [
        (b"Expect: 100-continue",),
        (b"Upgrade: websocket", b"Connection: upgrade"),
        (b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
        (b"Content-Length: 0",),
        (b"Content-Length: 000",),
        (b"X: " + b"a" * 8000,),
        tuple(b"X-%d: y" % number for number in range(MAX_HEADERS - 1)),
    ],
)
def test_harmless_fields_are_harmless(fields):
    request = parse_head(get(*fields))
    assert request.keep_alive
    assert len(request.headers) == len(fields) + 1
    check_method(request)


@pytest.mark.parametrize(
    "host",
    [
        b"a",
        b"a:",
        b"a:80",
        b"10.0.0.1:2967",
        b"[::1]",
        b"[fe80::1]:2967",
        b"b%C3%BCro",
        b"A_b-c.d~!$&'()*+,;=",
    ],
)
def test_hosts_that_are_hosts(host):
    assert parse_head(get(host=b"Host: " + host + b"\r\n")).header("host") == host.decode()


def test_http_1_0_needs_no_host():
    assert parse_head(get(line=b"GET / HTTP/1.0", host=b"")).minor_version == 0


@pytest.mark.parametrize(
    ("head", "plain"),
    [
        (get(), True),
        (get(b"User-Agent: x", b"Connection: close", b"Cache-Control: no-cache"), True),
        (get(line=b"GET / HTTP/1.0"), True),
        (get(line=b"HEAD / HTTP/1.1"), False),
        (get(b"Range: bytes=0-"), False),
        (get(b"IF-RANGE: x"), False),
        (get(b"If-Match: *"), False),
        (get(b"If-None-Match: *"), False),
        (get(b"If-Modified-Since: x"), False),
        (get(b"If-Unmodified-Since: x"), False),
        (get(b"Content-Length: 0"), False),
    ],
)
def test_plain_requests_mean_the_same_every_time(head, plain):
    assert parse_head(head).plain is plain


# --- refused heads


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nHost: gup\r\n",
        get() + b"x",
        get() + get(),
        b"\r\n" + get(),
        # the request line
        get(line=b"GET  / HTTP/1.1"),
        get(line=b" GET / HTTP/1.1"),
        get(line=b"GET / HTTP/1.1 "),
        get(line=b"GET\t/ HTTP/1.1"),
        get(line=b"GET /a b HTTP/1.1"),
        get(line=b"GET /\x00 HTTP/1.1"),
        get(line=b"GET /\x7f HTTP/1.1"),
        get(line=b"GET /\xff HTTP/1.1"),
        get(line=b"GET a HTTP/1.1"),
        get(line=b"GET http:/a HTTP/1.1"),
        get(line=b"GET / HTTP/1"),
        get(line=b"GET / http/1.1"),
        get(line=b"GET / HTTP/1.10"),
        get(line=b"GET / ICE/1.0"),
        get(line=b"GET /"),
        get(line=b"G(T / HTTP/1.1"),
        get(line=b"G\xc3\x89T / HTTP/1.1"),
        get(line=b"POST a HTTP/1.1"),
        get(line=b"PRI * HTTP/1.1"),
        get(line=b"DESCRIBE / HTTP/1.1"),
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        # line ends
        b"GET / HTTP/1.1\nHost: gup\r\n\r\n",
        b"GET / HTTP/1.1\rHost: gup\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: gup\n\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: gup\nX: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: gup\rX: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: gup\r\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: gup\r\nX: y\n\n\r\n\r\n",
        # fields
        get(b"X: a", b" folded"),
        get(b"X: a", b"\tfolded"),
        get(b" X: a", host=b""),
        get(b"X : a"),
        get(b"X\t: a"),
        get(b": a"),
        get(b"X"),
        get(b"X Y: a"),
        get(b"X(: a"),
        get(b"X\xff: a"),
        get(b"X: a\x00b"),
        get(b"X: a\x0bb"),
        get(b"X: a\x1bb"),
        get(b"X: a\x7fb"),
        # framing
        get(b"Content-Length: 5"),
        get(b"Content-Length: 5", line=b"HEAD / HTTP/1.1"),
        get(b"Content-Length: -0"),
        get(b"Content-Length: +0"),
        get(b"Content-Length: 0x0"),
        get(b"Content-Length: 0, 0"),
        get(b"Content-Length: "),
        get(b"Content-Length: 1e1"),
        get(b"Content-Length: 0 0"),
        get(b"Content-Length: 0", b"Content-Length: 0"),
        get(b"Content-Length: 0", b"content-length: 1", line=b"POST / HTTP/1.1"),
        get(b"Content-Length: 99999999999999999999999", line=b"POST / HTTP/1.1"),
        get(b"Content-Length: 9999999999999999999", line=b"POST / HTTP/1.1"),
        get(b"Transfer-Encoding: chunked"),
        get(b"Transfer-Encoding: chunked", line=b"POST / HTTP/1.1"),
        get(b"Transfer-Encoding: identity"),
        get(b"Transfer-Encoding: xchunked, chunked"),
        get(b"Transfer-Encoding:"),
        get(b"Transfer-Encoding: chunked", line=b"GET / HTTP/1.0"),
        get(b"Content-Length: 0", b"Transfer-Encoding: chunked"),
        get(b"Transfer-Encoding: chunked", b"Content-Length: 5", line=b"POST / HTTP/1.1"),
        # host
        get(host=b""),
        get(HOST[:-2]),
        get(b"Host: other"),
        get(b"Host: other", line=b"GET / HTTP/1.0"),
        get(host=b"Host:\r\n"),
        get(host=b"Host: a b\r\n"),
        get(host=b"Host: a/b\r\n"),
        get(host=b"Host: a@b\r\n"),
        get(host=b"Host: a, b\r\n"),
        get(host=b"Host: http://a\r\n"),
        get(host=b"Host: a:b\r\n"),
        get(host=b"Host: a:123456\r\n"),
        get(host=b"Host: ::1\r\n"),
        get(host=b"Host: [::1\r\n"),
        get(host=b"Host: \xff\r\n"),
        get(host=b"Host: a/b\r\n", line=b"GET / HTTP/1.0"),
    ],
)
def test_malformed_heads_are_bad_requests_and_close(head):
    assert problem_of(parse_head, head).slug == "bad-request"
    assert closes("bad-request")


@pytest.mark.parametrize("version", [b"0.9", b"1.2", b"2.0", b"3.0", b"9.9", b"0.0"])
def test_other_versions_are_not_spoken(version):
    assert problem_of(parse_head, get(line=b"GET / HTTP/" + version)).slug == "http-version"


def test_the_preface_of_http_2_is_understood_as_such():
    assert problem_of(parse_head, b"PRI * HTTP/2.0\r\n\r\n").slug == "http-version"


@pytest.mark.parametrize(
    ("head", "slug"),
    [
        (get(line=b"GET /" + b"a" * MAX_TARGET_BYTES + b" HTTP/1.1"), "uri-too-long"),
        (get(line=b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1"), "uri-too-long"),
        (get(b"X: " + b"a" * MAX_HEAD_BYTES), "head-too-large"),
        (get(*[b"X: y"] * MAX_HEADERS), "head-too-large"),
        (get(*[b":"] * MAX_HEAD_BYTES), "head-too-large"),
    ],
)
def test_limits(head, slug):
    assert problem_of(parse_head, head).slug == slug


def test_a_head_may_be_as_large_as_the_limit():
    spare = MAX_HEAD_BYTES - len(get(b"X: "))
    assert parse_head(get(b"X: " + b"a" * spare)).header("x") == "a" * spare
    assert problem_of(parse_head, get(b"X: " + b"a" * (spare + 1))).slug == "head-too-large"


@pytest.mark.parametrize(
    ("buffer", "slug"),
    [
        (b"GET /" + b"a" * MAX_HEAD_BYTES, "uri-too-long"),
        (bytearray(b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: "), "uri-too-long"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEAD_BYTES, "head-too-large"),
    ],
)
def test_a_head_that_does_not_end_says_which_part_is_too_large(buffer, slug):
    assert too_large(buffer).slug == slug
    assert problem_of(check_begun, buffer).slug == slug


@pytest.mark.parametrize(
    ("buffer", "slug"),
    [
        (b"GET / HTTP/1.1\nHost: gup\n\n", "bad-request"),
        (b"GET / HTTP/1.1\r\nHost: gup\n\n", "bad-request"),
        (b"GET / HTTP/1.1\rHost: gup\r\r", "bad-request"),
        (b"\n\nGET / HTTP/1.1", "bad-request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "bad-request"),
        (b"GET /content/x\r\n", "bad-request"),
        (b"PRI * HTTP/2.0\r\n", "http-version"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n", "uri-too-long"),
    ],
)
def test_what_can_never_become_a_head_is_not_waited_for(buffer, slug):
    assert problem_of(check_begun, bytearray(buffer)).slug == slug


def test_a_head_that_is_still_coming_is_waited_for():
    head = get(b"X: a", b"Range: bytes=0-1", line=b"DELETE http://a/content/b?c HTTP/1.0")
    for length in range(len(head)):
        check_begun(head[:length])
    check_begun(b"\r")


# --- methods


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_two_methods_are_served(method):
    check_method(parse_head(get(line=method + b" / HTTP/1.1")))


@pytest.mark.parametrize(
    "head",
    [
        get(b"Content-Length: 5", line=b"POST / HTTP/1.1"),
        get(line=b"PUT / HTTP/1.1"),
        get(line=b"DELETE / HTTP/1.1"),
        get(line=b"TRACE / HTTP/1.1"),
        get(line=b"OPTIONS * HTTP/1.1"),
        get(line=b"CONNECT manager:443 HTTP/1.1"),
        get(line=b"PURGE / HTTP/1.1"),
        get(line=b"SOURCE / HTTP/1.1"),
        get(line=b"get / HTTP/1.1"),
        get(line=b"GETT / HTTP/1.1"),
        get(line=b"GE / HTTP/1.1"),
        get(line=b"X!#$ / HTTP/1.1"),
    ],
)
def test_other_methods_are_not_allowed(head):
    problem = problem_of(lambda: check_method(parse_head(head)))
    assert problem.slug == "method-not-allowed"
    assert problem.headers == (("Allow", "GET, HEAD"),)
    assert closes(problem.slug)


def test_only_problems_of_framing_close():
    kept = {
        "bad-path",
        "not-content",
        "rule-refused",
        "range-not-satisfiable",
        "overloaded",
        "upstream-error",
    }
    assert kept <= PROBLEMS.keys()
    assert not any(closes(slug) for slug in kept)
    closing = {slug for slug in PROBLEMS if closes(slug)}
    assert {"http-version", "uri-too-long", "head-too-large", "request-timeout"} <= closing


# --- finding the end


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_the_end_of_a_head(kind):
    assert find_head_end(kind(get() + b"rest")) == len(get())
    assert find_head_end(kind(get() + get()), 1) == len(get())
    assert find_head_end(kind(get() + get()), len(get())) == 2 * len(get())
    assert find_head_end(kind(b"")) == -1
    assert find_head_end(kind(b"a\n\nb\r\r")) == -1


@given(st.lists(st.sampled_from([b"\r\n", b"\r", b"\n", b"x", b"\r\n\r\n"]), max_size=12).map(b"".join))
def test_fed_byte_by_byte_the_end_is_the_same(stream):
    whole = find_head_end(stream)
    searched = 0
    for size in range(1, len(stream) + 1):
        end = find_head_end(bytearray(stream[:size]), max(0, searched - 3))
        if end >= 0:
            assert end == whole == size
            return
        searched = size
    assert whole == -1


@pytest.mark.parametrize(
    ("buffer", "skipped"),
    [
        (b"", 0),
        (b"GET", 0),
        (b"\r\nGET", 2),
        (b"\r\n\r\n\r", 4),
        (b"\n\nGET", 0),
        (b"\rGET", 0),
        (b"\r\n\r\n", 4),
    ],
)
def test_empty_lines_before_a_request(buffer, skipped):
    assert skip_leading_newlines(buffer) == skipped
    assert skip_leading_newlines(bytearray(buffer)) == skipped


# --- nothing else ever happens

PIECES = st.sampled_from(
    b"GET HEAD CONNECT PRI QUERY / * a:1 HTTP/1.1 HTTP/1.0 HTTP/2.0 Host:a Upgrade:x \0 PLAY".split()
    + b"Content-Length:0 Content-Length:1 Transfer-Encoding:chunked Connection:upgrade X:y".split()
) | st.sampled_from([b" ", b"\r\n", b"\n", b"\r", b"\r\n\r\n"])
LINES = st.builds(
    lambda line, fields: line + b"\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n",
    st.builds(
        lambda *parts: b" ".join(parts),
        st.sampled_from([b"GET", b"HEAD", b"POST", b"CONNECT", b"PRI", b"M-SEARCH", b"FLUSH", b"PLAY"]),
        st.sampled_from([b"/", b"*", b"a:1", b"http://a", b"http://[", b"//"]) | st.binary(max_size=6),
        st.sampled_from([b"HTTP/1.1", b"HTTP/1.0"]),
    ),
    st.lists(PIECES | st.binary(max_size=6), max_size=4).map(lambda fields: [b"Host: a", *fields]),
)


@given(st.binary() | st.lists(PIECES, max_size=12).map(b"".join) | LINES)
@example(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
def test_any_bytes_are_a_request_or_a_problem(head):
    try:
        request = parse_head(head)
    except Problem:
        return
    assert request.method.isupper()
    assert request.target in head.split(b"\r\n")[0]
    assert len(request.headers) == head.count(b"\r\n") - 2
    assert find_head_end(head) == len(head)
