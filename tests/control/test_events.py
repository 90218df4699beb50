"""Events from workers: what is one, and what is not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.content.key import ContentKey, Kind
from gup.control.events import Committed, Failed, FullRequests, Need, UpstreamTrouble, Usage, Use, parse_event
from gup.jsonmodel import InvalidError

KEY = "14.3 RU2/French/{S}/260101001/full.zip"
OF = ContentKey.parse(KEY)
WHO = "fe80::1"
FULLS, CLIENTS = (FullRequests(WHO, OF, 2),), ("10.0.0.1", WHO)


@pytest.mark.parametrize(
    ("fields", "event"),
    [
        (
            {"type": "committed", "key": KEY, "length": 5, "kind": "full", "replaced": True},
            Committed(key=OF, length=5, kind=Kind.FULL, replaced=True),
        ),
        (
            {"type": "used", "uses": [[KEY, 3], [KEY, 1, 99]], "at": 7},
            Usage(uses=(Use(OF, 3, 0), Use(OF, 1, 99)), at=7.0),
        ),
        (
            {
                "type": "used",
                "at": 1,
                "asked": [[KEY, 2]],
                "fulls": [[WHO, KEY, 2]],
                "clients": CLIENTS,
            },
            Usage(at=1.0, asked=(Use(OF, 2),), fulls=FULLS, clients=CLIENTS),
        ),
        ({"type": "need", "bytes": 9}, Need(bytes=9)),
        (
            {"type": "failed", "key": KEY, "problem": "upstream-timeout", "detail": "x"},
            Failed(key=OF, problem="upstream-timeout", detail="x"),
        ),
    ],
)
def test_events_are_read(fields, event):
    assert parse_event(json.dumps(fields).encode()) == event


@pytest.mark.parametrize(
    "datagram",
    [
        b"", b"\xff\xfe", b"null", b"[]", b"7", b'"used"', b"{}", b'{"type": "melted"}', b'{"type": []}',
        b'{"type": "need"}', b'{"type": "need", "bytes": -1}', b'{"type": "need", "bytes": true}',
        b'{"type": "need", "bytes": 1.5}', b'{"type": "used", "uses": 3, "at": 1}',
        b'{"type": "used", "uses": [["a", 1]], "at": 1}', b'{"type": "used", "uses": [], "at": "x"}',
        b'{"type": "used", "uses": [], "at": NaN}', b'{"type": "used", "uses": [], "at": Infinity}',
        b'{"type": "committed", "key": "../../etc/passwd", "length": 1, "kind": "full"}',
        b'{"type": "committed", "key": "a/b/c/d/e", "length": 1, "kind": "odd"}',
        b'{"type": "committed", "key": "a/b/c/d/e", "length": 1, "kind": "full", "phases": {"x": 1}}',
        b'{"type": "committed", "key": "a/b/c/d/e", "length": 1, "kind": "full", "phases": {"wan": -1}}',
        b'{"type": "committed", "key": "a/b/c/d/e", "length": 1, "kind": "full", "marks": [[1, 2]]}',
        b'{"type": "slow", "rows": [["nobody", "", "hit", 200, 1, true, 1, 1, {}, [], []]]}',
        b'{"type": "slow", "rows": [["10.0.0.1", "x", "hit", 200, 1, true, 1, 1, {}, [], []]]}',
        b'{"type": "under_way", "process": -1}',
        b'{"type": "used", "at": 1, "refused": [["10.0.0.1", "language", "m", -1]]}',
        b'{"type": "used", "at": 1, "clients": ["<script>"]}', b'{"type": "used"}',
        b'{"type": "failed", "key": "a/b/c/d/e", "problem": "made-up"}', b"[" * 100_000,
        b'{"type": "need", "bytes": 80.0}', b'{"type": "need", "bytes": 9223372036854775808}',
        b'{"type": "need", "bytes": 1, "refused": 1}', b'{"type": "used", "uses": {"a/b/c/d/e": 1}, "at": 1}',
        b'{"type": "used", "uses": [["a/b/c/d/e", 1, 1, 1]], "at": 1}',
        b'{"type": "used", "uses": ["ab"], "at": 1}',
        b'{"type": "committed", "key": "a/b/c/d/e", "length": 80.0, "kind": "full"}',
        b'{"type": "committed", "key": "a/b/c/d/e", "length": 80, "kind": "full", "replaced": "no"}',
        b'{"type": "committed", "key": ["a"], "length": 80, "kind": "full"}',
        b'{"type": "begun", "key": "any/any/_/_/x", "path": "@evil:80/x"}',
        b'{"type": "committed", "key": "any/any/_/_/x", "length": 1, "kind": "full", "path": "//evil/x"}',
        b'{"type": "begun", "key": "any/any/_/_/x", "path": "/content/y"}',
        b'{"type": "failed", "key": "a/b/c/d/e", "problem": "loop", "detail": {"a": []}}',
        b'{"type": "used", "at": 1, "clients": [["10.0.0.1"]]}', b'{"type": "upstream", "name": 5}',
        b'{"type": "taken", "at": 1, "rows": [["10.0.0.1", "a/b/c/d/e", 1, 2, 1]]}',
        b'{"type": "taken", "at": 1, "rows": [["10.0.0.1", "a/b/c/d/e", "", "", true]]}',
        b'{"type": "taken", "at": 1, "rows": [["10.0.0.1", "a/b/c/d/e", "", "", [5, 5, 9]]]}',
        b'{"type": "taken", "at": 1, "rows": [["10.0.0.1", "a/b/c/d/e", "", "", 2]]}',
        b'{"type": "taken", "at": 1, "rows": [["10.0.0.1", "a/b/c/d/e"]]}',
        b'{"type": "taken", "at": 1, "rows": [["10.0.0.1", "no key", "", "", 1]]}',
        b'{"type": "taken", "at": 1, "rows": [["<script>", "a/b/c/d/e", "", "", 1]]}',
        b'{"type": "unlisted", "moniker": [["{"]]}', b'{"type": "need", "bytes": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_event_is_invalid(datagram):
    with pytest.raises(InvalidError) as told:
        parse_event(datagram)
    assert len(str(told.value)) < 400


def test_what_others_said_is_cut_and_can_be_written():
    detail = "\udcff" + "x" * 100_000
    event = parse_event(json.dumps({"type": "upstream", "name": "\ud800", "detail": detail}).encode())
    assert event == UpstreamTrouble(name="\\ud800", detail="\\udcff" + "x" * 503 + "…")


NAMES = ["type", "key", "length", "uses", "at", "bytes", "clients", "problem"]
TYPES = ["committed", "used", "taken", "need", "failed"]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(TYPES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner),
)


@given(st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
def test_no_datagram_raises_anything_else(datagram):
    try:
        parse_event(datagram)
    except InvalidError:
        return
