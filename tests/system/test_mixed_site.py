"""A site of mixed clients before three managers and LiveUpdate: each client gets what the rules give it.

The table is written out by hand: it is the rules as an administrator reads them, not as the program has them.
"""

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from harness.clients import RawConnection, Response
from harness.content import INDEX as CATALOG
from harness.content import MONIKER as VIRUS
from harness.content import noise, zip_of
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer, Gate, ScriptedUpstream

MANAGERS = {"fr": ("14.3 RU2", "French"), "en": ("14.3 RU3", "English"), "de": ("14.3 RU2", "German")}
PATCH = "{11111111-1111-1111-1111-111111111111}"
TEXTS = "{22222222-2222-2222-2222-222222222222}"
LATE = "{33333333-3333-3333-3333-333333333333}"
FULL, DELTA = "full.zip", "xdelta260701001_To_260801001.dax"
INDEX = "SEPC$20Virus$20Definitions$20Win64_14.3$20RU2_SymAllLanguages_livetri.zip"
PAYLOAD = "1700000000jtun_sep64.m25"
LIVEUPDATE = {"minitri.flg": b"1", INDEX: zip_of("index", 400), PAYLOAD: noise("payload", 9000)}
AT_ONCE = 16
SETTINGS = {"catalog": {"refresh": "1h"}, "log": {"access": "off"}}


def stated(version: str = "", language: str = "", **fields: str) -> dict[str, str]:
    own = {"GUP-Client-Version": version, "GUP-Client-Language": language}
    return {name: text for name, text in own.items() if text} | {
        name.replace("_", "-"): text for name, text in fields.items()
    }


FRENCH, ENGLISH = stated("14.3 RU2", "French"), stated("14.3.5413.3000", "en-GB")
ITALIAN, OLD = stated("14.3 RU2", "it"), stated("14.3 RU1", "fr")
CASES = [
    # what a client states, who gives it client patches or which rule refuses them, who gives it other content
    (FRENCH, "fr", "fr"),
    (stated("14.3.4700.2000", "fr-CA"), "fr", "fr"),
    (stated("14.3 RU3", "English"), "en", "en"),
    (stated(language="en-GB", User_Agent="Mozilla/4.0 (compatible; SEP/14.3.5413.3000; x64)"), "en", "en"),
    (stated("14.3 RU2", "Deutsch"), "de", "de"),
    (stated("14.3 RU2", "Italian"), "language", "en"),  # of no manager's language: English is next to all
    (stated("14.3 RU3", "French"), "version", "fr"),
    (stated("14.3 RU2", "English"), "version", "en"),
    (stated("14.3 RU1", "German"), "version", "de"),
    (stated("14.3.558.0000", "fr"), "version", "fr"),
    (stated(), "fr", "fr"),  # nothing stated: served, by the first manager
    (stated("14.3 RU3"), "en", "en"),
    (stated(language="de-AT"), "de", "de"),
    (stated("newest", "whatever"), "fr", "fr"),  # what can't be read counts as not stated
    (stated("99.9", "../../Klingon"), "version", "fr"),  # and makes no variant
    (stated("14.3 RU2", "SymAllLanguages"), "fr", "fr"),
    (stated(Accept_Language="de, en;q=0.5"), "fr", "fr"),  # Windows' language; not a source unless set
]
RULES = ("language", "version")
SHELF = [(PATCH, FULL), (PATCH, DELTA), (TEXTS, FULL), (VIRUS, FULL), (VIRUS, DELTA)]


def path(moniker: str, file: str = FULL) -> str:
    return f"/content/{moniker}/260801001/{file}"


def body(moniker: str, manager: str, file: str = FULL) -> bytes:
    """Of what is for all languages all managers have the same."""
    seed = f"{moniker} {'all' if moniker == VIRUS else manager}"
    return zip_of(seed, 20_000) if file == FULL else noise(seed, 3_000)


def lines(manager: str, more: str = "") -> bytes:
    release, language = MANAGERS[manager]
    return (
        f"{PATCH}: SEP Client Patch Win64 {release} - Patch - {language}\r\n"
        f"{TEXTS}: SEP Help Texts {release} - Texts - {language}\r\n"
        f"{VIRUS}: SEPC Virus Definitions Win32 12.1 RU6 - MicroDefsB.CurDefs - SymAllLanguages\r\n{more}"
    ).encode()


@dataclass
class Site:
    """The managers, a LiveUpdate server, and the service in front of them."""

    managers: dict[str, ScriptedUpstream]
    liveupdate: ScriptedUpstream
    gup: Gup

    def get(self, target: str, client: dict[str, str] | None = None, **more) -> Response:
        return self.gup.get(target, client, **more)

    def asked(self, target: str) -> list[int]:
        """By French, English and German."""
        return [len(upstream.requests(target)) for upstream in self.managers.values()]

    def change(self, **rules) -> None:
        """Other rules in the file, and a reload."""
        all_ = (*self.managers.values(), self.liveupdate)
        tables = [{"url": one.url, **one.table} for one in all_]
        self.gup.rewrite({"upstream": tables, **SETTINGS, "rules": rules})


@pytest.fixture
def site(serve) -> Site:
    managers, liveupdate = {name: ScriptedUpstream() for name in MANAGERS}, ScriptedUpstream()
    for name, upstream in managers.items():
        version, language = MANAGERS[name]
        upstream.table = {"name": name, "version": version, "language": language, "priority": 0}
        upstream.answer(CATALOG, Answer(lines(name), etag=f'"{name}"'))
        for moniker, file in (*SHELF, (LATE, FULL)):
            upstream.answer(path(moniker, file), Answer(body(moniker, name, file), etag=f'"{name}{file}"'))
    liveupdate.table = {"name": "lu", "kind": "liveupdate", "priority": 0}
    for file, text in LIVEUPDATE.items():
        liveupdate.answer(f"/{file}", text)
    first, *behind = managers.values()
    gup, _ = serve(before=first, behind=[*behind, liveupdate], **SETTINGS)
    return Site(managers, liveupdate, gup)


@dataclass
class Seen:
    """What all clients came to, as they saw it themselves."""

    answers: Counter[tuple[int, str]] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    body_bytes: int = 0
    wrong: list[str] = field(default_factory=list)


def asked_by(gup: Gup, number: int, chance: random.Random) -> list[tuple]:
    """A client with an address of its own asks for everything, in an order and a manner of its own."""
    headers, patches, others = CASES[number % len(CASES)]
    headers = {"User-Agent": f"client-{number}"} | headers
    own = f"127.{1 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}"
    found = []
    with RawConnection(gup.data, source=own) as client:
        for moniker, file in chance.sample(SHELF, len(SHELF)):
            manner = chance.choice(("GET", "GET", "HEAD", "range"))
            more = {"Range": "bytes=100-199"} if manner == "range" else {}
            method = "HEAD" if manner == "HEAD" else "GET"
            response = client.get(path(moniker, file), headers | more, method=method)
            source = patches if moniker == PATCH else others
            found.append((headers, moniker, file, manner, source, response.status, response.body))
    return found


def check(seen: Seen, row: tuple) -> None:
    headers, moniker, file, manner, source, status, got = row
    seen.answers[status, manner] += 1
    if source in RULES:
        seen.refusals[source] += 1
        if (status, json.loads(got)["rule"] if got else source) != (403, source):
            seen.wrong.append(f"{headers} {moniker} {file} {manner}: {status} in place of 403 {source}")
        return
    seen.body_bytes += len(got)
    whole = body(moniker, source, file)
    wanted = {"GET": (200, whole), "HEAD": (200, b""), "range": (206, whole[100:200])}[manner]
    if (status, got) != wanted:
        seen.wrong.append(f"{headers} {moniker} {file} {manner}: {status}, {len(got)} bytes, not {source}'s")


def crowd(gup: Gup, clients: int) -> Seen:
    """All clients, so many at once, those of the table mixed."""
    seen, numbers = Seen(), list(range(clients))
    random.Random(clients).shuffle(numbers)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for rows in pool.map(lambda n: asked_by(gup, n, random.Random(f"{clients} {n}")), numbers):
            for row in rows:
                check(seen, row)
    return seen


@pytest.mark.parametrize("clients", [255, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.timeout(600)
def test_every_client_gets_what_the_table_says_and_nothing_is_fetched_twice(site, clients):
    gup = site.gup
    # at once: nobody may get a patch because the catalogue is not read yet
    assert site.get(path(PATCH), ITALIAN).status == 403
    assert site.asked(path(PATCH)) == [0, 0, 0], "who is refused begins no fill"
    seen = crowd(gup, clients)
    assert not seen.wrong, "\n".join(seen.wrong[:10])
    assert sum(seen.answers.values()) == clients * len(SHELF)
    seen.refusals["language"] += 1
    seen.answers[403, "at once"] += 1
    gup.wait_metric(seen.body_bytes, "gup_client_sent_bytes_total")  # counted after it was sent
    metrics = gup.metrics()
    for rule in RULES:
        assert metrics("gup_rule_refusals_total", rule=rule, mode="enforce") == seen.refusals[rule]
    assert metrics("gup_rule_refusals_total") == seen.refusals.total()
    for code in (200, 206, 403):
        answers = sum(count for (status, _), count in seen.answers.items() if status == code)
        assert metrics("gup_requests_total", code=str(code)) == answers
    received = sum(request.body_bytes for m in site.managers.values() for request in m.requests())
    assert metrics("gup_upstream_received_bytes_total") == received
    streams = {dict(labels)["language"] for labels in metrics.series("gup_stream_sent_bytes_total")}
    assert streams == {"French", "English", "German", "SymAllLanguages"}
    gup.wait_metric(clients + 1, "gup_clients_seen", 20.0, window="1h")
    # each manager's own is fetched once, what all have once in all; clients and controller share a catalogue
    assert {site.get(CATALOG, CASES[n][0]).body == lines(name) for n, name in ((0, "fr"), (2, "en"))} == {
        True
    }
    for moniker, file in SHELF:
        if moniker == VIRUS:
            assert sum(site.asked(path(moniker, file))) == 1
        else:
            assert site.asked(path(moniker, file)) == [1, 1, 1], (moniker, file)
    assert site.asked(CATALOG) == [1, 1, 1]
    assert sum(len(m.requests()) for m in site.managers.values()) == 3 * 3 + 2 + 3
    # and stored by variant
    until(lambda: len(gup.bodies()) == 3 * 3 + 2 + 3, "all is committed, and the catalogues")
    variants = [f"{version}/{language}/" for version, language in sorted(MANAGERS.values())]
    for moniker, where in ((TEXTS, variants), (VIRUS, ["any/any/"])):
        found = [key for key in gup.bodies() if moniker in key and key.endswith(FULL)]
        assert sorted(key.split(moniker)[0] for key in found) == where


def test_variants_are_told_and_kept_apart_for_caches_on_the_way(site):
    assert site.get(path(PATCH), FRENCH).status == 200
    more = ({}, {"Range": "bytes=0-9"}, {"If-None-Match": "*"})
    answers = [
        site.get(path(PATCH), FRENCH, method="HEAD"),
        *(site.get(path(PATCH), FRENCH | m) for m in more),
    ]
    assert [answer.status for answer in answers] == [200, 200, 206, 304]
    chosen_by = "GUP-Client-Version, User-Agent, GUP-Client-Language"
    assert {answer.header("vary") for answer in answers} == {chosen_by}
    assert site.get(path(VIRUS), FRENCH).header("vary") is None, "what is for all is shared"


def test_a_refusal_tells_the_ways_out_and_binds_every_way_of_asking(site):
    french = site.managers["fr"]
    assert site.get(path(PATCH), FRENCH).status == 200
    refused = site.get(path(PATCH), OLD)
    assert (refused.status, refused.header("content-type")) == (403, "application/problem+json")
    told = json.loads(refused.body)
    fits = {"version": "14.3 RU2", "language": "French"}
    assert (told["type"], told["rule"], told["fits"]) == ("urn:gup:problem:rule-refused", "version", fits)
    assert told["client"] == {"version": "14.3 RU1", "language": "fr"}
    assert {r["action"] for r in told["remedies"]} == {"upgrade-client", "liveupdate"}
    assert refused.header("link") == f'<{site.liveupdate.url}>; rel="alternate"'
    assert refused.header("cache-control") == "no-store"
    agent = {"User-Agent": "Mozilla/4.0 (SEP/14.3.3384.1000; x)", "GUP-Client-Language": "French"}
    ways = [site.get(path(PATCH), OLD, method="HEAD")]
    ways += [
        site.get(path(PATCH), h) for h in (agent, OLD | {"Range": "bytes=0-9"}, OLD | {"If-None-Match": "*"})
    ]
    spelled = (french.url + path(PATCH), path(PATCH).replace("{", "%7b").lower())
    ways += [site.get(target, OLD) for target in spelled]
    ways.append(site.get(path(PATCH, "xdelta1_To_2.dax"), ITALIAN))
    assert [answer.status for answer in ways] == [403] * 7
    assert site.get(path(PATCH), FRENCH | {"Range": "bytes=0-9"}).body == body(PATCH, "fr")[:10]
    metrics = site.gup.metrics()
    assert metrics("gup_rule_refusals_total", rule="version", mode="enforce") == 7
    assert metrics("gup_rule_refusals_total", rule="language", mode="enforce") == 1
    assert metrics("gup_rule_refusals_total") == 8
    assert metrics("gup_requests_total", result="refused", code="403") == 8
    assert site.asked(path(PATCH)) == [1, 0, 0]

    # the same by the API
    def explained(query: str, status: int = 200):
        code, found = site.gup.api(f"/api/v1/rules/explain?{query}")
        assert code == status, found
        return found

    query = f"moniker={PATCH[1:-1]}&client_version=14.3+RU1&client_language=fr"
    found = explained(query)
    assert (found["allowed"], found["served_from"], found["mode"]) == (False, None, "enforce")
    rules = {answer["upstream"]: answer["rule"] for answer in found["decisions"]}
    assert rules == {"fr": "version", "en": "version", "de": "version", "lu": None}
    assert found["decisions"][0]["catalogue"] == french.url + CATALOG
    for name in ("rule", "client", "fits", "remedies"):
        assert told[name] == found["decisions"][0][name]
    for wrong in ("moniker=x", "", f"{query}&upstream=nobody"):
        explained(wrong, 400)
    one = explained(f"moniker={PATCH}&client_language=en&upstream=en")
    assert ([answer["upstream"] for answer in one["decisions"]], one["served_from"]) == (["en"], "en")
    assert site.gup.log.count("refused by the rule version") <= 4, "once a worker for each sort of client"


def test_a_reload_drops_decisions_and_report_only_counts(site):
    gup, refusals = site.gup, ("gup_rule_refusals_total", {"mode": "report"})
    assert site.get(path(PATCH), FRENCH).status == 200
    assert [site.get(path(PATCH), ITALIAN).status for _ in range(4)] == [403] * 4
    site.change(mode="report")
    until(lambda: site.get(path(PATCH), ITALIAN).status == 200, "the new rules hold", 10)
    until(lambda: gup.log.count("settings reloaded") == 1, "all were told")
    counted = gup.metric(refusals[0], **refusals[1])
    bodies = {site.get(path(PATCH), ITALIAN).body for _ in range(10)}  # from the hot cache too
    assert bodies == {body(PATCH, "fr")}
    assert gup.metric(refusals[0], **refusals[1]) == counted + 10
    gup.wait_log("would be refused by the rule language")
    site.change(download_client_patches=False)
    until(lambda: site.get(path(PATCH), FRENCH).status == 403, "client patches are off", 10)
    assert json.loads(site.get(path(PATCH), FRENCH).body)["rule"] == "client_patches_off"
    assert site.get(path(VIRUS), FRENCH).status == 200
    site.change(mode="off")
    until(lambda: site.get(path(PATCH), ITALIAN).status == 200, "the rules are off", 10)


def test_an_unlisted_moniker_is_looked_for_once_and_a_changed_catalogue_fetches_nothing_anew(site):
    gup = site.gup
    assert site.get(path(LATE), ITALIAN).status == 200, "unlisted: no rule binds it"
    until(lambda: site.asked(CATALOG) == [2, 2, 2], "the catalogues are read again", 20)
    assert [seen.status for seen in site.managers["fr"].requests(CATALOG)] == [200, 304]
    for name, upstream in site.managers.items():
        release, language = MANAGERS[name]
        more = f"{LATE}: SEP Client Patch Win32 {release} - Late - {language}\n"
        upstream.answer(CATALOG, Answer(lines(name, more), etag=f'"{language} 2"'))
    assert site.get(path(LATE), ITALIAN).status == 200
    site.change()
    until(lambda: site.get(path(LATE), ITALIAN).status == 403, "the new catalogue holds", 20)
    asked = site.asked(path(LATE))
    assert site.get(path(LATE), ENGLISH).body == body(LATE, "en")
    assert site.asked(path(LATE)) == asked
    rows = {upstream["name"]: upstream["catalogue"] for upstream in gup.status()["upstreams"]}
    assert (rows["fr"]["streams"], rows["fr"]["problem"], rows["lu"]) == (4, None, None)


def test_liveupdate_has_its_own_space_and_serves_every_client(site):
    for client in (None, OLD, ITALIAN):
        assert {file: site.get(f"/{file}", client).body for file in LIVEUPDATE} == LIVEUPDATE
    assert len(site.liveupdate.requests(f"/{PAYLOAD}")) == 1
    assert site.asked(f"/{PAYLOAD}") == site.asked(f"/{INDEX}") == [0, 0, 0]
    assert not site.liveupdate.requests(), "and no content is asked of it"
    site.gup.wait_stored(INDEX)
    assert f"14.3 RU2/SymAllLanguages/liveupdate/_/{INDEX}" in site.gup.bodies()

    def named() -> dict:
        code, found = site.gup.api("/api/v1/content?stream=liveupdate")
        assert code == 200
        return {row["file"]: (row["product"], row["version"], row["language"]) for row in found["entries"]}

    until(lambda: INDEX in named(), "the controller's entry")
    assert named()[INDEX] == ("SEPC Virus Definitions Win64", "14.3 RU2", "SymAllLanguages")


def test_what_is_for_all_languages_comes_from_any_manager_and_goes_on_without_its_leader(site):
    gup, gate, content = site.gup, Gate(), body(VIRUS, "all")
    for upstream in site.managers.values():
        upstream.answer(path(VIRUS), Answer(content, etag='"all"', gates=((12_000, gate),)))
    client = gup.connect()
    client.ask(path(VIRUS), ENGLISH)
    gate.wait_reached()
    assert client.head().status == 200, "the fill is under way"
    gup.kill_worker(gup.worker_of(client))
    gate.open()
    gup.wait_stored(FULL)  # nobody asks: the controller goes on, whom no rule binds
    key = f"any/any/{VIRUS}/260801001/{FULL}"
    assert key in gup.bodies()
    stored = gup.cache_dir / "content" / key
    stored.write_bytes(b"x" * len(content))
    assert gup.api("/api/v1/verify?repair=1", method="POST")[0] == 202
    until(lambda: gup.api("/api/v1/verify")[1]["ended_at"], "all is verified", 20)
    told = gup.api("/api/v1/verify")[1]
    assert (told["damaged"], told["mended"]) == (1, 1), told
    assert stored.read_bytes() == content, "mended, with no variant of its own to ask"
    site.managers["fr"].stop()
    assert site.get(path(VIRUS, DELTA), FRENCH).body == body(VIRUS, "all", DELTA), (
        "the French manager is down"
    )
    assert site.get(path(TEXTS), FRENCH).status == 502, "and only it has French texts"
