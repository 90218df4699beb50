"""The present rate of a body that grows."""

import pytest

from gup.cache.body import Pace


def grown(pace, rate, start, seconds, size=0.0):
    """`size` after growing for so many seconds, told ten times a second."""
    for tenth in range(1, int(seconds * 10) + 1):
        pace.came(int(size + rate * tenth / 10), start + tenth / 10)
    return int(size + rate * seconds)


def test_at_an_even_rate_it_is_the_rate():
    pace = Pace(100.0)
    size = grown(pace, 1000, 100.0, 20)
    assert pace.seconds_for(5000, size, 120.0) == pytest.approx(5, rel=0.1)
    assert pace.seconds_for(0, size, 120.0) == pace.seconds_for(-1, size, 120.0) == 0.0


def test_a_link_that_has_become_slow_is_slow():
    """The mean of all that came would promise the rest within a second."""
    pace = Pace(0.0)
    size = grown(pace, 50_000, 10.0, 6, grown(pace, 2_000_000, 0.0, 10))
    assert pace.seconds_for(1_000_000, size, 16.0) == pytest.approx(20, rel=0.1)
    size = grown(pace, 2_000_000, 16.0, 5, size)
    assert pace.seconds_for(1_000_000, size, 21.0) == pytest.approx(0.5, rel=0.1)


def test_what_was_there_before_is_no_rate():
    pace = Pace(0.0)
    pace.begin_with(50_000_000, 1.0)
    size = grown(pace, 1000, 1.0, 3, 50_000_000)
    assert pace.seconds_for(10_000, size, 4.0) == pytest.approx(10, rel=0.1)


def test_a_silence_is_the_least_that_it_will_take():
    pace = Pace(0.0)
    assert pace.seconds_for(1, 0, 7.0) == 7.0
    pace.came(1_000_000, 7.0)
    assert pace.seconds_for(1, 1_000_000, 8.0) == pytest.approx(1.0)
    assert pace.seconds_for(1, 1_000_000, 60.0) == pytest.approx(53.0)
