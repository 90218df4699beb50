"""Clients that read nothing, next to nothing, send a byte now and then, or vanish: nobody else notices."""

import contextlib
import socket
import threading
import time
from typing import Self

import psutil
import pytest
from harness.clients import End, body_digest, probing, readable
from harness.content import content_path, noise
from harness.processes import until

HIT = content_path("xdelta260701001_To_260731001.dax")
WARM = content_path("full.dax")
COLD = content_path("full.dax", revision="260801002")
MB = 1_000_000
_TCP_REPAIR = 19  # tcp(7); not in the socket module


class Nuisances:
    """Connections of bad clients, with one thread that lets some of them crawl."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._all: list[socket.socket] = []
        self._readers: list[socket.socket] = []
        self._senders: list[socket.socket] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._crawl, name="nuisances")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        for sock in self._all:
            sock.close()

    def connect(self, count: int, path: str = "") -> list[socket.socket]:
        """So many clients, who ask for `path` if there is one, and read nothing."""
        made = []
        for _ in range(count):
            made.append(sock := socket.create_connection(self._address))
            sock.setblocking(False)
            if path:
                sock.send(f"GET {path} HTTP/1.1\r\nHost: g\r\n\r\n".encode())
        self._all += made
        return made

    def read_slowly(self, count: int, path: str) -> None:
        """1 KB a second each."""
        self._readers += self.connect(count, path)

    def send_slowly(self, count: int) -> None:
        """A byte of a head now and then, never a whole one."""
        self._senders += self.connect(count)

    def vanish(self, count: int, path: str) -> None:
        """In the midst of an answer, without a word: no FIN, no RST, and the kernel forgets the connection.

        What gup sends to it afterwards is answered with a reset, as by a host that was started anew.
        """
        for sock in self.connect(count, path):
            until(lambda sock=sock: readable(sock, 0), "the answer has begun")
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
            sock.close()
        del self._all[-count:]

    def _crawl(self) -> None:
        began, rounds, head = time.monotonic(), 0, f"GET {WARM} HTTP/1.1\r\nHost: g".encode()
        while not self._stopping.wait(max(0.0, began + rounds - time.monotonic())):
            rounds += 1
            for sock in self._readers:
                with contextlib.suppress(OSError):
                    sock.recv(1000)
            for sock in self._senders:
                with contextlib.suppress(OSError):
                    sock.send(head[rounds : rounds + 1])


@pytest.mark.alone
@pytest.mark.needs("network")  # to let connections vanish
@pytest.mark.parametrize(
    ("each", "seconds"),
    [
        pytest.param(50, 4.0, id="short"),
        pytest.param(500, 20.0, id="whole", marks=[pytest.mark.long, pytest.mark.timeout(300)]),
    ],
)
def test_bad_clients_slow_nobody(serve, each, seconds, figures):
    warm, cold = noise("warm", 20 * MB), noise("cold", 20 * MB)
    gup, upstream = serve(
        {HIT: noise("hit", 4096), WARM: warm, COLD: cold},
        wan={"rate": 10 * MB},
        listen={"write_timeout": seconds, "header_timeout": seconds, "idle_timeout": seconds},
    )
    for path in (HIT, WARM):
        assert gup.get(path).status == 200
    until(lambda: len(gup.bodies()) == 2 and not gup.parts(), "both are stored")
    workers = [psutil.Process(pid) for pid in gup.workers()]
    with probing(gup.data, HIT, 1.5) as answer:
        quiet = answer()
    before = sum(worker.memory_info().rss for worker in workers)
    with Nuisances(gup.data) as bad:
        bad.connect(each // 2, WARM)
        bad.connect(each // 2, COLD)
        bad.read_slowly(each, WARM)
        bad.send_slowly(each)
        bad.vanish(each, WARM)
        swarm, began = gup.swarm(), time.monotonic()
        good = swarm.add(10, COLD)
        with probing(gup.data, HIT, 3.0) as answer:
            swarm.wait()
            took = time.monotonic() - began
            busy = answer()
        resident = sum(worker.memory_info().rss for worker in workers) - before
        assert all(c.end is End.COMPLETE and c.digest == body_digest(cold) for c in good)
        assert gup.metric("gup_client_connections") >= 2 * each, "the bad clients are still there"
        until(
            lambda: gup.metric("gup_client_connections") <= 1.25 * each,
            "who makes no progress is cut",
            3 * seconds,
        )
    gup.wait_metric(0, "gup_client_connections")
    figures(
        f"{4 * each} bad clients: hits' p99 {quiet['p99']:.2f} ms without, {busy['p99']:.2f} ms beside; "
        f"a fill of 20 MB at 10 MB/s in {took:.2f} s; memory of the workers +{resident / MB:.0f} MB"
    )
    assert len(upstream.requests(COLD)) == 1
    assert took <= 2.0 * 1.5
    assert resident <= 40 * MB + each * 40_000
    # beside other load of the machine a single late sample decides: the median is what can't be chance
    assert busy["p50"] <= 1.5 * quiet["p50"] + 1.0
