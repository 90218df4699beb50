"""The control channel, and a child's first steps."""

import os
import select
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.config import Settings
from gup.process.child import (
    TRANSITIONS,
    Assignment,
    Channel,
    Child,
    ChildSlot,
    Parent,
    Phase,
    command,
    delay_seconds,
    dump,
)


@pytest.fixture
def pair():
    ours, theirs = map(Channel, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    yield ours, theirs
    ours.close()
    theirs.close()


def many(count=200):
    return Settings.model_validate(
        {
            "upstream": [
                {
                    "url": f"http://manager-{n}.branch.example.org:8014",
                    "headers": {"Authorization": "x" * 3000},
                }
                for n in range(count)
            ],
            "wan": {"schedule": [{"days": ["mon"], "from": "08:00", "to": "18:00", "rate": "1MB/s"}]},
        }
    )


def test_messages_arrive_whole_and_in_order(pair):
    ours, theirs = pair
    sent = [{"n": n, "text": "é" * length} for n, length in enumerate((0, 1, 20_000, 5_000_000, 7, 40_000))]
    for message in sent:
        assert ours.send(message)
    assert theirs.receive() == sent
    assert theirs.receive() == []


def test_long_messages_leave_no_descriptor(pair):
    ours, theirs = pair
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        ours.send({"text": "x" * 100_000})
        theirs.receive()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_end_comes_after_the_last_message(pair):
    ours, theirs = pair
    ours.send({"last": True})
    ours.close()
    assert theirs.receive() == [{"last": True}]
    assert theirs.receive() is None
    assert theirs.send({"to": "nobody"}) is False


def test_an_end_with_our_messages_unread_is_an_end(pair):
    ours, theirs = pair
    theirs.send({"unread": True})
    ours.close()
    assert theirs.receive() is None


def test_a_reader_that_does_not_read_does_not_block_us(pair):
    ours, _ = pair
    for _ in range(100_000):
        if not ours.send({"text": "x" * 10_000}):
            break
    else:
        pytest.fail("the queue has no end")


def assignment(settings, fd, listen=()):
    return Assignment("worker", 0, 3, dump(settings), list(listen), fd, fd, fd, 1)


def test_settings_of_two_hundred_upstreams_reach_a_child(pair):
    ours, theirs = pair
    settings = many()
    with Path(os.devnull).open() as file:
        sent = assignment(settings, file.fileno())
        ours.send(asdict(sent))
        ours.send({"drain": True})
        fd = os.dup(theirs.fileno())
        parent = Parent.from_argv(["gup", str(fd)])
        assert parent.assignment == sent
        assert parent.settings() == settings
        assert parent.receive() == [{"drain": True}]
        assert not os.get_inheritable(parent.fileno())
        assert not os.get_inheritable(file.fileno())
        parent.close()


@pytest.mark.parametrize("argv", [["gup"], ["gup", "x"], ["gup", "1", "2"]])
def test_a_child_without_a_supervisor_says_so(argv):
    with pytest.raises(SystemExit, match="gup serve"):
        Parent.from_argv(argv)


def test_a_child_whose_supervisor_is_gone_exits(pair):
    ours, theirs = pair
    ours.close()
    with pytest.raises(SystemExit, match="gone"):
        Parent.from_argv(["gup", str(os.dup(theirs.fileno()))])


ECHO = """
import select, sys
from gup.process.child import Parent
parent = Parent.from_argv(sys.argv)
parent.send({"slot": parent.assignment.slot, "upstreams": len(parent.settings().upstream)})
while (messages := (select.select([parent], [], []), parent.receive())[1]) is not None:
    for message in messages:
        parent.send({"echo": message})
sys.exit(7)
"""


@pytest.fixture
def child():
    with Path(os.devnull).open() as file:
        child = Child([sys.executable, "-c", ECHO], assignment(many(), file.fileno()), os.environ)
        yield child
        child.process.kill()
        child.process.wait()
        child.close()


def answer(child):
    assert select.select([child], [], [], 30)[0]
    return child.receive()


def test_a_child_gets_its_assignment_and_answers(child):
    assert answer(child) == [{"slot": 0, "upstreams": 200}]
    assert child.process.poll() is None
    assert child.send({"settings": dump(many())})
    assert len(answer(child)[0]["echo"]["settings"]["upstream"]) == 200
    assert os.getpgid(child.process.pid) == child.process.pid


def test_a_child_sees_that_its_supervisor_is_gone(child):
    answer(child)
    child.close()
    assert child.process.wait() == 7


def test_a_killed_child_ends_the_channel(child):
    answer(child)
    os.kill(child.process.pid, signal.SIGKILL)
    assert answer(child) is None
    assert child.process.wait() == -signal.SIGKILL
    assert child.process.poll() == -signal.SIGKILL
    child.process.kill()  # nothing to kill is no mistake


def test_a_command_that_does_not_exist_is_an_oserror_and_leaves_nothing(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        Child([str(tmp_path / "none")], assignment(Settings(), 2), os.environ)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("role", ["worker", "controller"])
def test_children_run_our_own_modules(role):
    assert command(role) == [sys.executable, "-m", f"gup.process.{role}"]


# --- when it is started again, and when it is killed


def worker(phase=Phase.WAITING, role="worker"):
    slot = ChildSlot(role, 0, 3)
    if phase is not Phase.WAITING:
        slot.start(100.0)
    if phase is Phase.READY:
        slot.ready(101.0)
    return slot


def test_short_lives_delay_the_next_start_up_to_five_seconds():
    assert [round(delay_seconds(n), 3) for n in range(10)] == [0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]
    assert delay_seconds(10**9) == 5


def test_a_long_life_forgets_short_ones():
    slot = worker()
    now = 0.0
    for _ in range(4):
        slot.start(now)
        slot.exited(now + 1, restart=True)
        now = slot.start_at
    assert slot.quick_failures == 4
    slot.start(now)
    slot.ready(now + 1)
    slot.exited(now + 5, restart=True)
    assert (slot.quick_failures, slot.start_at) == (0, now + 5)
    assert slot.generation == 5


def test_the_end_of_the_service_is_for_good():
    slot = worker(Phase.READY)
    slot.exited(200.0, restart=False)
    assert slot.phase is Phase.ENDED
    with pytest.raises(AssertionError):
        slot.start(201.0)


@given(st.sampled_from(Phase), st.sampled_from(Phase))
def test_only_the_table_moves(before, after):
    slot = ChildSlot("worker", 0, 3, phase=before)
    if after in TRANSITIONS[before]:
        slot.move(after)
        assert slot.phase is after
    else:
        with pytest.raises(AssertionError):
            slot.move(after)


@pytest.mark.parametrize(
    ("phase", "role", "now", "last_beat", "watched_from", "reason"),
    [
        (Phase.STARTING, "worker", 130.0, 0, 0, None),
        (Phase.STARTING, "worker", 130.1, 0, 0, "not ready within 30 s"),
        (Phase.STARTING, "controller", 130.1, 0, 0, "not ready within 30 s"),
        (Phase.STARTING, "worker", 150.0, 0, 140.0, None),
        (Phase.READY, "worker", 131.0, 0, 0, None),
        (Phase.READY, "worker", 131.1, 0, 0, "no heartbeat"),
        (Phase.READY, "worker", 131.1, 102.0, 0, None),
        (Phase.READY, "worker", 170.0, 139.0, 0, "no heartbeat"),
        (Phase.READY, "worker", 1000.0, 139.0, 990.0, None),
        (Phase.READY, "controller", 1000.0, 0, 0, None),
        (Phase.READY, "controller", 1000.0, 900.0, 0, "no heartbeat"),
        (Phase.WAITING, "worker", 1000.0, 0, 0, None),
    ],
)
def test_who_must_be_killed(phase, role, now, last_beat, watched_from, reason):
    found = worker(phase, role).reason_to_kill(now, last_beat, watched_from)
    assert found is None if reason is None else reason in found


def test_a_closed_channel_must_be_followed_by_an_end():
    slot = worker(Phase.READY)
    slot.closed_at = 110.0
    assert slot.reason_to_kill(112.0, 111.0, 0) is None
    assert "closed its control channel" in slot.reason_to_kill(112.1, 111.0, 0)
    slot.move(Phase.KILLED)
    assert slot.reason_to_kill(200.0, 0, 0) is None


def test_a_late_ready_of_a_killed_child_changes_nothing():
    slot = worker(Phase.STARTING)
    slot.move(Phase.KILLED)
    slot.ready(102.0)
    assert slot.phase is Phase.KILLED
