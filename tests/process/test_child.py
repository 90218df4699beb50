"""The control channel, a child's first steps, and when a child is started or killed."""

import os
import socket
from pathlib import Path

import pytest

from gup.config import Settings
from gup.process.child import TRANSITIONS, Assignment, Channel, Child, ChildSlot, Parent, Phase, delay_seconds

MANY = Settings.model_validate(
    {
        "upstream": [
            {"url": f"http://manager-{n}.example.org:8014", "headers": {"Authorization": "x" * 3000}}
            for n in range(200)
        ],
        "wan": {"schedule": [{"days": ["mon"], "from": "08:00", "to": "18:00", "rate": "1MB/s"}]},
    }
)


@pytest.fixture
def pair():
    ours, theirs = map(Channel, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_arrive_whole_and_in_order(pair):
    ours, theirs = pair
    sent = [{"n": n, "text": "é" * length} for n, length in enumerate((0, 1, 20_000, 5_000_000, 7, 40_000))]
    for message in sent:
        assert ours.send(message)
    assert theirs.receive() == sent
    assert theirs.receive() == []


@pytest.mark.parametrize("unread", [False, True])
def test_the_end_comes_after_the_last_message(pair, unread):
    ours, theirs = pair
    if unread:
        theirs.send({"unread": True})
    else:
        ours.send({"last": True})
    ours.close()
    if not unread:
        assert theirs.receive() == [{"last": True}]
    assert theirs.receive() is None
    assert theirs.send({"to": "nobody"}) is False


def test_a_reader_that_does_not_read_does_not_block_us(pair):
    assert not all(pair[0].send({"n": n}) for n in range(100_000))


def assignment(settings, fd):
    fds = {"page_fd": fd, "shared_fd": fd, "shares_fd": fd, "event_fd": fd, "lock_fd": fd}
    fds |= {"listen_fds": (), "handed_fds": (fd, fd)}
    return Assignment(role="worker", slot=0, block=3, blocks=4, settings=settings, generation=1, **fds)


def test_settings_of_two_hundred_upstreams_reach_a_child(pair):
    ours, theirs = pair
    with Path(os.devnull).open() as file:
        sent = assignment(MANY, file.fileno())
        ours.send(sent.model_dump(mode="json", by_alias=True))
        ours.send({"drain": True})
        parent = Parent(["gup", str(os.dup(theirs.fileno()))])
        assert parent.assignment == sent
        assert parent.receive() == [{"drain": True}]
        assert not os.get_inheritable(parent.fileno())
        assert not os.get_inheritable(file.fileno())
        parent.close()


@pytest.mark.parametrize("argv", [["gup"], ["gup", "x"], ["gup", "1", "2"]])
def test_a_child_without_a_supervisor_says_so(argv):
    with pytest.raises(SystemExit, match="gup serve"):
        Parent(argv)


def test_a_child_whose_supervisor_is_gone_exits(pair):
    ours, theirs = pair
    ours.close()
    with pytest.raises(SystemExit, match="gone"):
        Parent(["gup", str(os.dup(theirs.fileno()))])


def test_a_command_that_does_not_exist_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        Child.start([str(tmp_path / "none")], assignment(Settings(), 2), os.environ)


# --- when it is started again, and when it is killed


def slot_in(phase, role="worker"):
    slot = ChildSlot(role, 0, 3)
    if phase is not Phase.WAITING:
        slot.start(100.0)
    if phase is Phase.READY:
        slot.became_ready(101.0)
    return slot


def test_short_lives_delay_the_next_start_up_to_five_seconds():
    assert [round(delay_seconds(n), 3) for n in range(10)] == [0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]
    assert delay_seconds(10**9) == 5


def test_a_long_life_forgets_short_ones():
    slot, now = slot_in(Phase.WAITING), 0.0
    for _ in range(4):
        slot.start(now)
        slot.exited(now + 1, restart=True)
        now = slot.start_at
    assert slot.quick_failures == 4
    slot.start(now)
    slot.exited(now + 5, restart=True)
    assert (slot.quick_failures, slot.start_at, slot.generation) == (0, now + 5, 5)


def test_only_the_table_moves():
    for before in Phase:
        for after in Phase:
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
    found = slot_in(phase, role).reason_to_kill(now, last_beat, watched_from)
    assert found is None if reason is None else reason in found


def test_a_closed_channel_must_be_followed_by_an_end():
    slot = slot_in(Phase.READY)
    slot.closed_at = 110.0
    assert slot.reason_to_kill(112.0, 111.0, 0) is None
    assert "closed its control channel" in slot.reason_to_kill(112.1, 111.0, 0)
    slot.move(Phase.KILLED)
    assert slot.reason_to_kill(200.0, 0, 0) is None


@pytest.mark.parametrize("phase", [Phase.READY, Phase.KILLED, Phase.WAITING, Phase.ENDED])
def test_a_late_ready_changes_nothing(phase):
    """It was queued before the child was killed, and is read afterwards."""
    slot = ChildSlot("worker", 0, 3, phase=phase, ready_at=101.0)
    slot.became_ready(120.0)
    assert (slot.phase, slot.ready_at) == (phase, 101.0)
