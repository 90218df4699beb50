"""Three real services with two workers each, and a real engine: the list, the shares, the end of a node."""

import os
import signal
import tomllib
from pathlib import Path

import pytest
from cluster.services import PASSWORD, running
from harness.processes import until


@pytest.fixture
def site(tmp_path):
    with running(tmp_path) as site:
        yield site


def test_three_services_find_each_other_and_lose_one(site):
    one, two, three = (site.start(name) for name in ("a", "b", "c"))
    until(site.all_ask_all, "all ask all", 30)
    seen = site.seen_by("a")
    assert (seen["site"], seen["node"], seen["alone"], seen["engine_error"]) == ("lyon", "a", False, None)
    assert seen["wan_rate_bytes_per_second"] == 1_000_000
    assert sum(member["share_bytes_per_second"] or 0 for member in seen["members"]) <= 1_000_000
    assert one.metrics()("gup_cluster_members") == 3
    # the engine's password is known to no process but by its file
    for gup in (one, two, three):
        for pid in gup.pids:
            assert PASSWORD.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        assert PASSWORD not in gup.log
    # SIGTERM: off the lists at once
    assert three.stop() == 0
    del site.nodes["c"]
    until(site.all_ask_all, "two are left", 30)
    assert len(site.seen_by("a")["members"]) == 2
    assert [(one["name"], one["left"]) for one in site.seen_by("a")["gone"]] == [("c", True)]
    html = site.page_of("a")
    assert [
        words for words in ('data-member="b"', 'data-member="c"', ">stopped</span>") if words not in html
    ] == []
    # kill -9: not asked, and off the list later
    two.kill()
    del site.nodes["b"]
    until(lambda: len(site.seen_by("a")["members"]) == 1, "one is left", 30)
    assert one.metrics()("gup_cluster_members") == 1


def test_without_its_engine_a_service_starts_and_serves(site):
    site.valkey.kill()
    site.upstream.answer("/content/ContentInfo.txt", b"x" * 100)
    one = site.start("a")
    assert one.get("/content/ContentInfo.txt").body == b"x" * 100
    until(lambda: one.alarms("engine-away"), "an alarm", 30)
    assert site.seen_by("a")["engine_error"]


def test_a_controller_that_is_killed_changes_no_list(site):
    for name in ("a", "b"):
        site.start(name)
    until(site.all_ask_all, "both ask each other", 30)
    one, two = site.nodes.values()
    two.wait_log("members besides b: a\n")
    before = two.log.count("members besides b")
    (controller,) = set(one.children()) - set(one.workers())
    os.kill(controller, signal.SIGKILL)
    until(lambda: set(one.children()) - set(one.workers()) not in ({controller}, set()), "a successor", 30)
    until(lambda: one.admin and site.all_ask_all(), "both ask each other", 30)
    assert two.log.count("members besides b") == before, "b saw no change"


def test_a_node_whose_processes_are_replaced_changes_no_list(site):
    settings = {"workers": {"count": 2}}
    for name in ("a", "b"):
        site.start(name, settings=settings, workers=None)
    until(site.all_ask_all, "both ask each other", 30)
    one, two = site.nodes.values()
    two.wait_log("members besides b: a\n")
    before, status = two.log.count("members besides b"), one.status()
    in_file = tomllib.loads((one.folder / "gup.toml").read_text())
    one.reload(**in_file | {"workers": {"count": 1}})
    one.wait_replaced(status, 1)
    until(lambda: site.all_ask_all() and not site.seen_by("a")["alone"], "both ask each other", 30)
    assert two.log.count("members besides b") == before, "b saw no change"


def test_the_secret_is_changed_without_a_pause(site):
    for name in ("a", "b"):
        site.start(name)
    until(site.all_ask_all, "both ask each other", 30)
    two = site.nodes["b"]
    two.wait_log("members besides b: a\n")
    before, secret, old, new = (
        two.log.count("members besides b"),
        site.folder / "secret",
        "a-secret-of-the-site",
        "b" * 20,
    )
    for lines in ((old, new), (new, old), (new,)):
        secret.write_text("\n".join(lines) + "\n")
        for gup in site.nodes.values():
            assert gup.api("/api/v1/reload", "POST")[0] == 200
        assert site.all_ask_all()
    assert two.log.count("members besides b") == before
    assert not any(gup.alarms("row-forged") for gup in site.nodes.values())
