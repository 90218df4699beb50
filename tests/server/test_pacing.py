"""The pace of one connection."""

import pytest

from gup.server.pacing import Pacer


def sent_in(seconds: float, per_second: int, *, late: float = 0.0, turn_bytes: int = 1 << 30) -> int:
    """What a pacer lets through when its timers are late by so much."""
    now, total = 100.0, 0
    pacer = Pacer(per_second, now)
    while now < 100.0 + seconds:
        if delay := pacer.delay_seconds(now):
            now += delay + late
            continue
        piece = min(pacer.slice_bytes, turn_bytes)
        pacer.took(piece, now)
        total += piece
    return total


@pytest.mark.parametrize("per_second", [100, 5_000, 1_000_000, 300_000_000])
@pytest.mark.parametrize("late", [0.0, 0.001, 0.02])
def test_the_rate_is_kept_though_timers_are_late(per_second, late):
    seconds = 3000.0 if per_second < 1000 else 20.0
    assert sent_in(seconds, per_second, late=late) == pytest.approx(seconds * per_second, rel=0.02)


def test_small_pieces_are_charged_as_they_are():
    assert sent_in(10.0, 100_000, turn_bytes=700) == pytest.approx(1_000_000, rel=0.02)


def test_a_pause_gives_no_more_than_one_slice_of_credit():
    pacer = Pacer(100_000, 0.0)
    pacer.took(pacer.slice_bytes, 1000.0)
    assert pacer.delay_seconds(1000.0) == 0.0
    pacer.took(pacer.slice_bytes, 1000.0)
    assert pacer.delay_seconds(1000.0) == pytest.approx(0.05)
