"""Records and states are read as models: each value of its type and within bounds, or InvalidError."""

import ast
import inspect
import json
import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gup import jsonmodel
from gup.cache import archive, records
from gup.cache.negative_cache import identity_of
from gup.cache.records import (
    CHUNK_BYTES,
    MAX_BODY_BYTES,
    MAX_RECORD_BYTES,
    MAX_STATE_BYTES,
    Failure,
    FillState,
    Head,
    Hold,
    Phase,
    Record,
    head_of,
    seal,
)
from gup.content import key, routes
from gup.content.key import ContentKey, Kind
from gup.content.routes import leads_to, path_of
from gup.errors import Problem
from gup.jsonmodel import InvalidError
from gup.upstream.exchange import RemoteHead, Validators

KEY = ContentKey("14.3 RU2", "Français", "{535CB6A4-441F-4E8A-A897-804CD859100E}", "260101001", "full.zip")
HEAD = Head(CHUNK_BYTES + 5, '"tag"', "application/zip", "Thu, 01 Jan 2026 00:00:00 GMT", "manager", '"u"')
RECORD = Record.of(KEY, Kind.FULL, HEAD, (1, 2**64 - 1), 1.8e9, 1_800_000_000_123_456_789, path_of(KEY))
FAILURE = Failure("upstream-error", "it broke off", 2.0, 1000.5)
HOLD = Hold("manager", 1000.5, 2.0, 3, ('"a"', None, 80), 2000.0)
VALIDATORS = {"m": Validators("", "x", True), "n": Validators('"a"')}
STATES = [
    FillState(KEY, Kind.FULL, 7, Phase.FAILED, None, FAILURE, holds=(HOLD,), told=VALIDATORS),
    FillState(KEY, Kind.FULL, 7, Phase.STREAMING, HEAD, path=path_of(KEY)),
    FillState(KEY, Kind.FULL, 7, Phase.FAILED, HEAD, FAILURE, background=True, pinned=True),
    FillState(KEY, Kind.FULL, 7, Phase.UNSTORABLE, failure=FAILURE, stored_at=1.5, passed_through=True),
    FillState(KEY, Kind.FULL, 7, Phase.REQUESTED, HEAD, holds=(Hold("a", 5.0, 2.0), Hold("b", 1e9, 3600.0))),
]

ODD = ["", "full", "streaming", '"tag"', "a/b/c/d/e", "/content/x", "\r\n", "\udcff", KEY.text]
TEXT = st.text(st.characters(), max_size=40)
NUMBERS = st.integers() | st.integers(min_value=2**62, max_value=2**70) | st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def sealed(fields) -> bytes:
    """As `seal`, of what it was never meant for; its checksum is right where there can be one."""
    fields.pop("checksum", None)
    try:
        return seal(fields)
    except ValueError:  # UTF-8 can't encode it
        return json.dumps({**fields, "checksum": "0"}).encode()


def changed(model, name, value):
    """The JSON of a record or a state with one value changed."""
    return sealed(json.loads(model.encode()) | {name: value})


def test_what_is_written_is_read_back():
    assert [FillState.decode(state.encode()) for state in STATES] == STATES
    assert Record.decode(RECORD.encode()) == RECORD


NO_TEXTS = [5, 1.5, True, [], {}]
CONTROLS = ["a\r\nSet-Cookie: x", "a\0", "a\x7f", "ł", "\udcff"]
TAGS = ["", "tag", 'W/"tag"', '"a"b"', '"a b"', *(f'"{odd}"' for odd in CONTROLS), '"' * 2000]
ELSEWHERE = ["@evil.example:80/x", "//evil.example/content/x", "http://evil.example/content/x", "content/x"]
ELSEWHERE += [f"/content/x{odd}" for odd in ("?y", "#y", " y", "\r\nHost: y")]
ELSEWHERE += ["/secars/x", "/content/../secars", "/content/%2e%2e/secars", "/content/other"]
LENGTHS = [80.0, 0, -1, True, "80", None, 2**63, MAX_BODY_BYTES + 1, 10**400, 2 * CHUNK_BYTES + 5, 5, []]
SUMS = ["", "0" * 16, "0" * 31, "0" * 48, "g" * 32, "+" + "0" * 31, "0_0" + "0" * 29, "F" * 32]
WRONG = {
    "format": [3, 1.0, True, "1", None],
    "key": [*NO_TEXTS, None, "", "a/b/c/d", "../../../../x", "a/b/c/d/.e", "/".join(["x" * 300] * 5)],
    "kind": [*NO_TEXTS, None, "", "FULL", "fulls"],
    "length": LENGTHS,
    "etag": [*NO_TEXTS, None, *TAGS],
    "content_type": [*NO_TEXTS, None, "", *CONTROLS, "x" * 1025],
    "last_modified": [*NO_TEXTS, "", *CONTROLS, "x" * 1025],
    "upstream": [*NO_TEXTS, None, "a\r\nb", "x" * 1025],
    "upstream_etag": [*NO_TEXTS, *TAGS],
    "stored_at": [None, "1", True, [], 1e12, -1e12, float("inf"), 10**400],
    "validated_at": [None, "1", False, {}, 1e300],
    "pinned": [None, 0, 1, "false", []],
    "generation": [None, 1.0, "1", True, 2**63, -(2**70)],
    "sums": [*NO_TEXTS, None, *SUMS],
    "path": [*NO_TEXTS, *ELSEWHERE, f"{path_of(KEY)}/", path_of(KEY).replace("001/", "2/"), "/" + "x" * 9000],
}
"""What each member of a record must not be."""


@pytest.mark.parametrize("name", WRONG)
def test_a_record_with_one_wrong_value_is_refused(name):
    for value in WRONG[name]:
        with pytest.raises(InvalidError) as told:
            Record.decode(changed(RECORD, name, value))
        assert str(told.value).isprintable()
        assert len(str(told.value)) < 500


@pytest.mark.parametrize(("number", "order"), [(0, ""), (1_785_574_800_123, "-=1785574800123")])
def test_the_number_of_the_last_purge_in_an_earlier_version_is_what_was_known(number, order):
    record = Record.decode(changed(RECORD, "order", number))
    assert (record.order, record.head.order, Record.decode(record.encode())) == (order, order, record)
    state = json.loads(STATES[1].encode())
    state["head"]["order"] = number
    assert FillState.decode(sealed(state)).head.order == order


@pytest.mark.parametrize("name", [*(name for name in WRONG if name != "path"), "checksum"])
def test_a_record_without_a_member_is_refused(name):
    fields = json.loads(RECORD.encode())
    del fields[name]
    text = json.dumps(fields).encode() if name == "checksum" else sealed(fields)
    with pytest.raises(InvalidError, match=f"{name}.*missing|checksum|unknown format"):
        Record.decode(text)


def test_records_of_before_the_path_was_kept_are_read():
    fields = json.loads(RECORD.encode())
    del fields["path"]
    assert Record.decode(sealed(fields)).path == ""


@pytest.mark.parametrize("end", ["a%2F%2E%2E%2F%2E%2E%2Fother", "%2E%2E", "a%3Fb%2F", "_/x"])
def test_a_record_without_a_path_whose_key_asks_for_something_else_is_refused(end):
    """A repair would ask for it: outside of /content/, or another body."""
    fields = json.loads(RECORD.encode())
    del fields["path"]
    fields["key"] = f"any/any/_/_/{end}"
    with pytest.raises(InvalidError):
        Record.decode(sealed(fields))


A_FAILURE = {"slug": "loop", "detail": "", "ttl": 1, "until": 1}
WRONG_STATES = {
    "generation": [-1, 7.0, "7", 2**64],
    "phase": ["done", None],
    "head": [[], "x", {}, {"length": 80.0}],
    "failure": [{}, *(A_FAILURE | {"slug": slug} for slug in ("no-such", []))],
    "failure ": [A_FAILURE | wrong for wrong in ({"detail": 5}, {"ttl": "1"}, {"until": True})],
    "path": ["@evil.example:80/x"],
    "background": [1],
    "told": [[], *({"m": row} for row in (['"\r\nX: y"', None, True], ['"ł"'], [5, None, True], 5))],
    "holds": [5, {}, [5], [[]], [["u", 1]], [["u", "x", 2, 0, None, 3]], [["u", 1, 2, 3.0, None, 4]]],
    "holds ": [[list(HOLD)] * 300, *([["u", 1, 2, 3, told, 4]] for told in (['"a"', None, 80.0], ['"a"']))],
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_state_with_one_wrong_value_is_refused(name):
    for value in WRONG_STATES[name]:
        with pytest.raises(InvalidError, match=f"^state: '{name.strip()}"):
            FillState.decode(changed(STATES[1], name.strip(), value))


@pytest.mark.parametrize(("state", "without"), [(1, "head"), (0, "failure"), (3, "failure")])
def test_a_state_without_what_its_phase_needs_is_refused(state, without):
    with pytest.raises(InvalidError, match="state: "):
        FillState.decode(changed(STATES[state], without, None))


NO_OBJECTS = [b"", b"null", b"[]", b"5", b"\xff", b"[" * 100_000, b'{"a":' * 100_000]
NO_OBJECTS += [b'{"length": ' + b"9" * 5000 + b"}", b'{"length": NaN}', b'{"length": 1e999, "checksum": "0"}']
NO_OBJECTS += [b'{"x": "\\ud800", "checksum": "0"}', b'{"checksum": ["a"]}']


@pytest.mark.parametrize("model", [Record, FillState])
def test_what_is_no_json_object_is_refused(model):
    for text in NO_OBJECTS:
        with pytest.raises(InvalidError):
            model.decode(text)


@settings(deadline=None)
@given(JSON, st.binary(max_size=40))
def test_arbitrary_json_is_a_model_or_an_invalid_error(value, noise):
    texts = [noise, json.dumps(value).encode(), *([sealed(value)] if isinstance(value, dict) else ())]
    for text in texts:
        for model in (Record, FillState):
            with pytest.raises(InvalidError):
                model.decode(text)


@settings(deadline=None)
@given(st.sampled_from([RECORD, *STATES]), st.data())
def test_any_value_in_any_place_is_a_model_or_an_invalid_error(model, data):
    fields = json.loads(model.encode())
    name = data.draw(st.sampled_from(sorted(fields.keys() - {"checksum"})))
    value = data.draw(JSON)
    if isinstance(fields[name], dict) and fields[name] and data.draw(st.booleans()):
        value = fields[name] | {data.draw(st.sampled_from(sorted(fields[name]))): value}
    try:
        read = type(model).decode(changed(model, name, value))
    except InvalidError:
        return
    assert type(model).decode(read.encode()) == read  # what was taken can be written, and is read again


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=0x2FF), max_size=40), TEXT, st.none() | TEXT)
def test_whatever_an_upstream_states_of_a_body_its_record_can_be_read(tag, content_type, last_modified):
    remote = RemoteHead(200, 0, HEAD.length, f'"{tag}"', last_modified, content_type, "manager")
    record = Record.of(KEY, Kind.FULL, head_of(KEY, remote), (1, 2), 1.8e9, 5, path_of(KEY))
    assert Record.decode(record.encode()) == record


@settings(deadline=None)
@given(st.none() | TEXT | st.just("x" * 9000), st.none() | TEXT, st.integers(1), TEXT | st.just("ł" * 3000))
def test_whatever_an_upstream_states_of_a_wrong_body_its_state_can_be_read(tag, modified, length, detail):
    """A header field may be any bytes; aiohttp gives what is no UTF-8 as surrogates."""
    texts = [None if x is None else x.encode(errors="ignore").decode() + "\udcff" for x in (tag, modified)]
    told = identity_of(RemoteHead(200, 0, length, *texts, "application/zip", "manager"))
    failure = Failure.of(Problem("upstream-error", f"{detail}\udcff"), 2.0, 5.0)
    held = Hold("manager", 1.0, 2.0, 1, told, 5.0)
    state = FillState(KEY, Kind.FULL, 7, Phase.FAILED, None, failure, holds=(held,))
    assert FillState.decode(state.encode()) == state


# --- in the store


@pytest.mark.parametrize("kind", ["record", "state"])
def test_of_a_huge_file_no_more_than_is_allowed_is_read(store, kind, monkeypatch):
    path = store.record_path(KEY) if kind == "record" else store.state_path(KEY.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, 4 << 30)
    got, read = [], os.read
    monkeypatch.setattr(os, "read", lambda fd, size: got.append(size) or read(fd, size))
    with pytest.raises(InvalidError, match="are allowed"):
        store.load(KEY) if kind == "record" else store.load_state(KEY.id)
    assert sum(got) <= 2 * max(MAX_RECORD_BYTES, MAX_STATE_BYTES)


def test_what_is_refused_is_told_in_printable_words_whatever_the_key_holds(store):
    name = "x\u202e\u0558.zip"
    other = ContentKey(KEY.version, KEY.language, KEY.stream, KEY.revision, name)
    record = replace(RECORD, key=other, path=path_of(other))
    store.record_path(KEY).parent.mkdir(parents=True, exist_ok=True)
    store.record_path(KEY).write_bytes(record.encode())
    wrong_path = changed(RECORD, "key", other.text)
    for read in (lambda: store.load(KEY), lambda: Record.decode(wrong_path)):
        with pytest.raises(InvalidError, match=r"x\\u202e") as told:
            read()
        assert str(told.value).isprintable()


def test_a_state_under_another_keys_name_is_refused(store):
    other = ContentKey(KEY.version, KEY.language, KEY.stream, KEY.revision, "other.zip")
    store.state_path(other.id).write_bytes(STATES[1].encode())
    with pytest.raises(InvalidError, match="the state is that of"):
        store.load_state(other.id)


# --- paths


@pytest.mark.parametrize(
    ("path", "stream", "revision", "file"),
    [
        ("/content/ContentInfo.txt", "_", "_", "ContentInfo.txt"),
        ("/content/a/b%25.txt", "_", "_", "a%2Fb%25.txt"),
        ("/content/%7B535cb6a4-441f-4e8a-a897-804cd859100e%7D/1/full.zip", KEY.stream, "1", "full.zip"),
        ("/content/{535cb6a4-441f-4e8a-a897-804cd859100e}/1/full.zip", KEY.stream, "1", "full.zip"),
        (f"/content/{KEY.stream}/Fran%C3%A7ais", KEY.stream, "_", "Français"),
        (f"/content/{KEY.stream}/_/x.dax", KEY.stream, "%5F", "x.dax"),
        ("/minitri.flg", "liveupdate", "_", "minitri.flg"),
        ("/sepm$20_14.3$20ru2_fr_livetri.zip", "liveupdate", "_", "sepm$20_14.3$20ru2_fr_livetri.zip"),
    ],
)  # fmt: skip
def test_a_path_leads_to_its_key_and_a_key_tells_a_path(path, stream, revision, file):
    key = ContentKey("any", "any", stream, revision, file)
    assert leads_to(path, key)
    assert leads_to(path_of(key), key)
    assert not leads_to(path, ContentKey("any", "any", stream, revision, "other"))


# --- with assertions off


@pytest.mark.parametrize("module", [key, routes, records, archive, jsonmodel], ids=lambda m: m.__name__)
def test_keys_paths_records_and_archives_are_as_safe_with_assertions_off(module):
    """PYTHONOPTIMIZE=1 takes every `assert` out of gup: nothing is refused by one."""
    assert not [
        node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Assert)
    ]
