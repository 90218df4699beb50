"""Who may connect, and the counts behind it."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gup.config import PRIVATE_NETWORKS, Settings
from gup.metrics import Counters
from gup.server.addresses import Addresses
from gup.server.admission import Admission, Gate
from gup.server.tally import Tally


@pytest.fixture
def make(tmp_path):
    made = []

    def make(column, columns, path=tmp_path / "addresses"):
        made.append(Addresses(path, column, columns))
        return made[-1]

    yield make
    for addresses in made:
        addresses.close()


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
    gate = Gate(PRIVATE_NETWORKS)
    assert gate.allows(address) is allowed
    assert gate.allows(address) is allowed  # as remembered


def test_connections_of_an_address_are_counted_over_workers(make):
    one, two = make(0, 2), make(1, 2)
    assert [one.come("10.0.0.1"), two.come("10.0.0.1"), one.come("10.0.0.1")] == [1, 2, 3]
    assert two.come("10.0.0.2") == 1
    one.gone("10.0.0.1")
    one.gone("10.0.0.1")
    assert two.come("10.0.0.1") == 2


def test_a_successor_forgets_what_the_killed_worker_counted(make):
    one, two = make(0, 2), make(1, 2)
    for _ in range(5):
        one.come("10.0.0.1")
    assert two.come("10.0.0.1") == 6
    make(0, 2)
    assert two.come("10.0.0.1") == 2


def test_without_the_file_each_worker_counts_alone(make, tmp_path, caplog):
    one, two = (make(n, 2, tmp_path / "none" / "addresses") for n in (0, 1))
    assert [one.come("::1"), two.come("::1"), one.come("::1")] == [1, 1, 2]
    assert "by each worker alone" in caplog.text


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 30)), max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_the_count_is_never_too_low_and_ends_at_nothing(make, steps):
    workers = [make(n, 3) for n in range(3)]
    open_now = []
    for come, worker, host in steps:
        address = f"10.0.0.{host}"
        if come:
            open_now.append((worker, address))
            assert workers[worker].come(address) >= sum(a == address for _, a in open_now)
        elif (worker, address) in open_now:
            open_now.remove((worker, address))
            workers[worker].gone(address)
    for worker, address in open_now:
        workers[worker].gone(address)
    assert not any(any(worker._column) for worker in workers)


def admission(make, tally, **limits):
    listen = {"max_connections": limits.pop("max_connections", 100)}
    return Admission(
        Settings.model_validate({"listen": listen, "clients": limits}),
        tally,
        make(0, 1),
        lambda: tally.words[tally.connections],
        most_here=3,
    )


def counted(tally):
    words = tally.words
    return {
        "in": words[tally.connections],
        "network": words[tally.refused_network],
        "limit": words[tally.refused_limit],
        "address": words[tally.refused_address],
    }


def test_each_refusal_is_counted_once_and_takes_no_place(make):
    tally = Tally(Counters.private())
    door = admission(make, tally, max_connections_per_address=2, max_connections=3)
    none = lambda: False  # noqa: E731
    assert not door.admit("8.8.8.8", none)
    assert [door.admit("10.0.0.1", none) for _ in range(3)] == [True, True, False]
    assert [door.admit(f"10.0.1.{n}", none) for n in range(2)] == [True, False]
    assert counted(tally) == {"in": 3, "network": 1, "limit": 1, "address": 1}
    door.left("10.0.0.1")
    assert door.admit("10.0.0.1", none)


def test_room_that_is_made_admits(make):
    tally = Tally(Counters.private())
    door = admission(make, tally, max_connections=1)
    assert door.admit("10.0.0.1", lambda: False)

    def make_room() -> bool:
        door.left("10.0.0.1")
        return True

    assert door.admit("10.0.0.2", make_room)
    assert counted(tally)["in"] == 1
    assert counted(tally)["limit"] == 0


def test_descriptors_limit_as_well(make):
    tally = Tally(Counters.private())
    door = admission(make, tally)
    assert [door.admit("10.0.0.1", lambda: False) for _ in range(4)] == [True, True, True, False]
