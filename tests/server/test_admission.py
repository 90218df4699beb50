"""Who may connect, and the counts behind it."""

import os

import pytest
from harness.private import private_counters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gup.cache.fair_shares import FairShares, Shared, networks_of, shares_file
from gup.config import PRIVATE_NETWORKS, Settings
from gup.server.admission import Admission


@pytest.fixture
def make():
    fd, made = shares_file(3), []

    def make(column):
        made.append(FairShares(fd, column))
        return made[-1].counts[Shared.CONNECTIONS]

    yield make
    for addresses in made:
        addresses.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("127.0.0.1", True),
        ("10.255.0.1", True),
        ("172.31.255.255", True),
        ("172.32.0.0", False),
        ("192.168.4.4", True),
        ("169.254.9.9", True),
        ("8.8.8.8", False),
        ("::1", True),
        ("fd00::17", True),
        ("fe80::1%eth0", True),
        ("2001:db8::1", False),
        ("::ffff:10.1.2.3", True),
        ("::ffff:8.8.8.8", False),
    ],
)
def test_by_default_the_sites_own_networks_are_allowed(address, allowed):
    assert networks_of(PRIVATE_NETWORKS)(address) is allowed


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 30)), max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_the_count_is_never_too_low_and_ends_at_nothing(make, steps):
    workers = [make(n) for n in range(3)]
    open_now = []
    for come, worker, host in steps:
        address = f"10.0.0.{host}"
        if come:
            open_now.append((worker, address))
            assert workers[worker].add(address) >= sum(a == address for _, a in open_now)
        elif (worker, address) in open_now:
            open_now.remove((worker, address))
            workers[worker].remove(address)
    for worker, address in open_now:
        workers[worker].remove(address)
    assert not any(any(worker._column) for worker in workers)


def test_descriptors_limit_as_well(make):
    own, counters = Settings.model_validate({"listen": {"max_connections": 100}}), private_counters()
    connections = lambda: counters.get("gup_client_connections")  # noqa: E731
    door = Admission(own, counters, make(0), connections, most_here=3)
    assert [door.admit("10.0.0.1", lambda: False) for _ in range(4)] == [True, True, True, False]
