"""The small form: what must hold for any site, and that the same seed is the same day."""

import pytest

from simulation.day import HOUR, Day
from simulation.run import table
from simulation.site import Loss, Site, catch_up_seconds

RATE, LINK = 20_000_000, 125_000_000
DAY = Day(3000, seed=1)
LOSS = Loss("gup-2", 8 * HOUR + HOUR // 2, 10 * HOUR)


def site(nodes, loss=None, link=LINK):
    return Site(DAY, nodes, rate=RATE, link=link, loss=loss).run()


def test_the_day_has_what_the_field_has():
    requests = list(DAY.requests())
    assert len(requests) == len(DAY) > 3 * DAY.clients
    assert [request.second for request in requests] == sorted(request.second for request in requests)
    assert max(request.client for request in requests) == DAY.clients - 1
    assert {request.key for request in requests} == set(range(len(DAY.keys)))
    fulls = sum(DAY.keys[request.key].endswith("full.zip") for request in requests) / DAY.clients
    assert 0.1 < fulls < 0.3, "one client of twenty needs the fulls of its four streams"


@pytest.mark.parametrize("nodes", [1, 2, 5, 16])
def test_each_key_crosses_the_wan_once_and_each_node_gets_one_copy(nodes):
    found = site(nodes)
    assert found.wan_bytes == sum(DAY.sizes)
    assert set(found.wan_fetches.values()) == {1}
    assert found.lan_bytes <= (nodes - 1) * found.wan_bytes
    assert found.wan_bytes <= found.alone_bytes <= found.wan_bytes + found.lan_bytes
    assert sum(found.sent().values()) == found.client_bytes + found.lan_bytes
    assert found.busiest() >= 1.0


@pytest.mark.parametrize("nodes", [2, 5, 16])
def test_a_node_that_dies_and_comes_back_empty_costs_the_wan_what_it_alone_had(nodes):
    without, with_ = site(nodes), site(nodes, LOSS)
    assert with_.client_bytes == without.client_bytes, "each client is served"
    again = {key for key, count in with_.wan_fetches.items() if count > 1}
    assert with_.wan_bytes == without.wan_bytes + sum(DAY.sizes[key] for key in again)
    assert sum(DAY.sizes[key] for key in again) <= 0.1 * without.wan_bytes
    assert sum(node.offered[at] for node in [with_.nodes["gup-2"]] for at in range(3060, 3600)) == 0


def test_links_that_are_too_slow_are_caught_up_with_later():
    wide, narrow = LINK, LINK // 40
    assert catch_up_seconds(site(4, link=wide), site(4, LOSS, link=wide), LOSS) == 0
    assert catch_up_seconds(site(4, link=narrow), site(4, LOSS, link=narrow), LOSS) > 60


def test_the_same_seed_gives_the_same_table():
    first, second = (table(500, [2, 3], 7, LINK, 0.05) for _ in range(2))
    assert first == second != table(500, [2, 3], 8, LINK, 0.05)
    assert first.count("\n") == 3
