import random

import pytest

from gup.demo.figures import MAX_COMPLAINTS, Figures, Latencies, cache_result


def test_quantiles_are_within_a_step_of_the_truth():
    latencies = Latencies()
    chance = random.Random(7)
    durations = sorted(chance.lognormvariate(-6, 2) for _ in range(5000))
    for duration in durations:
        latencies.add(duration)
    assert latencies.count == 5000
    for share in (0.01, 0.5, 0.99, 1.0):
        truth = durations[max(1, round(share * 5000)) - 1]
        assert latencies.quantile(share) == pytest.approx(truth, rel=0.025)


def test_extremes_stay_in_bounds():
    latencies = Latencies()
    assert latencies.quantile(0.5) is None
    latencies.add(0.0)
    assert latencies.quantile(0.5) == pytest.approx(1e-5)
    latencies.add(1e9)
    assert 500 < latencies.quantile(1.0) < 700


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (None, "none"),
        ("", "none"),
        ("gup; hit", "hit"),
        ("gup; hit; fwd=stale", "hit"),
        ("gup; fwd=uri-miss; stored", "miss"),
        ("gup; fwd=uri-miss; collapsed", "collapsed"),
    ],
)
def test_cache_status_is_read(value, word):
    assert cache_result(value) == word


def test_complaints_are_bounded():
    figures = Figures()
    for number in range(100):
        figures.complain(str(number))
    assert figures.complaints == [str(number) for number in range(MAX_COMPLAINTS)]


def test_hits_are_timed_apart():
    figures = Figures()
    figures.answered(0.001, "gup; hit")
    figures.answered(1.0, "gup; fwd=uri-miss; stored")
    assert figures.hit_time_to_first_byte.count == 1
    assert figures.time_to_first_byte.count == 2
