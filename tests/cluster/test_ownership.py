"""Whom a node asks: the order of the members, and that no list, death or break-off makes a circle."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from cluster.virtual import Stuck, run
from hypothesis import event, given, settings
from hypothesis import strategies as st

from gup.cluster.ownership import Source, Step, above, further_steps, ranked, steps

NAMES = [f"node{n}" for n in range(6)]
KEYS = [f"any/any/stream/26080{n}001/full.dax" for n in range(400)]
HOP_SECONDS, WAN_SECONDS, PROBE_SECONDS = 0.001, 1.0, 3.0


# --- the order


@pytest.mark.parametrize("size", range(1, 17))
def test_a_new_member_takes_its_share_and_nobody_elses(size):
    old = [f"node{n}" for n in range(size)]
    moved = Counter()
    for key in KEYS:
        before, after = ranked(key, old)[0], ranked(key, [*old, "new"])[0]
        if before != after:
            assert after == "new"
            moved[before] += 1
    assert moved.total() / len(KEYS) <= 1 / (size + 1) + 0.05


@given(st.permutations(NAMES), st.sampled_from(KEYS), st.sampled_from(NAMES))
def test_the_order_does_not_depend_on_the_list(names, key, gone):
    assert ranked(key, names) == ranked(key, NAMES)
    assert ranked(key, set(NAMES) - {gone}) == [name for name in ranked(key, NAMES) if name != gone]


@given(st.sampled_from(KEYS), st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES)))
def test_of_two_nodes_one_asks_the_other_at_most(key, one_list, other_list):
    """Whatever lists they have."""
    for one in NAMES:
        for other in NAMES:
            asks = other in above(key, one, one_list), one in above(key, other, other_list)
            assert one == other or not all(asks)


@pytest.mark.parametrize("members", [(), ("node0",)])
@pytest.mark.parametrize("immutable", [False, True])
def test_a_node_alone_asks_the_wan_alone(members, immutable):
    assert list(steps(KEYS[0], "node0", members, immutable=immutable)) == [Step(Source.WAN)]
    assert list(further_steps(KEYS[0], "node0", members, None)) == [Step(Source.WAN)]


def test_each_other_member_is_asked_once_at_most_and_the_wan_last():
    for key in KEYS[:50]:
        order = ranked(key, NAMES)
        for place, node in enumerate(order):
            tried = list(steps(key, node, NAMES, immutable=True))
            assert [step.members for step in tried[:place]] == [(name,) for name in order[:place]]
            asked = [name for step in tried for name in step.members]
            assert sorted([*asked, node]) == NAMES
            assert tried[-1] == Step(Source.WAN)
            assert Step(Source.WAN) not in tried[:-1]
            changing = list(steps(key, node, NAMES, immutable=False))
            assert all(step.source is not Source.HELD for step in changing)


# --- a model of nodes that follow it


class Gone(Exception):  # noqa: N818 - an answer
    """The member died, or broke the body off."""


@dataclass
class Node:
    """What the real one does with a key, without bytes."""

    site: "Site"
    name: str
    members: list[str]
    slots: asyncio.Semaphore
    alive: bool = True
    stored: set[str] = field(default_factory=set)
    fills: dict[str, asyncio.Task] = field(default_factory=dict)
    from_wan: set[str] = field(default_factory=set)
    """Keys that arrive here from the WAN at this moment."""

    def holds(self, key: str) -> bool:
        return key in self.stored or key in self.from_wan

    async def get(self, key: str) -> None:
        """For a client of this node, or a member that ranks lower."""
        if key not in self.stored:
            if key not in self.fills:
                self.fills[key] = asyncio.get_running_loop().create_task(self._fill(key))
                self.fills[key].add_done_callback(lambda _: self.fills.pop(key, None))
            await asyncio.shield(self.fills[key])

    async def _fill(self, key: str) -> None:
        plan = steps(key, self.name, self.members, immutable=True)
        while True:
            step = next(plan)
            try:
                came_from = None
                if step.source is Source.WAN:
                    await self._fetch(key)
                else:
                    came_from = await self._from_members(step, key)
                break
            except Gone as gone:
                if gone.args:  # in the middle of the body
                    plan = further_steps(key, self.name, self.members, gone.args[0])
        assert came_from != self.name
        self.stored.add(key)

    async def _fetch(self, key: str) -> None:
        async with self.slots:  # who waits for a member holds none
            self.site.fetches[key] += 1
            self.from_wan.add(key)
            try:
                await asyncio.sleep(WAN_SECONDS)
                if self.site.breaks():
                    raise Gone(None)
            finally:
                self.from_wan.discard(key)

    async def _from_members(self, step: Step, key: str) -> str:
        for name in step.members:
            member = self.site.nodes[name]
            await asyncio.sleep(HOP_SECONDS)
            if not self.site.reaches(self.name, name):
                await asyncio.sleep(PROBE_SECONDS)
                continue
            if step.source is Source.HELD and not member.holds(key):
                continue
            work = asyncio.ensure_future(member.get(key))
            self.site.asked.setdefault(name, set()).add(work)
            try:
                await work
            except (asyncio.CancelledError, Gone):
                if not work.cancelled():
                    raise
                raise Gone(name) from None
            if self.site.breaks():
                raise Gone(name)
            return name
        raise Gone


@dataclass
class Site:
    """All nodes, their deaths, and how often a body breaks off."""

    names: list[str]
    lists: list[list[str]]
    slots: int
    unreachable: set[tuple[str, str]]
    broken: float
    random: random.Random
    fetches: Counter = field(default_factory=Counter)
    asked: dict[str, set[asyncio.Future]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = {
            name: Node(self, name, members, asyncio.Semaphore(self.slots))
            for name, members in zip(self.names, self.lists, strict=True)
        }

    def reaches(self, one: str, other: str) -> bool:
        return self.nodes[other].alive and (one, other) not in self.unreachable

    def breaks(self) -> bool:
        return self.random.random() < self.broken

    def kill(self, name: str) -> None:
        node = self.nodes[name]
        node.alive = False
        node.from_wan.clear()
        for work in (*self.asked.get(name, ()), *node.fills.values()):
            work.cancel()


@st.composite
def sites(draw):
    names = NAMES[: draw(st.integers(2, 6))]
    lists = [sorted({name, *draw(st.sets(st.sampled_from(names)))}) for name in names]
    pairs = st.tuples(st.sampled_from(names), st.sampled_from(names))
    return Site(
        names,
        lists,
        draw(st.integers(1, 2)),
        draw(st.sets(pairs, max_size=4)),
        draw(st.sampled_from([0.0, 0.2, 0.5])),
        random.Random(draw(st.integers(0, 9999))),
    )


_requests = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 3), st.sampled_from([0.0, 0.0005, 0.3, 1.2])),
    min_size=1,
    max_size=24,
)
_deaths = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.0007, 0.5, 1.1])), max_size=2)


async def _play(site, requests, deaths):
    """Each request ends, or its node died."""

    async def request(number, key, at):
        await asyncio.sleep(at)
        node = site.nodes[site.names[number % len(site.names)]]
        if node.alive:
            try:
                await node.get(KEYS[key])
            except asyncio.CancelledError:
                assert not node.alive
            else:
                assert KEYS[key] in node.stored

    async def death(number, at):
        await asyncio.sleep(at)
        site.kill(site.names[number % len(site.names)])

    await asyncio.gather(*(request(*one) for one in requests), *(death(*one) for one in deaths))


@settings(max_examples=200, deadline=None)
@given(sites(), _requests, _deaths)
def test_every_request_ends_whatever_the_lists_deaths_and_break_offs(site, requests, deaths):
    run(lambda: _play(site, requests, deaths))
    event(f"WAN fetches a key: {max(site.fetches.values(), default=0)}")


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), _requests, st.integers(1, 2))
def test_with_equal_lists_each_key_is_fetched_once(size, requests, slots):
    names = NAMES[:size]
    site = Site(names, [names] * size, slots, set(), 0.0, random.Random(1))
    run(lambda: _play(site, requests, []))
    assert set(site.fetches.values()) == {1}


def test_the_model_notices_a_circle(monkeypatch):
    """Where a node may make anybody fetch, two nodes with unlike lists wait for each other."""

    def anybody(key, node, members, *, immutable):
        del key, immutable
        for name in members:
            if name != node:
                yield Step(Source.ASK, (name,))
        yield Step(Source.WAN)

    monkeypatch.setitem(globals(), "steps", anybody)
    site = Site(NAMES[:2], [NAMES[:2]] * 2, 1, set(), 0.0, random.Random(1))
    with pytest.raises(Stuck):
        run(lambda: _play(site, [(0, 0, 0.0), (1, 0, 0.0)], []))
