import asyncio
import gc
import os
import re

import aiohttp
import pytest
from blockbuster import blockbuster_ctx
from prometheus_client.parser import text_string_to_metric_families

from gup.cache.state import Phase
from gup.config import Settings
from gup.content.key import Kind
from gup.control.jobs import Jobs

DELTA = "xdelta260101001_To_260101002.dax"


@pytest.fixture(autouse=True)
def no_blocking_call():
    """Blocking calls made by the control plane on the event loop raise (the tests themselves may block)."""
    with blockbuster_ctx("gup.control"):
        yield


def limited(settings: Settings, **cache) -> Settings:
    return settings.model_copy(update={"cache": settings.cache.model_copy(update=cache)})


async def get(browser, world, path, **more):
    async with browser.get(world.url + path, **more) as answer:
        return answer.status, await answer.json(content_type=None)


# --- health, readiness, metrics, page


async def test_health_and_readiness(world, browser):
    async with world.running():
        async with browser.get(world.url + "/healthz") as answer:
            assert (answer.status, await answer.text()) == (200, "ok\n")
        async with browser.get(world.url + "/readyz") as answer:
            assert answer.status == 200
        world.workers[0]["ready"] = False
        status, told = await get(browser, world, "/readyz")
        assert (status, told["reasons"]) == (503, ["no worker is ready"])


async def test_not_ready_before_the_index_is_open(world, browser):
    async with world.running() as control:
        control.plane.index.opened = False
        status, told = await get(browser, world, "/readyz")
        assert (status, told["reasons"]) == (503, ["the index is being opened"])


async def test_metrics_are_scraped(world, browser):
    world.commit(body=b"x" * 500)
    world.counters.add("gup_requests_total", 4, result="hit", code="200")
    async with world.running(), browser.get(world.url + "/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(await answer.text())
            for sample in family.samples
        }
    assert found[("gup_cache_entries",)] == 1
    assert found[("gup_cache_size_bytes",)] == 500
    assert found[("gup_cache_limit_bytes",)] == 1_000_000
    assert found[("gup_disk_free_bytes",)] > 0
    assert found[("gup_requests_total", "200", "hit")] == 4
    assert found[("gup_site_info", "branch-7")] == 1
    assert found[("gup_upstream_up", "manager")] == 1
    assert len(found) <= 500


async def test_openmetrics_by_accept(world, browser):
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    async with world.running(), browser.get(world.url + "/metrics", headers=accept) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        assert (await answer.text()).endswith("# EOF\n")


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
                assert answer.status == 200, path
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


async def test_history_is_what_the_counters_gained(world, browser):
    async with world.running() as control:
        await world.until(lambda: control.plane.history.history.begun)
        world.counters.add("gup_client_sent_bytes_total", 500, source="cache")
        world.counters.add("gup_requests_total", 2, result="hit", code="200")
        _, told = await get(browser, world, "/api/v1/history?span=week")
        (point,) = told["points"]
        assert told["step_seconds"] == 3600
        assert (point["client_sent_bytes"], point["saved_bytes"], point["requests"]["hit"]) == (500, 500, 2)
        assert point["at"] == world.now // 3600 * 3600
        world.now += 7200
        world.counters.add("gup_client_sent_bytes_total", 7, source="cache")
        for span in ("hour", "day", "quarter"):
            _, told = await get(browser, world, f"/api/v1/history?span={span}")
            assert told["points"][-1]["client_sent_bytes"] == 7
        status, wrong = await get(browser, world, "/api/v1/history?span=year")
        assert status == 400
        assert "hour" in wrong["detail"]
    async with world.running() as control:  # and is there after a restart
        await world.until(lambda: control.plane.history.history.begun)
        _, told = await get(browser, world, "/api/v1/history?span=week")
        assert [point["client_sent_bytes"] for point in told["points"]] == [500, 7]


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
    assert status == 200
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
    assert (told["site"], told["uptime_seconds"], told["reload"]) == (
        "branch-7",
        3600.0,
        {"successful": True},
    )
    assert told["workers"][0]["pid"] == 4711


# --- entries


async def test_entries_are_listed_shown_and_found_by_their_key(world, browser):
    first = world.commit(world.key("260101001"), at=10.0)
    world.commit(world.key("260101002"), at=20.0)
    async with world.running():
        _, told = await get(browser, world, "/api/v1/content?order=-stored&limit=1")
        assert [row["revision"] for row in told["entries"]] == ["260101002"]
        assert told["matching"] == 2
        _, rest = await get(browser, world, f"/api/v1/content?order=-stored&limit=1&cursor={told['cursor']}")
        assert ([row["revision"] for row in rest["entries"]], rest["cursor"]) == (["260101001"], None)
        _, none = await get(browser, world, "/api/v1/content?language=German")
        assert none["entries"] == []
        status, shown = await get(browser, world, f"/api/v1/content/{first.key.text}")
        assert (status, shown["key"], shown["record"]["etag"]) == (200, first.key.text, first.etag)
        status, wrong = await get(browser, world, "/api/v1/content?limit=0")
        assert (status, "limit" in wrong["detail"]) == (400, True)


@pytest.mark.parametrize(
    "key", ["a/b/c/d/e", "a/b/c/d", "a/b/c/d/.hidden", "a/b/c/d/%2e%2e", "a/b/c/d%2Fe/f"]
)
async def test_keys_that_are_none_or_not_there(world, browser, key):
    async with world.running():
        for method in ("GET", "DELETE"):
            async with browser.request(method, f"{world.url}/api/v1/content/{key}") as answer:
                assert answer.status in (400, 404)
                assert answer.content_type == "application/problem+json"
                assert (await answer.json(content_type=None))["status"] == answer.status


async def test_purge_removes_while_a_reader_reads_on(world, browser):
    record = world.commit(body=b"the whole body")
    reader = world.store.open_body(record)
    async with world.running() as control:
        epochs = world.epochs
        async with browser.delete(f"{world.url}/api/v1/content/{record.key.text}") as answer:
            assert (answer.status, (await answer.json())["freed_bytes"]) == (200, 14)
        assert control.plane.index.rows == {}
        assert world.epochs == epochs + 1
        async with browser.delete(f"{world.url}/api/v1/content/{record.key.text}") as answer:
            assert answer.status == 404
    assert not world.store.body_path(record.key).exists()
    assert os.pread(reader.fd, 99, 0) == b"the whole body"


async def test_pinning_lasts_and_is_taken_back(world, browser):
    record = world.commit()
    url = f"/api/v1/content/{record.key.text}/pin"
    async with world.running() as control:
        for method, pinned in (("PUT", True), ("DELETE", False)):
            async with browser.request(method, world.url + url) as answer:
                assert (answer.status, (await answer.json())["pinned"]) == (200, pinned)
            assert control.plane.index.rows[record.key.text].pinned is pinned
            stored = await asyncio.to_thread(world.store.load, record.key)
            assert stored.pinned is pinned
        async with browser.put(f"{world.url}/api/v1/content/a/b/c/d/e/pin") as answer:
            assert answer.status == 404


async def test_other_methods_and_paths_are_problems(world, browser):
    async with world.running():
        async with browser.post(world.url + "/api/v1/status") as answer:
            assert (answer.status, answer.content_type) == (405, "application/problem+json")
            assert "GET" in answer.headers["Allow"]
        async with browser.get(world.url + "/api/v2") as answer:
            assert (answer.status, answer.content_type) == (404, "application/problem+json")


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/api/v1/status", {"Host": "evil.example"}),
        ("POST", "/api/v1/evict", {"Origin": "http://evil.example"}),
        ("POST", "/api/v1/reload", {"Sec-Fetch-Site": "cross-site"}),
    ],
)
async def test_forged_requests_are_refused_and_do_nothing(world, browser, method, path, headers):
    async with world.running(), browser.request(method, world.url + path, headers=headers) as answer:
        assert (answer.status, answer.content_type) == (403, "application/problem+json")
    assert world.reloads == 0


async def test_reload_is_asked_for(world, browser):
    async with world.running():
        async with browser.post(world.url + "/api/v1/reload") as answer:
            assert (answer.status, await answer.json()) == (200, {"reloaded": True, "problems": []})
        assert world.reloads == 1
        world.reload_problems = ["cache.max_size: is too small"]
        async with browser.post(world.url + "/api/v1/reload") as answer:
            assert await answer.json() == {"reloaded": False, "problems": world.reload_problems}
        world.config_ok = False
        _, told = await get(browser, world, "/api/v1/status")
        assert told["reload"] == {"successful": False}


async def test_our_own_mistake_is_a_problem_and_logged(world, browser, caplog):
    async with world.running() as control:
        control.plane.space.measure = lambda: 1 / 0
        async with browser.get(world.url + "/api/v1/status") as answer:
            assert (answer.status, answer.content_type) == (500, "application/problem+json")
    assert "ZeroDivisionError" in caplog.text


# --- events


async def test_commits_and_uses_reach_the_rows(world):
    async with world.running() as control:
        record = world.commit(body=b"x" * 77)
        world.tell_committed(record)
        world.tell(type="used", uses=[[record.key.text, 3, 231]], at=world.now - 5)
        rows = control.plane.index.rows
        await world.until(lambda: record.key.text in rows and rows[record.key.text].hits == 3)
        row = rows[record.key.text]
        assert (row.length_bytes, row.received_bytes, row.sent_bytes, row.kind) == (77, 77, 231, Kind.FULL)
        assert row.used_at == world.now, "the commit is the later use"
        await world.until(lambda: world.store_bytes[-1:] == [77])


async def test_uses_outlive_a_lost_index(world):
    record = world.commit(at=1000.0)
    async with world.running() as control:
        world.tell(type="used", uses=[[record.key.text, 1]], at=5000.0)
        world.tell(type="used", uses=[["a/b/c/d/e", 1]], at=5000.0)
        await world.until(lambda: control.plane.index.rows[record.key.text].hits == 1)
    (found,) = world.store.scan()
    assert found.used_at == 5000.0


async def test_hits_and_clients_survive_a_restart(world, browser):
    record = world.commit()
    async with world.running() as control:
        world.tell(type="used", uses=[[record.key.text, 5]], at=5000.0)
        world.tell(type="clients", addresses=["10.0.0.1", "10.0.0.2", "10.0.0.1"])
        await world.until(lambda: len(control.plane.clients) == 2)
    async with world.running():
        _, told = await get(browser, world, f"/api/v1/content/{record.key.text}")
        assert told["hits"] == 5
        _, seen = await get(browser, world, "/api/v1/clients")
        assert seen["seen"] == {"1h": 2, "1d": 2, "7d": 2}


async def test_a_damaged_index_is_rebuilt_in_the_background(world):
    record = world.commit()
    async with world.running():
        pass
    (world.store.index / "cache.db").write_bytes(b"garbage" * 5000)
    async with world.running() as control:
        assert set(control.plane.index.rows) == {record.key.text}
        assert world.counters.get("gup_integrity_failures_total", where="index") == 1


async def test_garbage_is_passed_over_and_counted(world, browser):
    record = world.commit()
    async with world.running() as control:
        for garbage in (b"", b"\x00\xff", b"{", b"[]", b'{"type":"need","bytes":-5}', b"x" * 60_000):
            world.sender.send(garbage)
        world.tell(type="failed", key=record.key.text, problem="upstream-timeout", detail="15 s")
        await world.until(lambda: len(control.plane.failures) == 1)
        _, told = await get(browser, world, "/api/v1/status")
        assert told["malformed_events"] == 6
        assert told["failures"][0]["problem"] == "upstream-timeout"


async def test_a_pin_outlives_a_new_generation(world):
    key = world.key("_", "ContentInfo.txt")
    world.commit(key, b"old", Kind.INDEX)
    world.store.set_pinned(key, True)
    async with world.running() as control:
        fresh = await asyncio.to_thread(world.commit, key, b"newer", Kind.INDEX)
        world.tell_committed(fresh, replaced=True)
        await world.until(lambda: control.plane.index.rows[key.text].length_bytes == 5)
        assert control.plane.index.rows[key.text].pinned
    assert world.store.load(key).pinned


# --- space


async def test_commits_beyond_the_limit_evict_the_least_recently_used_soon(world):
    world.settings = limited(world.settings, max_size=1000)
    old = world.commit(world.key(revision="_", file="old.7z"), b"o" * 600, Kind.OTHER, at=10.0)
    async with world.running() as control:
        new = await asyncio.to_thread(
            world.commit, world.key(revision="_", file="new.7z"), b"n" * 600, Kind.OTHER, world.now
        )
        begun = asyncio.get_running_loop().time()
        world.tell_committed(new)
        await world.until(lambda: world.counters.get("gup_evictions_total", reason="size") == 1)
        assert asyncio.get_running_loop().time() - begun < 5.0
        # The old entry may have gone while the new one was still a part: parts count too.
        await world.until(lambda: set(control.plane.index.rows) == {new.key.text})
        await world.until(lambda: world.store_bytes[-1:] == [600])
    assert not world.store.body_path(old.key).exists()
    assert world.counters.get("gup_evicted_bytes_total", reason="size") == 600
    assert world.epochs == 1


async def test_a_worker_in_need_gets_room(world):
    world.settings = limited(world.settings, max_size=1000)
    old = world.commit(world.key(revision="_", file="old.7z"), b"o" * 600, Kind.OTHER)
    async with world.running():
        world.tell(type="need", bytes=500)
        await world.until(lambda: world.counters.get("gup_evictions_total", reason="size") == 1)
    assert not world.store.body_path(old.key).exists()


async def test_superseded_revisions_go_after_a_commit(world):
    world.settings = limited(world.settings, keep_revisions=1)
    world.commit(world.key("260101001"))
    async with world.running() as control:
        new = await asyncio.to_thread(world.commit, world.key("260101002"))
        world.tell_committed(new)
        await world.until(lambda: world.counters.get("gup_evictions_total", reason="revision") == 1)
        assert set(control.plane.index.rows) == {new.key.text}


async def test_the_limit_holds_under_a_stream_of_commits(world):
    world.settings = limited(world.settings, max_size=10_000)
    async with world.running() as control:
        for number in range(60):
            key = world.key(revision="_", file=f"{number:03}.7z")
            record = await asyncio.to_thread(world.commit, key, b"x" * 1000, Kind.OTHER, world.now)
            world.tell_committed(record)
        await world.until(lambda: f"14.3 RU2/French/{world.MONIKER}/_/059.7z" in control.plane.index.rows)
        await world.until(lambda: control.plane.index.total_bytes <= 10_000)
    bodies = [stored.size_bytes for stored in world.store.scan()]
    assert sum(bodies) == 10_000, "no more is evicted than has to be"


async def test_evict_now_spares_what_is_claimed_or_pinned(world, browser):
    pinned = world.commit(world.key(revision="_", file="pinned.7z"), kind=Kind.OTHER)
    filled = world.commit(world.key(revision="_", file="filled.7z"), kind=Kind.OTHER)
    free = world.commit(world.key(revision="_", file="free.7z"), kind=Kind.OTHER)
    world.store.set_pinned(pinned.key, True)
    abandoned, under_way = world.key("260101008"), world.key("260101009")
    world.begin_part(abandoned, b"a" * 9, 99)
    world.begin_part(under_way, b"u" * 9, 99)
    for key in (filled.key, under_way):
        assert world.claims.try_claim(key.claim_offset)
    async with world.running() as control:
        await control.apply(limited(world.settings, max_size=0))
        async with browser.post(world.url + "/api/v1/evict") as answer:
            assert answer.status == 200
        await world.until(lambda: set(control.plane.index.rows) == {pinned.key.text, filled.key.text})
    assert not world.store.body_path(free.key).exists()
    assert not world.store.part_path(abandoned.id, 1).exists()
    assert not world.store.state_path(abandoned.id).exists()
    assert world.store.part_path(under_way.id, 1).exists()
    assert world.counters.get("gup_evictions_total", reason="part") == 1
    assert not world.claims.held(free.key.claim_offset)


async def test_nothing_is_evicted_while_the_index_is_incomplete(world):
    record = world.commit()
    world.settings = limited(world.settings, max_size=0)
    async with world.running() as control:
        control.plane.index.complete = False
        done = await control.plane.space.evict()
        assert done == []
        control.plane.index.complete = True
        await control.plane.space.evict()
    assert not world.store.body_path(record.key).exists()


async def test_a_part_that_went_on_meanwhile_is_not_removed(world):
    key = world.key("260101009")
    world.begin_part(key, b"a" * 9, 99)
    async with world.running() as control:
        (part,) = (await control.plane.space.measure()).parts
        await asyncio.to_thread(world.begin_part, key, b"more" * 9, 99)
        assert not await asyncio.to_thread(control.plane.space._remove_part, part)
    assert world.store.part_path(key.id, 1).exists()


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


async def test_eviction_goes_on_after_a_mistake(world, caplog):
    old = world.commit(body=b"o" * 600)
    async with world.running() as control:
        real, control.plane.space.measure = control.plane.space.measure, lambda: 1 / 0
        control.plane.space.look_soon()
        await world.until(lambda: "ZeroDivisionError" in caplog.text)
        control.plane.space.measure = real
        await control.apply(limited(world.settings, max_size=0))
        await world.until(lambda: world.counters.get("gup_evictions_total", reason="size") == 1)
    assert not world.store.body_path(old.key).exists()


async def test_stopping_at_once_leaves_nothing(world):
    async with world.running(complete=False):
        pass


async def test_a_reload_changes_the_limits(world, browser):
    async with world.running() as control:
        await control.apply(limited(world.settings, max_size=123_456))
        _, told = await get(browser, world, "/api/v1/status")
        assert told["cache"]["limit_bytes"] == 123_456


async def test_the_admin_port_is_closed_after_stop(world, browser):
    async with world.running():
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
