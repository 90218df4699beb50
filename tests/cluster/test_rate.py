"""The WAN rate of three real services together, from their own counters: figures of the long suite."""

import itertools
import time

import pytest
from cluster.services import order, running
from harness.clients import Swarm
from harness.content import content_path, noise
from harness.processes import until
from harness.upstreams import Answer

RATE = 3_000_000
WINDOW_SECONDS = 10.0
BODY = noise("rate", 60_000_000)
NODES = ("a", "b", "c")


def owned(name, count):
    """So many paths that this node fetches."""
    streams = (f"{{535CB6A4-441F-4E8A-A897-804C{number:08d}}}" for number in range(999))
    return [path for stream in streams if order(path := content_path("full.dax", stream))[0] == name][:count]


class Meter:
    """Bytes that have come over the WAN to all nodes, over time."""

    def __init__(self, site):
        self._nodes, self.samples = list(site.nodes.values()), []

    def watch(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            total = sum(node.metric("gup_upstream_received_bytes_total") for node in self._nodes)
            self.samples.append((time.monotonic(), total))
            time.sleep(0.05)

    def shares(self, begin, end):
        """Of the rate, in each window between these times."""
        taken = [(at, total) for at, total in self.samples if begin <= at <= end]
        found = []
        for at, total in taken:
            later = next(((t, n) for t, n in taken if t - at >= WINDOW_SECONDS), None)
            if later is not None:
                found.append((later[1] - total) / (later[0] - at) / RATE)
        return found


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(240)
def test_three_nodes_use_the_sites_rate_and_no_more(tmp_path):
    """All ask, then one alone, then all again; then the engine dies."""
    with running(tmp_path) as site:
        for name in NODES:
            site.start(name, settings={"wan": {"rate": f"{RATE}B/s"}})
        until(site.all_ask_all, "all ask all", 30)
        paths = {name: owned(name, 2) for name in NODES}
        for path in itertools.chain(*paths.values()):
            site.upstream.answer(path, Answer(BODY, etag='"a"'))
        meter, swarms = Meter(site), {name: Swarm(site.nodes[name].data) for name in NODES}
        try:
            for name, swarm in swarms.items():
                for path in paths[name]:
                    swarm.add(1, path)
            meter.watch(3)
            began = time.monotonic()
            meter.watch(20)
            steady = meter.shares(began, time.monotonic())
            for name in ("a", "b"):
                swarms.pop(name).close()
            moved = time.monotonic()
            meter.watch(20)
            alone = meter.shares(moved + 1, time.monotonic())
            site.valkey.kill()
            gone = time.monotonic()
            meter.watch(20)
            without = meter.shares(gone, time.monotonic())
            every = meter.shares(began, time.monotonic())
        finally:
            for swarm in swarms.values():
                swarm.close()
    for what, found in {"steady": steady, "one alone": alone, "no engine": without, "all": every}.items():
        print(f"{what}: {min(found):.3f} to {max(found):.3f} of the rate")  # noqa: T201 - the figures
    assert max(every) <= 1.01
    assert min(steady) >= 0.97
    assert min(alone) >= 0.97
