"""Listing entries: filters, orders, pages."""

import pytest

from gup.content.catalog import Label
from gup.content.key import ContentKey, Kind
from gup.control.api.entries import Listing, matching, page_of, shown
from gup.control.entry_table import make_row


def row(name="full.zip", kind=Kind.FULL, revision="260101001", length=10, **more):
    key = ContentKey("14.3 RU2", "French", "{S}", revision, name)
    return make_row(key, kind, length, stored_at=more.pop("stored_at", 0.0), used_at=0.0, **more)


def rows_of(count):
    return [row(f"f{n:03}", length=n % 7 + 1, stored_at=float(n % 5)) for n in range(count)]


def put(table, rows):
    for one in rows:
        table.put(one)


@pytest.mark.parametrize("filters", [{}, {"kind": "full"}])
async def test_pages_together_are_the_whole_list_once(table, filters):
    rows = rows_of(53)
    put(table, rows)
    for order in ("key", "-key", "name", "-name", "length", "-length", "stored", "-stored"):
        seen, cursor = [], None
        while cursor is not None or not seen:
            query = Listing.model_validate({"order": order, "limit": "10", "cursor": cursor} | filters)
            found = await page_of(table, query, labels, 0.0)
            assert found.matching == 53
            seen += found.entries
            cursor = found.model_dump()["cursor"]
        assert sorted(one.key for one in seen) == sorted(one.key for one in rows)
        lengths = [one.length_bytes for one in seen]
        if "length" in order:
            assert lengths == sorted(lengths, reverse=order.startswith("-"))


def labels(*_):
    return Label("Virus Definitions", "14.3.1", "English", "virus_definitions")


@pytest.mark.parametrize("filters", [{}, {"kind": "full"}])
async def test_by_name_entries_are_in_the_order_of_what_is_shown(table, filters):
    """Product, version, language, revision; streams that nothing lists come last."""
    products = {"{1}": "Virus", "{2}": "intrusion", "{3}": "{3}"}
    keys = [
        ContentKey(version, "any", stream, revision, "full.zip")
        for stream in ("{3}", "{1}", "{2}")
        for version in ("14.3", "14.2")
        for revision in ("260102001", "260101001")
    ]
    rows = [make_row(key, Kind.FULL, 1, stored_at=0.0, used_at=0.0) for key in keys]
    wanted = sorted(
        keys, key=lambda key: (["{2}", "{1}", "{3}"].index(key.stream), key.version, key.revision)
    )

    def label(stream, _file):
        return Label(products[stream[2]], "", "", "")

    put(table, rows)
    for order, expected in (("name", wanted), ("-name", wanted[::-1])):
        seen, cursor = [], None
        while cursor is not None or not seen:
            query = Listing.model_validate({"order": order, "limit": "5", "cursor": cursor} | filters)
            found = await page_of(table, query, label, 0.0)
            seen += [one.key for one in found.entries]
            cursor = found.model_dump()["cursor"]
        assert seen == [key.text for key in expected]


def test_filters_choose():
    delta = "xdelta260101001_To_260102007.dax"
    rows = [row(stored_at=50.0), row(delta, Kind.DELTA, stored_at=90.0)]

    def found(**wanted):
        return [one.file for one in matching(rows, Listing.model_validate(wanted), labels, 100.0)]

    assert (
        found(pattern="*/full.*")
        == found(older_than="50")
        == found(pattern="14.? ru2/F*.ZIP")
        == ["full.zip"]
    )
    assert found(unused_for="100") == found(pattern="*") == found(older_than="10") == ["full.zip", delta]
    assert found(kind="delta") == [delta]
    assert found(revision="260102007") == [delta]
    assert found(revision="260101001") == ["full.zip", delta]
    assert found(product="virus definitions") == found() == ["full.zip", delta]
    assert found(version="14.3 ru2", language="FRENCH", stream="{s}") == found()
    assert found(version="14.3.1", language="en") == found(language="fr-CA") == found()
    for wanted in (
        {"language": "German"},
        {"product": "{S}"},
        {"revision": "26"},
        {"version": "14"},
        {"pattern": "full.zip"},
    ):
        assert found(**wanted) == []


def test_a_delta_tells_its_step():
    told = shown(row("xdelta260101001_To_260102007.dax", Kind.DELTA), labels())
    assert (told.from_revision, told.to_revision) == ("260101001", "260102007")
    assert told.content_revision == "260102007"
    assert (told.product, told.revision) == ("Virus Definitions", "260101001")
    assert shown(row(), labels()).to_revision is None


@pytest.mark.parametrize(
    "parameters",
    [
        *({"limit": wrong} for wrong in ("0", "1001", "ten", "²", "1_0")),
        *({"cursor": wrong} for wrong in ("%%", "e30=", "WzEsMl0=", "W05hTiwgIngiXQ==")),
        *({"order": "age"}, {"order": "--key"}, {"kind": "odd"}, {"sort": "key"}, {"version": ""}),
        *({"older_than": "1h"}, {"unused_for": "-1"}, {"pattern": ""}),
    ],
)
def test_wrong_parameters_are_named(parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        Listing.model_validate(parameters)
