"""Download slots as several workers take them: one process here stands for each, with its own locks."""

import asyncio
from dataclasses import dataclass, field

import pytest
from harness.private import private_counters

from gup.cache.locks import Claims, Slots
from gup.config import Clients
from gup.errors import Problem
from gup.metrics import Counters
from gup.server.downloads import Downloads, Ticket
from gup.upstream.bandwidth import NOBODY, Turns


@dataclass
class Site:
    """Some workers on one file of locks; `limits` holds for all of them."""

    limits: Clients
    turns: "memoryview[int]"
    workers: list[Downloads] = field(default_factory=list)
    counters: list[Counters] = field(default_factory=list)
    claims: list[Claims] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)
    went: list[str] = field(default_factory=list)

    def sum_of(self, name):
        return lambda: sum(counters.get(name) for counters in self.counters)

    def ask(self, worker: int, name: str) -> Ticket:
        ticket = self.workers[worker].take_ticket()
        if ticket.slot is None:
            ticket.on_admitted = lambda: self.went.append(name)
        return ticket

    async def until(self, *names: str) -> None:
        async with asyncio.timeout(5):
            while self.went != list(names):  # noqa: ASYNC110 - the downloads' own timer is what is waited for
                await asyncio.sleep(0)


@pytest.fixture
def make(tmp_path):
    sites = []

    def make(workers: int, **limits: int) -> Site:
        # one word more: the controller's, which lives and has no downloads
        site = Site(Clients(**limits), memoryview(bytearray(8 * (workers + 1))).cast("Q"))
        sites.append(site)
        for number in range(workers):
            site.counters.append(private_counters())
            site.claims.append(Claims(tmp_path / "slots"))
            slots = Slots(site.claims[-1], 0, lambda: site.limits.max_downloads)
            turns = Turns(site.turns, number, lambda block: block not in site.dead)
            limits = lambda: site.limits  # noqa: E731
            site.workers.append(Downloads(slots, limits, site.counters[-1], site.sum_of, turns))
        return site

    yield make
    for site in sites:
        for claims in site.claims:
            claims.close()


async def test_a_newcomer_does_not_overtake_those_who_wait_elsewhere(make):
    site = make(2, max_downloads=1, queue=10)
    held = site.ask(0, "a")
    first = site.ask(1, "b")
    site.workers[0].give_back(held)
    newcomer = site.ask(0, "c")  # the slot is free, and not its own
    assert newcomer.slot is None
    await site.until("b")
    site.workers[1].give_back(first)
    await site.until("b", "c")
    site.workers[0].give_back(newcomer)


async def test_a_dead_workers_place_in_the_queue_is_skipped(make):
    site = make(2, max_downloads=1, queue=10)
    site.turns[1] = NOBODY - 1  # a worker that hangs while its clients wait, longest of all
    ticket = site.ask(0, "a")
    await asyncio.sleep(0.05)
    assert ticket.slot is None
    site.dead.add(1)
    await site.until("a")
    site.workers[0].give_back(ticket)


ENDED = [
    ([], 30.0),
    ([7], 30.0),
    ([0, 5, 10], 1.0),
    ([0] * 10 + [1], 20.0),
    ([0] * 30 + [1], 60.0),
    ([9, 3], 30.0),
]


@pytest.mark.parametrize(("ended", "seconds"), ENDED)
async def test_retry_after_is_the_time_in_which_the_queue_is_served(make, ended, seconds):
    site = make(1, max_downloads=1, queue=1)
    held, waiting = site.ask(0, "a"), site.ask(0, "b")
    for total in ended:
        site.counters[0].set("gup_client_downloads_total", total)
        site.workers[0].each_second()
    with pytest.raises(Problem) as caught:
        site.ask(0, "c")
    assert caught.value.retry_after_seconds == seconds
    for ticket in (waiting, held):
        site.workers[0].give_back(ticket)
    site.workers[0].close()


async def test_a_limit_that_goes_lets_everybody_go_and_one_that_comes_counts_those_before(make):
    site = make(1, max_downloads=1, queue=5)
    held = site.ask(0, "a")
    tickets = [site.ask(0, name) for name in "bc"]
    site.limits = Clients(max_downloads=0)
    await site.until("b", "c")
    site.limits = Clients(max_downloads=2)
    late = site.ask(0, "d")
    assert late.slot is None, "three are under way already"
    for ticket in (held, *tickets):
        site.workers[0].give_back(ticket)
    await site.until("b", "c", "d")
    assert late.slot == 0
    site.workers[0].give_back(late)
    site.workers[0].close()


async def test_nobody_begins_to_wait_when_the_service_stops(make):
    site = make(1, max_downloads=1, queue=5)
    held = site.ask(0, "a")
    site.workers[0].stop()
    with pytest.raises(Problem) as caught:
        site.ask(0, "b")
    assert caught.value.slug == "draining"
    site.workers[0].give_back(held)
    assert site.ask(0, "c").slot is not None, "what needs no waiting is still served"
