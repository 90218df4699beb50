"""The fill queue: slots by class, order over processes, and refusing what would wait too long."""

import asyncio
import os
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from harness.caches import slot_of
from harness.private import private_backlog

from gup.cache.fair_shares import FairShares, Shared, shares_file
from gup.cache.locks import Claims, Slots
from gup.cache.scheduler import GROUPS, Backlog, Class, FillQueue
from gup.upstream.bandwidth import Turns

DELTA, INDEX, FULL, UNKNOWN = list(Class)[:4]


class Site:
    """Queues of several processes of one service, with slots in one file and words in one page."""

    def __init__(self, directory, processes=2, most=2):
        self.most = most
        self.patience = 30.0
        self.live = set(range(processes))
        turns = [memoryview(bytearray(8 * processes)).cast("Q") for _ in range(2)]
        waiting = memoryview(bytearray(8 * processes)).cast("Q")
        self.held = memoryview(bytearray(8 * GROUPS)).cast("Q")
        self.claims = [Claims(directory / "slots") for _ in range(processes)]
        self.queues = [
            FillQueue(
                Slots(claims, 1000, lambda: self.most),
                Slots(claims, 0, lambda: self.most),
                Slots(claims, 2000, lambda: 2 * self.most),
                lambda: self.patience,
                tuple(Turns(words, number, self.live.__contains__) for words in turns),
                Backlog(waiting, self.held, number, self.live.__contains__),
            )
            for number, claims in enumerate(self.claims)
        ]
        fd = shares_file(processes)
        self.shares = [FairShares(fd, number) for number in range(processes)]
        os.close(fd)
        for queue, shares in zip(self.queues, self.shares, strict=True):
            queue.clients = shares.counts[Shared.FILLS]
        self.order = []

    def close(self):
        for each in (*self.claims, *self.shares):
            each.close()

    @asynccontextmanager
    async def waiter(self, process, class_, waited=0.0, client=""):
        """One who waits in the block, and notes when its turn has come; it holds its slot for no time."""

        async def wait():
            async with slot_of(self.queues[process], class_, waited, client) as held:
                self.order.append((client or class_, held is not None))

        task = asyncio.create_task(wait())
        before = self.waiting()
        await turns(lambda: task.done() or self.waiting() > before)
        yield task
        await task

    def waiting(self):
        return self.queues[0].waiting()


async def turns(condition):
    """Turns of the loop until it holds; the test's own timeout ends it."""
    while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
        await asyncio.sleep(0.001)


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    yield site
    site.close()


async def hold(stack, queue, class_, count, client=""):
    for _ in range(count):
        assert await stack.enter_async_context(slot_of(queue, class_, 0.0, client))


async def test_bulk_never_holds_up_what_is_urgent(site):
    async with AsyncExitStack() as stack:
        await hold(stack, site.queues[0], FULL, 2)
        for queue, priority in [(site.queues[1], DELTA), (site.queues[0], INDEX)]:
            await hold(stack, queue, priority, 1)
        site.patience = 0.02
        async with slot_of(site.queues[1], DELTA, 0.0) as held:
            assert not held, "two urgent ones stream already"


async def test_bulk_takes_only_what_urgent_leaves(site):
    async with AsyncExitStack() as stack:
        await hold(stack, site.queues[0], DELTA, 1)
        await hold(stack, site.queues[1], FULL, 1)
        site.patience = 0.02
        async with slot_of(site.queues[1], FULL, 0.0) as held:
            assert not held


async def test_a_place_that_is_left_early_is_free_and_given_back_once(site):
    site.most = 1
    async with slot_of(site.queues[0], FULL, 0.0) as first:
        first.leave()
        async with slot_of(site.queues[1], FULL, 0.0) as second:
            assert second is not None
            first.leave()
            assert site.queues[0]._groups[1].slots.taken() == 1


@pytest.mark.parametrize("process", [0, 1])
async def test_urgency_then_order_of_arrival(site, process):
    site.most = 1
    async with AsyncExitStack() as waiters, AsyncExitStack() as stack:
        await hold(stack, site.queues[0], DELTA, 1)
        for priority in (UNKNOWN, FULL, INDEX, DELTA):
            await waiters.enter_async_context(site.waiter(process, priority))
    assert site.order == [(DELTA, True), (INDEX, True), (FULL, True), (UNKNOWN, True)]


@pytest.mark.parametrize("process", [0, 1])
async def test_within_a_class_clients_take_turns_over_all_processes(site, process):
    """The greedy one came first, with more; it has all the slots, or waits, in either process."""
    async with AsyncExitStack() as waiters, AsyncExitStack() as stack:
        await hold(stack, site.queues[0], FULL, 2, "greedy")
        for number in range(6):
            await waiters.enter_async_context(site.waiter(number % 2, FULL, client="greedy"))
        await waiters.enter_async_context(site.waiter(process, FULL, client="modest"))
    assert site.order[:2].count(("modest", True)) == 1
    assert site.order.count(("greedy", True)) == 6


async def test_a_client_with_many_waiting_makes_no_other_one_hopeless(site):
    site.held[1] = 1_000_000
    async with AsyncExitStack() as waiters, AsyncExitStack() as stack:
        await hold(stack, site.queues[0], FULL, 2, "greedy")
        for number in range(50):
            await waiters.enter_async_context(site.waiter(number % 2, FULL, client="greedy"))
        site.patience = 20.0
        assert site.queues[0].hopeless(FULL, "greedy")
        assert not site.queues[0].hopeless(FULL, "modest")
        assert site.queues[0].expected_seconds(FULL, "modest") <= 2.0
        site.patience = 30.0
        await waiters.enter_async_context(site.waiter(0, FULL, client="modest"))
        site.held[1] = 20_000_000  # the greedy one is refused now, and the modest one is not
        await turns(lambda: len(site.order) > 40)
        assert ("modest", False) not in site.order
        site.held[1] = 0


async def test_a_full_waits_for_no_unknown_name_and_not_for_ever_for_what_is_urgent(site):
    async with AsyncExitStack() as waiters, AsyncExitStack() as stack:
        await hold(stack, site.queues[0], DELTA, 2)
        for _ in range(3):
            await waiters.enter_async_context(site.waiter(0, DELTA))
            await waiters.enter_async_context(site.waiter(0, UNKNOWN))
        began = asyncio.get_running_loop().time()
        async with slot_of(site.queues[1], FULL, 0.0) as held:
            assert held
            assert asyncio.get_running_loop().time() - began < 1.0
            assert site.order == []


async def test_who_has_waited_long_counts_as_of_a_more_urgent_class(site):
    site.most = 1
    async with AsyncExitStack() as waiters, AsyncExitStack() as stack:
        await hold(stack, site.queues[0], FULL, 1)
        await waiters.enter_async_context(site.waiter(0, FULL, client="full"))
        await waiters.enter_async_context(site.waiter(0, UNKNOWN, waited=11.0, client="unknown"))
    assert site.order == [("unknown", True), ("full", True)]


async def test_what_those_who_want_it_have_waited_counts(site):
    async with AsyncExitStack() as stack:
        await hold(stack, site.queues[0], FULL, 2)
        began = asyncio.get_running_loop().time()
        async with slot_of(site.queues[0], FULL, 29.99) as held:
            assert not held
        assert asyncio.get_running_loop().time() - began < 1.0


async def test_a_free_place_is_never_refused(site):
    site.held[1] = 10**12
    site.patience = 0.5
    async with slot_of(site.queues[0], FULL, 99.0) as held:
        assert held
        assert site.queues[1].expected_seconds(FULL) == 0.0
        assert not site.queues[1].hopeless(FULL)


async def test_the_wait_is_foretold_over_all_processes(site):
    site.held[1] = 6_000_000  # a fill held its slot for 6 s
    async with AsyncExitStack() as waiters, AsyncExitStack() as stack:
        await hold(stack, site.queues[0], FULL, 2)
        assert site.queues[0].expected_seconds(FULL) == pytest.approx(3.0)
        for process in (0, 1, 0, 1):
            await waiters.enter_async_context(site.waiter(process, FULL))
        assert site.queues[1].expected_seconds(FULL) == pytest.approx(15.0)
        assert site.queues[1].expected_seconds(UNKNOWN) == pytest.approx(15.0)
        assert site.queues[1].expected_seconds(DELTA) == 0.0
        assert not site.queues[1].hopeless(FULL)
        site.patience = 14.0
        assert site.queues[1].hopeless(FULL)
        assert not site.queues[1].hopeless(DELTA)
        assert 7.0 <= site.queues[1].refusal(FULL).retry_after_seconds <= 14.0
        async with slot_of(site.queues[0], FULL, 0.0) as held:
            assert not held
        site.live.remove(0)  # its two waiters are gone with it
        assert site.queues[1].expected_seconds(FULL) == pytest.approx(9.0)
        site.live.add(0)
        site.patience = 30.0


async def test_who_waits_in_vain_is_told_when_that_is_known(site):
    """The first fills tell how long one takes: those at the end of the queue need not wait their patience."""
    async with AsyncExitStack() as waiters, AsyncExitStack() as stack:
        await hold(stack, site.queues[0], FULL, 2)
        for _ in range(5):
            await waiters.enter_async_context(site.waiter(0, FULL))
        site.held[1] = 50_000_000  # slots become free every 25 s
        await turns(lambda: len(site.order) == 3)
        assert site.order == [(FULL, False)] * 3
        assert site.waiting() == 2, "the first two have their turn within twice their patience"
        site.held[1] = 0


async def test_the_queue_is_bounded(site, monkeypatch):
    monkeypatch.setattr("gup.cache.scheduler._MOST_WAITING", 3)
    async with AsyncExitStack() as waiters, AsyncExitStack() as stack:
        await hold(stack, site.queues[0], FULL, 2)
        for _ in range(3):
            await waiters.enter_async_context(site.waiter(0, FULL))
        assert site.queues[0].hopeless(FULL)
        assert not site.queues[1].hopeless(FULL)


async def test_the_mean_follows_what_fills_take_now(site):
    async with slot_of(site.queues[0], FULL, 0.0):
        pass
    assert 0 < site.held[1] < 1_000_000
    assert site.held[0] == 0
    backlog = private_backlog()
    for seconds in [8.0] + [1.0] * 20:
        backlog.held(1, seconds)
    assert backlog.mean_held_seconds(1) == pytest.approx(1.0, rel=0.05)


async def test_an_heir_waits_for_nothing_and_is_never_refused(site):
    """The dead leader's slot is another fill's already, and the queue is full: it goes on all the same."""
    site.most = 1
    async with AsyncExitStack() as waiters, AsyncExitStack() as stack:
        await hold(stack, site.queues[0], FULL, 1)
        for _ in range(3):
            await waiters.enter_async_context(site.waiter(0, FULL))
        site.held[1] = 10**12
        async with asyncio.timeout(1):
            assert await stack.enter_async_context(slot_of(site.queues[1], FULL, 10**6, inherits=True))
        assert site.order == []
        site.held[1] = 0
    assert site.order == [(FULL, True)] * 3


@pytest.mark.parametrize("most", [1, 3])
async def test_while_an_heir_streams_a_place_less_is_given(site, most):
    site.most = most
    async with AsyncExitStack() as takeovers:
        async with AsyncExitStack() as stack:
            await hold(stack, site.queues[0], FULL, most)
            assert await takeovers.enter_async_context(slot_of(site.queues[1], FULL, 0.0, inherits=True))
            assert not site.queues[0].idle()
        site.patience = 0.02
        async with AsyncExitStack() as stack:
            await hold(stack, site.queues[0], FULL, most - 1)
            async with slot_of(site.queues[0], FULL, 0.0) as held:
                assert not held
    assert site.queues[0].idle()
    async with AsyncExitStack() as stack:
        await hold(stack, site.queues[0], FULL, most)


async def test_an_heir_takes_a_place_that_is_free(site):
    async with AsyncExitStack() as stack:
        assert await stack.enter_async_context(slot_of(site.queues[1], FULL, 0.0, inherits=True))
        await hold(stack, site.queues[0], FULL, 1)
        assert site.queues[0]._inherited.taken() == 0


async def test_who_is_patient_is_not_refused(site):
    site.most, site.patience = 1, 0.01
    async with AsyncExitStack() as stack:
        await hold(stack, site.queues[0], FULL, 1)
        site.held[1] = 10**12

        async def wait():
            async with slot_of(site.queues[1], FULL, 10**6, patient=True) as held:
                return held is not None

        waiting = asyncio.create_task(wait())
        await turns(lambda: site.waiting() == 1)
        done, _ = await asyncio.wait([waiting], timeout=0.05)
        assert not done
    assert await waiting


async def test_places_of_a_dead_process_are_free(site):
    site.most = 1
    dead, alive = site.queues
    for slots in (*(group.slots for group in dead._groups), dead._inherited):
        assert slots.try_take() is not None
    assert not alive._has_free(alive._groups[1])
    site.claims.pop(0).close()
    async with slot_of(alive, FULL, 0.0) as held:
        assert held
