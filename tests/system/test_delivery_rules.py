"""The delivery rules in a running service: who gets what from whom, what is fetched, what is counted."""

import json
from dataclasses import dataclass

import pytest
from harness.clients import Response
from harness.content import noise, zip_of
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer, Gate, ScriptedUpstream

CATALOG = "/content/ContentInfo.txt"
PATCH = "{11111111-1111-1111-1111-111111111111}"
VIRUS = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
TEXTS = "{22222222-2222-2222-2222-222222222222}"
LATE = "{33333333-3333-3333-3333-333333333333}"
REVISION = "260801001"
INDEX = "SEPC$20Virus$20Definitions$20Win64_14.3$20RU2_SymAllLanguages_livetri.zip"
PAYLOAD = "1700000000jtun_sep64.m25"
FRENCH = {"GUP-Client-Version": "14.3 RU2", "GUP-Client-Language": "French"}
ENGLISH = {"GUP-Client-Version": "14.3.5413.3000", "GUP-Client-Language": "en-GB"}
GERMAN = {"GUP-Client-Version": "14.3 RU2", "GUP-Client-Language": "de"}
OLD = {"GUP-Client-Version": "14.3 RU1", "GUP-Client-Language": "fr"}
EQUAL = {"priority": 0}
SETTINGS = {"catalog": {"refresh": "1h"}, "rules": {"mode": "enforce"}}


def path(moniker: str, file: str = "full.zip") -> str:
    return f"/content/{moniker}/{REVISION}/{file}"


def lines(language: str, release: str) -> bytes:
    return (
        f"{PATCH}: SEP Client Patch Win64 {release} - Patch - {language}\r\n"
        f"{VIRUS}: SEPC Virus Definitions Win32 12.1 RU6 - MicroDefsB.CurDefs - SymAllLanguages\r\n"
        f"{TEXTS}: SEP Help Texts {release} - Texts - {language}\r\n"
    ).encode()


def body(moniker: str, language: str) -> bytes:
    return zip_of(f"{moniker} {language}", 20_000)


@dataclass
class Site:
    """A French and an English manager, a LiveUpdate server, and the service in front of them."""

    french: ScriptedUpstream
    english: ScriptedUpstream
    liveupdate: ScriptedUpstream
    gup: Gup

    def get(self, target: str, client: dict[str, str] | None = None, **more) -> Response:
        return self.gup.get(target, client, **more)

    def asked(self, target: str) -> tuple[int, int]:
        return len(self.french.requests(target)), len(self.english.requests(target))


@pytest.fixture
def site(serve) -> Site:
    french, english, liveupdate = (ScriptedUpstream() for _ in range(3))
    for upstream, language, release in ((french, "French", "14.3 RU2"), (english, "English", "14.3 RU3")):
        upstream.table = {
            "name": language[:2].lower(),
            "version": release,
            "language": language,
            "priority": 0,
        }
        upstream.answer(CATALOG, Answer(lines(language, release), etag=f'"{language}"'))
        for moniker in (PATCH, TEXTS, LATE):
            upstream.answer(path(moniker), Answer(body(moniker, language), etag=f'"{language}"'))
        upstream.answer(path(VIRUS), Answer(body(VIRUS, "all"), etag='"all"'))
    liveupdate.table = {"name": "lu", "kind": "liveupdate", "priority": 0}
    for file, text in (
        ("minitri.flg", b"1"),
        (INDEX, zip_of("index", 400)),
        (PAYLOAD, noise("payload", 9000)),
    ):
        liveupdate.answer(f"/{file}", text)
    gup, _ = serve(before=french, behind=[english, liveupdate], **SETTINGS)
    return Site(french, english, liveupdate, gup)


def changed(site: Site, **rules) -> None:
    """Other rules in the file, and a reload."""
    tables = [{"url": one.url, **one.table} for one in (site.french, site.english, site.liveupdate)]
    site.gup.rewrite({"upstream": tables, **SETTINGS, "rules": {"mode": "enforce", **rules}})


def test_each_client_gets_what_its_manager_has_and_nothing_is_mixed(site):
    gup = site.gup
    # at once: nobody may get a patch because the catalogue is not read yet
    assert site.get(path(PATCH), GERMAN).status == 403
    assert site.asked(path(PATCH)) == (0, 0), "who is refused begins no fill"
    for _ in range(2):
        assert site.get(path(PATCH), FRENCH).body == body(PATCH, "French")
        assert site.get(path(PATCH), ENGLISH).body == body(PATCH, "English")
        assert site.get(path(TEXTS), FRENCH).body == body(TEXTS, "French")
        assert site.get(path(TEXTS), ENGLISH).body == body(TEXTS, "English")
        for client in (None, FRENCH, ENGLISH, GERMAN, OLD):
            assert site.get(path(VIRUS), client).body == body(VIRUS, "all")
    answers = [site.get(path(PATCH), FRENCH, **more) for more in ({}, {}, {"method": "HEAD"})]
    answers += [
        site.get(path(PATCH), FRENCH | more) for more in ({"Range": "bytes=0-9"}, {"If-None-Match": "*"})
    ]
    assert [answer.status for answer in answers] == [200, 200, 200, 206, 304]
    chosen_by = "GUP-Client-Version, User-Agent, GUP-Client-Language"
    assert {answer.header("vary") for answer in answers} == {chosen_by}, "caches on the way keep them apart"
    assert site.get(path(VIRUS), FRENCH).header("vary") is None, "and share what is for all"
    assert site.asked(path(PATCH)) == site.asked(path(TEXTS)) == (1, 1)
    assert sum(site.asked(path(VIRUS))) == 1
    assert site.asked(CATALOG) == (1, 1)

    def stored(moniker):
        return sorted(found.split(moniker)[0] for found in gup.bodies() if moniker in found)

    until(lambda: len(gup.bodies()) == 7, "all is committed, and both catalogues")
    assert stored(PATCH) == stored(TEXTS) == ["14.3 RU2/French/", "14.3 RU3/English/"]
    assert stored(VIRUS) == ["any/any/"]
    # in a language of no manager, or undeclared: English is next to all, else by priority and order
    assert site.get(path(TEXTS), GERMAN).body == body(TEXTS, "English")
    assert site.get(path(TEXTS)).body == body(TEXTS, "French")
    assert site.get(path(PATCH)).body == body(PATCH, "French")
    # what a client states never makes a variant
    invented = {"GUP-Client-Version": "99.9", "GUP-Client-Language": "../../Klingon"}
    assert site.get(path(TEXTS), invented).body == body(TEXTS, "French")
    assert len(gup.bodies()) == 7
    assert site.get(CATALOG, ENGLISH).body == lines("English", "14.3 RU3")
    assert site.get(CATALOG, FRENCH).body == lines("French", "14.3 RU2")
    assert site.asked(CATALOG) == (1, 1), "one fetch for controller and clients"


def test_a_refusal_tells_the_ways_out_and_binds_every_way_of_asking(site):
    assert site.get(path(PATCH), FRENCH).status == 200
    refused = site.get(path(PATCH), OLD)
    assert (refused.status, refused.header("content-type")) == (403, "application/problem+json")
    told = json.loads(refused.body)
    assert told["type"] == "urn:gup:problem:rule-refused"
    assert told["rule"] == "version"
    assert told["client"] == {"version": "14.3 RU1", "language": "fr"}
    assert told["fits"] == {"version": "14.3 RU2", "language": "French"}
    assert {r["action"] for r in told["remedies"]} == {"upgrade-client", "liveupdate"}
    assert refused.header("link") == f'<{site.liveupdate.url}>; rel="alternate"'
    assert refused.header("cache-control") == "no-store"
    agent = {"User-Agent": "Mozilla/4.0 (SEP/14.3.3384.1000; x)", "GUP-Client-Language": "French"}
    assert site.get(path(PATCH), agent).status == 403
    assert site.get(path(PATCH), OLD, method="HEAD").status == 403
    assert site.get(path(PATCH), OLD | {"Range": "bytes=0-9"}).status == 403
    assert site.get(path(PATCH), OLD | {"If-None-Match": "*"}).status == 403
    assert site.get(site.french.url + path(PATCH), OLD).status == 403
    assert site.get(path(PATCH).replace("{", "%7b").lower(), OLD).status == 403
    assert site.get(path(PATCH, "xdelta1_To_2.dax"), GERMAN).status == 403
    assert site.get(path(PATCH), FRENCH | {"Range": "bytes=0-9"}).body == body(PATCH, "French")[:10]
    metrics = site.gup.metrics()
    assert metrics("gup_rule_refusals_total", rule="version", mode="enforce") == 7
    assert metrics("gup_rule_refusals_total", rule="language", mode="enforce") == 1
    assert metrics("gup_rule_refusals_total") == 8
    assert metrics("gup_requests_total", result="refused", code="403") == 8
    assert site.asked(path(PATCH)) == (1, 0)
    query = f"moniker={PATCH[1:-1]}&client_version=14.3+RU1&client_language=fr"
    status, explained = site.gup.api(f"/api/v1/rules/explain?{query}")
    assert status == 200
    assert (explained["allowed"], explained["served_from"], explained["mode"]) == (False, None, "enforce")
    rules = {answer["upstream"]: answer["rule"] for answer in explained["decisions"]}
    assert rules == {"fr": "version", "en": "version", "lu": None}
    assert explained["decisions"][0]["catalogue"] == site.french.url + CATALOG
    assert {k: told[k] for k in ("rule", "client", "fits", "remedies")} == {
        k: explained["decisions"][0][k] for k in ("rule", "client", "fits", "remedies")
    }
    for wrong in ("moniker=x", "", f"{query}&upstream=nobody"):
        assert site.gup.api(f"/api/v1/rules/explain?{wrong}")[0] == 400
    _, one = site.gup.api(f"/api/v1/rules/explain?moniker={PATCH}&client_language=en&upstream=en")
    assert [answer["upstream"] for answer in one["decisions"]] == ["en"]
    assert one["served_from"] == "en"
    assert site.gup.log.count("refused by the rule version") <= 4, "once a worker for each sort of client"


def test_a_reload_drops_decisions_and_report_only_counts(site):
    gup = site.gup
    assert site.get(path(PATCH), FRENCH).status == 200
    for _ in range(4):
        assert site.get(path(PATCH), GERMAN).status == 403
    changed(site, mode="report")
    until(lambda: site.get(path(PATCH), GERMAN).status == 200, "the new rules hold", 10)
    until(lambda: gup.log.count("settings reloaded") == 1, "all were told")
    counted = gup.metric("gup_rule_refusals_total", mode="report")
    for _ in range(10):  # from the hot cache too
        assert site.get(path(PATCH), GERMAN).body == body(PATCH, "French")
    assert gup.metric("gup_rule_refusals_total", mode="report") == counted + 10
    gup.wait_log("would be refused by the rule language")
    changed(site, download_client_patches=False)
    until(lambda: site.get(path(PATCH), FRENCH).status == 403, "client patches are off", 10)
    told = json.loads(site.get(path(PATCH), FRENCH).body)
    assert told["rule"] == "client_patches_off"
    assert site.get(path(VIRUS), FRENCH).status == 200
    changed(site, mode="off")
    until(lambda: site.get(path(PATCH), GERMAN).status == 200, "the rules are off", 10)


def test_an_unlisted_moniker_is_looked_for_once_and_a_changed_catalogue_fetches_nothing_anew(site):
    gup = site.gup
    assert site.get(path(LATE), GERMAN).status == 200, "unlisted: no rule binds it"
    until(lambda: site.asked(CATALOG) == (2, 2), "the catalogues are read again", 20)
    assert [seen.status for seen in site.french.requests(CATALOG)] == [200, 304]
    for upstream, language, release in (
        (site.french, "French", "14.3 RU2"),
        (site.english, "English", "14.3 RU3"),
    ):
        more = f"{LATE}: SEP Client Patch Win32 {release} - Late - {language}\n".encode()
        upstream.answer(CATALOG, Answer(lines(language, release) + more, etag=f'"{language} 2"'))
    assert site.get(path(LATE), GERMAN).status == 200
    changed(site)
    until(lambda: site.get(path(LATE), GERMAN).status == 403, "the new catalogue holds", 20)
    asked = site.asked(path(LATE))
    assert site.get(path(LATE), ENGLISH).body == body(LATE, "English")
    assert site.asked(path(LATE)) == asked
    rows = {upstream["name"]: upstream["catalogue"] for upstream in gup.status()["upstreams"]}
    assert (rows["fr"]["streams"], rows["fr"]["problem"], rows["lu"]) == (4, None, None)


def test_liveupdate_has_its_own_space_and_serves_every_client(site):
    for client in (None, OLD, GERMAN):
        assert site.get(f"/{PAYLOAD}", client).body == noise("payload", 9000)
        assert site.get(f"/{INDEX}", client).body == zip_of("index", 400)
        assert site.get("/minitri.flg", client).body == b"1"
    assert len(site.liveupdate.requests(f"/{PAYLOAD}")) == 1
    assert not site.french.requests(f"/{PAYLOAD}") + site.english.requests(f"/{INDEX}")
    assert not site.liveupdate.requests(), "and no content is asked of it"
    site.gup.wait_stored(INDEX)
    assert f"14.3 RU2/SymAllLanguages/liveupdate/_/{INDEX}" in site.gup.bodies()
    code, found = site.gup.api("/api/v1/content?stream=liveupdate")
    assert code == 200
    named = {row["file"]: (row["product"], row["version"], row["language"]) for row in found["entries"]}
    assert named[INDEX] == ("SEPC Virus Definitions Win64", "14.3 RU2", "SymAllLanguages")


def test_what_is_for_all_languages_comes_from_any_manager_and_goes_on_without_its_leader(site):
    gup, gate = site.gup, Gate()
    content = body(VIRUS, "all")
    for upstream in (site.french, site.english):
        upstream.answer(path(VIRUS), Answer(content, etag='"all"', gates=((12_000, gate),)))
    client = gup.connect()
    client.ask(path(VIRUS), ENGLISH)
    gate.wait_reached()
    assert client.head().status == 200, "the fill is under way"
    gup.kill_worker(gup.worker_of(client))
    gate.open()
    gup.wait_stored("full.zip", timeout_seconds=30)  # nobody asks: the controller goes on, whom no rule binds
    assert f"any/any/{VIRUS}/{REVISION}/full.zip" in gup.bodies()
    stored = gup.cache_dir / "content" / "any" / "any" / VIRUS / REVISION / "full.zip"
    stored.write_bytes(b"x" * len(content))
    assert gup.api("/api/v1/verify?repair=1", method="POST")[0] == 202
    until(lambda: gup.api("/api/v1/verify")[1]["ended_at"], "all is verified", 20)
    told = gup.api("/api/v1/verify")[1]
    assert (told["damaged"], told["mended"]) == (1, 1), told
    assert stored.read_bytes() == content, "mended, with no variant of its own to ask"
    delta = path(VIRUS, "xdelta260701001_To_260801001.dax")
    site.english.answer(delta, Answer(noise("delta", 900), etag='"d"'))
    site.french.stop()
    assert site.get(delta, FRENCH).body == noise("delta", 900), "the French manager is down"
    assert site.get(path(TEXTS), FRENCH).status == 502, "and only it has French texts"
