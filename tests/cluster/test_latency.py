"""How long a member's bytes are behind the owner's: a figure for an idle machine, of the long suite."""

import selectors
import socket
import statistics
import time

import pytest
from cluster.services import owned_by
from harness.upstreams import Answer

FILES, SIZE_BYTES = 200, 300_000


def first_bytes_at(addresses, path):
    """When the first byte of each answer came; all are read to their end."""
    came, left = [0.0] * len(addresses), len(addresses)
    with selectors.DefaultSelector() as selector:
        for number, address in enumerate(addresses):
            sock = socket.create_connection(address, 10)
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: gup\r\nConnection: close\r\n\r\n".encode())
            selector.register(sock, selectors.EVENT_READ, number)
        while left:
            for key, _ in selector.select(30):
                if data := key.fileobj.recv(1 << 20):
                    if not came[key.data]:
                        came[key.data] = time.perf_counter()
                        assert data.startswith(b"HTTP/1.1 200 ")
                else:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    left -= 1
    return came


@pytest.mark.long
@pytest.mark.alone
def test_first_bytes_through_a_member_come_soon_after_the_owner_s(site):
    files = owned_by("b", FILES, SIZE_BYTES)
    for path, body in files.items():
        site.upstream.answer(path, Answer(body, piece_seconds=0.005))
    behind = []
    for path in files:
        own, *others = first_bytes_at([site.nodes[name].data for name in ("b", "a", "c")], path)
        behind += [1000 * (other - own) for other in others]
    behind.sort()
    median, p99 = statistics.median(behind), behind[len(behind) * 99 // 100]
    print(f"behind the owner: median {median:.1f} ms, p99 {p99:.1f} ms, most {behind[-1]:.1f} ms")  # noqa: T201 - the figure
    assert median <= 20
    assert p99 <= 40
    assert {path: len(site.upstream.requests(path)) for path in files} == dict.fromkeys(files, 1)
