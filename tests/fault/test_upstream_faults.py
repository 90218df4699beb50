"""Upstreams that break off, hang, die or come back as another: attached clients notice nothing or are cut."""

import os
import random
import time
from dataclasses import dataclass

import pytest
from harness.clients import Client, End, body_digest
from harness.content import BIG, zip_of
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer, Gate, ScriptedUpstream

LENGTH = 6_000_000
HALF = LENGTH // 2
MEGABYTE = 1_000_000
CLIENTS = 100
BODY = zip_of("faults", LENGTH)
SEED = os.environ.get("GUP_TEST_SEED", "1")
LONG = pytest.mark.long
OVERLAP_BYTES = 64 * 1024
QUICK = {"connect_timeout": "5s", "read_timeout": "3s", "give_up": "1s", "health_interval": "0s"}
SOON = {"error_ttl": "100ms"}


def assert_all_right(clients: list[Client], body: bytes) -> None:
    """Each had the whole body over its one connection: a client of the swarm never connects again."""
    assert {(client.end, client.status) for client in clients} == {(End.COMPLETE, 200)}
    assert {client.digest for client in clients} == {body_digest(body)}
    assert len({client.fields["etag"] for client in clients}) == 1


def assert_cut_and_never_mixed(clients: list[Client], body: bytes, most_bytes: int) -> None:
    """Each has a beginning of `body`, was told that there should be more, and no byte of anything else."""
    for client in clients:
        assert client.end in (End.CUT, End.RESET), client
        assert client.body_bytes <= most_bytes
        assert client.digest == body_digest(body[: client.body_bytes])


@pytest.mark.parametrize(
    ("fault", "read_timeout"),
    [({"cut_after": MEGABYTE}, "3s"), ({"stall_after": 2 * MEGABYTE}, "500ms")],
    ids=["cut after every MB", "hangs"],
)
def test_a_hundred_clients_get_the_whole_body_however_often_upstream_fails(serve, fault, read_timeout):
    each = QUICK | {"read_timeout": read_timeout}
    gup, upstream = serve({BIG: Answer(BODY, etag='"a"', **fault)}, each=each, cache=SOON)
    swarm = gup.swarm()
    clients = swarm.add(CLIENTS, BIG)
    swarm.wait()
    assert_all_right(clients, BODY)
    asked = upstream.requests(BIG)
    ((name, piece_bytes),) = fault.items()
    assert len(asked) == -(-(LENGTH - piece_bytes) // (piece_bytes - OVERLAP_BYTES)) + 1
    assert [seen.header("if-range") for seen in asked[1:]] == ['"a"'] * (len(asked) - 1)
    assert upstream.body_bytes(BIG) <= 1.10 * LENGTH
    metrics, reason = gup.metrics(), "cut" if name == "cut_after" else "timeout"
    assert metrics("gup_upstream_received_bytes_total") == upstream.body_bytes(BIG)
    assert metrics("gup_fill_resumes_total", reason=reason) == len(asked) - 1
    gup.wait_stored(BIG)
    gup.serves(BIG, BODY)


@dataclass(frozen=True)
class Death:
    """The first upstream died for good at HALF; the clients' fate is in the second one's hands."""

    gup: Gup
    second: ScriptedUpstream
    clients: list[Client]


@pytest.fixture
def death(serve):
    """All clients have the half when the first upstream goes; `answer` is the second's, `more` of others."""

    def die(*answers: Answer) -> Death:
        others, gate = [ScriptedUpstream() for _ in answers], Gate()
        for other, its in zip(others, answers, strict=True):
            other.answer(BIG, its)
        mortal = Answer(BODY, etag='"1"', gates=((HALF, gate),), reset_at=HALF)
        gup, first = serve({BIG: mortal}, each=QUICK, behind=others, cache=SOON)
        swarm = gup.swarm()
        clients = swarm.add(CLIENTS, BIG)
        gate.wait_reached()
        swarm.reach(HALF, clients)
        first.refuse()  # before the gate opens: nobody gets through to it again
        gate.open()
        first.stop()
        swarm.wait(clients)
        return Death(gup, others[0], clients)

    return die


@pytest.mark.parametrize(("ranges", "wasted"), [(True, OVERLAP_BYTES), (False, HALF)], ids=["206", "200"])
def test_a_second_upstream_with_other_validators_and_the_same_bytes_goes_on(death, ranges, wasted):
    """One that ignores ranges is compared from its first byte."""
    after = death(Answer(BODY, etag='"2"', ranges=ranges))
    assert_all_right(after.clients, BODY)
    (resumed,) = after.second.requests(BIG)
    assert (resumed.status, resumed.body_bytes) == ((206 if ranges else 200), HALF + wasted)
    metrics = after.gup.metrics()
    assert metrics("gup_fill_resumes_total", reason="failover") == 1
    assert metrics("gup_upstream_wasted_bytes_total", reason="overlap") == wasted


@pytest.mark.parametrize("ranges", [True, pytest.param(False, marks=LONG)], ids=["206", "200"])
def test_a_second_upstream_with_other_bytes_cuts_the_clients_and_is_fetched_anew(death, ranges):
    other = zip_of("another file", LENGTH)
    after = death(Answer(other, etag='"2"', ranges=ranges))
    assert_cut_and_never_mixed(after.clients, BODY, HALF)
    again = after.gup.swarm()
    again.add(CLIENTS, BIG)
    assert_all_right(again.wait(), other)
    assert {c.fields["etag"] for c in again.clients}.isdisjoint({c.fields["etag"] for c in after.clients})
    after.gup.wait_stored(BIG)
    until(lambda: not after.gup.parts(), "the part of other bytes is gone")
    after.gup.serves(BIG, other)


@pytest.mark.parametrize(
    "difference", [pytest.param(-100_000, marks=LONG), 100_000], ids=["shorter", "longer"]
)
def test_an_upstream_that_lies_about_the_total_is_passed_over(death, difference):
    liar = BODY[:difference] if difference < 0 else BODY + bytes(difference)
    after = death(Answer(liar, etag='"2"'), Answer(BODY, etag='"3"'))
    assert_all_right(after.clients, BODY)
    assert [seen.status for seen in after.second.requests(BIG)] == [206]
    received = after.gup.metric("gup_upstream_received_bytes_total", upstream="u2")
    assert received == HALF + OVERLAP_BYTES


def test_a_liar_alone_cuts_the_clients_and_nothing_of_it_is_kept(death):
    """Nobody else is left: what it has does not end as a ZIP file. When it tells the truth, that is had."""
    after = death(Answer(BODY[:-100_000], etag='"2"'))
    assert_cut_and_never_mixed(after.clients, BODY, HALF)
    response = after.gup.get(BIG)
    assert (response.status, response.complete) != (200, True)
    assert not after.gup.stored(BIG)
    after.second.answer(BIG, Answer(BODY, etag='"3"'))
    until(lambda: after.gup.get(BIG).body == BODY, "the failure has passed")


@LONG
@pytest.mark.parametrize("round_", range(8))
def test_any_mixture_of_faults_of_two_upstreams_with_the_same_bytes(serve, round_):
    """Random: every answer of either breaks off somewhere, hangs, is refused, or ignores the range."""
    chance = random.Random(f"{SEED} {round_}")

    def faults(etag: str) -> list[Answer]:
        at = chance.randrange(1, LENGTH)
        kinds = [{"cut_after": at}, {"reset_at": at}, {"stall_after": at}, {"ranges": False, "cut_after": at}]
        kinds += [{"status": 503}, {"reset_at": -1}]
        return [Answer(BODY, etag=etag, **chance.choice(kinds)) for _ in range(12)] + [
            Answer(BODY, etag=etag)
        ]

    second = ScriptedUpstream()
    second.answer(BIG, *faults('"2"'))
    each = QUICK | {"read_timeout": "500ms"}
    gup, _ = serve({BIG: faults('"1"')}, each=each, behind=[second], cache=SOON)
    swarm, right, deadline = gup.swarm(), 0, time.monotonic() + 45
    while not right and time.monotonic() < deadline:
        for client in swarm.wait(swarm.add(20, BIG)):
            if client.status == 200:
                assert client.digest == body_digest(BODY[: client.body_bytes])
                assert (client.end is End.COMPLETE) is (client.body_bytes == LENGTH), client
                right += client.end is End.COMPLETE
            else:
                assert (client.status, client.end) in ((502, End.COMPLETE), (504, End.COMPLETE)), client
    assert right, "nobody ever got it, though both upstreams are right in the end"
    gup.wait_stored(BIG)
    gup.serves(BIG, BODY)
