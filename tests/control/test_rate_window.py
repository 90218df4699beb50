"""The increase and rate of a counter over a time window."""

from gup.control.stats.history import RateWindow


def test_the_increase_is_that_of_the_window():
    window = RateWindow(600.0)
    assert window.see(100, 0.0) == 0
    assert window.see(103, 1.0) == 3
    assert window.see(103, 500.0) == 3
    for second in range(500, 1300, 10):
        window.see(103, float(second))
    assert window.see(103, 1300.0) == 0
    assert window.see(104, 1301.0) == 1


def test_the_rate_is_that_of_the_last_seconds():
    window = RateWindow(5.0)
    assert window.bytes_per_second() == 0
    for second in range(100):
        window.see(1000 * min(second, 50), float(second))
        if second == 50:
            assert window.bytes_per_second() == 1000
    assert window.bytes_per_second() == 0


def test_a_total_that_falls_is_no_negative_rate():
    window = RateWindow(5.0)
    window.see(500, 0.0)
    window.see(0, 1.0)
    assert window.bytes_per_second() == 0
