"""The scrubber and the operator's verification, over a real store."""

import asyncio
import json
import os
import time

import pytest

from gup.cache.records import CHUNK_BYTES
from gup.errors import Problem

BODY = bytes(range(256)) * (CHUNK_BYTES * 3 // 256) + b"the end"


def harm(world, record, offset=CHUNK_BYTES):
    path = world.store.body_path(record.key)
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff\x00\xff")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    world.whole[record.key.text] = BODY


def scrubbing(world, **cache):
    changed = world.settings.cache.model_copy(update={"max_size": 1 << 30, "keep_revisions": 0, **cache})
    world.settings = world.settings.model_copy(update={"cache": changed})


async def verified(world, browser, query="") -> dict:
    """A whole verification, begun and read through the API."""
    async with browser.post(f"{world.url}/api/v1/verify{query}") as answer:
        assert answer.status == 202
    while True:
        async with browser.get(f"{world.url}/api/v1/verify") as answer:
            progress = json.loads(await answer.text())
        if not progress["running"]:
            assert progress["failed"] is None
            return progress


def counted(world, where="body") -> int:
    return world.counters.get("gup_integrity_failures_total", where=where)


# --- the scrubber


async def test_a_pass_finds_damage_and_has_it_mended(world):
    scrubbing(world, scrub_rate=1 << 40)
    records = [world.commit(world.key(f"26010100{n}"), BODY) for n in range(4)]
    harm(world, records[2])
    async with world.running() as control:
        scrub = control.state.scrubber
        await world.until(lambda: scrub.progress().ended_at is not None)
        progress = scrub.progress()
        assert (progress.checked, progress.damaged, progress.mended) == (4, 1, 1)
        assert progress.checked_bytes == 3 * len(BODY) + 2 * CHUNK_BYTES
        assert progress.next_at == world.now + 7 * 86400
        assert not progress.running
    assert world.mends == [(records[2].key.text, True)]
    assert counted(world) == 1
    assert world.store.body_path(records[2].key).read_bytes() == BODY


async def test_a_body_that_is_gone_is_mended_and_one_that_was_purged_is_not(world):
    scrubbing(world, scrub_rate=1 << 40)
    lost, kept = world.commit(world.key("260101001"), BODY), world.commit(world.key("260101002"), BODY)
    async with world.running() as control:
        scrub = control.state.scrubber
        await world.until(lambda: scrub.progress().ended_at is not None)
        world.store.body_path(lost.key).unlink()
        world.store.remove(kept.key)
        world.problem = Problem("upstream-unreachable", "nobody there")
        world.now += 8 * 86400
        await world.until(lambda: scrub.progress().damaged == 1)
        await world.until(lambda: scrub.progress().checked == 2)
        assert scrub.progress().mended == 0
    assert world.mends == [(lost.key.text, True)]


async def test_a_restart_goes_on_where_it_was(world):
    """Slow enough that the pass can't end: the second life begins behind what the first has read."""
    scrubbing(world, scrub_rate=4 * len(BODY))
    for n in range(20):
        world.commit(world.key(f"2601010{n:02}"), BODY)
    async with world.running() as control:
        await world.until(lambda: control.state.scrubber.progress().checked >= 2)
    async with world.running() as control:
        first = control.state.scrubber.progress()
        assert first.running
        assert 2 <= first.checked < 20
        scrubbing(world, scrub_rate=1 << 40)
        await world.apply(control, world.settings)
        await world.until(lambda: control.state.scrubber.progress().ended_at is not None)
        assert control.state.scrubber.progress().checked == 20


async def test_the_rate_is_kept_and_zero_turns_it_off(world):
    scrubbing(world, scrub_rate=0)
    record = world.commit(world.key(), BODY)
    harm(world, record)
    async with world.running() as control:
        scrub = control.state.scrubber
        assert scrub.progress().rate_bytes_per_second is None
        assert not scrub._due()
        scrubbing(world, scrub_rate=CHUNK_BYTES)
        await world.apply(control, world.settings)
        assert scrub._due()
        await world.until(lambda: scrub.progress().running)
        began = scrub._paid_until = time.monotonic()
        await scrub._pay(CHUNK_BYTES // 2)
        await scrub._pay(CHUNK_BYTES // 8)
        assert time.monotonic() - began >= 0.6


# --- the operator's verification


async def test_a_clean_store_has_no_findings(world, browser):
    scrubbing(world, scrub_rate=0)
    world.commit(world.key(), BODY)
    world.begin_part(world.key("260101002"), b"begun", 100)
    async with world.running():
        progress = await verified(world, browser)
    assert (progress["checked"], progress["total"], progress["damaged"]) == (2, 2, 0)
    assert progress["found"] == []


@pytest.mark.parametrize("repair", [False, True])
async def test_every_kind_of_damage_is_told_and_mended(world, browser, repair):
    scrubbing(world, scrub_rate=0)
    bad = world.commit(world.key("260101001"), BODY)
    harm(world, bad)
    torn = world.commit(world.key("260101002"), BODY)
    world.store.record_path(torn.key).write_bytes(b"{")
    lonely = world.commit(world.key("260101003"), BODY)
    world.store.record_path(lonely.key).unlink()
    stateless = world.key("260101004")
    world.store.part_path(stateless.id, 1).write_bytes(b"begun")
    world.store.state_path(world.key("260101005").id).write_bytes(b"{")
    stray = world.store.partial / "1.2.tmp"
    stray.write_bytes(b"x")
    os.utime(stray, (1, 1))
    young = world.store.partial / "2.2.tmp"
    young.write_bytes(b"x")
    async with world.running():
        progress = await verified(world, browser, "?repair=1" if repair else "")
        found = {(row["where"], row["path"].rpartition("/")[2]): row for row in progress["found"]}
        assert {where for where, _ in found} == {"body", "record", "part", "state", "stray"}
        assert len(found) == 6
        assert found["body", "full.zip"]["detail"] == "1 of 4 chunks of 1 MiB are missing or wrong: 1"
        assert {row["mended"] for row in progress["found"]} == {True if repair else None}
        assert progress["mended"] == (6 if repair else 0)
        if repair:
            again = await verified(world, browser)
            assert again["found"] == []
    assert young.exists()
    assert world.mends == ([(bad.key.text, True)] if repair else [])
    assert counted(world) == 1
    assert counted(world, "record") == 2


async def test_what_somebody_works_on_is_left_out(world, browser, monkeypatch):
    monkeypatch.setattr("gup.control.integrity_jobs._PATIENCE_SECONDS", 0.1)
    scrubbing(world, scrub_rate=0)
    record = world.commit(world.key(), BODY)
    harm(world, record)
    assert world.worker_claims.try_claim(record.key.claim_offset)
    async with world.running():
        progress = await verified(world, browser)
        assert (progress["busy"], progress["damaged"]) == (1, 0)
        world.worker_claims.release(record.key.claim_offset)
        assert (await verified(world, browser))["damaged"] == 1


async def test_what_somebody_has_just_worked_on_is_come_back_to(world):
    scrubbing(world, scrub_rate=0)
    record = world.commit(world.key(), BODY)
    harm(world, record)
    assert world.worker_claims.try_claim(record.key.claim_offset)
    async with world.running() as control:
        verification = control.state.verification
        assert verification.start(repair=True)
        await world.until(lambda: verification.progress().total == 1)
        await asyncio.sleep(0.1)  # long enough for a first look; the result is the same without
        world.worker_claims.release(record.key.claim_offset)
        await world.until(lambda: not verification.progress().running)
        progress = verification.progress()
    told = {name: getattr(progress, name) for name in ("checked", "busy", "damaged", "mended")}
    assert told == {"checked": 1, "busy": 0, "damaged": 1, "mended": 1}


async def test_why_something_could_not_be_mended_is_told(world, browser):
    scrubbing(world, scrub_rate=0)
    harm(world, world.commit(world.key(), BODY))
    world.problem = Problem("upstream-unreachable", "nobody there")
    async with world.running():
        progress = await verified(world, browser, "?repair=1")
        assert [(row["mended"], row["why_not"]) for row in progress["found"]] == [(False, "nobody there")]
        async with browser.post(f"{world.url}/api/v1/verify?repair=yes") as answer:
            assert answer.status == 400


async def test_only_one_verification_at_a_time(world, browser):
    scrubbing(world, scrub_rate=0)
    for n in range(5):
        world.commit(world.key(f"26010100{n}"), BODY)
    async with world.running() as control:
        assert control.state.verification.start(repair=False)
        async with browser.post(f"{world.url}/api/v1/verify") as answer:
            assert answer.status == 409


# --- reconciling


async def test_reconciling_mends_a_body_that_is_not_as_recorded(world):
    scrubbing(world, scrub_rate=0)
    record = world.commit(world.key(), BODY)
    path = world.store.body_path(record.key)
    os.truncate(path, CHUNK_BYTES)
    os.utime(path, (1, 1))
    world.whole[record.key.text] = BODY
    async with world.running() as control:
        await world.until(lambda: record.key.text in control.state.index.rows)
    assert world.mends == [(record.key.text, False)]
    assert path.read_bytes() == BODY


@pytest.mark.parametrize(("slug", "left"), [("upstream-unreachable", True), ("upstream-gone", False)])
async def test_what_no_upstream_has_any_more_is_removed_and_else_kept(world, slug, left):
    scrubbing(world, scrub_rate=0)
    record = world.commit(world.key(), BODY)
    path = world.store.body_path(record.key)
    os.truncate(path, CHUNK_BYTES)
    os.utime(path, (1, 1))
    world.problem = Problem(slug, "told so")
    async with world.running():
        await world.until(lambda: bool(world.mends) and path.exists() is left)
    assert path.exists() is left
