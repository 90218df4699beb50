"""A site of mixed clients before three managers: each gets what the table says, nothing is fetched twice.

The table is written out by hand: it is the rules as an administrator reads them, not as the program has them.
"""

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from harness.clients import RawConnection
from harness.content import noise, zip_of
from harness.service import Gup
from harness.upstreams import Answer, ScriptedUpstream

MANAGERS = {"fr": ("14.3 RU2", "French"), "en": ("14.3 RU3", "English"), "de": ("14.3 RU2", "German")}
PATCH = "{11111111-1111-1111-1111-111111111111}"
TEXTS = "{22222222-2222-2222-2222-222222222222}"
VIRUS = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
FULL, DELTA = "full.zip", "xdelta260701001_To_260801001.dax"
AT_ONCE = 16


def stated(version: str = "", language: str = "", **fields: str) -> dict[str, str]:
    own = {"GUP-Client-Version": version, "GUP-Client-Language": language}
    return {name: text for name, text in own.items() if text} | {
        n.replace("_", "-"): t for n, t in fields.items()
    }


CASES = [
    # what a client states, who gives it client patches or which rule refuses them, who gives it other content
    (stated("14.3 RU2", "French"), "fr", "fr"),
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
    (stated("14.3 RU2", "SymAllLanguages"), "fr", "fr"),
    (stated(Accept_Language="de, en;q=0.5"), "fr", "fr"),  # Windows' language; not a source unless set
]
RULES = ("language", "version")


def path(moniker: str, file: str = FULL) -> str:
    return f"/content/{moniker}/260801001/{file}"


def body(moniker: str, file: str, manager: str) -> bytes:
    """Of what is for all languages all managers have the same."""
    whose = "all" if moniker == VIRUS else manager
    return zip_of(f"{moniker} {whose}", 9_000) if file == FULL else noise(f"{moniker} {whose}", 3_000)


SHELF = [(PATCH, FULL), (PATCH, DELTA), (TEXTS, FULL), (VIRUS, FULL), (VIRUS, DELTA)]


def stock(upstream: ScriptedUpstream, manager: str) -> None:
    release, language = MANAGERS[manager]
    lines = (
        f"{PATCH}: SEP Client Patch Win64 {release} - Patch - {language}\n"
        f"{TEXTS}: SEP Help Texts {release} - Texts - {language}\n"
        f"{VIRUS}: SEPC Virus Definitions Win32 12.1 RU6 - MicroDefsB.CurDefs - SymAllLanguages\n"
    )
    upstream.answer("/content/ContentInfo.txt", Answer(lines.encode(), etag=f'"{manager}"'))
    for moniker, file in SHELF:
        upstream.answer(path(moniker, file), Answer(body(moniker, file, manager), etag=f'"{manager}{file}"'))


@pytest.fixture
def site(serve) -> tuple[dict[str, ScriptedUpstream], Gup]:
    managers = {name: ScriptedUpstream() for name in MANAGERS}
    for name, upstream in managers.items():
        stock(upstream, name)
        version, language = MANAGERS[name]
        upstream.table = {"name": name, "version": version, "language": language, "priority": 0}
    first, *behind = managers.values()
    gup, _ = serve(before=first, behind=behind, catalog={"refresh": "1h"}, log={"access": "off"})
    return managers, gup


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
    whole = body(moniker, file, source)
    wanted = {"GET": (200, whole), "HEAD": (200, b""), "range": (206, whole[100:200])}[manner]
    if (status, got) != wanted:
        seen.wrong.append(
            f"{headers} {moniker} {file} {manner}: {status}, {len(got)} bytes are not {source}'s"
        )


def crowd(gup: Gup, clients: int) -> Seen:
    """All clients, so many at once, those of the table mixed."""
    seen, numbers = Seen(), list(range(clients))
    random.Random(clients).shuffle(numbers)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for rows in pool.map(lambda n: asked_by(gup, n, random.Random(f"{clients} {n}")), numbers):
            for row in rows:
                check(seen, row)
    return seen


@pytest.mark.parametrize("clients", [240, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.timeout(600)
def test_every_client_gets_what_the_table_says_and_nothing_is_fetched_twice(site, clients):
    managers, gup = site
    seen = crowd(gup, clients)
    assert not seen.wrong, "\n".join(seen.wrong[:10])
    assert sum(seen.answers.values()) == clients * len(SHELF)
    assert fetched(managers) == expected_fetches()
    metrics = gup.metrics()
    for rule in RULES:
        assert metrics("gup_rule_refusals_total", rule=rule, mode="enforce") == seen.refusals[rule]
    assert metrics("gup_rule_refusals_total") == seen.refusals.total()
    for code in (200, 206, 403):
        answers = sum(count for (status, _), count in seen.answers.items() if status == code)
        assert metrics("gup_requests_total", code=str(code)) == answers
    assert metrics("gup_client_sent_bytes_total") == seen.body_bytes
    received = sum(request.body_bytes for m in managers.values() for request in m.requests())
    assert metrics("gup_upstream_received_bytes_total") == received
    streams = {dict(labels)["language"] for labels in metrics.series("gup_stream_sent_bytes_total")}
    assert streams == {"French", "English", "German", "SymAllLanguages"}
    gup.wait_metric(clients, "gup_clients_seen", 20.0, window="1h")


def fetched(managers: dict[str, ScriptedUpstream]) -> Counter[tuple[str, str]]:
    """GETs by whose content it is and its path; what is the same for all is nobody's."""
    found: Counter[tuple[str, str]] = Counter()
    for name, upstream in managers.items():
        for request in upstream.requests():
            target = request.path.replace("%7B", "{").replace("%7D", "}")
            found["" if VIRUS in target else name, target] += 1
    return found


def expected_fetches() -> Counter[tuple[str, str]]:
    """Each manager's own once, what all have once in all, each catalogue once; nothing for who is refused."""
    once = [(name, path(moniker, file)) for name in MANAGERS for moniker, file in SHELF if moniker != VIRUS]
    once += [("", path(moniker, file)) for moniker, file in SHELF if moniker == VIRUS]
    return Counter(once + [(name, "/content/ContentInfo.txt") for name in MANAGERS])
