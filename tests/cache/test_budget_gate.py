"""Which fills the WAN's budget holds back, as a table; and when it is not known how much is used."""

import asyncio

import pytest

from gup.cache.budget_gate import CHEAP, COUNTING, BudgetGate
from gup.config import WanBudget
from gup.content.catalog import CLIENT_PATCHES, Label
from gup.content.routes import Routes
from gup.errors import Problem
from gup.metrics import Counters, layout

MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
DELTA = f"/content/{MONIKER}/260801001/xdelta260801001_To_260802001.dax"
FULL = f"/content/{MONIKER}/260801001/full.zip"
UNKNOWN_NAME = f"/content/{MONIKER}/latest/anything.txt"
INDEX = "/content/ContentInfo.txt"
NOW = 1_785_574_800.0


class Gate(BudgetGate):
    def __init__(self, **budget):
        positions = {name: at for at, name in enumerate(layout(["m"]))}
        counters = Counters(memoryview(bytearray(8 * len(positions))).cast("Q"), positions)
        self.now, self.received = NOW, 0
        given = WanBudget.model_validate({"bytes": "1MB"} | budget)
        words = memoryview(bytearray(32)).cast("Q")
        super().__init__(words, lambda: given, lambda: self.received, counters, lambda: self.now)
        self.type = "virus_definitions"
        self.label = lambda _route: Label("", "", "", self.type)

    def held(self, path, *, background=False):
        route = Routes().route(path)
        found = None
        try:
            asyncio.run(self.refuse(route, background=background))
        except Problem as problem:
            found = problem
        assert self.is_held(route, background=background) == (found is not None)
        return found


@pytest.mark.parametrize(
    ("used", "background", "full", "delta"),
    [
        (0, False, False, False),
        (699_999, False, False, False),
        (700_000, True, False, False),
        (899_999, True, False, False),
        (900_000, True, True, False),
        (999_999, True, True, False),
        (1_000_000, True, True, True),
        (5_000_000, True, True, True),
    ],
)
def test_classes_are_held_back_in_their_order_and_index_files_never(used, background, full, delta):
    gate = Gate()
    gate.publish(COUNTING, used - 1000, 4000, 0)
    gate.received = 5000  # 1000 since that reading
    assert bool(gate.held(DELTA, background=True)) is background
    for path in (FULL, UNKNOWN_NAME):
        assert bool(gate.held(path)) is full
    assert bool(gate.held(DELTA)) is delta
    assert not gate.held(INDEX)
    assert not gate.held(INDEX, background=True)
    gate.type = CLIENT_PATCHES
    assert bool(gate.held(DELTA)) is full


def test_without_a_budget_and_in_cheap_hours_nothing_is_held_back():
    for gate, state in ((Gate(bytes="0"), COUNTING), (Gate(), CHEAP)):
        gate.publish(state, 10**9, 0, 0)
        assert not any(gate.held(path, background=True) for path in (DELTA, FULL, INDEX))


def test_an_outbreak_frees_definitions_until_its_end():
    gate = Gate()
    gate.publish(COUNTING, 10**9, 0, 0)
    gate.set_outbreak(NOW + 60)
    for type_, held in (("virus_definitions", False), (CLIENT_PATCHES, True), ("other", True)):
        gate.type = type_
        assert bool(gate.held(FULL)) is held
        assert bool(gate.held(DELTA, background=True)) is held
    gate.label = lambda _route: None  # nobody lists it
    assert not gate.held(FULL)
    gate.now += 61
    assert gate.held(FULL)


def test_the_problem_says_what_is_used_and_when_it_opens():
    gate = Gate()
    gate.publish(COUNTING, 1_200_000, 0, int(NOW) + 90)
    problem = gate.held(FULL)
    assert (problem.slug, problem.status, problem.retry_after_seconds) == ("wan-budget", 503, 90.0)
    assert problem.detail == (
        "1.2 MB of 1.0 MB a month are used (wan.budget): no full package is fetched "
        "before 2026-08-01 09:01 UTC, in 1 min 30 s"
    )
    assert problem.extensions == {
        "held": "full",
        "budget_bytes": 1_000_000,
        "used_bytes": 1_200_000,
        "per": "month",
        "opens_at": "2026-08-01T09:01:30+00:00",
    }
    gate.now += 1000  # the controller has not looked since
    assert "before" not in gate.held(FULL).detail


def test_counters_that_lag_behind_the_reading_hold_nothing_back():
    gate = Gate()
    gate.publish(COUNTING, 10, 5000, 0)
    gate.received = 4900
    assert gate.used_bytes == 0
    assert not gate.held(FULL)


def test_before_the_first_reading_a_fill_waits_but_not_for_ever(monkeypatch):
    monkeypatch.setattr("gup.cache.budget_gate._KNOWN_SECONDS", 0.03)
    gate, route = Gate(), Routes().route(FULL)

    async def wait():
        waiting = asyncio.ensure_future(gate.refuse(route, background=False))
        await asyncio.sleep(0.01)
        gate.publish(COUNTING, 10**9, 0, 0)
        with pytest.raises(Problem):
            await waiting

    asyncio.run(gate.refuse(route, background=False))
    asyncio.run(wait())
