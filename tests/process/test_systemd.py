"""systemd's side, played by a datagram socket."""

import os
import socket
import time

import pytest

from gup.process.systemd import Notifier, PassedSockets, passed_sockets


@pytest.fixture
def systemd(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


def test_each_message(systemd):
    notifier = Notifier(systemd.getsockname())
    notifier.ready("two workers")
    assert systemd.recv(4096) == b"READY=1\nSTATUS=two workers"
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    first, second = systemd.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    notifier.stopping("draining")
    assert systemd.recv(4096) == b"STOPPING=1\nSTATUS=draining"
    notifier.watchdog()
    assert systemd.recv(4096) == b"WATCHDOG=1"


def test_an_abstract_address():
    name = f"gup-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        Notifier("@" + name).watchdog()
        sock.settimeout(5)
        assert sock.recv(100) == b"WATCHDOG=1"


def test_a_deaf_systemd_is_a_warning(tmp_path, caplog):
    Notifier(None).ready("nobody hears")
    assert caplog.text == ""
    Notifier(str(tmp_path / "none")).ready("x")
    assert "READY=1" in caplog.text


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
    ],
)
def test_the_watchdog(environment, seconds):
    assert Notifier.from_environment(environment, 7).watchdog_seconds == seconds


@pytest.mark.parametrize(
    ("environment", "passed"),
    [
        ({}, PassedSockets()),
        ({"LISTEN_FDS": "2"}, PassedSockets()),
        ({"LISTEN_PID": "8", "LISTEN_FDS": "2"}, PassedSockets()),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "x"}, PassedSockets()),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "1"}, PassedSockets((3,))),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "2"}, PassedSockets((3,), (4,))),
        (
            {"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "gup.socket:gup-admin.socket"},
            PassedSockets((3,), (4,)),
        ),
        (
            {"LISTEN_PID": "7", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "admin:data:data"},
            PassedSockets((4, 5), (3,)),
        ),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "admin"}, PassedSockets((), (3,))),
    ],
)
def test_passed_sockets(environment, passed):
    assert passed_sockets(environment, 7) == passed
