"""`python -m harness.probe HOST PORT PATH PER_SECOND SECONDS`: how long hits take, from a process of its own.

Requests leave at fixed times over one kept connection; what a slow answer delays counts from when it should
have left, so that slow answers do not hide in fewer samples. Prints JSON: count, percentiles in
milliseconds.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PER_SECOND = 100


def _receive_whole(sock: socket.socket) -> None:
    head = b""
    while b"\r\n\r\n" not in head:
        piece = sock.recv(65536)
        if not piece:
            raise ConnectionError("closed by the server")
        head += piece
    fields, _, body = head.partition(b"\r\n\r\n")
    status, *lines = fields.split(b"\r\n")
    if b" 200 " not in status:
        raise ConnectionError(status.decode())
    length = next(int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:"))
    left = length - len(body)
    while left:
        left -= len(sock.recv(min(left, 65536)))


def probe(host: str, port: int, path: str, per_second: float, seconds: float) -> dict[str, float]:
    request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
    took = []
    with socket.create_connection((host, port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = time.perf_counter()
        for number in range(int(per_second * seconds)):
            due = began + number / per_second
            time.sleep(max(0.0, due - time.perf_counter()))
            due = max(
                due, time.perf_counter() - 1 / per_second
            )  # the probe's own lateness is not the server's
            sock.sendall(request)
            _receive_whole(sock)
            took.append(time.perf_counter() - due)
    took.sort()
    return {
        "count": len(took),
        **{f"p{share}": 1000 * took[min(len(took) - 1, len(took) * share // 100)] for share in (50, 90, 99)},
    }


@contextmanager
def probing(address: tuple[str, int], path: str, seconds: float) -> Iterator[Callable[[], dict[str, float]]]:
    """A probe beside what the block does; the answer waits for its figures."""
    arguments = [sys.executable, "-m", "harness.probe", address[0], str(address[1]), path]
    with subprocess.Popen(
        [*arguments, str(PER_SECOND), str(seconds)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield lambda: json.loads(process.communicate(timeout=600)[0])
        finally:
            process.kill()


if __name__ == "__main__":
    host, port, path, per_second, seconds = sys.argv[1:]
    sys.stdout.write(json.dumps(probe(host, int(port), path, float(per_second), float(seconds))))
