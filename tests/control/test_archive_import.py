"""Archives over the API: sent out for a site, taken in within the limits, broken off."""

import asyncio
import tarfile

from control.calls import ask

from gup.cache.archive import summary
from gup.config import Settings
from gup.content.key import Kind


async def exported(browser, world, query=""):
    async with browser.get(f"{world.url}/api/v1/export{query}") as answer:
        assert (answer.status, answer.content_type) == (200, "application/x-tar")
        return await answer.read()


async def imported(browser, world, text):
    return await ask(browser, world, "POST", "/api/v1/import", data=text)


async def purge_all(browser, world, control):
    for key in list(control.state.index.rows):
        assert (await ask(browser, world, "DELETE", f"/api/v1/content/{key}"))[0] == 200
    assert control.state.index.rows == {}


async def test_an_export_for_a_site_has_what_is_for_all_and_counts_the_rest(world, browser, tmp_path):
    every = {"version": "any", "language": "any"}
    mine = [world.key(), world.key("260101002", **every), world.key("_", "ContentInfo.txt", language="any")]
    others = [
        *(world.key(f"26010100{n}", language="German") for n in range(3)),
        world.key(version="14.3 RU3"),
        world.key("260101002", "xdelta260101001_To_260101002.dax"),
    ]
    for key in [*mine, *others[:-1]]:
        world.commit(key)
    world.commit(others[-1], kind=Kind.DELTA)
    async with world.running():
        query = "?version=14.3%20RU2&language=fr"
        (tmp_path / "a.tar").write_bytes(await exported(browser, world, query))
        (tmp_path / "b.tar").write_bytes(await exported(browser, world, f"{query}&kind=full"))
    not_wanted = {"it is for German": 3, "it is for 14.3 RU3": 1}
    with tarfile.open(tmp_path / "a.tar") as archive:
        bodies = {name for name in archive.getnames() if name.startswith("content/") and "/." not in name}
    assert bodies == {f"content/{key.text}" for key in (*mine, others[-1])}
    assert summary(tmp_path / "a.tar")["not_wanted"] == not_wanted
    assert summary(tmp_path / "b.tar")["not_wanted"] == not_wanted | {"it is not of that kind": 1}


async def test_an_import_evicts_nothing_and_waits_for_nobody(world, browser):
    world.commit(world.key("260101001"), b"a" * 600_000)
    held = world.commit(world.key("260101002"), b"b" * 1000)
    async with world.running() as control:
        text = await exported(browser, world)
        await purge_all(browser, world, control)
        assert world.worker_claims.try_claim(held.key.claim_offset)
        limited = world.settings.cache.model_copy(update={"max_size": 500_000})
        await world.apply(control, Settings.model_copy(world.settings, update={"cache": limited}))
        _, told = await imported(browser, world, text)
        assert {row["why"].split(" (")[0].split(",")[0] for row in told["refused"]} == {
            "cache.max_size",
            "it is being fetched; import it again later",
        }
        assert (told["imported"], control.state.index.rows) == (0, {})
        world.worker_claims.release(held.key.claim_offset)


async def test_a_sender_that_goes_leaves_whole_entries_and_frees_the_way(world, browser):
    world.commit(world.key("260101001"), b"a" * 1000)
    world.commit(world.key("260101002"), b"b" * 900_000)
    async with world.running() as control:
        text = await exported(browser, world)
        await purge_all(browser, world, control)
        begun = asyncio.Event()

        async def pieces():
            yield text[:100_000]
            begun.set()
            await asyncio.Event().wait()

        sending = asyncio.create_task(imported(browser, world, pieces()))
        await begun.wait()
        await world.until(lambda: len(control.state.index.rows) == 1)
        assert (await imported(browser, world, text))[0] == 409
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        while True:  # until its thread has ended
            if (await imported(browser, world, text))[0] == 200:
                break
            await asyncio.sleep(0.02)
        assert len(control.state.index.rows) == 2
        assert list(world.store.partial.glob("*.tmp")) == []


async def test_the_control_plane_stops_while_an_archive_is_coming(world, browser, monkeypatch):
    monkeypatch.setattr("gup.control.service._SHUTDOWN_SECONDS", 0.1)
    world.commit(world.key("260101001"), b"a" * 1000)
    begun = asyncio.Event()
    async with world.running():
        text = await exported(browser, world)

        async def pieces():
            yield text[:700]
            begun.set()
            await asyncio.Event().wait()

        sending = asyncio.create_task(imported(browser, world, pieces()))
        await begun.wait()
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
