"""Binding, taking over, and what passes between a service and systemd."""

import os
import select
import socket

import pytest

from gup.config import Listen
from gup.errors import GupError
from gup.process.sockets import Notifier, close, open_listeners, passed_sockets, url

NONE: tuple[list[int], list[int]] = ([], [])


def listen(**changes):
    return Listen(**{"address": "127.0.0.1", "port": 0, "admin_port": 0} | changes)


@pytest.fixture
def opened():
    found = []
    yield lambda *arguments: found.append(open_listeners(*arguments)) or found[-1]
    for listeners in found:
        close(*listeners.data, *listeners.admin)


def test_each_worker_has_its_own_socket_on_one_port(opened):
    listeners = opened(listen(), 3, NONE)
    assert len({sock.getsockname() for sock in listeners.data}) == 1
    assert len({tuple(map(id, listeners.of_worker(slot, 3))) for slot in range(3)}) == 3
    assert len(listeners.admin) == 1
    assert not any(sock.getblocking() for sock in (*listeners.data, *listeners.admin))
    served = set()
    for _ in range(200):
        with socket.create_connection(listeners.data[0].getsockname()):
            for sock in select.select(listeners.data, [], [], 5)[0]:
                sock.accept()[0].close()
                served.add(sock.fileno())
    assert len(served) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_port_in_use_is_named_though_both_would_share_it(opened, workers):
    first = opened(listen(), workers, NONE)
    port = first.data[0].getsockname()[1]
    with pytest.raises(GupError, match=rf"can't listen on 127\.0\.0\.1:{port}: Address already in use"):
        open_listeners(listen(port=port), workers, NONE)
    admin = first.admin[0].getsockname()[1]
    with pytest.raises(GupError, match=f":{admin}: Address already in use"):
        open_listeners(listen(admin_port=admin), workers, NONE)


def test_a_port_can_be_bound_again_after_connections_on_it_were_closed(opened):
    first = opened(listen(), 2, NONE)
    address = first.data[0].getsockname()
    with socket.create_connection(address) as client:
        ready = select.select(first.data, [], [], 5)[0][0]
        ready.accept()[0].close()  # our end closes first: TIME_WAIT is here
        assert client.recv(1) == b""
    close(*first.data)
    assert opened(listen(port=address[1]), 2, NONE).data[0].getsockname() == address


def test_ipv6(opened):
    listeners = opened(listen(address="::1", admin_address="::1"), 2, NONE)
    assert url(listeners.data) == f"http://[::1]:{listeners.data[0].getsockname()[1]}"
    with pytest.raises(GupError, match=r"can't listen on \[::1\]:"):
        open_listeners(listen(address="::1", port=listeners.data[1].getsockname()[1]), 1, NONE)


def test_an_address_that_is_not_ours(opened):
    with pytest.raises(GupError, match=r"192\.0\.2\.1:0: "):
        opened(listen(address="192.0.2.1"), 1, NONE)


def test_sockets_from_systemd_are_shared_by_all_workers(opened):
    data, admin = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    address = data.getsockname()
    passed = [data.detach()], [admin.detach()]
    os.set_inheritable(passed[0][0], True)
    listeners = opened(listen(), 4, passed)
    assert all(listeners.of_worker(slot, 4) is listeners.data for slot in range(4))
    found = [[sock.fileno() for sock in socks] for socks in (listeners.data, listeners.admin)]
    assert found == list(passed)
    assert url(listeners.data) == f"http://127.0.0.1:{address[1]}"
    assert not os.get_inheritable(passed[0][0])
    assert not listeners.data[0].getblocking()


def test_what_is_no_listening_socket_is_told():
    with socket.socket() as sock, pytest.raises(GupError, match="not a listening stream socket"):
        open_listeners(listen(), 1, ([sock.detach()], []))
    read, write = os.pipe()
    with pytest.raises(GupError, match="no socket"):
        open_listeners(listen(), 1, ([read], []))
    os.close(read)
    os.close(write)


# --- systemd, played by a datagram socket


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
