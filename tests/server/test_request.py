import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gup.errors import Problem
from gup.server.request import MAX_HEAD_BYTES, MAX_HEADERS, MAX_TARGET_BYTES, Request, check_begun, parse_head

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


LONG = b"/" + b"a" * (MAX_TARGET_BYTES - 1)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        (b"GET", b"/a?b=c"),
        (b"HEAD", b"/{a}|\\%zz"),
        (b"GET", b"http://manager:8014/content/a"),
        (b"OPTIONS", b"*"),
        (b"CONNECT", b"manager:443"),
        (b"GET", b"/#a"),
        (b"GET", LONG),
    ],
)
def test_targets_are_handed_on_as_they_came(method, target):
    assert parse_head(get(line=method + b" " + target + b" HTTP/1.1")).target == target


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [
        (b"1.1", None, True),
        (b"1.1", b"keep-alive", True),
        (b"1.1", b"close", False),
        (b"1.1", b"Upgrade, CLOSE", False),
        (b"1.1", b"clo\xffse,,", True),
        (b"1.0", None, False),
        (b"1.0", b"Keep-Alive", True),
        (b"1.0", b"keep-alive\t, close", False),
    ],
)
def test_the_connection_lives_on_or_not(version, connection, keep_alive):
    fields = [] if connection is None else [b"Connection: " + connection]
    request = parse_head(get(*fields, line=b"GET / HTTP/" + version, host=HOST if version == b"1.1" else b""))
    assert request.keep_alive is keep_alive
    assert request.minor_version == int(version[2:])


@pytest.mark.parametrize(
    "fields",
    [
        (b"Expect: 100-continue",),
        (b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
        (b"Content-Length: 000",),
        (b"X: " + b"a" * 8000,),
        tuple(b"X-%d: y" % number for number in range(MAX_HEADERS - 1)),
    ],
)
def test_harmless_fields_are_harmless(fields):
    request = parse_head(get(*fields))
    assert request.keep_alive
    assert len(request.headers) == len(fields) + 1
    request.check_method()


@pytest.mark.parametrize(
    "host", ["a", "a:", "10.0.0.1:2967", "[fe80::1]:2967", "b%C3%BCro", "A_b-c.d~!$&'()*+,;="]
)
def test_hosts_that_are_hosts(host):
    assert parse_head(get(host=b"Host: %b\r\n" % host.encode())).header("host") == host


def test_plain_requests_mean_the_same_every_time():
    plain = [get(), get(b"User-Agent: x", b"Connection: close", b"Cache-Control: no-cache")]
    fields = [b"Range: bytes=0-", b"IF-RANGE: x", b"If-Match: *", b"If-None-Match: *", b"Content-Length: 0"]
    fields += [b"If-Modified-Since: x", b"If-Unmodified-Since: x"]
    others = [get(line=b"HEAD / HTTP/1.1"), *map(get, fields)]
    assert [parse_head(head).plain for head in plain] == [True] * len(plain)
    assert [parse_head(head).plain for head in others] == [False] * len(others)


# --- refused heads


WHOLE_HEADS = [
    b"",
    b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: gup\r\n",
    get() + b"x",
    get() + get(),
    b"\r\n" + get(),
]
LINES_THAT_ARE_NONE = [
    b"GET%b HTTP/1.1" % target
    for target in (b"  /", b"\t/", b" /a b", b" /\0", b" /\x7f", b" /\xff", b" a", b" http:/a")
]
LINES_THAT_ARE_NONE += [b" GET / HTTP/1.1", b"GET / HTTP/1.1 ", b"GET /", b"GET / HTTP/1", b"GET / HTTP/1.10"]
LINES_THAT_ARE_NONE += [
    b"GET / http/1.1",
    b"GET / ICE/1.0",
    b"G(T / HTTP/1.1",
    b"POST a HTTP/1.1",
    b"PRI * HTTP/1.1",
]
LINES_THAT_ARE_NONE += [b"DESCRIBE / HTTP/1.1", b"HTTP/1.1 200 OK", b"\x16\x03\x01\x02\x00\x01"]
ENDS = (b"\n\r\n\r\n", b"\nX: y\r\n\r\n", b"\rX: y\r\n\r\n", b"\r\r\n\r\n", b"\r\nX: y\n\n\r\n\r\n")
LINE_ENDS = [b"GET / HTTP/1.1\r\nHost: gup" + end for end in ENDS]
LINE_ENDS += [b"GET / HTTP/1.1\nHost: gup\r\n\r\n", b"GET / HTTP/1.1\rHost: gup\r\n\r\n"]
FIELDS = [b"X: a\r\n folded", b"X: a\r\n\tfolded", b"X : a", b"X\t: a", b": a", b"X", b"X Y: a", b"X(: a"]
FIELDS += [b"X\xff: a", b"X: a\x00b", b"X: a\x0bb", b"X: a\x7fb"]
LENGTHS = [b"5", b"-0", b"+0", b"0x0", b"0, 0", b"", b"1e1", b"0 0", b"0\r\nContent-Length: 0"]
LONG_LENGTHS = [b"99999999999999999999999", b"9999999999999999999", b"0\r\ncontent-length: 1"]
CODINGS = [b"chunked", b"identity", b"xchunked, chunked", b"", b"chunked\r\nContent-Length: 5"]
HOSTS = [b"", b"a b", b"a/b", b"a@b", b"a, b", b"http://a", b"a:b", b"a:123456", b"::1", b"[::1", b"\xff"]
POST, OLD = b"POST / HTTP/1.1", b"GET / HTTP/1.0"


@pytest.mark.parametrize(
    "head",
    [
        *WHOLE_HEADS,
        *(get(line=line) for line in LINES_THAT_ARE_NONE),
        *LINE_ENDS,
        *map(get, FIELDS),
        get(b" X: a", host=b""),
        *(get(b"Content-Length: " + length) for length in LENGTHS),
        get(b"Content-Length: 5", line=b"HEAD / HTTP/1.1"),
        *(get(b"Content-Length: " + length, line=POST) for length in LONG_LENGTHS),
        *(get(b"Transfer-Encoding: " + coding, line=line) for coding in CODINGS for line in (POST, OLD)),
        get(host=b""),
        *(get(b"Host: other", line=line) for line in (b"GET / HTTP/1.1", OLD)),
        *(get(host=b"Host: " + host + b"\r\n") for host in HOSTS),
        get(host=b"Host: a/b\r\n", line=OLD),
    ],
)
def test_malformed_heads_are_bad_requests(head):
    assert problem_of(parse_head, head).slug == "bad-request"


@pytest.mark.parametrize(
    ("head", "slug"),
    [
        *(
            (get(line=b"GET / HTTP/" + version), "http-version")
            for version in (b"0.9", b"1.2", b"2.0", b"9.9")
        ),
        (b"PRI * HTTP/2.0\r\n\r\n", "http-version"),
        (get(line=b"GET /" + b"a" * MAX_TARGET_BYTES + b" HTTP/1.1"), "uri-too-long"),
        (get(line=b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1"), "uri-too-long"),
        (get(b"X: " + b"a" * MAX_HEAD_BYTES), "head-too-large"),
        (get(*[b"X: y"] * MAX_HEADERS), "head-too-large"),
        (get(*[b":"] * MAX_HEAD_BYTES), "head-too-large"),
    ],
)
def test_other_versions_and_limits(head, slug):
    assert problem_of(parse_head, head).slug == slug


def test_a_head_may_be_as_large_as_the_limit():
    spare = MAX_HEAD_BYTES - len(get(b"X: "))
    assert parse_head(get(b"X: " + b"a" * spare)).header("x") == "a" * spare
    assert problem_of(parse_head, get(b"X: " + b"a" * (spare + 1))).slug == "head-too-large"


@pytest.mark.parametrize(
    ("buffer", "slug"),
    [
        (b"GET /" + b"a" * MAX_HEAD_BYTES, "uri-too-long"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: ", "uri-too-long"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEAD_BYTES, "head-too-large"),
        (b"GET / HTTP/1.1\nHost: gup\n\n", "bad-request"),
        (b"GET / HTTP/1.1\r\nHost: gup\n\n", "bad-request"),
        (b"GET / HTTP/1.1\rHost: gup\r\r", "bad-request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "bad-request"),
        (b"GET /content/x\r\n", "bad-request"),
        (b"PRI * HTTP/2.0\r\n", "http-version"),
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


OTHERS = b"POST PUT DELETE TRACE PURGE SOURCE get GETT GE X!#$".split()


@pytest.mark.parametrize(
    "head",
    [
        *(get(line=method + b" / HTTP/1.1") for method in OTHERS),
        get(b"Content-Length: 5", line=POST),
        get(line=b"OPTIONS * HTTP/1.1"),
        get(line=b"CONNECT manager:443 HTTP/1.1"),
    ],
)
def test_other_methods_are_not_allowed(head):
    problem = problem_of(lambda: parse_head(head).check_method())
    assert problem.slug == "method-not-allowed"
    assert problem.headers == (("Allow", "GET, HEAD"),)


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
