"""Upstreams that break off, hang, die or come back as another: attached clients notice nothing or are cut."""

import contextlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.swarm import Client, End, Swarm, body_digest
from harness.trees import BIG, zip_of
from harness.waiting import until

LENGTH = 6_000_000
HALF = LENGTH // 2
MEGABYTE = 1_000_000
CLIENTS = 100
SEED = os.environ.get("GUP_TEST_SEED", "1")
LONG = pytest.mark.long
OVERLAP_BYTES = 64 * 1024
QUICK = {
    "connect_timeout": "500ms",
    "read_timeout": "3s",
    "give_up": "1s",
    "health_interval": "0s",
}


@dataclass
class Site:
    gup: Gup
    swarm: Swarm

    def received(self, **labels: str) -> float:
        return self.gup.metric("gup_upstream_received_bytes_total", **labels)


@contextlib.contextmanager
def site(folder, upstreams: Sequence[ScriptedUpstream], **each: str) -> Iterator[Site]:
    """A service of two workers before these upstreams, the first preferred."""
    tables = [
        {"name": f"u{number}", "url": upstream.url, "priority": number, **QUICK, **each}
        for number, upstream in enumerate(upstreams)
    ]
    with (
        Gup(folder / "cache", settings={"upstream": tables, "cache": {"error_ttl": "100ms"}}) as gup,
        Swarm(gup.data) as swarm,
    ):
        yield Site(gup, swarm)


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
def test_a_hundred_clients_get_the_whole_body_however_often_upstream_fails(tmp_path, fault, read_timeout):
    body = zip_of("faults", LENGTH)
    with ScriptedUpstream() as upstream, site(tmp_path, [upstream], read_timeout=read_timeout) as at:
        upstream.answer(BIG, Answer(body, etag='"a"', **fault))
        clients = at.swarm.add(CLIENTS, BIG)
        at.swarm.wait(30)
        assert_all_right(clients, body)
        asked = upstream.requests(BIG)
        (piece_bytes,) = fault.values()
        assert len(asked) == -(-(LENGTH - piece_bytes) // (piece_bytes - OVERLAP_BYTES)) + 1
        assert [seen.header("if-range") for seen in asked[1:]] == ['"a"'] * (len(asked) - 1)
        assert upstream.body_bytes(BIG) <= 1.10 * LENGTH
        assert at.received() == upstream.body_bytes(BIG)
        at.gup.wait_stored("full.zip")
        assert at.gup.get(BIG).body == body


@dataclass(frozen=True)
class Death:
    """The first upstream died for good at HALF; the clients' fate is in the second one's hands."""

    site: Site
    second: ScriptedUpstream
    clients: list[Client]
    body: bytes


@contextlib.contextmanager
def death(folder, answer: Answer, *more: Answer) -> Iterator[Death]:
    """All clients have the half when the first upstream goes; `answer` is the second's, `more` of others."""
    body, gate = zip_of("faults", LENGTH), Gate()
    with contextlib.ExitStack() as stack:
        first = ScriptedUpstream()
        stack.callback(first.stop)
        first.answer(BIG, Answer(body, etag='"1"', gates=((HALF, gate),), reset_at=HALF))
        others = [stack.enter_context(ScriptedUpstream()) for _ in (answer, *more)]
        for other, its in zip(others, (answer, *more), strict=True):
            other.answer(BIG, its)
        at = stack.enter_context(site(folder, [first, *others]))
        clients = at.swarm.add(CLIENTS, BIG)
        gate.wait_reached()
        at.swarm.wait_for(lambda: all(c.body_bytes == HALF for c in clients), "all have the half", 15)
        first._listener.close()  # before the gate opens: nobody gets through to it again
        gate.open()
        first.stop()
        at.swarm.wait(30)
        yield Death(at, others[0], clients, body)


def test_a_second_upstream_with_other_validators_and_the_same_bytes_goes_on(tmp_path):
    with death(tmp_path, Answer(zip_of("faults", LENGTH), etag='"2"')) as after:
        assert_all_right(after.clients, after.body)
        (resumed,) = after.second.requests(BIG)
        assert (resumed.status, resumed.body_bytes) == (206, HALF + OVERLAP_BYTES)
        metrics = after.site.gup.metrics()
        assert metrics("gup_fill_resumes_total", reason="failover") == 1
        assert metrics("gup_upstream_wasted_bytes_total", reason="overlap") == OVERLAP_BYTES


def test_a_second_upstream_that_ignores_ranges_is_compared_from_its_first_byte(tmp_path):
    with death(tmp_path, Answer(zip_of("faults", LENGTH), etag='"2"', ranges=False)) as after:
        assert_all_right(after.clients, after.body)
        (resumed,) = after.second.requests(BIG)
        assert (resumed.status, resumed.body_bytes) == (200, LENGTH)
        assert after.site.gup.metric("gup_upstream_wasted_bytes_total", reason="overlap") == HALF


@pytest.mark.parametrize("ranges", [True, pytest.param(False, marks=LONG)], ids=["206", "200"])
def test_a_second_upstream_with_other_bytes_cuts_the_clients_and_is_fetched_anew(tmp_path, ranges):
    other = zip_of("another file", LENGTH)
    with death(tmp_path, Answer(other, etag='"2"', ranges=ranges)) as after:
        assert_cut_and_never_mixed(after.clients, after.body, HALF)
        gup = after.site.gup
        again = after.site.swarm.add(CLIENTS, BIG)
        after.site.swarm.wait(20, again)
        assert_all_right(again, other)
        assert {c.fields["etag"] for c in again}.isdisjoint({c.fields["etag"] for c in after.clients})
        gup.wait_stored("full.zip")
        until(lambda: not gup.parts(), "the part of other bytes is gone")
        assert gup.get(BIG).body == other


@pytest.mark.parametrize(
    "difference", [pytest.param(-100_000, marks=LONG), 100_000], ids=["shorter", "longer"]
)
def test_an_upstream_that_lies_about_the_total_is_passed_over(tmp_path, difference):
    body = zip_of("faults", LENGTH)
    liar = body[:difference] if difference < 0 else body + bytes(difference)
    with death(tmp_path, Answer(liar, etag='"2"'), Answer(body, etag='"3"')) as after:
        assert_all_right(after.clients, after.body)
        (lied,) = after.second.requests(BIG)
        assert lied.status == 206
        metrics = after.site.gup.metrics()
        assert metrics("gup_upstream_received_bytes_total", upstream="u2") == HALF + OVERLAP_BYTES


def test_a_liar_alone_cuts_the_clients_and_nothing_of_it_is_kept(tmp_path):
    """Nobody else is left: what it has does not end as a ZIP file. When it tells the truth, that is had."""
    body = zip_of("faults", LENGTH)
    with death(tmp_path, Answer(body[:-100_000], etag='"2"')) as after:
        assert_cut_and_never_mixed(after.clients, after.body, HALF)
        gup = after.site.gup
        response = gup.get(BIG)
        assert (response.status, response.complete) != (200, True)
        assert not gup.stored("full.zip")
        after.second.answer(BIG, Answer(body, etag='"3"'))
        assert until(lambda: _answered(gup), "the failure has passed", 5) == body


def _answered(gup: Gup) -> bytes:
    response = gup.get(BIG)
    return response.body if response.status == 200 and response.complete else b""


@LONG
@pytest.mark.timeout(120)
@pytest.mark.parametrize("round_", range(8))
def test_any_mixture_of_faults_of_two_upstreams_with_the_same_bytes(tmp_path, round_):
    """Random: every answer of either breaks off somewhere, hangs, is refused, or ignores the range."""
    chance = random.Random(f"{SEED} {round_}")
    body = zip_of("faults", LENGTH)

    def fault(etag: str) -> Answer:
        return chance.choice(
            [
                Answer(body, etag=etag, cut_after=chance.randrange(1, LENGTH)),
                Answer(body, etag=etag, reset_at=chance.randrange(1, LENGTH)),
                Answer(body, etag=etag, stall_after=chance.randrange(1, LENGTH)),
                Answer(body, etag=etag, ranges=False, cut_after=chance.randrange(1, LENGTH)),
                Answer(b"busy", 503),
                Answer(body, etag=etag, reset_at=-1),
            ]
        )

    with (
        ScriptedUpstream() as first,
        ScriptedUpstream() as second,
        site(tmp_path, [first, second], read_timeout="500ms") as at,
    ):
        first.answer(BIG, *(fault('"1"') for _ in range(12)), Answer(body, etag='"1"'))
        second.answer(BIG, *(fault('"2"') for _ in range(12)), Answer(body, etag='"2"'))
        right = 0
        deadline = time.monotonic() + 45
        while not right and time.monotonic() < deadline:
            clients = at.swarm.add(20, BIG)
            at.swarm.wait(40, clients)
            for client in clients:
                if client.status == 200:
                    assert client.digest == body_digest(body[: client.body_bytes])
                    assert (client.end is End.COMPLETE) is (client.body_bytes == LENGTH), client
                    right += client.end is End.COMPLETE
                else:
                    assert (client.status, client.end) in ((502, End.COMPLETE), (504, End.COMPLETE)), client
        assert right, "nobody ever got it, though both upstreams are right in the end"
        at.gup.wait_stored("full.zip")
        assert at.gup.get(BIG).body == body
