import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.content.catalog import Label
from gup.content.key import ContentKey, Kind
from gup.control.api.endpoint import ENDPOINTS, document
from gup.control.api.entries import Listing, matching, page_of, shown
from gup.control.api.status import totals_of
from gup.control.application import make_app
from gup.control.events import Committed, Failed, FullRequests, Need, UpstreamTrouble, Usage, Use, parse_event
from gup.control.index import Index, Row, make_row
from gup.control.integrity_jobs import Pass
from gup.control.prefetch import PrefetchQueue
from gup.control.stats.client_records import ClientWindows
from gup.control.traffic import newest_times, revision_time
from gup.jsonmodel import InvalidError

KEY = "14.3 RU2/French/{S}/260101001/full.zip"


def row(name="full.zip", kind=Kind.FULL, revision="260101001", length=10, **more):
    key = ContentKey("14.3 RU2", "French", "{S}", revision, name)
    return make_row(key, kind, length, stored_at=more.pop("stored_at", 0.0), used_at=0.0, **more)


# --- events


@pytest.mark.parametrize(
    ("fields", "event"),
    [
        (
            {"type": "committed", "key": KEY, "length": 5, "kind": "full", "replaced": True},
            Committed(key=ContentKey.parse(KEY), length=5, kind=Kind.FULL, replaced=True),
        ),
        (
            {"type": "used", "uses": [[KEY, 3], [KEY, 1, 99]], "at": 7},
            Usage(uses=(Use(ContentKey.parse(KEY), 3, 0), Use(ContentKey.parse(KEY), 1, 99)), at=7.0),
        ),
        (
            {"type": "used", "at": 1, "asked": [[KEY, 2]], "fulls": [["fe80::1", KEY, 2]]}
            | {"clients": ["10.0.0.1", "fe80::1"]},
            Usage(
                at=1.0,
                asked=(Use(ContentKey.parse(KEY), 2),),
                fulls=(FullRequests("fe80::1", ContentKey.parse(KEY), 2),),
                clients=("10.0.0.1", "fe80::1"),
            ),
        ),
        ({"type": "need", "bytes": 9}, Need(bytes=9)),
        (
            {"type": "failed", "key": KEY, "problem": "upstream-timeout", "detail": "x"},
            Failed(key=ContentKey.parse(KEY), problem="upstream-timeout", detail="x"),
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
        b'{"type": "begun", "key": "any/any/_/_/x", "path": "//evil/content/x"}',
        b'{"type": "begun", "key": "any/any/_/_/x", "path": "/content/y"}',
        b'{"type": "failed", "key": "a/b/c/d/e", "problem": "loop", "detail": {"a": []}}',
        b'{"type": "used", "at": 1, "clients": [["10.0.0.1"]]}', b'{"type": "upstream", "name": 5}',
        b'{"type": "taken", "at": 1, "rows": [["10.0.0.1", "a/b/c/d/e", 1, 2, 1]]}',
        b'{"type": "taken", "at": 1, "rows": [["10.0.0.1", "a/b/c/d/e", "", "", true]]}',
        b'{"type": "taken", "at": 1, "rows": [["10.0.0.1", "a/b/c/d/e", "", "", [5, 4, 9]]]}',
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


ROW = row()


@given(st.sampled_from(sorted(ROW.to_json())), anything)
def test_a_row_of_the_index_is_a_row_or_invalid(name, value):
    fields = ROW.to_json() | {name: value}
    try:
        read = Row.from_json(fields)
    except InvalidError:
        return
    assert Row.from_json(read.to_json()) == read


@given(anything)
def test_what_was_noted_is_taken_back_or_left_out(value):
    assert isinstance(Pass.from_json(value), Pass)
    wishes = PrefetchQueue()
    wishes.restore([value])
    assert len(wishes) == 0
    with pytest.raises(InvalidError):
        Row.from_json(value)


@pytest.mark.parametrize(
    "changed",
    [{"began_at": float("nan")}, {"checked": 1.5}, {"after": 5}, {"damaged": True}, {"mended": -1}],
)
def test_a_pass_with_a_wrong_value_begins_anew(changed):
    kept = {"began_at": 5.0, "ended_at": 0.0, "after": "a/b/c/d/e"}
    kept |= {"checked": 1, "checked_bytes": 2, "damaged": 0, "mended": 0}
    assert Pass.from_json(kept).after == "a/b/c/d/e"
    assert Pass.from_json(kept | changed) == Pass()


# --- clients


def test_clients_are_counted_by_window_and_forgotten_beyond_the_limit():
    book = ClientWindows(limit=3)
    book.see(["a"], 0.0)
    book.see(["b", "c"], 90_000.0)
    book.see(["a"], 100_000.0)
    assert book.counts(100_000.0) == {"1h": 1, "1d": 3, "7d": 3}
    book.see(["d"], 100_001.0)
    assert [address for address, _ in book.newest(9)] == ["d", "a", "c"]
    assert len(book.newest(1)) == 1


def test_clients_survive_a_restart_and_newer_sightings_win():
    before, after = ClientWindows(), ClientWindows()
    before.see(["a", "b"], 1.0)
    after.see(["a"], 5.0)
    after.restore(before.newest(9)[::-1])
    assert after.newest(9) == [("a", 5.0), ("b", 1.0)]


# --- listing


def rows_of(count):
    return [row(f"f{n:03}", length=n % 7 + 1, stored_at=float(n % 5)) for n in range(count)]


def index_of(tmp_path, rows):
    index = Index(tmp_path, lambda: None, lambda _: None)
    for one in rows:
        index.put(one)
    return index


@pytest.mark.parametrize("order", ["key", "-key", "length", "-length", "stored", "-stored"])
@pytest.mark.parametrize("filters", [{}, {"kind": "full"}])
async def test_pages_together_are_the_whole_list_once(order, filters, tmp_path):
    rows, seen, cursor = rows_of(53), [], None
    index = index_of(tmp_path, rows)
    while True:
        query = Listing.model_validate({"order": order, "limit": "10", "cursor": cursor} | filters)
        found = await page_of(index, query, labels)
        assert found.matching == 53
        seen += found.entries
        cursor = found.model_dump()["cursor"]
        if cursor is None:
            break
    assert len(seen) == 53
    assert {one.key for one in seen} == {one.key for one in rows}
    lengths = [one.length_bytes for one in seen]
    if "length" in order:
        assert lengths == sorted(lengths, reverse=order.startswith("-"))


def labels(_):
    return Label("Virus Definitions", "14.3.1", "English", "virus_definitions")


def test_filters_choose():
    delta = "xdelta260101001_To_260102007.dax"
    rows = [row(), row(delta, Kind.DELTA)]

    def found(**wanted):
        return [one.file for one in matching(rows, Listing.model_validate(wanted), labels)]

    assert found(kind="delta") == [delta]
    assert found(revision="260102007") == [delta]
    assert found(revision="260101001") == ["full.zip", delta]
    assert found(product="virus definitions") == found() == ["full.zip", delta]
    assert found(version="14.3 ru2", language="FRENCH", stream="{s}") == found()
    assert found(version="14.3.1", language="en") == found(language="fr-CA") == found()
    for wanted in ({"language": "German"}, {"product": "{S}"}, {"revision": "26"}, {"version": "14"}):
        assert found(**wanted) == []


def test_a_delta_tells_its_step():
    told = shown(row("xdelta260101001_To_260102007.dax", Kind.DELTA), labels(row()))
    assert (told.from_revision, told.to_revision, told.content_revision) == (
        "260101001",
        "260102007",
        "260102007",
    )
    assert (told.product, told.revision) == ("Virus Definitions", "260101001")
    assert shown(row(), labels(row())).to_revision is None


@pytest.mark.parametrize(
    "parameters",
    [
        {"order": "age"}, {"limit": "0"}, {"limit": "1001"}, {"limit": "ten"}, {"limit": "²"},
        {"kind": "odd"}, {"cursor": "%%"}, {"cursor": "e30="}, {"cursor": "WzEsMl0="}, {"sort": "key"},
        {"cursor": "W05hTiwgIngiXQ=="}, {"order": "--key"}, {"version": ""}, {"limit": "1_0"},
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(parameters):
    with pytest.raises(ValueError, match=r"limit|order|kind|cursor|version|sort"):
        Listing.model_validate(parameters)


# --- figures


def test_totals_are_added_up_and_savings_not_clipped():
    totals = totals_of(
        {
            'gup_requests_total{code="200",result="hit"}': 6,
            'gup_requests_total{code="206",result="hit"}': 1,
            'gup_requests_total{code="200",result="miss"}': 1,
            'gup_requests_total{code="403",result="refused"}': 5,
            'gup_client_sent_bytes_total{source="cache"}': 100,
            'gup_upstream_received_bytes_total{purpose="fill",upstream="m"}': 150,
            'gup_upstream_received_bytes_total{purpose="index",upstream="m"}': 50,
        }
    )
    assert totals.saved_bytes == -100
    assert totals.hit_ratio == 7 / 8
    assert (totals.requests["hit"], totals.requests_total) == (7, 13)
    assert totals_of({}).hit_ratio is None


@pytest.mark.parametrize(
    ("revision", "at"), [("700102001", 86400.0 + 0), ("269901001", None), ("260231001", None)]
)
def test_revisions_begin_with_their_day(revision, at):
    found = revision_time(revision)
    assert (found is None) == (at is None)
    assert found is None or found % 86400 == 0


def test_newest_content_takes_the_latest_of_a_product():
    held = {("v1", "l", "{A}"): "260101001", ("v2", "l", "{A}"): "260103002", ("v", "l", "{B}"): "269999999"}
    times = newest_times(held, {}, lambda stream: (stream[2], stream[1]))
    assert times == {("{A}", "l", "held"): revision_time("260103002")}


# --- the API


def test_every_request_of_the_application_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    app = make_app(SimpleNamespace())
    described = document(app[ENDPOINTS]).paths
    for route in app.router.routes():
        path = route.resource.canonical
        if route.method != "HEAD" and not path.startswith("/assets/"):  # the page's own
            assert (route.method.lower() in described.get(path, ())) == (path != "/"), path
            path = path.replace("{version}/{language}/{stream}/{revision}/{file}", "{key}")
            assert f"`{route.method} {path}`" in text.replace("?", "`"), (route.method, path)
