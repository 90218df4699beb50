"""The WAN's rate through real processes: kept over all workers, fair, urgent content first."""

import time

import pytest
from harness.scripted import Answer, ScriptedUpstream
from harness.service import Gup
from harness.swarm import Swarm
from harness.trees import content_path, noise
from harness.waiting import until

pytestmark = pytest.mark.alone

MB = 1_000_000


def full(number: int) -> str:
    return content_path("full.dax", revision=f"2608010{number:02}")


def service(tmp_path, upstream: ScriptedUpstream, settings: dict) -> Gup:
    return Gup(tmp_path / "cache", [upstream.url], settings=settings)


def received(gup: Gup) -> float:
    purposes = ("fill", "index", "bypass")
    metrics = gup.metrics()
    name = gup.status()["upstreams"][0]["name"]
    return sum(
        metrics("gup_upstream_received_bytes_total", upstream=name, purpose=purpose) for purpose in purposes
    )


def measured_rate(gup: Gup, seconds: float) -> float:
    """Bytes a second from upstream, between two looks at the metrics."""
    before, began = received(gup), time.monotonic()
    until(lambda: time.monotonic() - began >= seconds, "the time of the measurement", seconds + 5)
    amount, ended = received(gup) - before, time.monotonic()
    return amount / (ended - began)


@pytest.mark.parametrize(
    ("fills", "rate"),
    [
        pytest.param(1, 1_000_000, marks=pytest.mark.long),
        pytest.param(8, 2_000_000, marks=pytest.mark.long),
        (8, 100_000),
    ],
)
def test_the_rate_holds_over_all_workers(tmp_path, fills, rate):
    body = noise("wan", 30 * MB)
    with ScriptedUpstream() as upstream:
        for number in range(fills):
            upstream.answer(full(number), Answer(body, etag=f'"{number}"'))
        settings = {"wan": {"rate": rate}}
        with (
            Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup,
            Swarm(gup.data) as swarm,
        ):
            for number in range(fills):
                swarm.add(1, full(number))
            until(lambda: len(upstream.requests()) == fills, "all fills have begun")
            measured_rate(gup, 1.0)
            assert measured_rate(gup, 4.0) == pytest.approx(rate, rel=0.03)
            assert gup.metric("gup_bandwidth_limit_bytes_per_second", direction="upstream") == rate
            each = [seen.body_bytes for seen in upstream.requests()]
            assert max(each) - min(each) <= 0.25 * max(each) + 300_000


def test_a_delta_goes_before_eight_fulls_and_the_fulls_go_on(tmp_path):
    body, delta = noise("wan", 20 * MB), noise("delta", 800_000)
    urgent = content_path("xdelta260801001_To_260802001.dax")
    with ScriptedUpstream() as upstream:
        for number in range(8):
            upstream.answer(full(number), Answer(body, etag=f'"{number}"'))
        upstream.answer(urgent, Answer(delta, etag='"d"'))
        settings = {"wan": {"rate": 1_000_000}}
        with (
            Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup,
            Swarm(gup.data) as swarm,
        ):
            for number in range(8):
                swarm.add(1, full(number))
            until(lambda: len(upstream.requests()) == 8, "all fills have begun")
            measured_rate(gup, 1.0)
            began = time.monotonic()
            assert gup.get(urgent).body == delta
            took = time.monotonic() - began
            assert len(delta) / took >= 0.8 * 1_000_000
            assert measured_rate(gup, 2.0) == pytest.approx(1_000_000, rel=0.05)


def test_a_new_rate_holds_within_a_second_in_mid_fill(tmp_path):
    body = noise("wan", 30 * MB)
    with ScriptedUpstream() as upstream:
        upstream.answer(full(1), Answer(body, etag='"1"'))
        settings = {"wan": {"rate": 500_000}}
        with (
            Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup,
            Swarm(gup.data) as swarm,
        ):
            swarm.add(1, full(1))
            until(lambda: received(gup) > 500_000, "the fill runs")
            assert measured_rate(gup, 2.0) == pytest.approx(500_000, rel=0.05)
            gup.rewrite({"wan": {"rate": 3_000_000}})
            until(
                lambda: gup.metric("gup_bandwidth_limit_bytes_per_second", direction="upstream") == 3_000_000,
                "the new rate is in force",
            )
            assert measured_rate(gup, 2.0) == pytest.approx(3_000_000, rel=0.1)
