"""Download slots as several workers take them: one process here stands for each, with its own locks."""

import asyncio
import os
from dataclasses import dataclass, field

import pytest
from harness.private import private_counters

from gup.cache.fair_shares import FairShares, Shared, shares_file
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
    shares: list[FairShares] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)
    went: list[str] = field(default_factory=list)

    def sum_of(self, name):
        return lambda: sum(counters.get(name) for counters in self.counters)

    @property
    def gauges(self):
        """Under way, and waiting."""
        names = ("gup_client_downloads_in_progress", "gup_client_downloads_queued")
        return tuple(self.sum_of(name)() for name in names)

    def ask(self, worker: int, name: str, client: str = "") -> Ticket:
        ticket = self.workers[worker].take_ticket(client or name)
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
        fd = shares_file(workers)
        for number in range(workers):
            site.counters.append(private_counters())
            site.claims.append(Claims(tmp_path / "slots"))
            slots = Slots(site.claims[-1], 0, lambda: site.limits.max_downloads)
            site.shares.append(shares := FairShares(fd, number))
            turns = Turns(site.turns, number, lambda block: block not in site.dead)
            limits = lambda: site.limits  # noqa: E731
            site.workers.append(
                Downloads(
                    slots, limits, site.counters[-1], site.sum_of, turns, shares.counts[Shared.DOWNLOADS]
                )
            )
        os.close(fd)
        return site

    yield make
    for site in sites:
        for each in (*site.claims, *site.shares):
            each.close()


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


async def test_clients_take_turns_over_workers_however_many_of_one_wait(make):
    site = make(2, max_downloads=2, queue=20)
    held = [site.ask(0, "a", "greedy"), site.ask(1, "b", "greedy")]
    greedy = [site.ask(number % 2, f"g{number}", "greedy") for number in range(6)]
    modest = site.ask(1, "modest")
    site.workers[0].give_back(held[0])
    await site.until("modest")
    site.workers[1].give_back(held[1])
    for number, ticket in enumerate(greedy):
        site.workers[number % 2].give_back(ticket)
    site.workers[1].give_back(modest)
    assert site.gauges == (0, 0)


@pytest.mark.parametrize("most", [0, 10], ids=["no limit in all", "a limit in all"])
async def test_one_address_has_so_many_downloads_and_others_go_past_those_it_has_waiting(make, most):
    site = make(2, max_downloads=most, max_downloads_per_address=2, queue=20)
    held = [site.ask(0, "a", "one"), site.ask(1, "b", "one")]
    waiting = site.ask(0, "c", "one")
    other = site.ask(0, "d", "other")
    await site.until("d") if other.slot is None else None
    assert waiting.slot is None
    site.workers[1].give_back(held[1])
    await site.until(*site.went, "c") if waiting.slot is None else None
    assert waiting.slot is not None
    for ticket in (held[0], waiting, other):
        site.workers[0].give_back(ticket)


async def test_no_client_takes_all_places_of_the_queue(make):
    site = make(1, max_downloads=1, queue=8)
    held = site.ask(0, "a", "greedy")
    tickets = [site.ask(0, f"g{number}", "greedy") for number in range(4)]
    with pytest.raises(Problem):
        site.ask(0, "g4", "greedy")
    tickets += [site.ask(0, name) for name in "bcde"]
    with pytest.raises(Problem):
        site.ask(0, "f")
    for ticket in (*tickets, held):
        site.workers[0].give_back(ticket)


async def test_who_takes_next_to_nothing_goes_on_without_its_slot_when_others_wait(make, monkeypatch):
    monkeypatch.setattr("gup.server.downloads._LEAST_SECONDS", 0.1)
    site = make(1, max_downloads=2, queue=8)
    slow, quick = site.ask(0, "slow"), site.ask(0, "quick")
    sent = [0]
    slow.sent_bytes, quick.sent_bytes = (lambda: 5), (lambda: sent[0])
    await asyncio.sleep(0.12)
    site.workers[0].each_second()
    assert site.gauges == (2, 0), "nobody waits: both keep their slots"
    waiting = [site.ask(0, "b"), site.ask(0, "c")]
    await asyncio.sleep(0.12)
    sent[0] += 10_000_000
    site.workers[0].each_second()
    await site.until("b")
    assert waiting[1].slot is None
    for ticket in (slow, quick):
        site.workers[0].give_back(ticket)
    await site.until("b", "c")
    for ticket in waiting:
        site.workers[0].give_back(ticket)
    assert site.gauges == (0, 0)
