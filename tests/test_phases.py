"""Clocks of phases: what they give adds up, and a wait is split by what the fill did meanwhile."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.phases import ELSEWHERE, FILL_PHASES, MOST_MARKS, FillClock, RequestClock, split


class Time:
    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


STEPS = st.lists(
    st.tuples(st.sampled_from([*FILL_PHASES, ELSEWHERE]), st.floats(0, 20, allow_nan=False)), max_size=200
)


@given(STEPS)
def test_the_phases_add_up_to_the_whole(steps):
    time = Time()
    clock = FillClock(time)
    for phase, seconds in steps:
        clock.enter(phase)
        time.now += seconds
    clock.stop()
    whole = time.now - 100.0
    time.now += 5.0
    assert sum(clock.spent.values()) == pytest.approx(whole, abs=1e-6)
    assert clock.seconds == pytest.approx(whole, abs=1e-6)
    marks = clock.marks()
    assert len(marks) <= MOST_MARKS + 2
    assert marks == sorted(marks)
    assert sum(marks[-1][1:]) == pytest.approx(whole, abs=1e-6)
    assert len(json.dumps(clock.told())) < 8000


@given(STEPS, st.floats(90, 500), st.floats(0, 500), st.floats(0, 1))
def test_a_split_adds_up_to_the_wait(steps, start, length, share):
    time = Time()
    clock = FillClock(time)
    for phase, seconds in steps:
        clock.enter(phase)
        time.now += seconds
    wait = (start, start + length, length * share)
    assert sum(split(clock.marks(), wait).values()) == pytest.approx(wait[2], abs=1e-6)


def test_a_wait_is_split_by_what_the_fill_did_in_that_time():
    time = Time(0.0)
    fill = FillClock(time)
    for phase, seconds in (("queue", 3.0), ("head", 2.0), ("wan", 4.0), ("disk", 1.0)):
        fill.enter(phase)
        time.now += seconds
    fill.stop()
    assert split(fill.marks(), (0.0, 10.0, 10.0)) == pytest.approx(
        {"queue": 3.0, "head": 2.0, "wan": 4.0, "disk": 1.0}
    )
    assert split(fill.marks(), (2.0, 6.0, 4.0)) == pytest.approx({"queue": 1.0, "head": 2.0, "wan": 1.0})
    assert split(fill.marks(), (5.0, 10.0, 1.0)) == pytest.approx({"wan": 0.8, "disk": 0.2})
    assert split(fill.marks(), (20.0, 30.0, 2.0)) == {ELSEWHERE: 2.0}


def test_a_request_has_the_phases_of_the_fill_that_it_waited_for():
    time = Time(0.0)
    fill, request = FillClock(time), RequestClock(time, "disk")
    request.wait_for(fill)
    for phase in ("queue", "head"):
        fill.enter(phase)
        time.now += 2.0
    request.enter("client")
    request.close_wait()
    time.now += 5.0
    fill.enter("receiving")
    request.wait_for(fill)
    time.now += 1.0
    request.enter("sending")
    request.split()
    assert {name: part for name, part in request.spent.items() if part > 1e-9} == pytest.approx(
        {"queue": 2.0, "head": 2.0, "client": 5.0, "receiving": 1.0}
    )
    assert request.elsewhere == []


def test_a_wait_for_another_processs_fill_is_told_as_it_is():
    time = Time(0.0)
    fill, request = FillClock(time), RequestClock(time, "disk")
    fill.enter(ELSEWHERE)
    request.wait_for(fill)
    time.now += 2.0
    request.enter("sending")
    request.split()
    assert (request.spent, request.elsewhere) == ({ELSEWHERE: 2.0}, [(0.0, 2.0, 2.0)])


def test_many_looks_at_a_long_wait_leave_a_few_waits():
    time = Time(0.0)
    fill, request = FillClock(time), RequestClock(time, "disk")
    fill.enter(ELSEWHERE)
    for _ in range(100):
        request.wait_for(fill)
        time.now += 1.0
        request.split()
        request.enter("client")
        time.now += 0.1
    request.enter("sending")
    assert len(request.elsewhere) <= 4
    assert sum(seconds for _, _, seconds in request.elsewhere) == pytest.approx(100.0)
    assert request.spent == pytest.approx({ELSEWHERE: 100.0, "client": 10.0})
