"""The scrubber and the operator's verification, over a real store; no bad entry stops them."""

import json
import os
import time

import pytest
from harness.control import get, limited

from gup.cache.records import CHUNK_BYTES, seal
from gup.control.integrity_jobs import Pass, read_pass
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
    world.settings = limited(world.settings, max_size=1 << 30, keep_revisions=0, **cache)


async def verified(world, browser, query="") -> dict:
    """A whole verification, begun and read through the API."""
    async with browser.post(f"{world.url}/api/v1/verify{query}") as answer:
        assert answer.status == 202
    progress = {"running": True}
    while progress["running"]:
        _, progress = await get(browser, world, "/api/v1/verify")
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
        with world.claimed(kept.key) as store:
            store.remove(kept.key)
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


async def test_what_somebody_has_just_worked_on_is_come_back_to_and_no_second_verification_begins(
    world, browser
):
    scrubbing(world, scrub_rate=0)
    record = world.commit(world.key(), BODY)
    harm(world, record)
    assert world.worker_claims.try_claim(record.key.claim_offset)
    async with world.running() as control:
        verification = control.state.verification
        assert verification.start(repair=True)
        await world.until(lambda: verification.progress().total == 1)
        async with browser.post(f"{world.url}/api/v1/verify") as answer:
            assert answer.status == 409
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


# --- bad entries


def spoil(world, record, **changed):
    """A record with a right checksum and wrong values, as an earlier release imported them."""
    path = world.store.record_path(record.key)
    fields = json.loads(path.read_bytes())
    del fields["checksum"]
    path.write_bytes(seal(fields | changed))


BAD = {
    "length 80.0": lambda world, record: spoil(world, record, length=80.0),
    "negative length": lambda world, record: spoil(world, record, length=-5),
    "huge length": lambda world, record: spoil(world, record, length=10**30),
    "other host": lambda world, record: spoil(world, record, path="@evil.example:80/x"),
    "CRLF": lambda world, record: spoil(world, record, upstream_etag='"\r\nX: y"'),
    "no sums": lambda world, record: spoil(world, record, sums=""),
    "nested": lambda world, record: world.store.record_path(record.key).write_bytes(b"[" * 100_000),
    "pipe": lambda world, record: (
        world.store.record_path(record.key).unlink(),
        os.mkfifo(world.store.record_path(record.key)),
    ),
    "huge file": lambda world, record: os.truncate(world.store.record_path(record.key), 1 << 32),
}


async def scrub_all(world, scrubber) -> int:
    """A whole pass of the scrubber; how many entries it read."""
    before = scrubber.progress().ended_at or 0
    world.now += 8 * 86400
    await world.until(lambda: (scrubber.progress().ended_at or 0) > before)
    return scrubber.progress().checked


async def test_bad_records_stop_no_pass_over_all(world, browser):
    """What comes after them is scrubbed, verified, reconciled, listed and evicted too."""
    scrubbing(world, scrub_rate=1 << 40)
    keys = [world.key(f"2601010{n:02}") for n in range(len(BAD) + 2)]
    records = [world.commit(key, b"body of %s" % key.revision.encode(), at=1000.0) for key in keys]
    good = {keys[0].text, keys[-1].text}
    async with world.running() as control:
        await scrub_all(world, control.state.scrubber)
        for record, harm in zip(records[1:-1], BAD.values(), strict=True):
            harm(world, record)
        assert await scrub_all(world, control.state.scrubber) == len(keys)
        _, told = await get(browser, world, "/api/v1/content")
        assert len(told["entries"]) == len(keys)
        for record in records[1:-1]:
            status, told = await get(browser, world, f"/api/v1/content/{record.key.text}")
            assert (status, told["record"]) == (200, None)
        progress = await verified(world, browser)
        assert progress["checked"] == progress["total"] == len(keys)
        found = {(finding["where"], finding["key"]) for finding in progress["found"]}
        assert found == {("record", record.key.text) for record in records[1:-1]}
        await control._reconcile()
        assert set(control.state.index.rows) == good
        world.settings = limited(world.settings, max_size=1)
        assert {eviction.key for eviction in await control.state.evictor.evict()} == good


async def test_a_mistake_of_ours_at_one_entry_stops_no_pass_over_all(world, browser, monkeypatch):
    scrubbing(world, scrub_rate=1 << 40)
    records = [world.commit(world.key(f"26010100{n}"), b"body %d" % n) for n in range(3)]
    load = world.store.load

    def broken(key):
        if key == records[1].key:
            raise RuntimeError("nobody has thought of that")
        return load(key)

    async with world.running() as control:
        await scrub_all(world, control.state.scrubber)
        monkeypatch.setattr(world.store, "load", broken)
        assert await scrub_all(world, control.state.scrubber) == 3
        progress = await verified(world, browser)
        assert progress["checked"] == 3
        (found,) = progress["found"]
        assert "nobody has thought of that" in found["detail"]


# --- reconciling


@pytest.mark.parametrize(
    ("slug", "left"), [("", True), ("upstream-unreachable", True), ("upstream-gone", False)]
)
async def test_reconciling_mends_what_is_not_as_recorded_and_removes_what_no_upstream_has(world, slug, left):
    scrubbing(world, scrub_rate=0)
    record = world.commit(world.key(), BODY)
    path = world.store.body_path(record.key)
    os.truncate(path, CHUNK_BYTES)
    os.utime(path, (1, 1))
    world.problem = Problem(slug, "told so") if slug else None
    world.whole[record.key.text] = BODY
    async with world.running() as control:
        await world.until(lambda: bool(world.mends) and path.exists() is left)
        await world.until(lambda: bool(slug) or record.key.text in control.state.index.rows)
    assert world.mends == [(record.key.text, False)]
    assert path.exists() is left
    assert slug or path.read_bytes() == BODY


# --- a pass is noted

PASS = Pass(began_at=5.0, ended_at=0.0, after="a/b/c/d/e", checked=1, checked_bytes=2, damaged=3, mended=4)


@pytest.mark.parametrize(
    "changed", [{"began_at": float("nan")}, {"checked": 1.5}, {"after": 5}, {"damaged": True}, {"mended": -1}]
)
def test_a_pass_is_what_was_noted_and_with_a_wrong_value_begins_anew(changed):
    noted = json.loads(json.dumps(PASS.model_dump()))
    assert read_pass(noted) == PASS
    assert read_pass(noted | changed) == Pass()
    for nonsense in (None, {}, [1], "text"):
        assert read_pass(nonsense) == Pass()
