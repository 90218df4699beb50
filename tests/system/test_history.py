"""The history of a real service that is killed: what its points add up to."""

import pytest
from harness.service import Gup
from harness.trees import BIG, DELTA, make_tree
from harness.upstreams import Nginx
from harness.waiting import until

LENGTH = 300_000
SPANS = ("hour", "day", "week", "quarter")


def added(gup, span, member):
    status, told = gup.api(f"/api/v1/history?span={span}")
    assert status == 200
    return sum(point[member] for point in told["points"])


def begun(gup):
    return until(lambda: gup.api("/api/v1/history")[1]["points"], "the history is read")


@pytest.mark.long
def test_points_add_up_to_the_counters_whoever_is_killed(tmp_path):
    tree = make_tree(tmp_path / "tree", big_bytes=LENGTH)
    with Nginx(tree, tmp_path / "nginx") as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        begun(gup)
        for _ in range(3):
            assert len(gup.get(BIG).body) == LENGTH
        gup.wait_metric(1, "gup_fills_total", outcome="committed")
        (controller,) = set(gup.children()) - set(gup.workers())
        gup.kill_worker(controller)  # what is counted meanwhile belongs to the history too
        assert len(gup.get(BIG).body) == LENGTH
        until(lambda: set(gup.children()) - set(gup.workers()) - {controller}, "another controller")
        gup.kill()
        gup.start()
        begun(gup)
        assert len(gup.get(DELTA).body) == 200_000
        gup.kill()
        gup.start()
        begun(gup)
        totals = gup.status()["totals"]["since_install"]
        assert totals["client_sent_bytes"] == 4 * LENGTH + 200_000
        for span in SPANS:
            assert added(gup, span, "client_sent_bytes") == totals["client_sent_bytes"], span
            assert added(gup, span, "upstream_received_bytes") == totals["upstream_received_bytes"], span
            assert added(gup, span, "saved_bytes") == totals["saved_bytes"], span
        points = gup.api("/api/v1/history")[1]["points"]
        assert sum(point["requests"]["hit"] for point in points) == totals["requests"]["hit"]
        assert sum(sum(point["fills"].values()) for point in points) == totals["fills"] >= 1
