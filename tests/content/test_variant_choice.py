"""Which manager's content a client gets and where it is stored: tables, and what always holds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gup.config import Settings
from gup.content.catalog import CLIENT_PATCHES, Catalogues, Label, parse_catalog
from gup.content.key import ABSENT, Variant
from gup.content.routes import LIVEUPDATE_STREAM, Routes
from gup.content.rules import Rulebook
from gup.content.variant_choice import _MOST_REMEMBERED, Choices, explain, explained, why_not_for

PATCH = "{11111111-1111-1111-1111-111111111111}"
TEXTS = "{22222222-2222-2222-2222-222222222222}"
COMMON = "{33333333-3333-3333-3333-333333333333}"
VIRUS = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
UNKNOWN = "{99999999-9999-9999-9999-999999999999}"
ALL = Variant("any", "any")
FR, EN = Variant("14.3 RU2", "French"), Variant("14.3 RU3", "English")


def choices(upstreams=("fr", "en", "lu"), without=(), **rules) -> Choices:
    known = {
        "fr": {"version": "14.3 RU2", "language": "French"},
        "en": {"version": "14.3 RU3", "language": "English"},
        "en2": {"version": "14.3 RU2", "language": "English"},
        "old": {"version": "14.3 RU1", "language": "French", "priority": 5},
        "plain": {},
        "lu": {"kind": "liveupdate"},
    }
    rows = [{"name": name, "url": f"http://{name}", **known[name]} for name in upstreams]
    made = Settings.model_validate({"upstream": rows, "rules": rules})
    book = Rulebook(made)
    listed = {
        name: parse_catalog(lines(known[name]).encode()) for name in upstreams if name not in (*without, "lu")
    }
    return Choices(book, Catalogues(listed, made.upstream, book.types), made.upstream)


def lines(manager: dict) -> str:
    version, language = manager.get("version", "14.3 RU2"), manager.get("language", "SymAllLanguages")
    return (
        f"{PATCH}: SEP Client Patch Win64 {version} - Patch - {language}\n"
        f"{TEXTS}: SEP Help Texts {version} - Texts - {language}\n"
        f"{COMMON}: SEP Client Patch Mac {version} - Common - SymAllLanguages\n"
        f"{VIRUS}: SEPC Virus Definitions Win32 12.1 RU6 - MicroDefsB.CurDefs - SymAllLanguages\n"
    )


def choose(found: Choices, stream: str, version: str = "", language: str = ""):
    stated = {"gup-client-version": version or None, "gup-client-language": language or None}
    return found.choose(stream, stated.get)


@pytest.mark.parametrize(
    ("stream", "version", "language", "upstream", "asked", "stored", "rule"),
    [
        (PATCH, "14.3 RU2", "fr-CA", "fr", FR, FR, None),
        (PATCH, "14.3.5413.3000", "en", "en", EN, EN, None),
        (PATCH, "14.3 RU3", "French", "fr", FR, FR, "version"),
        (PATCH, "14.3 RU2", "English", "en", EN, EN, "version"),
        (PATCH, "14.3 RU2", "German", "fr", FR, FR, "language"),
        (PATCH, "", "", "fr", FR, FR, None),
        (TEXTS, "14.3 RU3", "French", "fr", FR, FR, None),
        (TEXTS, "14.3 RU2", "German", "en", EN, EN, None),
        (TEXTS, "14.3 RU3", "", "en", EN, EN, None),
        (UNKNOWN, "", "en", "en", EN, EN, None),
        (ABSENT, "", "en", "en", EN, EN, None),
        (VIRUS, "14.3 RU1", "German", "fr", Variant("*", "*"), ALL, None),
        (COMMON, "14.3 RU2", "German", "fr", Variant("14.3 RU2", "*"), Variant("14.3 RU2", "any"), None),
        (COMMON, "14.3 RU3", "German", "en", Variant("14.3 RU3", "*"), Variant("14.3 RU3", "any"), None),
        (LIVEUPDATE_STREAM, "14.3 RU1", "German", "liveupdate", ALL, ALL, None),
    ],
)
def test_a_french_and_an_english_manager(stream, version, language, upstream, asked, stored, rule):
    choice = choose(choices(), stream, version, language)
    assert (choice.upstream, choice.asked, choice.stored) == (upstream, asked, stored)
    assert choice.decision.rule == rule
    assert choice.refused == (rule is not None)


def test_what_holds_for_everybody_is_known_without_looking_at_the_client():
    found = choices()

    def header(name):
        raise AssertionError(f"{name} was read")

    for stream in (VIRUS, LIVEUPDATE_STREAM):
        assert found.choose(stream, header).for_everybody
    for stream in (PATCH, TEXTS, COMMON, UNKNOWN, ABSENT):
        assert found.standing(stream) is None
    alone = choices(["plain"])
    for stream in (TEXTS, VIRUS, UNKNOWN, ABSENT):
        assert alone.choose(stream, header).for_everybody
    assert alone.standing(PATCH) is None, "its release is the catalogue's"
    off = choices(["fr"], mode="off")
    assert off.choose(PATCH, header).for_everybody


def test_one_manager_without_a_variant_leaves_routes_as_they_are():
    found, route = choices(["plain"]), Routes().route(f"/content/{VIRUS}/260801001/full.zip")
    assert found.choose(VIRUS, {}.get).of(route) is route
    assert found.choose(UNKNOWN, {}.get).of(route) is route


def test_where_it_is_stored_and_where_it_is_looked_for():
    route = Routes().route(f"/content/{VIRUS}/260801001/full.zip")
    found = choices()
    choice = choose(found, VIRUS)
    keys = [key.variant for key in choice.of(route).keys(choice.asked)]
    assert keys == [ALL, FR, EN], "also where it was stored before the catalogue was known"
    choice = choose(found, TEXTS, "", "English")
    assert [key.variant for key in choice.of(route).keys(choice.asked)] == [EN], "never another's"
    choice = choose(choices(["fr"]), TEXTS)
    assert [key.variant for key in choice.of(route).keys(choice.asked)] == [FR, ALL]
    choice = choose(found, COMMON, "14.3 RU2", "")
    assert [key.variant for key in choice.of(route).keys(choice.asked)] == [Variant("14.3 RU2", "any"), FR]
    named = Routes(liveupdate=True).route("/SEPC_14.3$20RU2_French_livetri.zip")
    choice = found.choose(LIVEUPDATE_STREAM, {}.get)
    assert choice.of(named).key(choice.asked).variant == FR, "as its name states"


def test_a_manager_whose_catalogue_is_not_known_may_have_everything():
    found = choices(without=["en"])
    choice = choose(found, PATCH, "14.3 RU3", "English")
    assert (choice.upstream, choice.decision.rule, choice.decision.type) == ("en", None, "client_patches")
    assert choose(found, PATCH, "14.3 RU2", "fr").upstream == "fr"
    refused = choose(found, PATCH, "14.3 RU3", "fr")
    assert (refused.upstream, refused.decision.rule) == ("fr", "version"), "nor does it pass as unknown"
    assert choose(choices(["fr", "plain"], without=["fr"]), UNKNOWN, "", "fr").upstream == "fr"


def test_priority_decides_between_equals():
    found = choices(["old", "fr", "en2"])
    assert choose(found, TEXTS).upstream == "fr"
    assert choose(found, TEXTS, "14.3 RU1", "French").upstream == "old"
    assert choose(found, TEXTS, "14.3 RU4", "English").upstream == "en2"
    assert choose(found, PATCH, "14.3 RU1", "French").decision.rule == "manager_too_old"
    assert choose(choices(["fr", "en2"]), PATCH, "14.3 RU2", "Italian").upstream == "en2", (
        "where AutoUpgrade leads"
    )


@pytest.mark.parametrize(
    ("rules", "stream", "rule", "for_everybody"),
    [
        ({"content_types": ["client_patches"]}, VIRUS, "content_type", True),
        ({"download_client_patches": False}, PATCH, "client_patches_off", False),
        ({"unlisted": "refuse"}, UNKNOWN, "unlisted", False),
        ({"undeclared": "refuse"}, PATCH, "undeclared", False),
        ({"mode": "report", "undeclared": "refuse"}, PATCH, "undeclared", False),
    ],
)
def test_rules_that_the_settings_turn(rules, stream, rule, for_everybody):
    choice = choose(choices(**rules), stream)
    assert choice.decision.rule == rule
    assert choice.refused == (rules.get("mode") != "report")
    assert choice.for_everybody == for_everybody
    assert not choose(choices(**rules), ABSENT).refused, "files beside the streams are nobody's patches"


_TEXT = st.text(max_size=12) | st.sampled_from(
    [
        *("14.3", "14.3 RU2", "14.3.4615.2000", "99.1", "*", "any", "French", "fr-CA", "en", "de"),
        *("../x", "SymAllLanguages"),
    ]
)


@settings(deadline=None)
@given(version=_TEXT, language=_TEXT, stream=st.sampled_from([PATCH, TEXTS, COMMON, VIRUS, UNKNOWN, ABSENT]))
def test_nothing_that_a_client_states_makes_a_variant(version, language, stream):
    found = choices(["fr", "en", "old", "lu"])
    choice = choose(found, stream, version, language)
    configured = {FR, EN, Variant("14.3 RU1", "French")}
    neutral = {ALL, *(Variant(variant.version, "any") for variant in configured)}
    assert choice.stored in configured | neutral
    assert choice.upstream in ("fr", "en", "old")
    assert choice == choose(found, stream, version, language), "the same question has the same answer"
    if choice.stored in configured:
        assert choice.asked == choice.stored


PATCH_FOR_RU3 = Label("Client Patch", "14.3 RU3", "SymAllLanguages", CLIENT_PATCHES)


@pytest.mark.parametrize(
    ("stored", "label", "wanted", "why"),
    [
        (FR, None, ("14.3 RU2", "French"), ""),
        (FR, None, ("14.3 ru2", "fr"), ""),
        (FR, None, (None, None), ""),
        (FR, None, ("14.3 RU3", "French"), "it is for 14.3 RU2"),
        (FR, None, (None, "English"), "it is for French"),
        (ALL, None, ("14.3 RU2", "French"), ""),
        (Variant("14.3 RU2", "any"), None, ("14.3 RU2", "French"), ""),
        (Variant("14.3 RU2", "any"), None, ("14.3 RU3", "French"), "it is for 14.3 RU2"),
        (ALL, Label("Virus", "12.1 RU6", "SymAllLanguages", "virus_definitions"), ("14.3 RU2", "French"), ""),
        (ALL, Label("Texts", "", "English", "other"), ("14.3 RU2", "French"), "it is for English"),
        (ALL, Label("Texts", "", "English", "other"), ("14.3 RU2", "en"), ""),
        (ALL, PATCH_FOR_RU3, ("14.3 RU2", "French"), "it is for 14.3 RU3"),
        (ALL, PATCH_FOR_RU3, ("14.3 RU3", "French"), ""),
        (Variant("any", "neither"), None, (None, "Neither"), ""),
        (Variant("any", "neither"), None, (None, "French"), "it is for neither"),
        (FR, Label("Virus", "14.3.1", "French", "virus_definitions"), ("14.3.1", "French"), ""),
    ],
)
def test_what_a_site_of_a_version_and_language_has_a_use_for(stored, label, wanted, why):
    assert why_not_for(stored, *wanted, label) == why


def test_a_manager_of_no_stated_version_is_nearer_than_one_of_another_release():
    found = choices(["fr", "plain"])
    assert choose(found, UNKNOWN, "14.3.4615.2000").upstream == "fr"
    assert choose(found, UNKNOWN, "12.1 RU6").upstream == "plain"


def test_the_variants_that_a_prefetch_asks_for():
    found = choices()
    assert found.variants(LIVEUPDATE_STREAM) == [(ALL, ALL)]
    assert found.variants(PATCH) == [(FR, FR), (EN, EN)]
    assert found.variants(VIRUS) == [(FR, ALL), (EN, ALL)]


def test_clients_that_state_something_else_each_time_do_not_fill_memory():
    found = choices(["fr", "en"])
    first = choose(found, PATCH, "14.3 RU3", "en")
    for number in range(2 * _MOST_REMEMBERED):
        choose(found, PATCH, f"14.3.{number}", "en")
        assert len(found._by_client) <= _MOST_REMEMBERED
    assert choose(found, PATCH, "14.3 RU3", "en") == first


@pytest.mark.parametrize(("mode", "said"), [("enforce", ""), ("report", "nothing is refused")])
def test_what_people_are_told_of_a_choice(mode, said):
    rows = [{"name": "fr", "url": "http://fr", "version": FR.version, "language": FR.language}]
    rows += [{"name": "en", "url": "http://en", "version": EN.version, "language": EN.language}]
    made = Settings.model_validate({"upstream": rows, "rules": {"mode": mode}})
    book = Rulebook(made)
    listed = {"fr": parse_catalog(lines(rows[0]).encode()), "en": parse_catalog(lines(rows[1]).encode())}
    catalogues = Catalogues(listed, made.upstream, book.types)
    client = book.identities.stated("14.3 RU3", "English")
    found = explained(explain(book, catalogues, made.upstream, {"fr": "disk"}, PATCH, client))
    assert found[0].startswith(f"{PATCH}: allowed")
    assert found[0].endswith(", from en")
    assert said in found[0]
    assert "  product: SEP Client Patch Win64 14.3 RU2 (catalogue: disk)" in found
    assert any("catalogue: not read yet" in line for line in found)
