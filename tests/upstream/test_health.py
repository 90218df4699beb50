"""The health of upstreams: transitions, the shared word, and the board as two processes see it."""

import threading
from contextlib import contextmanager, nullcontext
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.config import Settings
from gup.upstream.exchange import UpstreamFailure
from gup.upstream.health import (
    DOUBT_SECONDS,
    EVERY_MARK,
    RARE_TRIAL_SECONDS,
    TRANSITIONS,
    Board,
    Health,
    Sign,
    State,
    after,
    mark,
    sign_of,
)

ANSWERED, ERRED, BROKE, AWAY = Sign.ANSWERED, Sign.ERRED, Sign.BROKE, Sign.AWAY
CONNECT = 5.0


def through(*signs: Sign, failed: int = 1 << 5 | 1, health: Health | None = None) -> Health:
    """The health after signs one second apart, all of one name and client."""
    health = health or Health()
    for number, sign in enumerate(signs):
        health = after(health, sign, failed, 100 + number, 5000 + number)
    return health


@pytest.mark.parametrize(
    ("signs", "state"),
    [
        ((), State.UNKNOWN),
        ((ANSWERED,), State.UP),
        ((AWAY,), State.DOWN),
        ((ANSWERED, AWAY), State.DOWN),
        ((AWAY, ANSWERED), State.UP),
        ((AWAY, ERRED), State.UP),
        ((AWAY, BROKE), State.DOWN),
        ((AWAY,) * 50, State.DOWN),
        ((ERRED,) * 50, State.UP),
        ((BROKE,) * 50, State.UP),
        ((BROKE, ANSWERED), State.UP),
    ],
)
def test_signs_move_the_state(signs, state):
    assert through(*signs).state is state


def different(texts, of) -> list[str]:
    """Some of them that have different bits."""
    found = {of(text): text for text in texts}
    return [found[bit] for bit in sorted(found)]


NAMES = different((f"/content/{number}" for number in range(100)), lambda name: mark(name, ""))
CLIENTS = different((f"10.0.0.{number}" for number in range(100)), lambda client: mark("", client))


@pytest.mark.parametrize("sign", [ERRED, BROKE])
@pytest.mark.parametrize(
    ("asked", "state"),
    [
        ([(0, 0)] * 9, State.UP),
        ([(name, 0) for name in range(5)] * 50, State.UP),
        ([(0, client) for client in range(5)] * 50, State.UP),
        ([(0, 0), (1, 1), (0, 1)], State.UP),
        ([(0, 0), (1, 1), (2, 2)], State.DOUBTFUL),
        ([(name, client) for name in range(5) for client in range(5)] * 3, State.DOUBTFUL),
    ],
    ids=["one file again and again", "one client's names", "one name", "two of each", "three", "everything"],
)
def test_failures_count_once_a_name_and_client(sign, asked, state):
    health = Health()
    for number, (name, client) in enumerate(asked):
        health = after(health, sign, mark(NAMES[name], CLIENTS[client]), 100 + number, 5000)
    assert health.state is state
    good = through(ANSWERED, health=health)
    assert (good.state, good.marks) == (State.UP, 0)


def test_any_number_of_names_of_one_client_makes_nobody_doubtful():
    health = Health()
    for number in range(10_000):
        health = after(health, BROKE, mark(f"/content/{number}", "10.0.0.1"), number, number)
    assert health.state is State.UP


def test_a_check_without_an_answer_is_enough_for_doubt():
    assert through(BROKE, failed=EVERY_MARK).state is State.DOUBTFUL


def test_what_is_down_is_tried_ever_more_rarely_but_soon():
    waits = [Health(State.DOWN, trials).trial_wait_seconds(CONNECT) for trials in range(64)]
    assert waits[:6] == [1, 1, 2, 4, 5, 5]
    assert set(waits[6:]) == {5}
    rare = [
        Health(State.DOWN, trials).trial_wait_seconds(CONNECT, RARE_TRIAL_SECONDS) for trials in range(64)
    ]
    assert rare[:9] == [1, 1, 2, 4, 8, 16, 32, 60, 60]


@given(
    st.lists(
        st.tuples(st.sampled_from(Sign), st.floats(0, 1e5), st.booleans(), st.integers(0, EVERY_MARK)),
        max_size=60,
    )
)
def test_whatever_happens_every_move_is_in_the_table_and_fits_the_word(steps):
    now = 0.0
    board = Board.private(["a"], clock=lambda: now)
    for sign, pause, trial, failed in steps:
        now += pause
        before = board.get("a")
        if trial and before.state is State.DOWN:
            board.may_try("a", CONNECT)
        board.note("a", sign, "detail", failed)
        health = board.get("a")
        assert Health.decode(health.encode()) == health
        assert health.encode() < 2**64
        assert health.state is before.state or health.state in TRANSITIONS[before.state]
        assert (health.state is State.DOWN) <= (sign is AWAY or before.state is State.DOWN)


WORDS = st.integers(0, EVERY_MARK), st.integers(0, 2**32 - 1), st.integers(0, 2**20 - 1)


@given(st.builds(Health, st.sampled_from(State), *WORDS))
def test_the_word_holds_all_of_it(health):
    assert Health.decode(health.encode()) == health


def test_time_passes_over_the_word_s_wrap():
    wrap = 2**20 / 10
    health = after(Health(), AWAY, EVERY_MARK, wrap - 1, 0)
    assert health.quiet_seconds(wrap + 1) == pytest.approx(2, abs=0.2)


# --- what a failure tells


def failed(
    outcome: str = "error", status: int | None = None, slug: str = "upstream-error"
) -> UpstreamFailure:
    return UpstreamFailure(outcome, slug, "", again=False, status=status)


@pytest.mark.parametrize(
    ("failure", "kind", "check", "sign"),
    [
        (failed("unreachable"), "manager", False, AWAY),
        (failed("unreachable"), "gup", True, AWAY),
        (failed("unreachable", slug="overloaded"), "manager", False, None),
        (failed("timeout"), "manager", False, BROKE),
        (failed("timeout"), "manager", True, BROKE),
        (failed(), "manager", False, BROKE),
        (failed("rejected"), "manager", False, ERRED),
        (failed(status=500), "manager", False, ERRED),
        (failed(status=503), "manager", True, ANSWERED),
        (failed(status=302), "manager", True, ANSWERED),
        (failed(status=501), "manager", False, ANSWERED),
        (failed(status=403), "manager", False, ANSWERED),
        (failed(status=502), "gup", False, ANSWERED),
        (failed(status=508), "manager", False, ANSWERED),
    ],
)
def test_what_a_failure_tells(failure, kind, check, sign):
    assert sign_of(failure, kind, check=check) is sign


# --- the board


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
    """But not of upstreams beyond the words."""
    one, two, _, _ = boards(["x", "y", "z"], ["z", "y", "x"])
    for name in "yz":
        one.note(name, AWAY, "refused")
        assert one.get(name).state is State.DOWN
    assert [two.get(name).state for name in "xyz"] == [State.UNKNOWN, State.DOWN, State.UNKNOWN]


def test_one_trial_for_all_processes():
    one, two, clock, _ = boards(["a"], ["a"])
    clock.now += 100
    assert not one.may_try("a", CONNECT), "it is not down"
    one.note("a", AWAY, "refused")
    assert not one.may_try("a", CONNECT)
    clock.now += 1.2
    assert [one.may_try("a", CONNECT), two.may_try("a", CONNECT)] == [True, False]
    clock.now += 1.2
    assert not two.may_try("a", CONNECT), "the first is under way"
    one.note("a", AWAY, "refused")
    clock.now += 1.2
    assert two.may_try("a", CONNECT)
    two.note("a", AWAY, "refused")
    clock.now += 1.2
    assert not one.may_try("a", CONNECT), "the wait doubles"
    clock.now += 1.2
    assert one.may_try("a", CONNECT)


def test_a_trial_whose_process_died_is_followed_by_another():
    one, two, clock, _ = boards(["a"], ["a"])
    one.note("a", AWAY, "refused")
    clock.now += 1.2
    assert one.may_try("a", CONNECT)
    clock.now += CONNECT + 0.5
    assert not two.may_try("a", CONNECT)
    clock.now += 1
    assert two.may_try("a", CONNECT)


def test_doubt_passes():
    one, _, clock, _ = boards(["a"], ["a"])
    one.note("a", BROKE, "reset")
    assert one.doubted("a")
    clock.now += DOUBT_SECONDS + 0.2
    assert not one.doubted("a")


def test_errors_are_told_once_a_second():
    one, _, clock, told = boards(["a"], ["a"])
    for _ in range(5):
        one.note("a", ERRED, "oops")
    clock.now += 1.1
    one.note("a", ERRED, "again")
    assert told == [("a", "oops"), ("a", "again")]


def test_answers_of_what_is_up_take_no_lock():
    locked = Mock(side_effect=lambda _word: nullcontext())
    board = Board(["a"], memoryview(bytearray(8)).cast("Q"), 0, 1, locked)
    for _ in range(10):
        board.note("a", ANSWERED)
    locked.assert_called_once_with(0)


# --- checks


@pytest.mark.parametrize("path", ["", "content", "http://a/b", "/a b", "/a?b", "/a#b", "/a\r\nX: y", "/\xe9"])
def test_a_health_path_that_is_none_is_refused(path):
    with pytest.raises(ValueError, match="health_path"):
        Settings.model_validate({"upstream": [{"url": "http://127.0.0.1:9", "health_path": path}]})
