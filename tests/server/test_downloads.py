"""Download slots as several workers take them: one process here stands for each, with its own locks."""

import asyncio
from dataclasses import dataclass, field

import pytest

from gup.cache.locks import Claims, Slots
from gup.config import Clients
from gup.errors import Problem
from gup.metrics import Counters
from gup.server import downloads
from gup.server.downloads import NO_SLOT, Downloads, MachineView, Ticket


@dataclass
class Site:
    """Some workers on one file of locks; `limits` holds for all of them."""

    limits: Clients
    workers: list[Downloads] = field(default_factory=list)
    counters: list[Counters] = field(default_factory=list)
    claims: list[Claims] = field(default_factory=list)
    since: list[int] = field(default_factory=list)
    went: list[str] = field(default_factory=list)

    def sum(self, name):
        return lambda: sum(counters.get(f"gup_client_downloads_{name}") for counters in self.counters)

    @property
    def gauges(self):
        """Under way, and waiting."""
        return self.sum("in_progress")(), self.sum("queued")()

    def ask(self, worker: int, name: str) -> Ticket:
        ticket = self.workers[worker].take_ticket()

        def go() -> None:
            self.went.append(name)

        if ticket.slot is None:
            ticket.on_admitted = go
        return ticket

    async def until(self, *names: str) -> None:
        async with asyncio.timeout(5):
            while self.went != list(names):  # noqa: ASYNC110 - the downloads' own timer is what is waited for
                await asyncio.sleep(0)


@pytest.fixture
def make(tmp_path):
    sites = []

    def make(workers: int, **limits: int) -> Site:
        site = Site(Clients(**limits))
        sites.append(site)
        loop = asyncio.get_running_loop()
        site.since = [0] * workers
        for number in range(workers):
            counters = Counters.private()
            claims = Claims(tmp_path / "slots")
            site.counters.append(counters)
            site.claims.append(claims)
            machine = MachineView(
                in_progress=site.sum("in_progress"),
                queued=site.sum("queued"),
                ended=site.sum("total"),
                waiting_since_ns=site.since,
                own=number,
                show=lambda ns, number=number: site.since.__setitem__(number, ns),
            )
            slots = Slots(claims, 0, lambda: site.limits.max_downloads)
            site.workers.append(Downloads(slots, lambda: site.limits, counters, machine, loop))
        return site

    yield make
    for site in sites:
        for claims in site.claims:
            claims.close()


async def test_without_a_limit_every_download_has_a_ticket_and_is_counted(make):
    site = make(1, max_downloads=0)
    tickets = [site.ask(0, "x") for _ in range(3)]
    assert [ticket.slot for ticket in tickets] == [NO_SLOT] * 3
    assert site.gauges == (3, 0)
    for ticket in tickets:
        site.workers[0].give_back(ticket)
    assert site.gauges == (0, 0)
    assert site.counters[0].get("gup_client_downloads_total") == 3
    site.workers[0].close()


async def test_the_limit_holds_over_workers_and_the_longest_waiting_goes_first(make):
    site = make(2, max_downloads=2, queue=10)
    held = [site.ask(0, "a"), site.ask(1, "b")]
    assert all(ticket.slot is not None for ticket in held)
    tickets = [site.ask(worker, name) for worker, name in ((1, "c"), (0, "d"), (1, "e"), (0, "f"))]
    assert site.gauges == (2, 4)
    site.workers[0].give_back(held[0])
    await site.until("c")
    site.workers[1].give_back(tickets[0])
    await site.until("c", "d")
    site.workers[1].give_back(held[1])
    await site.until("c", "d", "e")
    site.workers[0].give_back(tickets[1])
    await site.until("c", "d", "e", "f")
    assert site.gauges == (2, 0)
    assert site.since == [0, 0]
    for worker, ticket in ((1, tickets[2]), (0, tickets[3])):
        site.workers[worker].give_back(ticket)
    assert site.gauges == (0, 0)
    for worker in site.workers:
        worker.close()


async def test_a_newcomer_does_not_overtake_those_who_wait_elsewhere(make):
    site = make(2, max_downloads=1, queue=10)
    held = site.ask(0, "a")
    first = site.ask(1, "b")
    site.workers[0].give_back(held)
    newcomer = site.ask(0, "c")  # the place is free, and not its own
    assert newcomer.slot is None
    await site.until("b")
    site.workers[1].give_back(first)
    await site.until("b", "c")
    site.workers[0].give_back(newcomer)


async def test_a_dead_workers_place_in_the_queue_is_skipped(make):
    site = make(2, max_downloads=1, queue=10)
    site.since[1] = 1  # a worker that was killed while its clients waited, longest of all
    ticket = site.ask(0, "a")
    assert ticket.slot is None
    began = asyncio.get_running_loop().time()
    await site.until("a")
    assert asyncio.get_running_loop().time() - began >= downloads._COURTESY_SECONDS
    site.workers[0].give_back(ticket)


async def test_the_queue_is_full_for_all_workers_together(make):
    site = make(2, max_downloads=1, queue=2)
    held = site.ask(0, "a")
    waiting = [site.ask(0, "b"), site.ask(1, "c")]
    for worker in (0, 1):
        with pytest.raises(Problem) as caught:
            site.ask(worker, "d")
        assert (caught.value.slug, caught.value.retry_after_seconds) == ("overloaded", 30.0)
    assert site.gauges == (1, 2)
    site.workers[1].give_back(waiting[1])  # the client has gone
    assert site.gauges == (1, 1)
    again = site.ask(0, "e")
    for ticket in (waiting[0], again, held):
        site.workers[0].give_back(ticket)
    for worker in site.workers:
        worker.close()


@pytest.mark.parametrize(
    ("ended", "seconds"),
    [
        ([], 30.0),
        ([7], 30.0),
        ([0, 5, 10], 1.0),
        ([0] * 10 + [1], 20.0),
        ([0] * 30 + [1], 60.0),
        ([9, 3], 30.0),
    ],
)
async def test_retry_after_is_the_time_in_which_the_queue_is_served(make, ended, seconds):
    site = make(1, max_downloads=1, queue=1)
    held, waiting = site.ask(0, "a"), site.ask(0, "b")
    counters = site.counters[0]
    for total in ended:
        counters.words[counters.position("gup_client_downloads_total")] = total
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


async def test_a_killed_workers_locks_are_free_when_its_counts_are(make):
    site = make(2, max_downloads=1, queue=5)
    site.ask(1, "dead")
    ticket = site.ask(0, "a")
    site.claims.pop(1).close()  # as the kernel does
    site.counters[1].add("gup_client_downloads_in_progress", -1)  # as the supervisor does
    await site.until("a")
    site.workers[0].give_back(ticket)


async def test_nobody_begins_to_wait_when_the_service_stops(make):
    site = make(1, max_downloads=1, queue=5)
    held = site.ask(0, "a")
    site.workers[0].stop()
    with pytest.raises(Problem) as caught:
        site.ask(0, "b")
    assert caught.value.slug == "draining"
    site.workers[0].give_back(held)
    assert site.ask(0, "c").slot is not None, "what needs no waiting is still served"
