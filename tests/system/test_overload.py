"""More is asked for than the link can carry: quick and honest refusals, and everybody gets it in the end."""

import heapq
import time
from dataclasses import dataclass, field

import psutil
import pytest
from harness.clients import Client, End, Swarm, body_digest, probing
from harness.content import content_path, noise

HIT = content_path("xdelta260701001_To_260731001.dax")


@dataclass
class Crowd:
    """Clients that retry as told until each has its file; what the processes took meanwhile."""

    swarm: Swarm
    patience_seconds: float
    processes: list[psutil.Process]
    later: list[tuple[float, str]] = field(default_factory=list)
    got: list[Client] = field(default_factory=list)
    refused: list[Client] = field(default_factory=list)
    resident_bytes: int = 0
    descriptors: int = 0

    def run(self, clients: int, timeout_seconds: float) -> None:
        deadline = look_at = time.monotonic()
        deadline += timeout_seconds
        while len(self.got) < clients:
            now = time.monotonic()
            assert now < deadline, f"{len(self.got)} of {clients} clients have their file"
            self._sort()
            while self.later and self.later[0][0] <= now:
                self.swarm.add(1, heapq.heappop(self.later)[1])
            if now >= look_at:
                look_at = now + 0.5
                self.resident_bytes = max(self.resident_bytes, *(p.memory_info().rss for p in self.processes))
                self.descriptors = max(self.descriptors, sum(p.num_fds() for p in self.processes))
            time.sleep(0.05)

    def _sort(self) -> None:
        for client in [client for client in self.swarm.clients if client.end]:
            self.swarm.clients.remove(client)
            assert client.end is End.COMPLETE, (client.end, client.status, client.target)
            if client.status == 200:
                self.got.append(client)
                continue
            assert client.status == 503, client.status
            self.refused.append(client)
            retry = int(client.fields["retry-after"])
            assert 1 <= retry <= max(1.0, self.patience_seconds) + 1
            heapq.heappush(self.later, (client.finished_at + retry, client.target))


@pytest.mark.alone
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("clients", "files", "size", "rate", "patience", "seconds"),
    [
        pytest.param(400, 20, 60_000, 600_000, 1.0, 60, id="short"),
        pytest.param(5000, 300, 400_000, 1_000_000, 30.0, 600, id="whole", marks=pytest.mark.long),
    ],
)
def test_more_than_the_link_can_carry(serve, clients, files, size, rate, patience, seconds, figures):
    bodies = {content_path(f"xdelta2607{n:03}_To_260801001.dax"): noise(f"o{n}", size) for n in range(files)}
    gup, upstream = serve(
        {**bodies, HIT: noise("hit", 4096)},
        wan={"rate": rate},
        fill={"queue_timeout": patience},
        clients={"max_connections_per_address": 0},
    )
    assert gup.get(HIT).status == 200
    gup.wait_stored(HIT)
    with probing(gup.data, HIT, 1.5) as answer:
        quiet = answer()
    crowd = Crowd(gup.swarm(), patience, [psutil.Process(pid) for pid in gup.workers()])
    began = time.monotonic()
    for path in bodies:
        crowd.swarm.add(clients // files, path)
    asked = clients // files * files
    with probing(gup.data, HIT, 0.8 * files * size / rate) as answer:
        crowd.run(asked, seconds)
        took = time.monotonic() - began
        busy = answer()

    assert all(client.digest == body_digest(bodies[client.target]) for client in crowd.got)
    assert {len(upstream.requests(path)) for path in bodies} == {1}
    assert crowd.refused, "the link could carry it all: nothing was tested"
    slowest = max(client.finished_at - client.asked_at for client in crowd.refused)
    figures(
        f"{asked} clients, {files} files of {size} bytes, {rate} bytes/s: all in {took:.1f} s "
        f"({files * size / rate:.1f} s at the link's rate), {len(crowd.refused)} refusals, "
        f"the slowest after {slowest:.2f} s; a worker at most "
        f"{crowd.resident_bytes / 1e6:.0f} MB, {crowd.descriptors} descriptors in all; "
        f"hits' p99 {quiet['p99']:.2f} ms alone, {busy['p99']:.2f} ms beside them"
    )
    assert slowest <= patience + 2.0
    assert took <= 1.5 * files * size / rate + 3 * patience
    assert crowd.descriptors <= 3 * asked
    assert crowd.resident_bytes <= 200_000_000
