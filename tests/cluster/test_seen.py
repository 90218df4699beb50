"""What three real services show of each other: on the page, by the API, in metrics and by `gup status`."""

import os
import re
import signal

import pytest
from cluster.services import owned_by, running
from harness.commands import on
from harness.content import zip_of
from harness.processes import until
from harness.upstreams import Answer

pytestmark = pytest.mark.long
SIZE = 400_000


def figures(html, place):
    """The figures of a part of the page: an element's id, or a row's member."""
    found = re.search(rf'(?:id|data-member)="{place}".*?(?:</tr>|\n</div>)', html, re.DOTALL)
    return [int(value) for value in re.findall(r'<data value="(-?\d+)"', found[0])]


def test_each_gup_shows_the_site_as_one_and_every_gup_of_it(site):
    """The owner's clients and those of one other take all; what came from the owner is saved once."""
    made = owned_by("a", 4, SIZE)
    for path, body in made.items():
        site.upstream.answer(path, Answer(body, etag='"a"'))
        for name in ("a", "b", "b"):
            assert site.nodes[name].get(path).body == body
    total = 4 * SIZE
    sums = {"sent_bytes": 3 * total, "received_bytes": total, "saved_bytes": 2 * total, "wasted_bytes": 0}
    sums |= {"between_members_bytes": total}
    until(lambda: all(site.seen_by(name)["sums"] == sums for name in "abc"), "all know of all", 30)
    assert total == sum(site.upstream.body_bytes(path) for path in made), "once over the WAN"
    moved = {"a": (total, total, 0, total), "b": (2 * total, 0, total, 0), "c": (0, 0, 0, 0)}
    for name, gup in site.nodes.items():
        seen = site.seen_by(name)
        assert {member["name"]: member["state"] for member in seen["members"]} == dict.fromkeys(
            "abc", "ready"
        )
        assert {member["unconfirmed_orders"] for member in seen["members"]} == {0}
        html = site.page_of(name)
        assert figures(html, "saved-site") == [2 * total, 3 * total, total]
        assert figures(html, "site-between") == [total]
        assert {name: tuple(figures(html, name)[1:]) for name in "abc"} == moved
        flow = "4.8 MB to clients, 1.6 MB over the WAN, 3.2 MB saved (66.7%), 1.6 MB from one to another"
        said = on(gup, "status").stdout
        assert f"all gups: {flow}\n" in said
        rows = [line.split() for line in said.splitlines() if line.startswith(("a ", "b ", "c "))]
        assert [row[:3] for row in rows[:3]] == [[name, "ready", "confirmed"] for name in "abc"]
        check_its_own_savings(gup, *moved[name][:2])
    check_members_have_their_bytes(site, total)
    site.nodes["b"].stop()
    site.nodes["b"].start()
    until(site.all_ask_all, "b is back", 30)
    check_members_have_their_bytes(site, total)
    check_the_loss_of_one(site, sums)


def check_its_own_savings(gup, sent, received):
    """In the report, by stream, by entry and in metrics: bytes of the WAN only."""
    saved = gup.api("/api/v1/savings")[1]
    assert [saved["since_install"][f"{way}_bytes"] for way in ("sent", "received", "wasted")] == [
        sent,
        received,
        0,
    ]
    streams = [row for day in saved["days"] for row in day["streams"]]
    entries = gup.api("/api/v1/content")[1]["entries"]
    assert [sum(row["received_bytes"] for row in rows) for rows in (streams, entries)] == [received] * 2
    metrics = gup.metrics()
    assert metrics("gup_upstream_received_bytes_total") == received
    assert sum(metrics.series("gup_stream_received_bytes_total").values()) == received
    assert metrics("gup_cluster_members") == 3


def check_members_have_their_bytes(site, total):
    for one, way, other in (("a", "sent", "b"), ("b", "received", "a")):
        assert site.nodes[one].metrics()(f"gup_peer_{way}_bytes_total", member=other) == total


def check_the_loss_of_one(site, sums):
    """It is shown as not reached, then as gone; its figures stay in the sums."""
    lost = site.nodes.pop("a")
    for pid in lost.pids:
        os.kill(pid, signal.SIGSTOP)  # a controller whose supervisor is gone first says goodbye
    lost.kill()
    until(lambda: states(site, "b").get("a") in ("unreachable", "gone"), "a is not reached", 5)
    until(lambda: all(states(site, name)["a"] == "gone" for name in "bc"), "a is gone", 10)
    for name in "bc":
        assert site.seen_by(name)["sums"] == sums
        html = site.page_of(name)
        assert ">gone</span>" in html
        assert figures(html, "saved-site") == [
            sums["saved_bytes"],
            sums["sent_bytes"],
            sums["received_bytes"],
        ]
        assert "GONE" in on(site.nodes[name], "status").stdout


def states(site, name):
    """Of each node, as this one sees it."""
    seen = site.seen_by(name)
    gone = {one["name"]: "stopped" if one["left"] else "gone" for one in seen["gone"]}
    return gone | {member["name"]: member["state"] for member in seen["members"]}


def test_a_member_that_hangs_has_not_confirmed_and_one_that_stops_has_left(tmp_path):
    with running(tmp_path) as site:
        for name in ("a", "b", "c"):
            site.start(name, member_timeout="60s")
        until(site.all_ask_all, "all ask all", 30)
        one, hanging = site.nodes["a"], site.nodes["c"]
        pids = hanging.pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            status, answer = one.api("/api/v1/content?product=x", "DELETE")
            assert (status, "c" in answer["unconfirmed"]) == (200, True)
            until(lambda: states(site, "a")["c"] == "unreachable", "c does not answer", 10)
            (seen,) = (member for member in site.seen_by("a")["members"] if member["name"] == "c")
            assert seen["unconfirmed_orders"] == 1
            assert seen["told_seconds"] > 0.5
            assert "1</data> unconfirmed" in site.page_of("a")
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        until(lambda: {m["unconfirmed_orders"] for m in site.seen_by("a")["members"]} == {0}, "confirmed", 20)
        assert site.nodes.pop("c").stop() == 0
        until(lambda: states(site, "a")["c"] == "stopped", "a hears it with its next beat", 10)
        assert ">stopped</span>" in site.page_of("a")


def test_each_gup_has_a_timeline_and_a_statement_of_its_own(site):
    for revision, name in (("261101001", "a"), ("261102001", "b")):
        path = f"/content/{{535CB6A4-441F-4E8A-A897-804CD859100E}}/{revision}/full.zip"
        body = zip_of(path, 9000)
        site.upstream.answer(path, Answer(body, etag='"a"'))
        assert site.nodes[name].get(path).body == body
    for revision, name in (("261101001", "a"), ("261102001", "b")):
        gup = site.nodes[name]

        def asked(gup=gup):
            return gup.api("/api/v1/report/timeline?client=127.0.0.1")[1]

        until(lambda: asked()["standings"], "it is known")
        assert [row["revision"] for row in asked()["standings"]] == [revision]
        assert asked()["node"] == name
        assert f"the record of {name} alone" in on(gup, "report", "timeline", "--client", "127.0.0.1").stdout
        month = gup.api("/api/v1/report/month")[1]
        assert (month["node"], month["traffic"]["sent_bytes"]) == (name, 9000)
        assert f"one, {name}" in " ".join(month["reservations"])
