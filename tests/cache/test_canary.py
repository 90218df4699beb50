"""New revisions: what is new, since when, and for whom."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.cache.canary import Canary, KnownRevisions, age, keep_known, read_known
from gup.config import Settings
from gup.content.routes import Routes

STREAM = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
A, B, C = "260801001", "260801002", "260802001"
HOUR = 3600.0


def rules(**canary):
    mode = canary.pop("mode", "enforce")
    subnets = {"subnets": ["10.1.0.0/16", "2001:db8::/32"], "wait": "4h"}
    return Settings.model_validate({"rules": {"mode": mode, "canary": subnets | canary}}).rules


def canary(since=None, **settings):
    return Canary(rules(**settings), [KnownRevisions(STREAM, since)] if since is not None else [])


@pytest.mark.parametrize(
    ("since", "revision", "now", "opens_at"),
    [
        (None, A, 0.0, None),  # nothing is known of the stream: it is new
        ({A: 0.5 * HOUR}, A, HOUR, 4.5 * HOUR),
        ({A: 0.5 * HOUR}, A, 4.6 * HOUR, "open"),
        ({A: 0.0}, A, HOUR, "open"),  # by an operator
        ({B: HOUR}, A, 2 * HOUR, "open"),  # older than what is known
        ({A: 0.0}, B, 9 * HOUR, None),
        ({A: HOUR, B: 3 * HOUR}, A, 4 * HOUR, 5 * HOUR),  # each has its own time
        ({A: HOUR, B: 3 * HOUR}, B, 6 * HOUR, 7 * HOUR),
        ({A: HOUR}, None, 2 * HOUR, 5 * HOUR),  # "latest" may be the newest
        ({A: HOUR}, None, 6 * HOUR, "open"),
        (None, None, 0.0, "open"),
        ({A: HOUR}, "latest", 2 * HOUR, "open"),  # no revision
        ({"9": HOUR}, "10", 2 * HOUR, None),  # numbers, not texts
    ],
)
def test_what_waits_and_until_when(since, revision, now, opens_at):
    found = canary(since).of(STREAM, revision, "virus_definitions", now)
    if opens_at == "open":
        assert found is None
    else:
        assert found is not None
        assert (found.revision, found.opens_at) == (revision or max(since, key=age), opens_at)


def test_only_content_of_the_types_named_waits_and_none_with_the_rules_off():
    limited = canary(types=["virus_definitions"])
    assert limited.of(STREAM, A, "virus_definitions", 0.0)
    assert limited.of(STREAM, A, "client_patches", 0.0) is None
    assert limited.of(STREAM, A, "", 0.0) is None
    assert canary(mode="off").of(STREAM, A, "", 0.0) is None
    assert canary(subnets=[]).of(STREAM, A, "", 0.0) is None
    assert canary(mode="report").of(STREAM, A, "", 0.0)


@pytest.mark.parametrize(
    ("client", "first"),
    [
        ("10.1.255.255", True),
        ("10.2.0.0", False),
        ("10.1.0.1 40000", True),
        ("2001:db8:1:2::/64", True),
        ("2001:db9::/64", False),
    ],
)
def test_who_goes_first(client, first):
    assert canary().is_first(client) is first


@pytest.mark.parametrize(
    ("path", "link"),
    [
        (f"/content/{STREAM}/{B}/full.zip", f"/content/{STREAM}/{A}/full.zip"),
        (f"/content/{STREAM}/latest/full.zip", f"/content/{STREAM}/{A}/full.zip"),
        (f"/content/{STREAM}/{A}/xdelta{A}_To_{B}.dax", None),
    ],
)
def test_who_is_refused_is_told_what_may_be_had_and_when_all_get_it(path, link):
    found = Canary(rules(), [KnownRevisions(STREAM, {A: 0.0, B: HOUR}, newest=A)])
    route = Routes(fold_case=True).route(path)
    waiting = found.of(STREAM, B, "", 2 * HOUR)
    problem = found.problem(route, waiting, 2 * HOUR)
    assert (problem.status, problem.retry_after_seconds) == (403, 3 * HOUR)
    assert problem.extensions["opens_at"] == "1970-01-01T05:00:00+00:00"
    assert problem.extensions["newest"] == A
    assert problem.extensions["first"] == ["10.1.0.0/16", "2001:db8::/32"]
    assert dict(problem.headers).get("Link") == (link and f'<{quote(link)}>; rel="alternate"')


TELLINGS = st.lists(st.tuples(st.integers(1, 60).map(str), st.floats(0, 100)), max_size=100)


@given(TELLINGS, st.randoms())
def test_it_makes_no_difference_in_which_order_members_tell_it(tellings, random):
    """But for what is too old to be kept."""
    one = other = KnownRevisions(STREAM)
    for revision, at in tellings:
        one = one.with_one(revision, at)
    random.shuffle(tellings)
    for revision, at in tellings:
        other = other.with_one(revision, at)
    assert set(one.since) == set(other.since)
    assert len(one.since) <= 40
    assert one.latest() == other.latest() == max((name for name, _ in tellings), key=age, default="")


def test_what_is_kept_is_read_again_and_lines_that_are_wrong_are_left_out(tmp_path):
    known = [KnownRevisions(STREAM, {A: 0.0, B: 5.5}, newest=A)]
    keep_known(tmp_path, known)
    with (tmp_path / "revisions").open("ab") as file:
        file.write(b'{"stream": "no"}\nnot JSON\n{"stream": "' + STREAM.encode() + b'", "since": {"x": 1}}\n')
    assert read_known(tmp_path) == known
    assert read_known(tmp_path / "missing") == []


def test_a_clock_that_was_ahead_makes_nobody_wait_longer():
    ahead = KnownRevisions(STREAM, {A: 10.0, B: 1e9})
    assert ahead.by_the_clock(100.0, 5.0).since == {A: 10.0, B: 100.0}
    assert ahead.by_the_clock(1e9, 5.0) is ahead
