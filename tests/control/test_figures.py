"""Figures for pages and metrics."""

import pytest

from gup.control.api.status import totals_of
from gup.control.traffic import newest_times, revision_time


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
