"""A clock that is 40 days ahead for a while and put back: what was written then is taken back."""

import pytest
from harness.control import get

from gup.control.stats.client_records import ClientWindows

NOW, AHEAD = 1_800_000_000.0, 40 * 86400.0  # 2027-01-15
A, B = "10.0.0.1", "10.0.0.2"


async def report(world, browser, path):
    status, told = await get(browser, world, f"/api/v1/{path}")
    assert status == 200
    return told


async def take(world, control, client, revision, sent_bytes):
    """A client takes a full, and what a worker and the jobs of the control plane do then."""
    key = world.key(revision)
    world.counters.add("gup_client_sent_bytes_total", sent_bytes, source="cache")
    world.tell(type="taken", at=world.now, rows=[[client, key.text, "", "", 1]])
    world.tell(type="used", at=world.now, uses=[[key.text, 1, sent_bytes]], clients=[client])
    row = control.state.index.rows[key.text]
    await world.until(lambda: control.state.index.rows[key.text].hits > row.hits)
    await control.state.reports.write_clients()
    await control.state.history.write()


@pytest.mark.parametrize("restart", [False, True])
async def test_reports_are_right_once_the_clock_is(world, browser, restart):
    world.now, world.installed_at = NOW, NOW - 60
    for revision in ("270114001", "270115001"):
        world.commit(world.key(revision), at=NOW)
    async with world.running() as control:
        await take(world, control, A, "270114001", 100)
        world.now += AHEAD
        await take(world, control, A, "270115001", 1000)
        await take(world, control, B, "270115001", 1000)
        if not restart:
            world.now -= AHEAD - 60
            await take(world, control, A, "270114001", 10)
            await check(world, browser, control)
    if restart:
        world.now -= AHEAD - 60
        async with world.running() as control:
            await control.state.history.write()
            world.now += 10
            await take(world, control, A, "270114001", 10)
            await check(world, browser, control)


async def check(world, browser, control):
    savings = await report(world, browser, "report/savings")
    assert savings["today"]["sent_bytes"] == savings["since_install"]["sent_bytes"] == 2110
    assert [day["day"] for day in savings["days"]] == ["2027-01-15"]
    for span in ("hour", "week"):
        points = (await report(world, browser, f"history?span={span}"))["points"]
        assert sum(point["client_sent_bytes"] for point in points) == 2110
        assert all(point["at"] <= world.now for point in points)
    listed = await report(world, browser, "clients")
    assert {row["address"]: row["seen_at"] <= world.now for row in listed["clients"]} == {A: True, B: True}
    assert listed["seen"]["1h"] >= 1
    (stream,) = (await report(world, browser, "report/content"))["content"]
    assert {row["revision"]: row["last_taken_at"] for row in stream["revisions"]} == {
        "270115001": NOW + 60, "270114001": NOW,
    }  # fmt: skip
    found = {row["address"]: row["revision"] for row in stream["lagging"]}
    assert found == {A: "270114001"}, "it took an older one last"
    rows = control.state.index.rows.values()
    assert {row.used_at for row in rows if row.revision == "270114001"} == {world.now}


async def test_a_clock_that_is_not_set_yet_takes_nothing_back(world, browser):
    """It tells a time before the installation, as without a battery until the network is asked."""
    world.now, world.installed_at = NOW, NOW - 60
    world.commit(world.key("270115001"), at=NOW)
    async with world.running() as control:
        await take(world, control, A, "270115001", 100)
        (before,) = (await report(world, browser, "clients"))["clients"]
        world.now = 1_000_000.0
        await take(world, control, A, "270115001", 10)
        world.now = NOW + 60
        (after,) = (await report(world, browser, "clients"))["clients"]
        assert after["seen_at"] == before["seen_at"] == NOW
        assert (await report(world, browser, "report/savings"))["today"]["sent_bytes"] == 100
        (row,) = control.state.index.rows.values()
        assert row.used_at == NOW


def test_who_was_seen_in_the_future_is_counted_when_seen_again():
    windows = ClientWindows()
    windows.see([A, B], NOW + AHEAD)
    windows.see([A], NOW)
    assert windows.counts(NOW) == {"1h": 1, "1d": 1, "7d": 1}
