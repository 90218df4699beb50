"""The page's parts: words for figures, what is held, templates that escape, and who is told what when."""

import asyncio
import contextlib
import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gup.content.key import ContentKey, Kind
from gup.control.api.schemas import Cluster, ClusterMember, GoneMember, SiteTraffic
from gup.control.entry_table import make_row
from gup.control.page import view
from gup.control.page.live import MAX_LISTENERS, Page
from gup.control.page.view import MAX_REVISIONS, MAX_STREAMS, Kept, Renderer, holdings

SPACE = "\N{NO-BREAK SPACE}"
SIZES = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 99_949: "99.9 kB", 999_400: "999 kB", 999_500: "1.0 MB"}
SIZES |= {
    1_234_567_890: "1.2 GB",
    20_000_000_000: "20.0 GB",
    5_432e12: "5.4 PB",
    -1500: "\N{MINUS SIGN}1.5 kB",
}
SHARES = {0: "0 %", 0.004: "0.4 %", 0.5: "50 %", 0.9996: "99.9 %", 1: "100 %", -0.25: "\N{MINUS SIGN}25 %"}
SPANS = {-3: "0 s", 59.9: "60 s", 60: "1 min", 7200: "2 h", 1e6: "11 d"}


@pytest.mark.parametrize(("word", "rows"), [(view.size, SIZES), (view.percent, SHARES), (view.span, SPANS)])
def test_figures_in_words(word, rows):
    """Shares are never rounded to all or nothing."""
    assert {given: word(given) for given in rows} == {
        given: shown.replace(" ", SPACE) for given, shown in rows.items()
    }


@given(st.floats(-1e18, 1e18))
@settings(max_examples=50)
def test_every_size_has_at_most_three_digits_before_its_point(count):
    number = view.size(count).split(SPACE)[0]
    assert len(re.sub(r"\D", "", number.split(".")[0])) <= 3 or "PB" in view.size(count)


def row(stream, revision, file, *, hits=0, length=100, at=5.0):
    key = ContentKey("14.3", "French", stream, revision, file)
    kind = Kind.DELTA if file.endswith(".dax") else Kind.FULL
    return make_row(key, kind, length, stored_at=at, used_at=at + 1, hits=hits)


def label(stream):
    return stream[2], stream[0], stream[1]


def test_what_is_held_is_told_by_stream_and_revision():
    delta = "xdelta260101001_To_260102001.dax"
    rows = [
        row("{A}", "260101001", "full.zip", hits=3, at=7.0),
        row("{A}", "260102001", "full.zip", hits=5, at=9.0),
        row("{A}", "260101001", delta, hits=2, length=10),  # brings to the newer one, whatever its folder
        row("{B}", "260101001", "full.zip"),
    ]
    found = holdings(rows, label)
    first, second = found["streams"]
    assert (first["product"], first["version"], first["language"]) == ("{A}", "14.3", "French")
    assert (first["size_bytes"], first["hits"], first["stored_at"]) == (210, 10, 9.0)
    assert [(one["name"], one["wholes"], one["deltas"], one["hits"]) for one in first["revisions"]] == [
        ("260102001", 1, 1, 7),
        ("260101001", 1, 0, 3),
    ]
    assert (second["size_bytes"], found["more"]) == (100, 0)


def test_of_many_streams_and_revisions_the_largest_and_newest_are_told():
    rows = [row(f"{{{n}}}", "260101001", "full.zip", length=n) for n in range(MAX_STREAMS + 7)]
    rows += [row("{0}", f"2601010{n:02}", "full.zip", length=10_000) for n in range(2, MAX_REVISIONS + 5)]
    found = holdings(rows, label)
    assert (len(found["streams"]), found["more"]) == (MAX_STREAMS, 7)
    (zero,) = [stream for stream in found["streams"] if stream["product"] == "{0}"]
    assert (len(zero["revisions"]), zero["more"]) == (MAX_REVISIONS, 4)
    assert zero["revisions"][0]["name"] == f"2601010{MAX_REVISIONS + 4:02}"


def test_bodies_without_a_revision_are_told_by_their_file():
    (held,) = holdings([row("_", "_", "ContentInfo.txt"), row("_", "_", "a%2Fb.flg")], label)["streams"]
    assert {revision["name"] for revision in held["revisions"]} == {"ContentInfo.txt", "a/b.flg"}


ATTACK = "<img/src=x/onerror=hit()>"


def member(name, **changes):
    made = {
        "name": name,
        "address": f"http://{name}:2969",
        "askable": True,
        "state": "ready",
        "detail": "",
        "told_seconds": 0.0,
        "share_bytes_per_second": 250_000,
        "wan_bytes_per_second": 100_000,
        "unconfirmed_orders": 0,
        "totals": {"gup_client_sent_bytes_total": 7_000, "gup_upstream_received_bytes_total": 3_000},
    }
    return ClusterMember(**made | changes)


def fragments(cluster):
    view = {"status": SimpleNamespace(cluster=cluster, budget=None), "now": 1.0, "zone": None}
    return Renderer().fragments(view, ["site"])


def test_the_site_part_tells_each_gup_and_escapes_what_others_say():
    rates = dict.fromkeys(("share_bytes_per_second", "wan_bytes_per_second"))
    never = {"told_seconds": None, "unconfirmed_orders": None, "totals": {}, **rates}
    cluster = Cluster(
        site=ATTACK,
        node="a",
        alone=False,
        engine_error=None,
        wan_rate_bytes_per_second=1_000_000,
        members=[
            member("a"),
            member(ATTACK, state="unreachable", detail=ATTACK, unconfirmed_orders=2),
            member("c", state="unlike", detail="its upstreams differ", told_seconds=12.5),
            member("d", state="unknown", **never),
        ],
        gone=[
            GoneMember(name="e" + ATTACK, address=ATTACK, left=False, gone_seconds=90, totals={}),
            GoneMember(name="f", address="http://f:1", left=True, gone_seconds=5, totals={}),
        ],
        sums=SiteTraffic.of(21_000, 9_000, 0, between_members_bytes=4_000),
    )
    html = fragments(cluster)["site"]
    assert "<img" not in html
    assert html.count("&lt;img/src=x/onerror=hit()&gt;") >= 6
    rows = dict(re.findall(r'<tr data-member="([^"]*)">(.*?)</tr>', html, re.DOTALL))
    texts = [" ".join(re.sub("<[^>]*>", " ", row).split()).replace(SPACE, " ") for row in rows.values()]
    a, b, c, d, e, f = texts
    assert a == "a this one http://a:2969 ready 100 kB/s share 250 kB/s 7.0 kB 3.0 kB 0 B 0 B confirmed"
    assert [word for word in ("unreachable", "2 unconfirmed") if word not in b] == []
    assert "unlike its upstreams differ; figures of 12 s ago" in c
    assert c.endswith("confirmed")
    assert d == "d http://d:2969 unknown - 0 B 0 B 0 B 0 B -".replace("-", "\N{EN DASH}")
    assert (
        "2 unconfirmed" in b,
        'id="saved-site"' in html,
        "gone 1 min ago" in e,
        "stopped 5 s ago" in f,
    ) == (True,) * 4
    assert '<p class="big"><data value="12000">' in html


def test_a_gup_alone_shows_nothing_of_a_site():
    assert fragments(None) == {}


async def test_what_is_dear_is_found_once_for_all_and_stands_and_a_failure_does_not():
    finding, answers = asyncio.Event(), iter([OSError("not now"), 1, 2])

    async def find():
        await finding.wait()
        if isinstance(answer := next(answers), OSError):
            raise answer
        return answer

    kept = Kept(60.0, find)
    waiting = [asyncio.create_task(kept.value()) for _ in range(5)]
    await asyncio.sleep(0)
    finding.set()
    failed, *found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(failed, OSError)
    assert [*found, await kept.value()] == [1] * 5


def parsed(message):
    """Names and data of server-sent events."""
    found = re.findall(r"event: (\w+)\ndata: (.*)\n\n", message.decode())
    return [(name, json.loads(data)) for name, data in found]


async def test_listeners_share_looks_and_get_the_newest_of_what_changed(monkeypatch):
    monkeypatch.setattr("gup.control.page.live._SECONDS", 0.01)
    looks = 0

    async def look():
        nonlocal looks
        looks += 1
        if looks == 3:
            raise ValueError("one look fails")
        return {"n": looks}, {"still": "<p>\nsame</p>", "new": f"<b>{looks}</b>"}

    page = Page(None, None)
    page.look = look
    with page.listening() as admitted:
        assert admitted
        one, two = page.messages(), page.messages()
        first = parsed(await anext(one))
        assert first == parsed(await anext(two))
        assert ("fragment", {"id": "still", "html": "<p>\nsame</p>"}) in first
        later = []
        while not any(name == "figures" and data["n"] > 3 for name, data in later):
            later += parsed(await anext(one))
        assert "still" not in {data.get("id") for _, data in later}
        missed = parsed(await anext(two))  # a slow one: each event once, as it is by now
        assert [name for name, _ in missed] == ["figures", "fragment"]
        assert missed[0][1]["n"] >= 4
        late = parsed(await anext(page.messages()))  # who comes later is told all at once
        assert {data.get("id") for _, data in late} == {None, "still", "new"}
    await page.stop()


async def test_listeners_are_bounded_and_a_stop_ends_them():
    async def look():
        return {}, {}

    page = Page(None, None)
    page.look = look
    with contextlib.ExitStack() as listeners:
        admitted = [listeners.enter_context(page.listening()) for _ in range(MAX_LISTENERS - 1)]
        with page.listening() as last, page.listening() as refused:
            assert all((*admitted, last))
            assert not refused
        with page.listening() as again:
            assert again
        messages = page.messages()
        await anext(messages)
        ending = asyncio.create_task(anext(messages, None))
        await asyncio.sleep(0)
        await page.stop()
        assert await ending is None
        with page.listening() as late:
            assert not late
