"""Listing entries: filters, orders, pages; and whether all requests are documented."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from gup.content.catalog import Label
from gup.content.key import ContentKey, Kind
from gup.control.api.endpoint import ENDPOINTS, document
from gup.control.api.entries import Listing, matching, page_of, shown
from gup.control.index import Index, make_row
from gup.control.service import make_app


def row(name="full.zip", kind=Kind.FULL, revision="260101001", length=10, **more):
    key = ContentKey("14.3 RU2", "French", "{S}", revision, name)
    return make_row(key, kind, length, stored_at=more.pop("stored_at", 0.0), used_at=0.0, **more)


def rows_of(count):
    return [row(f"f{n:03}", length=n % 7 + 1, stored_at=float(n % 5)) for n in range(count)]


def index_of(tmp_path, rows):
    index = Index(tmp_path, lambda: None, lambda _: None)
    for one in rows:
        index.put(one)
    return index


@pytest.mark.parametrize("filters", [{}, {"kind": "full"}])
async def test_pages_together_are_the_whole_list_once(filters, tmp_path):
    rows = rows_of(53)
    index = index_of(tmp_path, rows)
    for order in ("key", "-key", "length", "-length", "stored", "-stored"):
        seen, cursor = [], None
        while cursor is not None or not seen:
            query = Listing.model_validate({"order": order, "limit": "10", "cursor": cursor} | filters)
            found = await page_of(index, query, labels)
            assert found.matching == 53
            seen += found.entries
            cursor = found.model_dump()["cursor"]
        assert sorted(one.key for one in seen) == sorted(one.key for one in rows)
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
    assert (told.from_revision, told.to_revision) == ("260101001", "260102007")
    assert told.content_revision == "260102007"
    assert (told.product, told.revision) == ("Virus Definitions", "260101001")
    assert shown(row(), labels(row())).to_revision is None


@pytest.mark.parametrize(
    "parameters",
    [
        *({"limit": wrong} for wrong in ("0", "1001", "ten", "²", "1_0")),
        *({"cursor": wrong} for wrong in ("%%", "e30=", "WzEsMl0=", "W05hTiwgIngiXQ==")),
        *({"order": "age"}, {"order": "--key"}, {"kind": "odd"}, {"sort": "key"}, {"version": ""}),
    ],
)
def test_wrong_parameters_are_named(parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        Listing.model_validate(parameters)


def test_every_request_of_the_application_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    app = make_app(SimpleNamespace())
    described = document(app[ENDPOINTS]).root["paths"]
    for route in app.router.routes():
        path = route.resource.canonical
        if route.method != "HEAD" and not path.startswith("/assets/"):  # the page's own
            assert (route.method.lower() in described.get(path, ())) == (path != "/"), path
            path = path.replace("{version}/{language}/{stream}/{revision}/{file}", "{key}")
            assert f"`{route.method} {path}`" in text.replace("?", "`"), (route.method, path)
