"""Clients behind a proxy that sends PROXY headers: reports, log, limits, and a change of processes."""

import re
import signal
import tomllib
from collections import Counter

import pytest
from harness.clients import RawConnection, proxy_header
from harness.content import BIG, DELTA, INDEX, noise, zip_of
from harness.processes import until
from harness.steady import Steady

BODIES = {BIG: zip_of("proxied", 2_000_000), DELTA: noise("d", 60_000), INDEX: noise("i", 3_000)}
LISTEN = {"proxy_protocol": ["127.0.0.1/32"]}
CLIENTS = ["10.0.0.7", "10.0.0.8", "fd00:1::9"]


@pytest.fixture
def gup(serve):
    gup, _ = serve(
        BODIES,
        listen=LISTEN,
        clients={"max_connections_per_address": 2},
        log={"access": "all"},
        workers={"count": 2},
        each={"health_interval": "0s"},
        env={"PYTHONDONTWRITEBYTECODE": "1"},  # a process that runs another program is one of its own
    )
    return gup


def behind(gup, client) -> RawConnection:
    """A connection of this client through the proxy."""
    connection = gup.connect()
    connection.send(proxy_header(client))
    return connection


def logged(gup) -> Counter[str]:
    """How often the access log names each client."""
    return Counter(re.findall(r"\bclient=(\S+)", gup.log))


def test_reports_log_and_limits_have_the_clients_own_addresses(gup):
    for client in CLIENTS:
        assert behind(gup, client).get(DELTA).body == BODIES[DELTA]
    assert [behind(gup, client).get(BIG).status for client in CLIENTS] == [200] * 3
    assert behind(gup, CLIENTS[0]).ended(), "it has two"
    gup.wait_metric(1, "gup_connections_refused_total", reason="address")
    seen = lambda: {row["address"] for row in gup.api("/api/v1/clients")[1]["clients"]}  # noqa: E731
    until(lambda: seen() == set(CLIENTS), "the report names them, and nobody else")
    until(lambda: logged(gup) == dict.fromkeys(CLIENTS, 2), "the log names them")


def test_idle_connections_keep_the_clients_address_when_other_processes_take_over(gup):
    kept = [behind(gup, client) for client in CLIENTS]
    assert [connection.get(DELTA).status for connection in kept] == [200] * 3
    before = gup.status()
    with Steady(gup.data, BODIES, lazy=2, first=proxy_header("10.9.9.9")) as others:
        gup.signal(signal.SIGUSR2)
        gup.wait_replaced(before, 2)
        until(lambda: len(gup.status()["workers"]) == 2, "the earlier processes have ended")
    assert others.failures == []
    assert [connection.get(DELTA).status for connection in kept] == [200] * 3
    until(lambda: {logged(gup)[client] for client in CLIENTS} == {2}, "the log names them")
    gup.wait_metric(3, "gup_client_connections")
    with behind(gup, CLIENTS[0]), behind(gup, CLIENTS[0]):
        gup.wait_metric(1, "gup_connections_refused_total", reason="address")


def test_a_reload_changes_whose_connections_begin_with_a_header(gup):
    assert gup.get(DELTA).status == 400
    settings = tomllib.loads((gup.folder / "gup.toml").read_text())
    gup.reload(**settings | {"listen": {"proxy_protocol": ["127.0.0.2/32"]}})
    until(lambda: gup.get(DELTA).status == 200, "connections from here are clients'")
    gup.wait_metric(0, "gup_client_connections")
    assert behind(gup, CLIENTS[0]).get(DELTA).status == 400
