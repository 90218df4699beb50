"""The health of upstreams: pure moves, the shared word, the board over two processes' views."""

import threading
from collections import Counter
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.upstream.checks import check_path, wait_seconds
from gup.upstream.health import (
    DOUBT_SECONDS,
    TRANSITIONS,
    Board,
    Health,
    Sign,
    State,
    after,
    backoff_seconds,
    rendezvous,
)

GOOD, SLOW, ERRED, FAILED = Sign.GOOD, Sign.SLOW, Sign.ERRED, Sign.FAILED


def through(*signs: Sign, apart: float = 1.0, health: Health | None = None) -> Health:
    health = health or Health()
    for number, sign in enumerate(signs):
        health = after(health, sign, 100 + number * apart, 5000 + number * apart)
    return health


@pytest.mark.parametrize(
    ("signs", "state"),
    [
        ((), State.UNKNOWN),
        ((GOOD,), State.UP),
        ((FAILED,), State.DOUBTFUL),
        ((ERRED,), State.UP),
        ((ERRED, ERRED), State.DOUBTFUL),
        ((FAILED, GOOD), State.UP),
        ((FAILED, FAILED, GOOD, FAILED, FAILED), State.DOUBTFUL),
        ((FAILED,) * 3, State.DOWN),
        ((ERRED,) * 5, State.DOUBTFUL),
        ((ERRED,) * 6, State.DOWN),
        ((SLOW,) * 50, State.DOUBTFUL),
        ((FAILED,) * 50, State.DOWN),
        ((FAILED, FAILED, FAILED, GOOD), State.RECOVERING),
        ((FAILED, FAILED, FAILED, GOOD, GOOD), State.UP),
        ((FAILED, FAILED, FAILED, GOOD, SLOW), State.RECOVERING),
        ((FAILED, FAILED, FAILED, GOOD, FAILED), State.DOWN),
        ((FAILED, FAILED, FAILED, GOOD, FAILED, GOOD), State.RECOVERING),
    ],
)
def test_signs_move_the_state(signs, state):
    assert through(*signs).state is state


def test_two_good_signs_of_one_moment_are_one():
    down = through(FAILED, FAILED, FAILED)
    assert through(GOOD, GOOD, GOOD, apart=0.1, health=down).state is State.RECOVERING
    assert through(GOOD, GOOD, apart=0.6, health=down).state is State.UP


def test_late_failures_of_older_requests_do_not_lengthen_the_back_off():
    down = through(FAILED, FAILED, FAILED)
    assert through(*(FAILED,) * 20, health=down) == down


def test_the_back_off_doubles_to_a_minute_and_jitters():
    waits = [backoff_seconds("a", Health(State.DOWN, points, 0, 77)) for points in range(1, 64)]
    for trial, wait in enumerate(waits):
        nominal = min(2.0**trial, 60.0)
        assert 0.8 * nominal <= wait <= 1.2 * nominal
    assert len(set(waits[10:])) > 40
    assert backoff_seconds("b", Health(State.DOWN, 1, 0, 77)) != waits[0]


@given(
    st.lists(st.tuples(st.sampled_from(Sign), st.floats(0, 1e5), st.booleans()), max_size=60),
)
def test_whatever_happens_every_move_is_in_the_table_and_fits_the_word(steps):
    now = 0.0
    board = Board.private(["a"], clock=lambda: now)
    for sign, pause, trial in steps:
        now += pause
        before = board.get("a")
        if trial and before.state is State.DOWN:
            board.may_try("a", 1.0)
        board.note("a", sign, "detail")
        health = board.get("a")
        assert Health.decode(health.encode()) == health
        assert health.encode() < 2**64
        assert health.state is before.state or health.state in TRANSITIONS[before.state]


@given(
    st.builds(
        Health,
        st.sampled_from(State),
        st.integers(0, 63),
        st.integers(0, 3),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**20 - 1),
    )
)
def test_the_word_holds_all_of_it(health):
    assert Health.decode(health.encode()) == health


def test_time_passes_over_the_word_s_wrap():
    wrap = 2**20 / 10
    health = after(Health(), FAILED, wrap - 1, 0)
    assert health.quiet_seconds(wrap + 1) == pytest.approx(2, abs=0.2)


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def boards(names_a, names_b):
    """Two processes' boards over the same words."""
    words = memoryview(bytearray(64)).cast("Q")
    lock, clock, told = threading.Lock(), Time(), []

    @contextmanager
    def locked(_word):
        with lock:
            yield

    made = [
        Board(names, words, 2, 2, locked, lambda name, text: told.append((name, text)), clock)
        for names in (names_a, names_b)
    ]
    return *made, clock, told


def test_what_one_process_learns_all_know_whatever_their_settings_order():
    one, two, _, _ = boards(["x", "y"], ["y", "x"])
    for _ in range(3):
        one.note("y", FAILED, "refused")
    assert two.get("y").state is State.DOWN
    assert two.get("x").state is State.UNKNOWN


def test_upstreams_beyond_the_words_are_kept_in_the_process():
    one, two, _, _ = boards(["a", "b", "c"], ["a", "b", "c"])
    for _ in range(3):
        one.note("c", FAILED, "refused")
    assert one.get("c").state is State.DOWN
    assert two.get("c").state is State.UNKNOWN


def test_one_trial_for_all_processes():
    one, two, clock, _ = boards(["a"], ["a"])
    for _ in range(3):
        one.note("a", FAILED, "refused")
    assert not one.may_try("a", 2.0)
    clock.now += 2.5
    assert [one.may_try("a", 2.0), two.may_try("a", 2.0), one.may_try("a", 2.0)] == [True, False, False]
    clock.now += 2.5
    assert two.may_try("a", 2.0)


def test_nothing_is_tried_that_is_not_down():
    one, _, clock, _ = boards(["a"], ["a"])
    clock.now += 100
    assert not one.may_try("a", 0.0)


def test_doubt_passes():
    one, _, clock, _ = boards(["a"], ["a"])
    one.note("a", FAILED, "reset")
    assert one.doubted("a")
    clock.now += DOUBT_SECONDS + 0.2
    assert not one.doubted("a")


def test_what_recovers_gets_its_place_back_without_checks_too():
    one, _, clock, _ = boards(["a"], ["a"])
    for sign in (FAILED, FAILED, FAILED, GOOD):
        one.note("a", sign, "reset")
    assert one.doubted("a")
    clock.now += DOUBT_SECONDS + 0.2
    assert not one.doubted("a")
    one.note("a", GOOD)
    assert one.get("a").state is State.UP


def test_errors_are_told_once_a_second():
    one, _, clock, told = boards(["a"], ["a"])
    for _ in range(5):
        one.note("a", ERRED, "oops")
    clock.now += 1.1
    one.note("a", ERRED, "again")
    assert told == [("a", "oops"), ("a", "again")]


def test_good_signs_of_what_is_up_take_no_lock():
    words = memoryview(bytearray(8)).cast("Q")
    taken = []

    @contextmanager
    def locked(word):
        taken.append(word)
        yield

    board = Board(["a"], words, 0, 1, locked)
    for _ in range(10):
        board.note("a", GOOD)
    assert taken == [0]


# --- preference


def shares(weights: dict[str, int], keys: int = 6000) -> Counter[str]:
    return Counter(
        max(weights, key=lambda name: rendezvous(f"key {number}", name, weights[name]))
        for number in range(keys)
    )


def test_keys_are_shared_out_by_weight():
    found = shares({"a": 1, "b": 1, "c": 4})
    assert found["a"] == pytest.approx(1000, rel=0.15)
    assert found["b"] == pytest.approx(1000, rel=0.15)
    assert found["c"] == pytest.approx(4000, rel=0.05)


def test_an_upstream_that_goes_moves_its_own_keys_only():
    three, two = {"a": 1, "b": 2, "c": 1}, {"a": 1, "b": 2}
    for number in range(2000):
        key = f"key {number}"
        before = max(three, key=lambda name: rendezvous(key, name, three[name]))
        if before != "c":
            assert max(two, key=lambda name: rendezvous(key, name, two[name])) == before


# --- checks


def test_checks_are_rare_while_it_is_up_and_soon_when_it_is_not():
    assert wait_seconds("a", Health(State.UP), 30.0) == 30.0
    assert wait_seconds("a", Health(State.UNKNOWN), 30.0) == 30.0
    assert wait_seconds("a", Health(State.DOUBTFUL, 2), 30.0) == 1.0
    assert wait_seconds("a", Health(State.RECOVERING, 2, 1), 30.0) == 1.0
    assert 0.8 <= wait_seconds("a", Health(State.DOWN, 1), 30.0) <= 1.2


def test_a_gup_is_asked_for_what_it_answers_by_itself():
    assert (check_path("gup"), check_path("manager")) == ("/", "/content/ContentInfo.txt")
