"""A herd of clients in a process of its own: all connect, all ask at once; bodies are thrown away unread.

With MSG_TRUNC the kernel drops what has come instead of copying it: so a thousand clients take little of the
cores that the servers need. Run as a program: targets on standard input, results on standard output, as JSON.
"""

import json
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_HEAD_BYTES = 4096
_DROP_BYTES = 1 << 20


@dataclass(slots=True)
class Transfer:
    """One client's download; seconds since all asked, `asked_at` on the monotonic clock."""

    target: str
    asked_at: float = 0.0
    first_byte_seconds: float = 0.0
    """When the head and the body's first byte were there."""
    done_seconds: float = 0.0
    body_bytes: int = 0
    length: int = -1
    status: int = 0


class _Crowd:
    """Clients by descriptor."""

    def __init__(self, port: int, targets: Sequence[str]) -> None:
        self._epoll = select.epoll()
        self._buffer = bytearray(_DROP_BYTES)
        self._clients: dict[int, tuple[socket.socket, Transfer, bytearray]] = {}
        self.transfers = []
        for target in targets:
            sock = socket.create_connection(("127.0.0.1", port), 30)
            transfer = Transfer(target)
            self._clients[sock.fileno()] = sock, transfer, bytearray()
            self.transfers.append(transfer)
            self._epoll.register(sock.fileno(), select.EPOLLIN)
            sock.setblocking(False)

    def ask(self) -> None:
        for sock, transfer, _ in self._clients.values():
            transfer.asked_at = time.monotonic()
            sock.send(f"GET {transfer.target} HTTP/1.1\r\nHost: gup\r\nUser-Agent: crowd\r\n\r\n".encode())

    def read(self, until_monotonic: float) -> None:
        while self._clients and time.monotonic() < until_monotonic:
            for fd, _ in self._epoll.poll(1.0):
                sock, transfer, head = self._clients[fd]
                if transfer.length < 0:
                    self._head(sock, transfer, head)
                else:
                    transfer.body_bytes += sock.recv_into(self._buffer, _DROP_BYTES, socket.MSG_TRUNC)
                if transfer.body_bytes >= transfer.length >= 0:
                    transfer.done_seconds = time.monotonic() - transfer.asked_at
                    self._epoll.unregister(fd)
                    sock.close()
                    del self._clients[fd]

    @staticmethod
    def _head(sock: socket.socket, transfer: Transfer, head: bytearray) -> None:
        head += sock.recv(_HEAD_BYTES)
        end = head.find(b"\r\n\r\n")
        if end < 0 or len(head) == end + 4:
            return
        lines = bytes(head[:end]).decode("latin-1").lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines[1:])
        transfer.status = int(lines[0].split(" ")[1])
        transfer.length = int(fields.get("content-length", 1 << 62))
        transfer.body_bytes = len(head) - end - 4
        transfer.first_byte_seconds = time.monotonic() - transfer.asked_at


@dataclass(slots=True)
class Outcome:
    """Of all clients, and the CPU seconds that they took themselves."""

    transfers: list[Transfer]
    cpu_seconds: float


def run(port: int, targets: Sequence[str], patience_seconds: float) -> Outcome:
    """Have as many clients as targets download them at once, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.crowd", str(port), str(patience_seconds)],
        input=json.dumps(list(targets)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return Outcome([Transfer(**row) for row in found["transfers"]], found["cpu_seconds"])


def main() -> None:
    port, patience = int(sys.argv[1]), float(sys.argv[2])
    crowd = _Crowd(port, json.load(sys.stdin))
    spent = resource.getrusage(resource.RUSAGE_SELF)
    crowd.ask()
    crowd.read(time.monotonic() + patience)
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime
    rows = [asdict(transfer) for transfer in crowd.transfers]
    json.dump({"transfers": rows, "cpu_seconds": cpu}, sys.stdout)


if __name__ == "__main__":
    main()
