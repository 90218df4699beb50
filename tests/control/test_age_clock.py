"""The clock by which entries grow old: jumps ahead are doubted for a day, jumps back are taken over."""

from dataclasses import dataclass

import pytest

from gup.control.eviction import BELIEVED_AFTER_SECONDS, GAP_SECONDS, AgeClock

NOW = 1_800_000_000.0
MONTH = 30 * 86400.0


@dataclass
class Machine:
    wall: float = NOW
    boot: float = 1000.0

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def ages(machine) -> AgeClock:
    return AgeClock(lambda: machine.wall, lambda: machine.boot)


def test_it_follows_a_clock_that_is_right_and_one_that_is_corrected_a_little(machine, ages):
    for _ in range(100):
        machine.passes(3600)
        machine.wall += 2
        assert ages() == machine.wall


def test_a_jump_ahead_is_not_believed_and_when_it_is_undone_nothing_was(machine, ages):
    assert ages() == NOW
    machine.wall += 12 * MONTH
    machine.passes(3600)
    assert ages() == NOW + 3600
    machine.wall -= 12 * MONTH
    machine.passes(60)
    assert ages() == machine.wall == NOW + 3660


def test_a_jump_that_stands_for_a_day_is_believed(machine, ages):
    machine.wall += MONTH
    assert ages() == NOW
    machine.passes(BELIEVED_AFTER_SECONDS - 1)
    assert ages() == NOW + BELIEVED_AFTER_SECONDS - 1
    machine.passes(1)
    assert ages() == machine.wall


def test_a_jump_back_counts_at_once(machine, ages):
    machine.wall -= MONTH
    assert ages() == NOW - MONTH


@pytest.mark.parametrize(("gap", "believed"), [(GAP_SECONDS - 1, True), (GAP_SECONDS + 1, False)])
def test_at_the_start_the_last_use_is_what_the_clock_is_held_to(machine, ages, gap, believed):
    ages.begin([NOW - 2 * gap, NOW - gap, NOW + 1])
    assert (ages() == NOW) is believed
    machine.passes(BELIEVED_AFTER_SECONDS + 1)
    ages()
    machine.passes(BELIEVED_AFTER_SECONDS + 1)
    assert ages() == machine.wall


def test_a_last_use_in_the_future_changes_nothing(ages):
    ages.begin([NOW + MONTH])
    assert ages() == NOW
