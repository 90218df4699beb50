import asyncio
import gc
import re
import time

import aiohttp
import pytest
from control.calls import get, limited

from gup.cache.records import Phase
from gup.control.service import Jobs

# --- health, readiness, metrics, page


async def test_health_and_readiness(world, browser):
    async with world.running() as control:
        async with browser.get(world.url + "/healthz") as answer:
            assert (answer.status, await answer.text()) == (200, "ok\n")
        async with browser.get(world.url + "/readyz") as answer:
            assert answer.status == 200
        world.workers[0]["ready"] = False
        status, told = await get(browser, world, "/readyz")
        assert (status, told["reasons"]) == (503, ["no worker is ready"])
        control.state.index.opened = False
        _, told = await get(browser, world, "/readyz")
        assert told["reasons"] == ["the index is being opened", "no worker is ready"]


async def test_the_page_is_whole_without_script_and_locked_down(world, browser):
    world.commit()
    world.begin_part(world.key("260101009"), b"z" * 250, 1000)
    assert world.claims.try_claim(world.key("260101009").claim_offset)
    async with world.running():
        async with browser.get(world.url + "/") as answer:
            text = await answer.text()
            policy = answer.headers["Content-Security-Policy"]
            assert answer.content_type == "text/html"
        for path in re.findall(r'(?:src|href)="([^"#]+)"', text):
            async with browser.get(world.url + path) as answer:  # files of its own, nothing from elsewhere
                assert path.startswith("/")
                assert answer.status == 200, (path, await answer.text())
    assert "branch-7" in text
    assert "260101001" in text
    assert '<progress max="1000" value="250"' in text
    assert "http://manager:8014" in text
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert " style=" not in text
    assert re.findall(r"<script(?! src=)", text) == []


async def test_files_of_the_page_are_kept_while_their_url_is_the_same(world, browser):
    async with world.running():
        async with browser.get(world.url + "/") as answer:
            url = re.search(r'"(/assets/page.js\?\w+)"', await answer.text())[1]
        for path, kept in ((url, "max-age=31536000, immutable"), ("/assets/page.js?older", "no-cache")):
            async with browser.get(world.url + path) as answer:
                assert answer.content_type == "text/javascript"
                assert answer.headers["Cache-Control"] == kept
        for name in ("nothing.js", "..%2froutes.py", "page.html"):
            async with browser.get(f"{world.url}/assets/{name}") as answer:
                assert answer.status == 404


async def test_every_answer_carries_security_headers(world, browser):
    async with world.running():
        for path in ("/", "/metrics", "/api/v1/status", "/nowhere"):
            async with browser.get(world.url + path) as answer:
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
                assert answer.headers["Cache-Control"] == "no-store"


async def test_status_tells_everything(world, browser):
    world.commit(body=b"x" * 500)
    key = world.key("260101009")
    world.begin_part(key, b"z" * 250, 1000)
    assert world.claims.try_claim(key.claim_offset)
    world.counters.add("gup_client_sent_bytes_total", 700, source="cache")
    world.counters.add("gup_upstream_received_bytes_total", 200, upstream="manager", purpose="fill")
    async with world.running():
        status, told = await get(browser, world, "/api/v1/status")
        fills = (await get(browser, world, "/api/v1/fills"))[1]
        upstreams = (await get(browser, world, "/api/v1/upstreams"))[1]
    assert status == 200
    assert [row["key"] for row in fills["fills"]] == [key.text]
    assert (fills["waiters"], upstreams["upstreams"]) == (0, told["upstreams"])
    assert told["totals"]["since_install"]["saved_bytes"] == 500
    assert told["totals"]["since_start"]["client_sent_bytes"] == 700
    assert told["cache"] | {"free_bytes": 0} == {
        "entries": 1, "entries_bytes": 500, "parts": 1, "parts_bytes": 250, "size_bytes": 750,
        "limit_bytes": 1_000_000, "free_bytes": 0, "complete": True,
    }  # fmt: skip
    (fill,) = told["fills"]
    assert fill | {"began_at": 0, "bytes_per_second": 0, "remaining_seconds": 0} == {
        "key": key.text, "id": key.id, "phase": str(Phase.STREAMING), "received_bytes": 250,
        "length_bytes": 1000, "upstream": "manager", "product": world.MONIKER, "language": "French",
        "kind": "full", "began_at": 0, "bytes_per_second": 0, "remaining_seconds": 0,
    }  # fmt: skip
    (manager,) = told["upstreams"]
    assert (manager["name"], manager["up"], manager["url"]) == ("manager", True, "http://manager:8014")
    assert (manager["state"], manager["last_error"], manager["weight"]) == ("unknown", None, 1)
    assert told["wan_rate_bytes_per_second"] == 8_000_000
    assert (told["site"], told["uptime_seconds"]) == ("branch-7", 3600.0)
    assert told["reload"] == {"successful": True}
    assert told["workers"][0]["pid"] == 4711


# --- jobs


async def test_recovery_runs_and_a_failing_job_hurts_nobody(world, browser, caplog):
    calls = []

    async def failing():
        calls.append(1)
        world.recovered.set()
        raise RuntimeError("recovery tripped")

    world.recover = failing
    async with world.running():
        await asyncio.wait_for(world.recovered.wait(), 10)
        status, _ = await get(browser, world, "/api/v1/status")
        assert status == 200
    assert "recovery tripped" in caplog.text


async def test_eviction_goes_on_after_a_mistake_and_with_reloaded_limits(world, browser, caplog):
    old = world.commit(body=b"o" * 600)
    async with world.running() as control:
        real, control.state.evictor.measure = control.state.evictor.measure, lambda: 1 / 0
        control.state.evictor.look_soon()
        await world.until(lambda: "ZeroDivisionError" in caplog.text)
        control.state.evictor.measure = real
        await world.apply(control, limited(world.settings, max_size=0))
        assert (await get(browser, world, "/api/v1/status"))[1]["cache"]["limit_bytes"] == 0
        await world.until(lambda: world.counters.get("gup_evictions_total", reason="size") == 1)
    assert not world.store.body_path(old.key).exists()


async def test_events_that_come_together_are_taken_together(world):
    """What follows from a commit is done once a batch; it was done, and the loop woken, for each event."""
    key, count = world.key(), 200
    world.commit(key)
    async with world.running() as control:
        before, begun = len(world.store_bytes), time.monotonic()
        for number in range(count):
            name = {"revision": "260101001", "file": f"xdelta{number:09d}_To_260101001.dax"}
            world.tell(type="committed", key=world.key(**name).text, length=1, kind="delta")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await world.until(lambda: len(control.state.index.rows) == count + 1)
        batches = 2 + (time.monotonic() - begun) / 0.05
        assert 1 <= len(world.store_bytes) - before <= 2 * batches, "and as often after an eviction run"


async def test_stopping_at_once_leaves_nothing_and_closes_the_port(world, browser):
    async with world.running(complete=False):
        pass
    with pytest.raises(aiohttp.ClientConnectorError):
        await browser.get(world.url + "/healthz")


async def test_a_job_that_is_stopped_before_its_first_step_leaves_nothing():
    jobs, turns = Jobs(), []

    async def turn():
        turns.append(1)

    jobs.every(1.0, "early", turn)
    await jobs.stop()
    gc.collect()  # a coroutine that was never awaited would be an error here
    assert turns == []
