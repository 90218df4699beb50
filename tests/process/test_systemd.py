"""systemd's side, played by a datagram socket."""

import os
import socket

import pytest

from gup.process.sockets import Notifier, passed_sockets


@pytest.mark.parametrize("abstract", [False, True])
def test_messages(tmp_path, abstract):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        name = f"@gup-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
        systemd.bind(name.replace("@", "\0"))
        systemd.settimeout(5)
        notifier = Notifier({"NOTIFY_SOCKET": name}, 7)
        notifier.send("READY=1", "STATUS=two workers")
        assert systemd.recv(4096) == b"READY=1\nSTATUS=two workers"
        notifier.send("WATCHDOG=1")
        assert systemd.recv(4096) == b"WATCHDOG=1"


def test_a_deaf_systemd_is_a_warning(tmp_path, caplog):
    Notifier({}, 7).send("READY=1")
    assert caplog.text == ""
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}, 7).send("READY=1")
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
    assert Notifier(environment, 7).watchdog_seconds == seconds


@pytest.mark.parametrize(
    ("environment", "passed"),
    [
        ({}, ([], [])),
        ({"LISTEN_FDS": "2"}, ([], [])),
        ({"LISTEN_PID": "8", "LISTEN_FDS": "2"}, ([], [])),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "x"}, ([], [])),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "1"}, ([3], [])),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "2"}, ([3], [4])),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "admin:data:data"}, ([4, 5], [3])),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "admin"}, ([], [3])),
    ],
)
def test_passed_sockets(environment, passed):
    assert passed_sockets(environment, 7) == passed
