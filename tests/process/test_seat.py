"""A seat's decisions, with made-up times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.process.seat import TRANSITIONS, Phase, Seat, delay_seconds


def worker(phase=Phase.WAITING, role="worker"):
    seat = Seat(role, 0, 3)
    if phase is not Phase.WAITING:
        seat.start(100.0)
    if phase is Phase.READY:
        seat.ready(101.0)
    return seat


def test_short_lives_delay_the_next_start_up_to_five_seconds():
    assert [round(delay_seconds(n), 3) for n in range(10)] == [0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]
    assert delay_seconds(10**9) == 5


def test_a_long_life_forgets_short_ones():
    seat = worker()
    now = 0.0
    for _ in range(4):
        seat.start(now)
        seat.died(now + 1, again=True)
        now = seat.start_at
    assert seat.quick_deaths == 4
    seat.start(now)
    seat.ready(now + 1)
    seat.died(now + 5, again=True)
    assert (seat.quick_deaths, seat.start_at) == (0, now + 5)
    assert seat.generation == 5


def test_the_end_of_the_service_is_for_good():
    seat = worker(Phase.READY)
    seat.died(200.0, again=False)
    assert seat.phase is Phase.GONE
    with pytest.raises(AssertionError):
        seat.start(201.0)


@given(st.sampled_from(Phase), st.sampled_from(Phase))
def test_only_the_table_moves(before, after):
    seat = Seat("worker", 0, 3, phase=before)
    if after in TRANSITIONS[before]:
        seat.move(after)
        assert seat.phase is after
    else:
        with pytest.raises(AssertionError):
            seat.move(after)


@pytest.mark.parametrize(
    ("phase", "role", "now", "last_beat", "watched_from", "reason"),
    [
        (Phase.STARTING, "worker", 130.0, 0, 0, None),
        (Phase.STARTING, "worker", 130.1, 0, 0, "not ready within 30 s"),
        (Phase.STARTING, "controller", 130.1, 0, 0, "not ready within 30 s"),
        (Phase.STARTING, "worker", 150.0, 0, 140.0, None),
        (Phase.READY, "worker", 131.0, 0, 0, None),
        (Phase.READY, "worker", 131.1, 0, 0, "no sign of life"),
        (Phase.READY, "worker", 131.1, 102.0, 0, None),
        (Phase.READY, "worker", 170.0, 139.0, 0, "no sign of life"),
        (Phase.READY, "worker", 1000.0, 139.0, 990.0, None),
        (Phase.READY, "controller", 1000.0, 0, 0, None),
        (Phase.READY, "controller", 1000.0, 900.0, 0, "no sign of life"),
        (Phase.WAITING, "worker", 1000.0, 0, 0, None),
    ],
)
def test_who_must_be_killed(phase, role, now, last_beat, watched_from, reason):
    verdict = worker(phase, role).verdict(now, last_beat, watched_from)
    assert verdict is None if reason is None else reason in verdict


def test_a_closed_channel_must_be_followed_by_an_end():
    seat = worker(Phase.READY)
    seat.closed_at = 110.0
    assert seat.verdict(112.0, 111.0, 0) is None
    assert "closed its control channel" in seat.verdict(112.1, 111.0, 0)
    seat.move(Phase.DOOMED)
    assert seat.verdict(200.0, 0, 0) is None


def test_a_late_ready_of_a_killed_child_changes_nothing():
    seat = worker(Phase.STARTING)
    seat.move(Phase.DOOMED)
    seat.ready(102.0)
    assert seat.phase is Phase.DOOMED
