"""A long link between two network namespaces: every packet arrives half a round trip later, at a given rate.

The kernels at both ends speak TCP to each other, as over a satellite; a proxy that waits would end TCP itself
and show none of its windows. Each end is a TUN device, and one process carries packets between the two. Needs
the right to make namespaces and devices, and says so.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

SERVER, CLIENT = "10.77.0.1", "10.77.0.2"
MTU_BYTES = 1500
_RMEM = "4096 131072 6291456"
"""Linux's own limits of a receive buffer, whatever the machine is set to."""
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_TUN_SET = 0x400454CA  # TUNSETIFF
_TUN_NO_HEADER = 0x1001  # IFF_TUN | IFF_NO_PI
_SET_FLAGS, _SET_ADDRESS, _SET_PEER, _SET_MTU = 0x8914, 0x8916, 0x8918, 0x8922
_UP_AND_RUNNING = 0x41
_libc = ctypes.CDLL(None, use_errno=True)


def _check(status: int) -> None:
    if status:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def _inside(namespace: int) -> Iterator[None]:
    """Sockets, threads and processes that this thread makes meanwhile belong to that namespace."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(namespace, _NEW_NETWORK))
        try:
            yield
        finally:
            _check(_libc.setns(own, _NEW_NETWORK))
    finally:
        os.close(own)


def _configure(device: str, own: str, peer: str) -> None:
    def request(number: int, name: str, value: bytes) -> None:
        fcntl.ioctl(control, number, struct.pack("16s24s", name.encode(), value))

    def address(text: str) -> bytes:
        return struct.pack("=HH4s", socket.AF_INET, 0, socket.inet_aton(text))

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request(_SET_ADDRESS, device, address(own))
        request(_SET_PEER, device, address(peer))
        request(_SET_MTU, device, struct.pack("i", MTU_BYTES))
        for name in (device, "lo"):
            request(_SET_FLAGS, name, struct.pack("h", _UP_AND_RUNNING))


class _End:
    """One namespace and the descriptor that its packets come out of and go into."""

    def __init__(self, own: str, peer: str) -> None:
        self._error: BaseException | None = None
        self.namespace = self.packets = -1
        thread = threading.Thread(target=self._make, args=(own, peer), name="namespace")
        thread.start()
        thread.join()
        if self._error is not None:
            raise self._error

    def _make(self, own: str, peer: str) -> None:
        """In a thread that ends: none of the test's own leaves its namespace."""
        try:
            _check(_libc.unshare(_NEW_NETWORK))
            self.namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            self.packets = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            fcntl.ioctl(self.packets, _TUN_SET, struct.pack("16sH22x", b"line", _TUN_NO_HEADER))
            _configure("line", own, peer)
            Path("/proc/sys/net/ipv4/tcp_rmem").write_text(_RMEM, encoding="ascii")
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            self._error = error

    def close(self) -> None:
        for descriptor in (self.packets, self.namespace):
            if descriptor >= 0:
                os.close(descriptor)


class DelayLine:
    """`round_trip_seconds` between SERVER and CLIENT, and `link` bytes a second in each direction.

    Its queue holds what the link carries in a round trip, or in 0.1 s; what does not fit is lost.
    """

    def __init__(self, round_trip_seconds: float, link_bytes_per_second: int) -> None:
        self._server, self._client = _End(SERVER, CLIENT), _End(CLIENT, SERVER)
        ends = (self._server.packets, self._client.packets)
        figures = (round_trip_seconds / 2, link_bytes_per_second, max(round_trip_seconds, 0.1))
        self._carrier = subprocess.Popen(
            [sys.executable, __file__, *map(str, ends), *map(str, figures)],
            pass_fds=ends,
            stdin=subprocess.PIPE,
        )

    def server(self) -> contextlib.AbstractContextManager[None]:
        """Here listens what has SERVER as its address."""
        return _inside(self._server.namespace)

    def client(self) -> contextlib.AbstractContextManager[None]:
        return _inside(self._client.namespace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._carrier.communicate()
        self._server.close()
        self._client.close()


@dataclass(slots=True)
class _Direction:
    """Packets under way in one direction."""

    target: int
    delay_seconds: float
    link_bytes_per_second: float
    queue_seconds: float
    free_at: float = 0.0
    """When the link has sent what it was given."""
    under_way: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take(self, packet: bytes, now: float) -> None:
        if self.free_at - now <= self.queue_seconds:
            self.free_at = max(self.free_at, now) + len(packet) / self.link_bytes_per_second
            self.under_way.append((self.free_at + self.delay_seconds, packet))

    def deliver(self, now: float) -> None:
        while self.under_way and self.under_way[0][0] <= now:
            os.write(self.target, self.under_way.popleft()[1])


def _carry(server: int, client: int, figures: tuple[float, float, float]) -> None:
    to_client, to_server = _Direction(client, *figures), _Direction(server, *figures)
    for descriptor in (server, client):
        os.set_blocking(descriptor, False)
    ways = ((server, to_client), (client, to_server))
    while True:  # until the test closes our standard input, or dies
        due = [way.under_way[0][0] for _, way in ways if way.under_way]
        wait = max(min(due) - time.monotonic(), 0.0) if due else None
        if 0 in select.select([0, server, client], [], [], wait)[0]:
            return
        for source, way in ways:
            with contextlib.suppress(BlockingIOError):
                while True:
                    way.take(os.read(source, MTU_BYTES), time.monotonic())
            way.deliver(time.monotonic())


if __name__ == "__main__":
    _carry(int(sys.argv[1]), int(sys.argv[2]), (float(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])))
