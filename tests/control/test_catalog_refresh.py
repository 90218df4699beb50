"""How catalogues are kept: when they are read, what stays of a good one, who is told."""

import asyncio
import contextlib
import json
from dataclasses import dataclass, field

import pytest

from gup.cache.catalog_cache import FILE, read_kept
from gup.config import Settings
from gup.control.catalog_refresh import CatalogRefresher
from gup.upstream.download import Fetched
from gup.upstream.exchange import UpstreamFailure

MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
LINE = (
    b"{535CB6A4-441F-4e8a-A897-804CD859100E}: SEPC Virus Definitions Win32 12.1 RU6 - X - SymAllLanguages\r\n"
)
STREAM = ("any", "any", MONIKER)
OTHER = "{07B590B3-9282-482F-BBAA-6D515D385869}"


@dataclass
class Managers:
    """What the upstreams answer, and what they were asked."""

    run: object
    answers: dict[str, Fetched | UpstreamFailure] = field(default_factory=dict)
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    published: int = 0

    async def look(self, name):
        return await self.fetch(name, "by way of the store", None)

    async def fetch(self, name, etag, last_modified):
        self.asked.append((name, etag, last_modified))
        gone = UpstreamFailure("unreachable", "upstream-unreachable", "gone", again=True)
        answer = self.answers.get(name, gone)
        if isinstance(answer, UpstreamFailure):
            raise answer
        return answer

    def publish(self):
        self.published += 1

    def keeper(self, catalog=None, names=("fr",)):
        return CatalogRefresher(
            self.run, settings(catalog, names), self.look, self.fetch, self.publish, wall_clock=lambda: 7.0
        )


def settings(catalog=None, names=("fr",), **more):
    upstreams = [{"name": name, "url": f"http://{name}:8014"} for name in names]
    liveupdate = {"name": "lu", "url": "http://lu", "kind": "liveupdate"}
    return Settings.model_validate({"upstream": [*upstreams, liveupdate], "catalog": catalog or {}} | more)


@pytest.fixture
def managers(tmp_path):
    return Managers(tmp_path)


async def test_the_last_good_one_stays_and_outlives_the_process(managers):
    managers.answers["fr"] = Fetched(LINE, '"1"', "Mon, 01 Jan 2026 00:00:00 GMT")
    keeper = managers.keeper()
    await keeper.read()
    label = keeper.label(STREAM)
    assert (label.product, label.language) == ("SEPC Virus Definitions Win32 12.1 RU6", "SymAllLanguages")
    assert keeper.label(("any", "any", MONIKER)).type == "virus_definitions"
    assert managers.published == 1
    for worse in (
        UpstreamFailure("timeout", "upstream-timeout", "fr did not answer in time", again=False),
        Fetched(b"<html>no catalogue</html>"),
        Fetched(b""),
    ):
        managers.answers["fr"] = worse
        await keeper.read()
        assert keeper.label(STREAM) is not None
        assert keeper.shown()["fr"]["problem"]
    assert managers.asked == [("fr", "by way of the store", None)] * 4
    keeper.unlisted(OTHER)
    await keeper.read()
    assert managers.asked[4:] == [("fr", '"1"', "Mon, 01 Jan 2026 00:00:00 GMT")]
    assert managers.published == 1, "nothing has changed for the workers"
    again = managers.keeper()
    assert again.label(STREAM) is not None, "before anybody was asked"
    managers.answers["fr"] = Fetched(None, '"1"', None)
    await again.read()
    assert again.shown()["fr"] == {
        "source": "http://fr:8014/content/ContentInfo.txt",
        "streams": 1,
        "read_at": 7.0,
        "problem": None,
    }


async def test_who_has_none_is_known_to_have_none(managers):
    managers.answers["en"] = Fetched(LINE)
    keeper = managers.keeper(names=("fr", "en"))
    await keeper.read()
    kept = read_kept(managers.run)
    assert kept["fr"].rows is None
    assert kept["fr"].problem == "gone"
    assert list(kept["en"].rows) == [MONIKER]
    spelled = kept["en"].rows[MONIKER].moniker
    assert spelled == "{535CB6A4-441F-4e8a-A897-804CD859100E}", "as the manager spells it"
    assert "lu" not in kept, "LiveUpdate has no catalogue"
    assert managers.published == 1


async def test_another_server_under_the_same_name_has_not_the_old_one_s_streams(managers):
    managers.answers["fr"] = Fetched(LINE, '"1"')
    keeper = managers.keeper()
    await keeper.read()
    del managers.answers["fr"]
    changed = settings().model_dump()
    changed["upstream"][0]["url"] = "http://new:8014"
    keeper.apply(Settings.model_validate(changed))
    await keeper.read()
    assert keeper.label(STREAM) is None
    assert managers.asked[-1] == ("fr", None, None), "past the store: who reloads wants what is there now"
    assert managers.published == 2


async def test_a_file_stands_for_all_managers_and_nobody_is_asked(managers, tmp_path):
    file = tmp_path / "ContentInfo.txt"
    file.write_bytes((LINE.decode()).encode("utf-16"))
    keeper = managers.keeper({"file": str(file)}, ("fr", "en"))
    await keeper.read()
    assert keeper.catalogues.listed("en", MONIKER) == keeper.catalogues.listed("fr", MONIKER)
    file.unlink()
    await keeper.read()
    assert keeper.label(STREAM) is not None
    assert "can't be read: No such file" in keeper.shown()["fr"]["problem"]
    assert not managers.asked


async def test_no_refresh_reads_no_manager(managers):
    keeper = managers.keeper({"refresh": "0"})
    await keeper.read()
    assert not managers.asked
    assert read_kept(managers.run)["fr"].rows is None


@contextlib.asynccontextmanager
async def keeping(keeper):
    task = asyncio.create_task(keeper.keep())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def asked(managers, times):
    async with asyncio.timeout(20):
        while len(managers.asked) < times:  # noqa: ASYNC110 - nothing to wait on: it only counts
            await asyncio.sleep(0.002)


async def test_the_unlisted_is_looked_for_once_in_the_background(managers, monkeypatch):
    monkeypatch.setattr("gup.control.catalog_refresh._LEAST_GAP_SECONDS", 0.05)
    managers.answers["fr"] = Fetched(LINE)
    keeper = managers.keeper()
    async with keeping(keeper):
        await asked(managers, 1)
        keeper.unlisted(MONIKER)
        managers.answers["fr"] = Fetched(LINE + LINE.replace(b"{535CB6A4", b"{07B590B3"))
        keeper.unlisted(OTHER)
        keeper.unlisted(OTHER)
        await asked(managers, 2)
        keeper.unlisted(OTHER)
        keeper.apply(settings(names=("fr", "en")))
        await asked(managers, 4)
    assert [name for name, _, _ in managers.asked] == ["fr", "fr", "fr", "en"]


def test_a_damaged_file_is_as_good_as_none(tmp_path):
    rows = (["[]"], [[]], [[5, "p", "l", ""]], [["{A}"]], [["{A}", 5, "l", ""]], [{"a": "b"}], "{A}")
    damaged = [{"format": 1, "upstreams": {"fr": {"source": "s", "rows": one}}} for one in rows]
    for text in (b"", b"{", b"[]", b'{"format": 2}', b'{"format": 1, "upstreams": {"fr": {"source": 1}}}'):
        (tmp_path / FILE).write_bytes(text)
        assert read_kept(tmp_path) == {}
    for document in damaged:
        (tmp_path / FILE).write_text(json.dumps(document))
        assert read_kept(tmp_path) == {}, document
    whole = {"source": "s", "rows": [["{A}", "p", "l", ""]], "read_at": 1}
    whole |= dict.fromkeys(("problem", "etag", "last_modified"))
    (tmp_path / FILE).write_text(json.dumps({"format": 1, "upstreams": {"fr": whole}}))
    assert read_kept(tmp_path)["fr"].rows["{A}"].product == "p"
