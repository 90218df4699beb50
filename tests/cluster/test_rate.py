"""The WAN rate of three real services together, from their own counters: figures of the long suite."""

import contextlib
import itertools
import statistics
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
    """Bytes that have come over the WAN to these nodes, over time."""

    def __init__(self, nodes):
        self._nodes, self.samples = list(nodes), []

    def look(self):
        total = sum(node.metric("gup_upstream_received_bytes_total") for node in self._nodes)
        self.samples.append((time.monotonic(), total))

    def watch(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.look()
            time.sleep(0.05)

    def missed(self, seconds):
        """Bytes that the rate would have brought, and that did not come, from the last look on."""
        began, before = self.samples[-1]
        self.watch(seconds)
        ended, after = self.samples[-1]
        return RATE * (ended - began) - (after - before)

    def shares(self, begin, end):
        """Of the rate, in each window between these times."""
        taken = [(at, total) for at, total in self.samples if begin <= at <= end]
        found = []
        for at, total in taken:
            later = next(((t, n) for t, n in taken if t - at >= WINDOW_SECONDS), None)
            if later is not None:
                found.append((later[1] - total) / (later[0] - at) / RATE)
        return found


@contextlib.contextmanager
def started(folder, **settings):
    """Three nodes with two bodies each that last long, and clients: the site, paths and swarms."""
    with running(folder) as site:
        for name in NODES:
            site.start(name, settings={"wan": {"rate": f"{RATE}B/s"}, **settings})
        until(site.all_ask_all, "all ask all", 30)
        paths = {name: owned(name, 60) for name in NODES}
        for path in itertools.chain(*(of_node[:2] for of_node in paths.values())):
            site.upstream.answer(path, Answer(BODY, etag='"a"'))
        swarms = {name: Swarm(node.data) for name, node in site.nodes.items()}
        try:
            yield site, paths, swarms
        finally:
            for swarm in swarms.values():
                swarm.close()


def shown(what, found, unit="of the rate"):
    print(f"{what}: {min(found):.3f} to {max(found):.3f} {unit}")  # noqa: T201 - the figures


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(240)
def test_three_nodes_use_the_sites_rate_and_no_more(tmp_path):
    """All ask, then one alone, then all again; then the engine dies."""
    with started(tmp_path) as (site, paths, swarms):
        meter = Meter(site.nodes.values())
        for name, swarm in swarms.items():
            for path in paths[name][:2]:
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
        came = time.monotonic()
        for _ in range(5):
            site.valkey.start()
            meter.watch(2)
            site.valkey.kill()
            meter.watch(3)
        unsteady = meter.shares(came, time.monotonic())
        every = meter.shares(began, time.monotonic())
    shown("steady", steady)
    shown("one alone", alone)
    shown("no engine", without)
    shown("an engine that comes and goes", unsteady)
    shown("all", every)
    assert max(every) <= 1.01
    assert min(steady) >= 0.97
    assert min(alone) >= 0.97


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(240)
def test_what_a_move_of_demand_costs(tmp_path):
    """One node after the other fetches a body, each as soon as the one before has its own."""
    size = 2 * RATE
    with started(tmp_path) as (site, paths, swarms):
        turns = ["a", "a", "a", "a", *"bcabcabca"]
        used = dict.fromkeys(NODES, 2)
        costs = {"same": [], "moved": []}
        ended, before = None, "a"
        for name in turns:
            used[name] += 1
            path = paths[name][used[name]]
            site.upstream.answer(path, Answer(BODY[:size], etag='"a"'))
            (client,) = swarms[name].add(1, path)
            until(lambda client=client: client.end, "the body", 30)
            if ended is not None:
                costs["same" if name == before else "moved"].append(client.finished_at - ended - size / RATE)
            ended, before = client.finished_at, name
    for what, found in costs.items():
        shown(what, found, "s")
    assert statistics.median(costs["moved"]) <= 0.4


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(240)
def test_what_the_death_of_a_node_costs(tmp_path):
    """In seconds of the share that is free then: of one of three, then of one of two."""
    with started(tmp_path) as (site, paths, swarms):
        for name, swarm in swarms.items():
            for path in paths[name][:2]:
                swarm.add(1, path)
        Meter(site.nodes.values()).watch(4)
        costs = []
        for name in ("a", "b"):
            lost = site.nodes.pop(name)
            meter, share = Meter(site.nodes.values()), RATE / (len(site.nodes) + 1)
            meter.look()
            lost.kill()
            costs.append(meter.missed(4) / share)
            meter.watch(2)
    shown("a death", costs, "s")
    assert max(costs) <= 0.9


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(240)
def test_shares_that_swap_every_moment(tmp_path):
    """Each 0.4 s another node wants what the rate carries in that time."""
    turn_seconds = 0.4
    with started(tmp_path) as (site, paths, swarms):
        meter = Meter(site.nodes.values())
        began = time.monotonic()
        for number in range(60):
            name = "ab"[number % 2]
            path = paths[name][number // 2]
            site.upstream.answer(path, Answer(BODY[: int(turn_seconds * RATE)], etag='"a"'))
            swarms[name].add(1, path)
            meter.watch(began + (number + 1) * turn_seconds - time.monotonic())
        found = meter.shares(began, time.monotonic())
    shown("swapped every 0.4 s", found)
    assert max(found) <= 1.01


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(240)
def test_the_schedule_is_the_site_s(tmp_path):
    """From the next full minute on there is half of the rate, of all nodes together."""
    change = (int(time.time()) + 25) // 60 * 60 + 60
    begin, end = (time.strftime("%H:%M", time.gmtime(at)) for at in (change, change + 600))
    days = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
    half = {"days": days, "from": begin, "to": end, "rate": f"{RATE // 2}B/s"}
    with started(tmp_path, **{"wan.schedule": [half]}) as (site, paths, swarms):
        for name, swarm in swarms.items():
            for path in paths[name][:2]:
                swarm.add(1, path)
        meter = Meter(site.nodes.values())
        at = time.monotonic() + change - time.time()
        meter.watch(change + 14 - time.time())
        before, after = meter.shares(at - 13, at), meter.shares(at + 0.5, time.monotonic())
    shown("before", before)
    shown("after", after)
    assert max(before) <= 1.01
    assert 0.97 / 2 <= min(after) <= max(after) <= 1.01 / 2
