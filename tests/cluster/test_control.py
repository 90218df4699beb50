"""The controller's part in a cluster, with a real engine and real probes: who is listed, who is asked."""

import asyncio
import contextlib
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from cluster.nodes import RATE, SECRET, UPSTREAM, Node, Valkey, until
from harness.content import MONIKER

from gup.cache.revision_holds import keep_holds
from gup.cluster.beat import EngineError
from gup.cluster.member_list import Member, Members
from gup.cluster.orders import Order
from gup.control.order_book import OrderBook


@pytest.fixture
async def cluster(valkey):
    """`await cluster("a", "b")`: nodes that run; what is given by name goes to each."""
    made = []

    async def start(*names, **how):
        nodes = [Node(name, valkey.port, **how) for name in names]
        made.extend(nodes)
        for node in nodes:
            await node.start()
        return nodes

    yield start
    for node in made:
        await node.die()


def all_ask_all(nodes):
    names = {node.name for node in nodes}
    return lambda: all(node.asks == node.lists == names - {node.name} for node in nodes)


async def beats(nodes, count=4):
    """So many more beats of each have been answered."""
    goals = [(node, node.control.beats + count) for node in nodes]
    await until(lambda: all(node.control.beats >= goal for node, goal in goals), "beats")


async def test_nodes_find_each_other_and_share_the_rate(cluster):
    nodes = await cluster("a", "b", "c")
    await until(all_ask_all(nodes), "all ask all")
    for node in nodes:
        assert node.published.node == node.name
        assert node.published.most == node.most == 3
        assert node.alarms == {}
    await beats(nodes)
    assert sum(node.share for node in nodes) <= RATE
    b, c = nodes[0].control.membership.peers()
    assert (nodes[0].control.own.name, b.name, c.name) == ("a", "b", "c")
    assert b.row.totals == {"gup_requests_total": 5}


async def test_the_list_is_published_only_when_it_has_changed(cluster):
    nodes = await cluster("a", "b")
    await until(all_ask_all(nodes), "both ask each other")
    before = [node.epoch for node in nodes]
    await beats(nodes, 10)
    assert [node.epoch for node in nodes] == before


async def test_the_share_goes_where_the_demand_is_and_is_told_at_once(cluster):
    one, two = nodes = await cluster("a", "b")
    await until(all_ask_all(nodes), "both ask each other")
    one.waiting = frozenset({1})
    await until(lambda: one.share >= 0.98 * RATE, "the one that waits has it")
    assert two.share <= 0.01 * RATE
    two.waiting = frozenset({0})
    await until(lambda: two.share >= 0.98 * RATE, "urgent content goes first")
    assert sum(node.share for node in nodes) <= RATE + 2
    two.waiting, one.waiting = frozenset({1}), frozenset({1})
    await until(
        lambda: abs(one.share - two.share) <= 2 and one.share > 0.49 * RATE, "equal where both want it"
    )


async def test_a_killed_engine_changes_no_list_and_an_empty_one_is_filled_again(cluster, valkey):
    nodes = await cluster("a", "b", "c")
    await until(all_ask_all(nodes), "all ask all")
    epochs = [node.epoch for node in nodes]
    valkey.kill()
    await until(lambda: all("engine-away" in node.alarms for node in nodes), "an alarm says so")
    probes = [len(node.probed_by) for node in nodes]
    await until(
        lambda: all(len(node.probed_by) >= before + 6 for node, before in zip(nodes, probes, strict=True)),
        "longer than member_timeout, they answer each other",
    )
    assert all_ask_all(nodes)()
    assert [node.rate() for node in nodes] == [RATE // 3] * 3, "equal parts"
    assert [node.epoch for node in nodes] == epochs
    valkey.start()
    await beats(nodes)
    assert all_ask_all(nodes)()
    assert [node.alarms for node in nodes] == [{}] * 3
    assert sum(node.rate() for node in nodes) <= RATE
    assert [node.epoch for node in nodes] == epochs


async def test_an_emptied_engine_changes_no_list(cluster, valkey):
    nodes = await cluster("a", "b")
    await until(all_ask_all(nodes), "both ask each other")
    epochs = [node.epoch for node in nodes]
    with valkey.client() as client:
        for _ in range(5):
            client.flushall()
            client.script_flush()
            await beats(nodes, 2)
            assert sum(node.rate() for node in nodes) <= RATE
    assert [node.epoch for node in nodes] == epochs
    assert all_ask_all(nodes)()


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.long)])
async def test_a_paused_engine_changes_no_list(cluster, valkey, seconds):
    nodes = await cluster("a", "b", "c")
    await until(all_ask_all(nodes), "all ask all")
    epochs = [node.epoch for node in nodes]
    with valkey.paused():
        await asyncio.sleep(seconds)
        assert all("engine-away" in node.alarms for node in nodes)
        assert [node.rate() for node in nodes] == [RATE // 3] * 3
    await beats(nodes)
    assert [node.epoch for node in nodes] == epochs
    assert [node.alarms for node in nodes] == [{}] * 3


async def test_a_dead_node_is_no_longer_asked_at_once_and_leaves_the_list_after_its_time(cluster):
    one, two, three = nodes = await cluster("a", "b", "c")
    await until(all_ask_all(nodes), "all ask all")
    one.waiting = three.waiting = frozenset({1})
    await until(lambda: three.share > 0.4 * RATE, "both have a half")
    await three.die()
    await until(lambda: one.asks == {"b"} and one.share >= 0.98 * RATE, "not asked, and its share is free")
    await until(lambda: (one.lists, two.lists) == ({"b"}, {"a"}), "off the list")
    assert one.alarms == {}
    assert one.most == 3, "for ten minutes, should the engine be lost"


async def test_a_node_that_leaves_is_off_the_list_with_its_next_beat(cluster):
    one, two = nodes = await cluster("a", "b", timeout="1h")
    await until(all_ask_all(nodes), "both ask each other")
    two.control.leave()
    await until(lambda: one.lists == set(), "gone")
    assert two.asks == {"a"}, "it still asks while it drains"
    assert one.alarms == {}


async def test_a_member_that_can_not_be_reached_from_here_is_passed_over_here_alone(cluster):
    one, two, three = nodes = await cluster("a", "b", "c")
    await until(all_ask_all(nodes), "all ask all")
    two.refuses.add("a")
    await until(lambda: one.asks == {"c"}, "passed over")
    assert one.lists == {"b", "c"}
    assert three.asks == {"a", "b"}
    assert "a can't reach b at http://127.0.0.1:" in one.alarms["member-unreachable"]
    assert "not signed by b" in one.alarms["member-unreachable"]
    two.refuses.clear()
    await until(lambda: one.asks == {"b", "c"} and not one.alarms, "asked again")


async def test_a_member_that_is_not_ready_is_not_asked(cluster):
    one, two = nodes = await cluster("a", "b")
    await until(all_ask_all(nodes), "both ask each other")
    two.ready = False
    await until(lambda: one.asks == set(), "not asked")
    assert one.lists == {"b"}


async def test_members_with_other_upstreams_are_not_asked_until_they_have_the_same(cluster):
    one, two = nodes = await cluster("a", "b")
    await until(all_ask_all(nodes), "both ask each other")
    two.upstreams = [UPSTREAM.model_copy(update={"url": "http://other:8014"})]
    two.control.apply()
    await until(lambda: not one.asks and not two.asks, "neither asks the other")
    assert one.lists == {"b"}
    assert one.alarms["member-unlike"] == "a does not ask b: its upstreams differ"
    one.upstreams = two.upstreams
    one.control.apply()
    await until(all_ask_all(nodes), "the same again")


async def test_of_two_nodes_with_one_name_the_later_stays_alone_until_the_earlier_is_gone(cluster):
    first, other = await cluster("same", "b")
    await until(all_ask_all([first, other]), "they ask each other")
    (second,) = await cluster("same")
    await until(lambda: "name-taken" in second.alarms, "an alarm")
    assert second.published.others == ()
    assert second.rate() <= RATE // 100
    assert other.lists == {"same"}
    assert dict(other.published.askable)["same"] == first.settings.address
    await first.die()
    await until(lambda: second.asks == {"b"}, "its turn")
    await until(lambda: other.published.askable == {"same": second.settings.address}, "seen by the other")
    assert second.alarms == {}


async def test_a_row_that_is_not_signed_with_the_sites_secret_is_ignored_and_counted(cluster):
    (one,) = await cluster("a")
    (forged,) = await cluster("b", secret=b"x" * 20)
    await until(lambda: "row-forged" in one.alarms and "row-forged" in forged.alarms, "counted")
    assert one.lists == forged.lists == set()
    assert forged.probed_by == one.probed_by == []


async def test_a_row_that_stands_under_another_name_is_ignored(cluster, valkey):
    one, two = nodes = await cluster("a", "b")
    await until(all_ask_all(nodes), "both ask each other")
    with valkey.client() as client:
        row = client.get("gup:{lyon}:members:b")
        client.zadd("gup:{lyon}:members", {"c": 9e15})
        client.set("gup:{lyon}:members:c", row)
    await until(lambda: one.control.forged and two.control.forged, "seen by both")
    assert one.lists == {"b"}


async def test_another_secret_comes_in_without_a_pause(cluster):
    one, two = nodes = await cluster("a", "b")
    await until(all_ask_all(nodes), "both ask each other")
    epochs, new = [node.epoch for node in nodes], b"another-secret-of-it"
    for keys in ((SECRET, new), (new, SECRET), (new,)):
        for node in nodes:
            node.signer = type(node.signer)("lyon", keys)
            await beats(nodes)
            await asyncio.sleep(0)
    assert [node.epoch for node in nodes] == epochs
    assert one.control.forged == two.control.forged == 0


@pytest.mark.parametrize("orders", [None, b"", b"\xff no orders\n", "folder"])
async def test_what_is_purged_and_on_hold_stays_so_when_the_orders_are_lost(tmp_path, orders):
    before = OrderBook(tmp_path, "a", time.time, lambda: None)
    kept = []
    before.keep_holds = lambda holds, _: asyncio.to_thread(kept.append, keep_holds(tmp_path, holds))
    await before.issue("purge", {"pattern": "*"})
    stream = {"stream": MONIKER, "except_subnets": []}
    for action, revision in (("hold", "1"), ("hold", "2"), ("release", "2")):
        await before.issue(action, stream | {"revision": revision, "by": "ann", "reason": ""})
    other = Order("b", 17, 0, time.time(), "purge", {"pattern": "b*"})
    assert await before.take([other])
    (tmp_path / "orders").unlink()
    if orders == "folder":
        (tmp_path / "orders").mkdir()
    elif orders is not None:
        (tmp_path / "orders").write_bytes(orders)
    after = OrderBook(tmp_path, "a", time.time, lambda: None)
    with contextlib.suppress(OSError):  # then it can't be noted, and holds in this run
        await after.open()
    found = {
        (order.action, order.what.get("pattern", order.what.get("revision"))) for order in after.log.orders
    }
    assert found == {("purge", "*"), ("purge", "b*"), ("hold", "1")}


async def test_orders_that_the_secret_of_before_has_signed_are_signed_anew(cluster, valkey, tmp_path):
    """And are no forgeries."""
    book = OrderBook(tmp_path, "a", time.time, lambda: None)
    (one,) = await cluster("a", book=book)
    await book.issue("purge", {"pattern": "*"})

    def signed_with(signer):
        with valkey.client() as client:
            texts = [fields["order"] for _, fields in client.xrange("gup:{lyon}:orders")]
        return [signer.unseal("order", text) is not None for text in texts] == [True]

    await until(lambda: signed_with(one.signer), "the engine has it")
    one.signer = type(one.signer)("lyon", (b"another-secret-of-it",))
    one.control.hear_of_orders("nobody")  # so that it looks at once
    await until(lambda: signed_with(one.signer), "signed anew")
    assert one.control.forged == 0


async def test_a_jump_of_the_engines_clock_is_used_when_the_others_must_have_seen_it(cluster, monkeypatch):
    one, two = nodes = await cluster("a", "b")
    await until(all_ask_all(nodes), "both ask each other")
    engine = one.control._engine
    honest, known = engine.beat, one.offset

    async def jumped(*given, **named):
        beat = await honest(*given, **named)
        return replace(beat, time_ms=beat.time_ms - 3_600_000)

    monkeypatch.setattr(engine, "beat", jumped)
    await until(lambda: one.accepted_offset, "it has seen the jump")
    probes = two.probed_by.count("a")
    await until(lambda: two.probed_by.count("a") > probes, "it asks the one that has not")
    assert two.refused_times == 0
    assert one.offset == known
    assert abs(one.accepted_offset - known + 3_600_000) < 1000


async def test_a_wrong_password_is_told_without_it_and_the_gup_serves_alone(tmp_path):
    valkey, password = Valkey(tmp_path / "valkey"), tmp_path / "password"
    with valkey.client() as client:
        client.config_set("requirepass", "right-password")
    password.write_text("wrong-password\n")
    one = Node("a", valkey.port, password_file=str(password))
    await one.start()
    try:
        await until(lambda: "engine-away" in one.alarms, "an alarm")
        text = one.alarms["engine-away"]
        assert "WRONGPASS" in text or "invalid" in text
        assert "password\n" not in text
        assert "wrong-password" not in text
        assert one.lists == set()
        await one.die()
        password.write_text("right-password\n")
        one = Node("a", valkey.port, password_file=str(password))
        await one.start()
        await until(lambda: one.share > 0, "with the right one")
    finally:
        await one.die()
        valkey.kill()


async def test_without_an_engine_a_start_finds_the_members_of_before(cluster, valkey):
    one, two = nodes = await cluster("a", "b")
    await until(all_ask_all(nodes), "both ask each other")
    valkey.kill()
    known = Members(
        "c", (Member("a", one.settings.address, True), Member("gone", "http://127.0.0.1:9", True)), most=3
    )
    (three,) = await cluster("c", known=known)
    assert three.rate() <= RATE // 100, "nothing is known yet"
    await until(lambda: three.asks == {"a"} and three.lists == {"a"}, "who answers")
    await until(lambda: three.rate() == RATE // 3, "its part")
    assert three.offset, "a member told the engine's time"
    assert two.lists == {"a"}


# --- the rate, watched all the time


@asynccontextmanager
async def watched(nodes):
    """The most that all nodes together used, looked at every few milliseconds; and the least."""
    seen = []

    async def watch():
        while True:
            seen.append(sum(node.rate() for node in nodes))
            await asyncio.sleep(0.004)

    task = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def swap(nodes, times):
    """All demand goes from one node to the next, and on."""
    for turn in range(times):
        for number, node in enumerate(nodes):
            node.waiting = frozenset({1}) if number == turn % len(nodes) else frozenset()
        await asyncio.sleep(0.4)


@pytest.mark.parametrize("times", [5, pytest.param(25, marks=pytest.mark.long)])
async def test_the_sum_of_shares_is_never_above_the_rate_while_demand_moves(cluster, times):
    nodes = await cluster("a", "b", "c")
    await until(all_ask_all(nodes), "all ask all")
    await beats(nodes)
    async with watched(nodes) as seen:
        await swap(nodes, times)
    assert max(seen) <= RATE + len(nodes)


async def test_the_sum_is_never_above_the_rate_when_the_engine_goes_and_comes(cluster, valkey):
    nodes = await cluster("a", "b", "c")
    await until(all_ask_all(nodes), "all ask all")
    nodes[0].waiting = frozenset({1})
    await until(lambda: nodes[0].share >= 0.97 * RATE, "one has it all")
    async with watched(nodes) as seen:
        with valkey.paused():
            await until(lambda: sum(node.rate() for node in nodes) == RATE // 3 * 3, "equal parts")
        await until(lambda: nodes[0].share >= 0.97 * RATE, "as before")
        valkey.kill()
        await until(lambda: sum(node.rate() for node in nodes) == RATE // 3 * 3, "equal parts")
        valkey.start()
        await until(lambda: nodes[0].share >= 0.97 * RATE, "as before")
    assert max(seen) <= RATE + len(nodes)


async def test_a_node_that_loses_the_engine_alone_has_its_part_and_the_others_leave_it(cluster, monkeypatch):
    one, two, three = nodes = await cluster("a", "b", "c")
    await until(all_ask_all(nodes), "all ask all")
    one.waiting = two.waiting = frozenset({1})
    await until(lambda: abs(one.share - two.share) < 10, "halves")

    async def lost(*_, **__):
        raise EngineError("the cable is broken")

    async with watched(nodes) as seen:
        with monkeypatch.context() as broken:
            broken.setattr(three.control._engine, "beat", lost)
            await until(lambda: three.rate() == RATE // 3, "its part")
            assert one.rate() + two.rate() == pytest.approx(RATE * 2 // 3, abs=RATE // 50)
            assert one.asks == {"b", "c"}, "it answers, so it stays"
        await until(lambda: three.share < RATE // 10 and one.share + two.share > 0.97 * RATE, "as before")
    assert max(seen) <= RATE + len(nodes)


async def test_whoever_has_been_a_member_is_counted_in_the_same_place_for_good(cluster):
    (a,) = await cluster("a", known=Members("a", slots=("x", "c")))
    nodes = [a, *await cluster("b", "c")]
    await until(all_ask_all(nodes), "all ask all")
    assert a.published.slots == ("x", "c", "b")
