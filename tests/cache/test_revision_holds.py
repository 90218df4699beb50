"""Holds: what they name, who is excepted, what a refused client is told, and the file."""

from dataclasses import replace

import pytest
from harness.content import MONIKER, OTHER_MONIKER, content_path

from gup.cache.revision_holds import FILE, RevisionHold, RevisionHolds, keep_holds, read_holds
from gup.cluster.orders import Order
from gup.content.routes import Routes
from gup.jsonmodel import InvalidError

BAD, GOOD = "260801002", "260801001"
HOLD = RevisionHold(MONIKER, BAD, 1_785_574_800.0, "ann", "crashes clients", ("10.1.0.0/16", "2001:db8::/32"))


def route(file, revision=BAD, moniker=MONIKER):
    return Routes().route(content_path(file, moniker, revision))


@pytest.mark.parametrize(
    ("file", "folder", "is_named"),
    [
        ("full.zip", BAD, True),
        ("FULL.dax", BAD, True),
        ("notes.txt", BAD, True),
        (f"xdelta{GOOD}_To_{BAD}.dax", GOOD, True),
        (f"xdelta{GOOD}_To_{BAD}.dax", BAD, True),
        (f"xdelta{BAD}_To_260802001.dax", BAD, False),  # it leads away from the bad revision
        (f"xdelta{BAD}_To_{GOOD}.dax", BAD, False),
        ("full.zip", GOOD, False),
        ("full.zip", "latest", True),  # whatever it is of
        ("index.txt", "latest", False),
        (f"xdelta{GOOD}_To_260802001.dax", "latest", False),
    ],
)
def test_what_brings_a_client_to_the_revision_is_named(file, folder, is_named):
    assert HOLD.names(route(file, folder)) is is_named
    assert RevisionHolds([HOLD]).on(route(file, folder)) == (HOLD if is_named else None)
    assert not HOLD.names(route(file, folder, OTHER_MONIKER))


@pytest.mark.parametrize(
    ("client", "may"),
    [
        ("10.1.2.3", True),
        ("10.1.2.3 51234", True),  # an address that many share
        ("10.2.2.3", False),
        ("2001:db8:1:2::/64", True),
        ("2001:db9:1:2::/64", False),
        ("fe80::1", False),
    ],
)
def test_clients_in_the_excepted_subnets_may_have_it(client, may):
    assert HOLD.excepts(client) is may
    refused = RevisionHolds([HOLD]).refusal(route("full.zip"), client)
    assert (refused is None) is may
    assert refused is None or (refused.status, refused.slug) == (403, "on-hold")


def test_a_refused_client_is_told_who_when_why_and_what_it_may_have():
    hold = RevisionHold(MONIKER, BAD, 1_785_574_800.0, "ann", "crashes clients", (), "-", GOOD)
    problem = hold.problem(route("full.zip"))
    for part in (BAD, "ann", "2026-08-01 09:00 UTC", "crashes clients", GOOD):
        assert part in problem.detail
    assert problem.extensions == {
        "stream": MONIKER,
        "revision": BAD,
        "held_by": "ann",
        "held_at": "2026-08-01T09:00:00+00:00",
        "reason": "crashes clients",
        "newest": GOOD,
    }
    (link,) = problem.headers
    assert link[1] == f'<{route("full.zip", GOOD).upstream_path}>; rel="alternate"'
    assert hold.problem(route(f"xdelta{GOOD}_To_{BAD}.dax")).headers == ()
    assert "can't be told" in hold.problem(route("full.zip", "latest")).detail


def test_the_file_has_the_holds_and_a_line_that_is_none_is_left_out(tmp_path):
    keep_holds(tmp_path, [HOLD, RevisionHold(OTHER_MONIKER, GOOD, 1.0, newest="1")])
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"stream":"{}","revision":"1"}\n[]\n\xff\n')
    assert read_holds(tmp_path) == [HOLD, RevisionHold(OTHER_MONIKER, GOOD, 1.0, newest="1")]
    assert read_holds(tmp_path / "nowhere") == []


def test_an_order_says_the_same():
    order = Order("a", 7, 0, HOLD.at, "hold", HOLD.given())
    assert RevisionHold.of(order) == replace(HOLD, node="a")
    for wrong in ({"stream": "x"}, {"revision": "latest"}, {"except_subnets": ["10.0.0/8"]}):
        with pytest.raises(InvalidError):
            RevisionHold.of(Order("a", 7, 0, HOLD.at, "hold", HOLD.given() | wrong))
    with pytest.raises(InvalidError, match="must be a revision: 1 to 20 digits, such as 260801002"):
        RevisionHold.of(Order("a", 7, 0, 1.0, "hold", HOLD.given() | {"revision": "latest"}))
    with pytest.raises(InvalidError, match="/64"):
        RevisionHold.of(Order("a", 7, 0, 1.0, "hold", HOLD.given() | {"except_subnets": ["2001:db8::1/128"]}))
