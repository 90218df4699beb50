"""The dates of revisions, as metrics show them."""

import pytest

from gup.control.traffic import newest_times, revision_time


@pytest.mark.parametrize(
    ("revision", "at"), [("700102001", 86400.0 + 0), ("269901001", None), ("260231001", None)]
)
def test_revisions_begin_with_their_day(revision, at):
    found = revision_time(revision)
    assert (found is None) == (at is None)
    assert found is None or found % 86400 == 0


def test_newest_content_takes_the_latest_of_a_product():
    held = {("v1", "l", "{A}"): "260101001", ("v2", "l", "{A}"): "260103002", ("v", "l", "{B}"): "269999999"}
    times = newest_times(held, lambda stream: (stream[2], stream[1]))
    assert times == {("{A}", "l"): revision_time("260103002")}
