"""What is told of one file: stored or not and why, where from, who took it, queues, failures, rules."""

from dataclasses import replace

import pytest
from harness.control import get, limited

from gup.config import Settings
from gup.content.catalog import Catalogues, Listed
from gup.content.key import Variant


@pytest.fixture
def site(world):
    """A world with one manager for French 14.3 RU2, whose catalogue lists the stream."""
    upstream = {"name": "manager", "url": "http://manager:8014", "version": "14.3 RU2", "language": "French"}
    world.now = 1_785_585_600.0  # of 2026-08-01: revisions are not of the future
    given = world.settings.model_dump(by_alias=True) | {"upstream": [upstream]}
    world.settings = Settings.model_validate(given)
    listed = {world.MONIKER: Listed(world.MONIKER, "Client Patch 14.3 RU2", "French", "14.3 RU2")}
    catalogues = Catalogues({"manager": listed}, world.settings.upstream)
    own, before = Variant("14.3 RU2", "French"), world.dependencies
    world.dependencies = lambda admin: replace(
        before(admin), catalogue_rows=lambda: catalogues, places=lambda _stream: [(own, own)]
    )
    return world


async def told(browser, world, of):
    status, found = await get(browser, world, "/api/v1/why", params={"of": of})
    assert status == 200, found
    (file,) = found["files"]
    return file


def path_of(key):
    return f"/content/{key.stream}/{key.revision}/{key.file}"


async def test_of_a_stored_file_it_is_told_where_it_came_from_and_who_took_it(site, browser):
    record = site.commit(site.key("260101001"), b"x" * 1500, at=site.now - 7200)
    key = record.key
    async with site.running() as control:
        fetched = {"upstream": "manager", "resumes": 2, "seconds": 61.0}
        site.tell(type="committed", key=key.text, length=1500, kind="full", **fetched)
        site.tell(type="taken", at=site.now, rows=[["10.0.0.7", key.text, "14.3 RU2", "French", 1]])
        await site.until(lambda: control.state.notes.of(key.text) and len(control.state.clients))
        for of in (key.text, path_of(key), f"http://gup:2967{path_of(key)}"):
            file = await told(browser, site, of)
            assert (file["key"], file["stored"], file["upstream"]) == (key.text, True, "manager")
            assert (file["fetched"]["resumes"], file["fetched"]["seconds"]) == (2, 61.0)
            assert (file["taken"], [row["address"] for row in file["clients"]]) == (1, ["10.0.0.7"])
            assert (file["refusals"], file["failed"], file["waiting"]) == ([], None, None)
        said = " ".join(file["said"])
        for words in (
            "Stored 0 s ago, 1.5 kB, from manager",
            "took 1 min 1 s, resumed 2 times",
            "10.0.0.7 (0 s ago)",
        ):
            assert words in said


async def test_of_a_file_that_is_not_stored_it_is_told_why(site, browser):
    key = site.key("260102001")
    async with site.running() as control:
        file = await told(browser, site, path_of(key))
        assert (file["stored"], file["entry"]) == (False, None)
        assert file["said"] == [
            "Not stored.",
            "No request for it is known since the service started.",
        ]
        site.tell(type="failed", key=key.text, problem="upstream-timeout", detail="silent for 15 s")
        site.tell(type="unstorable", key=key.text, detail="it takes more than cache.max_size", disk=False)
        site.tell(type="rejected", key=key.text, upstream="manager", detail="it is no ZIP file")
        await site.until(control.state.rejections)
        said = " ".join((await told(browser, site, key.text))["said"])
        for words in (
            "upstream-timeout: silent for 15 s",
            "more than cache.max_size",
            "manager sent a body that can't be this file",
        ):
            assert words in said


async def test_queues_and_fills_are_told(site, browser):
    key = site.key("260102001")
    async with site.running() as control:
        control.state.prefetcher.order(path_of(key), None, None)
        assert site.worker_claims.try_claim(key.claim_offset)
        file = await told(browser, site, key.text)
        assert (file["waiting"], file["fill"]) == ("fill", None)
        assert file["prefetch"]["by"] == "operator"
        site.begin_part(key, b"z" * 250, 1000)
        file = await told(browser, site, key.text)
        assert (file["waiting"], file["fill"]["received_bytes"]) == (None, 250)
        assert "It is being fetched from manager; 250 B of 1.0 kB received." in file["said"]


async def test_what_else_is_known_is_told_while_the_disk_refuses_reports(site, browser):
    record = site.commit(site.key("260101001"))
    (site.store.root / "reports").write_text("a file where the folder should be")
    async with site.running():
        file = await told(browser, site, path_of(record.key))
        assert (file["stored"], file["clients"]) == (True, [])


async def test_what_was_purged_is_said_to_be_gone(site, browser):
    record = site.commit(site.key("260101001"))
    async with site.running():
        async with browser.delete(f"{site.url}/api/v1/content/{record.key.text}") as answer:
            assert answer.status == 200
        file = await told(browser, site, record.key.text)
        assert (file["stored"], file["removed"]["detail"]) == (False, "purged by an operator")


async def test_what_was_evicted_is_said_to_be_gone_and_what_came_back_is_not(site, browser):
    record = site.commit(site.key("260101001"))
    async with site.running() as control:
        await site.apply(control, limited(site.settings, max_size=0))
        await site.until(lambda: not control.state.index.rows)
        assert (
            "It was stored, and evicted (size) 0 s ago."
            in (await told(browser, site, record.key.text))["said"]
        )
        await site.apply(control, limited(site.settings, max_size=10**6))
        site.tell_committed(site.commit(site.key("260101001")))
        await site.until(lambda: control.state.index.rows)
        assert (await told(browser, site, record.key.text))["removed"] is None


async def test_whom_a_rule_refuses_is_told_with_the_rule(site, browser):
    key = site.key("260101001")
    async with site.running() as control:
        for client, version in ((1, "12.1 RU6"), (2, "12.1 RU6"), (3, "14.3 RU2")):
            row = [f"10.0.0.{client}", key.text, version, "French", 0]
            site.tell(type="taken", at=site.now, rows=[row])
        await site.until(lambda: len(control.state.clients) == 3)
        file = await told(browser, site, key.text)
        (refused,) = file["refusals"]
        assert (refused["version"], refused["clients"], refused["enforced"]) == ("12.1 RU6", 2, True)
        assert (
            f"2 clients that state 12.1 RU6 and French may not have it, by the rule {refused['rule']}"
            in str(file)
        )


@pytest.mark.parametrize(
    ("of", "status"), [("/secars/x", 404), ("nonsense", 400), ("", 400), ("/content/../x", 404)]
)
async def test_what_is_no_file_of_a_client_s_is_refused(site, browser, of, status):
    async with site.running():
        found, answer = await get(browser, site, "/api/v1/why", params={"of": of})
        assert (found, "of" in answer["detail"]) == (status, True)
