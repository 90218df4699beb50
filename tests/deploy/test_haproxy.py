"""Three gups behind a real HAProxy, as deploy/haproxy and docs/haproxy.md have it."""

import contextlib
import math
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from deploy.balanced import CONFIG, HAProxy
from deploy.deployed import run
from harness.clients import Ended, RawConnection
from harness.content import BIG, DELTA, content_path, noise, zip_of
from harness.needs import program
from harness.processes import free_port, until
from harness.service import Gup
from harness.upstreams import Answer, Gate, ScriptedUpstream

pytestmark = pytest.mark.needs("haproxy")
HOT = zip_of("hot", 200_000)
SMALL = {content_path(f"xdelta26073{n}001_To_260801001.dax"): noise(f"s{n}", 20_000) for n in range(9)}
CLIENTS = [f"127.0.1.{number}" for number in range(1, 61)]
OUTSIDE = "127.0.9.9"


@pytest.fixture
def site(tmp_path):
    """Gups of one upstream, and HAProxy before them."""
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(ScriptedUpstream())
        for path, body in {BIG: HOT, DELTA: noise("d", 9000), **SMALL}.items():
            upstream.answer(path, Answer(body, etag='"a"'))

        def make(count=3, **clients):
            settings = {
                "listen": {"proxy_protocol": ["127.0.0.1/32"]},
                "clients": {"allow": ["127.0.0.0/23"], **clients},
                "log": {"access": "all"},
                "upstream": [{"url": upstream.url, "health_interval": "0s"}],
            }
            gups = []
            for number in range(count):  # of fixed ports: HAProxy finds one again that was restarted
                bind, admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
                folder = tmp_path / f"cache{number}"
                gup = Gup(folder, workers=1, settings=settings, bind=bind, admin=admin)
                gups.append(stack.enter_context(gup))
            return upstream, gups, stack.enter_context(HAProxy(tmp_path / "haproxy", gups))

        yield make


def test_the_file_is_what_haproxy_understands():
    assert "server gup3" in CONFIG.read_text()
    run(program("haproxy"), "-c", "-f", CONFIG)


def test_each_gup_sees_the_clients_themselves_and_none_in_anothers_name(site):
    _, gups, haproxy = site()
    kept = {client: RawConnection(haproxy.address, source=client) for client in CLIENTS[:3]}
    for path, body in SMALL.items():
        for connection in kept.values():
            assert connection.get(path).body == body

    def logged():
        return Counter(line for gup in gups for line in re.findall(r"\brequest client=(\S+)", gup.log))

    until(lambda: logged() == dict.fromkeys(kept, len(SMALL)), "each request is in the log of its client")
    seen = lambda: {row["address"] for gup in gups for row in gup.api("/api/v1/clients")[1]["clients"]}  # noqa: E731
    until(lambda: seen() == set(kept), "the reports have them, and not the proxy")
    with RawConnection(haproxy.address, source=OUTSIDE) as outside:
        assert outside.get(DELTA).status in (502, 503)
    assert sum(gup.metric("gup_connections_refused_total", reason="network") for gup in gups) > 0
    for connection in kept.values():
        assert connection.get(DELTA).status == 200
        connection.close()


def test_limits_of_an_address_are_the_clients(site):
    upstream, (gup,), haproxy = site(1, max_connections_per_address=1)
    gate = Gate()
    upstream.answer(BIG, Answer(HOT, etag='"a"', gates=((100_000, gate),)))
    with RawConnection(haproxy.address, source=CLIENTS[0]) as first:
        started = first.begin(BIG, 1000)
        with RawConnection(haproxy.address, source=CLIENTS[0]) as second:
            assert second.get(DELTA).status in (502, 503)
        assert gup.metric("gup_connections_refused_total", reason="address") > 0
        with RawConnection(haproxy.address, source=CLIENTS[1]) as other:
            assert other.get(DELTA).status == 200
        gate.open()
        assert first.finish(started).body == HOT


def test_a_hot_file_loads_no_gup_more_than_one_and_a_half_times_the_mean(site):
    """Of requests at once: these the balance factor bounds. One after another they go to one gup."""
    upstream, gups, haproxy = site(rate="200kB/s")

    def asked():
        return [gup.metric("gup_requests_total") for gup in gups]

    def take(client):
        with RawConnection(haproxy.address, source=client) as connection:
            response = connection.get(BIG)
            assert response.body == HOT
            return response.etag

    with ThreadPoolExecutor(len(CLIENTS)) as pool:
        assert len(set(pool.map(take, CLIENTS))) == 1, "so one gup's download is resumed at another"
    at_once = asked()
    assert sum(at_once) == len(CLIENTS)
    assert max(at_once) <= math.ceil(1.5 * len(CLIENTS) / len(gups)) + 1, at_once
    assert len(upstream.requests(BIG)) == sum(count > 0 for count in at_once)
    for client in CLIENTS[:4]:
        take(client)
    later = [after - before for before, after in zip(at_once, asked(), strict=True)]
    assert max(later) >= 3, later


class Asking:
    """Clients that ask on, each over a kept connection; when each failed request had begun."""

    def __init__(self, address, count):
        self._address, self._stopping, self._done = address, threading.Event(), Counter()
        self.failed, self.wrong = [], []
        self._pool = ThreadPoolExecutor(count)
        self._asking = [self._pool.submit(self._ask, number) for number in range(count)]

    def _ask(self, number):
        paths, connection = list(SMALL), None
        while not self._stopping.is_set():
            path = paths[(self._done[number] * 7 + number) % len(paths)]
            began = time.monotonic()
            try:
                connection = connection or RawConnection(self._address, source=CLIENTS[number])
                response = connection.get(path)
                if (response.status, response.body) != (200, SMALL[path]):
                    self.wrong.append((began, response.status, response.complete))
            except (Ended, OSError) as error:
                self.failed.append((began, repr(error)))
                connection = None
            self._done[number] += 1
        if connection is not None:
            connection.close()

    def go_on(self, count):
        """Until each client has done so many more."""
        before = Counter(self._done)
        until(
            lambda: all(self._done[n] - before[n] >= count for n in range(len(self._asking))),
            "clients ask on",
        )

    def end(self):
        self._stopping.set()
        for one in self._asking:
            one.result()
        self._pool.shutdown()


def test_a_gup_that_stops_or_dies_loses_no_request_but_those_under_way_there(site):
    _, gups, haproxy = site()
    clients = Asking(haproxy.address, 8)
    try:
        clients.go_on(20)
        assert gups[2].stop() == 0
        clients.go_on(20)
        assert (clients.failed, clients.wrong) == ([], [])
        gups[1].kill()
        died = time.monotonic()
        clients.go_on(20)
        until(lambda: haproxy.up() == 1, "the checks have found both")
        clients.go_on(20)
    finally:
        clients.end()
    lost = [each for each in clients.failed + clients.wrong if each[0] > died]
    assert lost == []
    assert len(clients.failed + clients.wrong) <= 8, "under way when it died"
    gups[1].start()
    gups[2].start()
    until(lambda: haproxy.up() == 3, "all are asked again")
