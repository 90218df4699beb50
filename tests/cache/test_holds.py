"""Upstreams on hold for one key: by Retry-After, and since a body was found wrong; kept in the state file."""

import pytest

from gup.cache.negative_cache import LONGEST_HOLD_SECONDS, Holds
from gup.cache.records import MEMORY_SECONDS, Failure, FillState, Hold, Phase
from gup.content.key import ContentKey, Kind
from gup.errors import Problem
from gup.upstream.exchange import RemoteHead, UpstreamFailure, rejected

KEY = ContentKey.parse("any/any/{535CB6A4-441F-4E8A-A897-804CD859100E}/260801001/full.zip")
FAILURE = Failure.of(Problem("upstream-error", "x"), 3.0, 100.0)
WRONG = rejected("does not end like a ZIP file")


class Time:
    now = 5000.0

    def __call__(self) -> float:
        return self.now


def head(etag: str | None = '"a"', modified: str | None = None, length: int | None = 7) -> RemoteHead:
    return RemoteHead(200, 0, length, etag, modified, "x/y", "u")


def later(seconds: float) -> UpstreamFailure:
    return UpstreamFailure(
        "error", "upstream-error", "", again=False, status=503, retry_after_seconds=seconds
    )


def holds(clock: Time, *rows: Hold) -> Holds:
    return Holds(rows, 2.0, clock)


def test_a_wrong_body_is_waited_for_ever_longer_up_to_a_quarter_of_an_hour():
    clock, told = Time(), []
    held = Holds((), 2.0, clock, lambda upstream, detail: told.append((upstream, detail)))
    waits = []
    for _ in range(14):
        held.note("u", WRONG, head())
        waits.append(held.seconds_left("u"))
        clock.now += held.seconds_left("u")
        assert held.seconds_left("u") == 0
        assert held.is_wrong(head()), "its head is known when the wait is over"
    assert waits == [*(2.0**number for number in range(1, 10)), *[900.0] * 5]
    assert told == [("u", WRONG.detail)] * 14
    assert not held.seconds_left("another")


@pytest.mark.parametrize(
    "other",
    [head('"b"'), head(None, "Sun, 06 Nov 1994 08:49:37 GMT"), head(length=8), head(length=None)],
    ids=["ETag", "Last-Modified", "length", "no length"],
)
def test_another_body_is_a_new_chance(other):
    clock = Time()
    held = holds(clock)
    for _ in range(5):
        held.note("u", WRONG, head())
    clock.now += held.seconds_left("u")
    assert not held.is_wrong(other)
    held.note("u", WRONG, other)
    assert held.seconds_left("u") == 2, "and begins anew"


def test_without_validators_nobody_can_tell_that_it_is_the_same():
    held = holds(Time())
    for _ in range(3):
        held.note("u", WRONG, head(None))
    assert not held.is_wrong(head(None))
    assert held.seconds_left("u") == 8


def test_a_head_that_is_no_content_waits_too():
    held = holds(Time())
    for _ in range(3):
        held.note("u", rejected("u sent a web page"), None)
    assert held.seconds_left("u") == 8
    assert not held.is_wrong(head())


def test_it_may_be_fetched_once_more_after_a_day():
    clock = Time()
    held = holds(clock)
    held.note("u", WRONG, head())
    clock.now += MEMORY_SECONDS - 1
    held.note("u", rejected("u still has it"), None)
    assert held.rows[0].times == 2
    assert holds(clock, *held.rows).is_wrong(head())
    clock.now += LONGEST_HOLD_SECONDS + 5
    assert not holds(clock, *held.rows).is_wrong(head())


def test_retry_after_is_kept_beside_what_was_wrong():
    clock = Time()
    held = holds(clock)
    held.note("u", WRONG, head())
    held.note("u", later(120), None)
    assert held.seconds_left("u") == 120
    assert held.is_wrong(head())
    clock.now += 121
    assert not held.seconds_left("u")


def test_other_failures_hold_nothing():
    held = holds(Time())
    for outcome in ("error", "timeout", "unreachable"):
        held.note("u", UpstreamFailure(outcome, "upstream-error", "", again=True), head())
    assert held.rows == ()


def test_a_clock_that_began_anew_at_boot_ends_all_of_it():
    clock = Time()
    held = holds(clock)
    held.note("u", later(3600), None)
    held.note("v", WRONG, head())
    clock.now = 10.0
    assert not held.seconds_left("u")
    state = FillState(KEY, Kind.FULL, 0, Phase.FAILED, holds=held.rows)
    assert not state.is_current(clock.now)
