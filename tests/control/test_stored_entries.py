"""Entries over the API of a running control plane: listed, purged, pinned; and how rows come to them."""

import asyncio
import os
from dataclasses import replace
from urllib.parse import quote, unquote

from control.calls import ask, get

from gup.content.catalog import Label
from gup.content.key import Kind


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


async def test_keys_that_are_none_or_not_there(world, browser):
    async with world.running():
        for key in ("a/b/c/d/e", "a/b/c/d", "a/b/c/d/.hidden", "a/b/c/d/%2e%2e", "a/b/c/d%2Fe/f"):
            for method in ("GET", "DELETE"):
                status, told = await ask(browser, world, method, f"/api/v1/content/{key}")
                assert status == told["status"] in (400, 404), key


async def test_purge_removes_while_a_reader_reads_on(world, browser):
    record = world.commit(body=b"the whole body")
    reader = world.store.open_body(record)
    async with world.running() as control:
        epochs, path = world.epochs, f"/api/v1/content/{record.key.text}"
        status, told = await ask(browser, world, "DELETE", path)
        assert (status, told["freed_bytes"]) == (200, 14)
        assert control.state.index.rows == {}
        assert world.epochs == epochs + 2, "workers close it at once, and again when its files are gone"
        assert (await ask(browser, world, "DELETE", path))[0] == 404
    assert not world.store.body_path(record.key).exists()
    assert os.pread(reader.fd, 99, 0) == b"the whole body"


async def test_a_purge_of_many_removes_what_the_filter_chooses_after_a_dry_run(world, browser):
    world.commit(world.key("260101001"))
    pinned = world.commit(world.key("260101002"))
    busy = world.commit(world.key("260101003"))
    gone = [world.commit(world.key("260101004", f"{n}.zip"), b"0123456789") for n in range(70)]
    assert world.worker_claims.try_claim(busy.key.claim_offset)
    query = "/api/v1/content?pattern=*/2601010*&stream=" + quote(world.MONIKER)
    async with world.running() as control:
        rows = control.state.index.rows
        assert (await ask(browser, world, "PUT", f"/api/v1/content/{pinned.key.text}/pin"))[0] == 200
        assert (await ask(browser, world, "DELETE", "/api/v1/content"))[0] == 400, (
            "no filter is no wish for all"
        )
        query += "&older_than=1&kind=full"
        alone = {"unconfirmed": []}
        _, told = await ask(browser, world, "DELETE", query + "&dry_run=1")
        assert told == {"dry_run": True, "entries": 72, "freed_bytes": 708, "pinned": 1, "busy": 0} | alone
        assert len(rows) == 73
        _, told = await ask(browser, world, "DELETE", query + "&revision=260101004")
        assert told == {"dry_run": False, "entries": 70, "freed_bytes": 700, "pinned": 0, "busy": 0} | alone
        assert not any(world.store.body_path(record.key).exists() for record in gone)
        _, told = await ask(browser, world, "DELETE", query + "&pinned=1")
        assert told == {"dry_run": False, "entries": 2, "freed_bytes": 8, "pinned": 0, "busy": 1} | alone
        assert list(rows) == [busy.key.text]
        assert world.epochs >= 2


async def test_the_newest_of_a_product_is_prefetched(world, browser):
    """The newest revision that is stored or that a client was sent, of each stream of that name."""
    old, newer, other = (
        world.key("260101001"),
        world.key("260103001"),
        world.key("260102001", language="German"),
    )
    label = {"French": "Virus Definitions", "German": "virus definitions", "Dutch": "Firewall"}
    before = world.dependencies
    world.dependencies = lambda admin: replace(
        before(admin), label_of=lambda stream, _file: Label(label[stream[1]], "14.3", stream[1], "other")
    )
    for key in (old, other, world.key("260109001", language="Dutch")):
        world.commit(key)
    async with world.running() as control:
        world.tell(type="used", at=world.now, asked=[[newer.text, 1]])
        await world.until(control.state.traffic.newest)
        status, told = await ask(
            browser, world, "POST", "/api/v1/prefetch", json={"product": "virus definitions"}
        )
        assert status == 202
        assert {row["key"] for row in told["wanted"]} == {newer.text, other.text}
        french = {"product": "Virus Definitions", "language": "french", "version": "14.3"}
        _, told = await ask(browser, world, "POST", "/api/v1/prefetch", json=french)
        assert [unquote(row["path"]) for row in told["wanted"]] == [
            f"/content/{world.MONIKER}/260103001/full.zip"
        ]
        for wrong, status in (
            ({}, 400),
            (french | {"path": "/content/a/b/full.zip"}, 400),
            ({"product": "x"}, 404),
        ):
            assert (await ask(browser, world, "POST", "/api/v1/prefetch", json=wrong))[0] == status, wrong


async def test_pinning_lasts_and_is_taken_back(world, browser):
    record = world.commit()
    url = f"/api/v1/content/{record.key.text}/pin"
    async with world.running() as control:
        for method, pinned in (("PUT", True), ("DELETE", False)):
            status, told = await ask(browser, world, method, url)
            assert (status, told["pinned"]) == (200, pinned)
            assert control.state.index.rows[record.key.text].pinned is pinned
            stored = await asyncio.to_thread(world.store.load, record.key)
            assert stored.pinned is pinned
        assert (await ask(browser, world, "PUT", "/api/v1/content/a/b/c/d/e/pin"))[0] == 404


async def test_other_methods_paths_and_forged_requests_are_problems_and_do_nothing(world, browser):
    asked = [
        ("POST", "/api/v1/status", {}, 405),
        ("GET", "/api/v2", {}, 404),
        ("GET", "/api/v1/status", {"Host": "evil.example"}, 403),
        ("POST", "/api/v1/evict", {"Origin": "http://evil.example"}, 403),
        ("POST", "/api/v1/reload", {"Sec-Fetch-Site": "cross-site"}, 403),
    ]
    async with world.running():
        for method, path, headers, status in asked:
            async with browser.request(method, world.url + path, headers=headers) as answer:
                assert (answer.status, answer.content_type) == (status, "application/problem+json")
                assert ("GET" in answer.headers.get("Allow", "")) == (status == 405)
    assert world.reloads == 0


async def test_reload_is_asked_for(world, browser):
    async with world.running():
        for number, problems in enumerate(([], ["cache.max_size: is too small"]), 1):
            world.reload_problems, world.reload_waiting = problems, ["listen.port"]
            status, told = await ask(browser, world, "POST", "/api/v1/reload")
            assert (status, told["reloaded"], told["problems"]) == (200, not problems, problems)
            assert (told["changed"], told["waiting"]) == (["wan.rate"], ["listen.port"])
            assert world.reloads == number
        world.config_ok = False
        _, told = await get(browser, world, "/api/v1/status")
        assert told["reload"] == {"successful": False}


async def test_our_own_mistake_is_a_problem_and_logged(world, browser, caplog):
    async with world.running() as control:
        control.state.evictor.measure = lambda: 1 / 0
        status, told = await get(browser, world, "/api/v1/status")
        assert (status, told["type"]) == (500, "about:blank")
    assert "ZeroDivisionError" in caplog.text


# --- events


async def test_commits_and_uses_reach_the_rows(world):
    async with world.running() as control:
        record = world.commit(body=b"x" * 77)
        world.tell_committed(record)
        world.tell(type="used", uses=[[record.key.text, 3, 231]], at=world.now - 5)
        rows = control.state.index.rows
        await world.until(lambda: record.key.text in rows and rows[record.key.text].hits == 3)
        row = rows[record.key.text]
        assert (row.length_bytes, row.received_bytes, row.sent_bytes, row.kind) == (77, 77, 231, Kind.FULL)
        assert row.used_at == world.now, "the commit is the later use"
        await world.until(lambda: world.store_bytes[-1:] == [77])


async def test_uses_and_clients_outlive_a_restart_and_uses_a_lost_index(world, browser):
    record = world.commit(at=1000.0)
    async with world.running() as control:
        world.tell(type="used", uses=[[record.key.text, 5], ["a/b/c/d/e", 1]], at=5000.0)
        world.tell(type="used", at=5000.0, clients=["10.0.0.1", "10.0.0.2", "10.0.0.1"])
        await world.until(lambda: len(control.state.clients) == 2)
    (found,) = world.store.scan()
    assert found.used_at == 5000.0
    async with world.running() as control:
        _, told = await get(browser, world, f"/api/v1/content/{record.key.text}")
        assert told["hits"] == 5
        await world.until(
            lambda: len(control.state.clients) == 2
        )  # the statistics are opened beside the index
        _, seen = await get(browser, world, "/api/v1/clients")
        assert seen["seen"] == {"1h": 2, "1d": 2, "7d": 2}


async def test_garbage_is_passed_over_and_counted(world, browser):
    record = world.commit()
    async with world.running() as control:
        for garbage in (b"", b"\x00\xff", b"{", b"[]", b'{"type":"need","bytes":-5}', b"x" * 60_000):
            world.sender.send(garbage)
        world.tell(type="failed", key=record.key.text, problem="upstream-timeout", detail="15 s")
        await world.until(lambda: len(control.state.failures) == 1)
        _, told = await get(browser, world, "/api/v1/status")
        assert told["malformed_events"] == 6
        assert told["failures"][0]["problem"] == "upstream-timeout"
