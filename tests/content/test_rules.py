"""The delivery rules, as a table of cases; what is refused is told usefully."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gup.config import Settings
from gup.content.catalog import Listed
from gup.content.client_identity import NOBODY
from gup.content.rules import Rule, Rulebook, document, lines, problem
from gup.errors import SettingsError
from gup.metrics import BY_NAME

MONIKER = "{11111111-1111-1111-1111-111111111111}"
PATCH = Listed(MONIKER, "SEPC Client Patch Win64", "")
VIRUS = Listed(MONIKER, "SEPC Virus Definitions Win64 14.3", "SymAllLanguages", "14.3")


def patch(language="", version=""):
    return Listed(MONIKER, f"SEPC Client Patch Win64 {version}", language, version)


def book(version="any", language="any", kind="manager", more=None, **rules):
    upstream = {"url": "http://m:8014", "name": "m", "kind": kind, "version": version, "language": language}
    return Rulebook(Settings.model_validate({"upstream": [upstream], "rules": rules, **(more or {})}))


def decide(rulebook, stream, version=None, language=None):
    client = rulebook.identities.stated(version, language)
    return rulebook.decide(stream, rulebook.origins["m"], client)


# The document's example: a French manager with French (supported) and German (unsupported) clients.
def test_the_documents_french_manager():
    rulebook = book("14.3 RU2", "French", supported_languages=["French", "English"])
    assert decide(rulebook, PATCH, "14.3 RU2", "French").allowed
    german = decide(rulebook, PATCH, "14.3 RU2", "German")
    assert german.rule is Rule.LANGUAGE
    (remedy,) = (one for one in german.remedies if one.action == "autoupgrade-to-english")
    assert remedy.text.startswith("German is not supported: enable AutoUpgrade")
    assert "rules.english_after_autoupgrade" in remedy.text  # what is to be done here once it is English


TOO_OLD, VERSION, LANGUAGE = Rule.MANAGER_TOO_OLD, Rule.VERSION, Rule.LANGUAGE


@pytest.mark.parametrize(
    ("manager", "match", "clients", "rule"),
    [
        # no client patches from a manager older than 14.3 RU2, whoever asks
        ("14.3 RU1", "release", ["14.3 RU1", "14.3 RU2"], TOO_OLD),
        ("14.3", "release", [None], TOO_OLD),
        ("12.1 RU6 MP10", "release", ["12.1 RU6 MP10"], TOO_OLD),
        ("14.3.4614.9999", "release", ["14.3.4614.9999"], TOO_OLD),
        # equal versions: the same release; silence is served unless it is refused
        ("14.3 RU2", "release", ["14.3 RU2", "14.3.4700.2000", None], None),
        ("14.3 RU2", "release", ["14.3 RU1", "14.3 RU3"], VERSION),
        ("14.3.4615.2000", "release", ["14.3 RU2", "14.3.5412.3000"], None),
        ("14.3 RU8", "release", ["14.3 RU8 Patch 3"], None),
        ("14.3 RU3", "release", ["14.3.5412.3000"], VERSION),
        ("14.3 RU10", "release", ["14.4"], VERSION),
        ("any", "release", ["14.3 RU1"], None),
        # or the same build
        ("14.3.4615.2000", "build", ["14.3 RU2"], None),
        ("14.3 RU2", "build", ["14.3.4700.2000"], VERSION),
        ("14.3.4700.2000", "build", ["14.3.4700.2000"], None),
    ],
)
def test_versions(manager, match, clients, rule):
    rulebook = book(manager, version_match=match)
    assert {decide(rulebook, PATCH, client).rule for client in clients} == {rule}


@pytest.mark.parametrize(
    ("manager", "listed", "after_autoupgrade", "clients", "rule"),
    [
        ("French", "", False, ["fr-CA", "SymAllLanguages", None], None),  # all languages fit everybody
        ("French", "", False, ["German", "English"], LANGUAGE),
        ("fr", "French", False, ["French"], None),
        ("English", "", True, ["German"], LANGUAGE),
        # the case that the document leaves open: the German client is an English one after AutoUpgrade
        ("French", "", True, ["English"], None),
        ("French", "", True, ["German"], LANGUAGE),
        ("French", "English", True, ["English"], None),
        ("French", "French", True, ["English"], LANGUAGE),  # the patch itself is French
        ("French", "English", True, ["French"], LANGUAGE),
        ("French", "English", False, ["English"], LANGUAGE),
        ("French", "SymAllLanguages", False, ["German"], None),
        ("SymAllLanguages", "", False, ["German"], None),
        # where the settings are silent, the catalogue speaks
        ("any", "French", False, ["German"], LANGUAGE),
        ("any", "French", False, ["fr"], None),
        ("any", "", False, ["German"], None),
        ("any", "gibberish", False, ["German"], None),
        ("Chinese (Simplified)", "", False, ["zh-CN"], None),
        ("Chinese (Simplified)", "", False, ["zh-TW"], LANGUAGE),
    ],
)
def test_languages(manager, listed, after_autoupgrade, clients, rule):
    rulebook = book("14.3 RU2", manager, english_after_autoupgrade=after_autoupgrade)
    assert {decide(rulebook, patch(listed), "14.3 RU2", client).rule for client in clients} == {rule}


@pytest.mark.parametrize(
    ("listed", "client", "rule"),
    [
        ("14.3 RU2", "14.3 RU2", None),
        ("14.3 RU2", "14.3 RU3", Rule.VERSION),
        ("14.3 RU1", "14.3 RU3", None),  # no release that has patches: it names the line of products
        ("14.3", "14.3 RU3", None),
        ("", "14.3 RU3", None),
    ],
)
def test_the_catalogues_version_counts_where_the_settings_have_none(listed, client, rule):
    assert decide(book(), patch("", listed), client).rule is rule
    assert decide(book("14.3 RU3"), patch("", listed), "14.3 RU3").rule is None


@pytest.mark.parametrize(
    ("manager", "language", "client", "spoken", "silent_about"),
    [
        ("14.3 RU2", "French", None, None, "version or language"),
        ("14.3 RU2", "French", "14.3 RU2", None, "language"),
        ("14.3 RU2", "French", "newest", "fr", "version"),
        ("14.3 RU2", "any", "14.3 RU2", None, None),
        ("any", "French", None, "fr", None),
        ("any", "any", None, None, None),
    ],
)
def test_undeclared(manager, language, client, spoken, silent_about):
    served = decide(book(manager, language), PATCH, client, spoken)
    refused = decide(book(manager, language, undeclared="refuse"), PATCH, client, spoken)
    assert served.allowed
    assert refused.rule is (Rule.UNDECLARED if silent_about else None)
    if silent_about:
        assert f"does not state its {silent_about}" in served.because
        assert f"does not state its {silent_about}" in refused.because
        assert refused.remedies[0].action == "declare"
    assert bool(refused.notes) == (client == "newest" or manager == language == "any")
    wrong = decide(book("14.3 RU2", "French", undeclared="refuse"), PATCH, "14.3 RU3")
    assert wrong.rule is Rule.VERSION, "a wrong version is refused though the language is not stated"


@pytest.mark.parametrize("client", ["14.3 RU1", "14.3 RU2", "12.1 RU6", None])
@pytest.mark.parametrize("manager", ["14.3 RU1", "14.3 RU2", "any"])
def test_other_content_is_for_everybody(manager, client):
    rulebook = book(manager, "French", undeclared="refuse", version_match="build")
    for product in ("SEPC Virus Definitions Win64 14.3", "SEPC IPS Signatures", "Something new"):
        assert decide(rulebook, Listed(MONIKER, product, "French"), client, "German").allowed


@pytest.mark.parametrize(
    ("stream", "rules", "rule"),
    [
        (VIRUS, {"content_types": ["virus_definitions"]}, None),
        (VIRUS, {"content_types": ["client_patches"]}, Rule.CONTENT_TYPE),
        (VIRUS, {"content_types": ["other"]}, Rule.CONTENT_TYPE),
        (Listed(MONIKER, "New", ""), {"content_types": ["other"]}, None),
        (Listed(MONIKER, "New", ""), {"content_types": ["client_patches"]}, Rule.CONTENT_TYPE),
        (VIRUS, {"download_client_patches": False}, None),
        (PATCH, {"download_client_patches": False}, Rule.CLIENT_PATCHES_OFF),
        (PATCH, {"content_types": ["virus_definitions"]}, Rule.CONTENT_TYPE),
        (PATCH, {"content_types": ["client_patches"]}, None),
        (None, {}, None),
        (None, {"content_types": ["virus_definitions"]}, None),  # of no known type
        (None, {"unlisted": "refuse"}, Rule.UNLISTED),
        (None, {"unlisted": "refuse", "mode": "off"}, None),
        (PATCH, {"download_client_patches": False, "mode": "off"}, None),
        (PATCH, {"download_client_patches": False, "mode": "report"}, Rule.CLIENT_PATCHES_OFF),
    ],
)
def test_what_is_switched_off(stream, rules, rule):
    rulebook = book("14.3 RU2", **rules)
    assert decide(rulebook, stream, "14.3 RU2").rule is rule


def test_own_types_are_bound_by_their_name():
    more = {"catalog": {"types": {"client_patches": ["*hotfix*"]}}}
    rulebook = book("14.3 RU2", more=more)
    assert decide(rulebook, Listed(MONIKER, "SEP Hotfix", ""), "14.3 RU1").rule is Rule.VERSION
    assert decide(rulebook, PATCH, "14.3 RU1").allowed


@pytest.mark.parametrize("stream", [PATCH, VIRUS, None])
@pytest.mark.parametrize("client", ["14.3 RU1", "14.4", None])
def test_liveupdate_serves_every_version_and_language(stream, client):
    rulebook = book("14.3 RU1", "French", "liveupdate", unlisted="refuse", undeclared="refuse")
    assert decide(rulebook, stream, client, "German").allowed
    assert not decide(book(kind="liveupdate", download_client_patches=False), PATCH).allowed


@pytest.mark.parametrize(
    ("manager", "client", "actions"),
    [
        ("14.3 RU3", "14.3 RU2", ["upgrade-client", "upgrade-manager", "liveupdate"]),
        ("14.3 RU2", "14.3 RU3", ["upgrade-manager", "upgrade-client", "liveupdate"]),
        ("14.3 RU2", "14.3 RU1", ["upgrade-client", "liveupdate"]),  # RU1 managers have none
    ],
)
def test_both_ways_out_of_unequal_versions_the_older_side_first(manager, client, actions):
    refused = decide(book(manager), PATCH, client)
    assert [remedy.action for remedy in refused.remedies] == actions
    assert any("no manager has client patches" in note for note in refused.notes) == (len(actions) == 2)


@pytest.mark.parametrize(
    ("client", "rules", "action", "word"),
    [
        ("German", {}, "autoupgrade-to-english", "If German is not supported: "),
        ("German", {"supported_languages": ["fr"]}, "autoupgrade-to-english", "German is not supported"),
        ("German", {"supported_languages": ["de"]}, None, ""),
        ("English", {}, "change-setting", "english_after_autoupgrade = true"),
        ("English", {"english_after_autoupgrade": True}, None, ""),
    ],
)
def test_ways_out_of_unequal_languages(client, rules, action, word):
    refused = decide(book("14.3 RU2", "French", **rules), patch("French"), "14.3 RU2", client)
    assert refused.rule is Rule.LANGUAGE
    between = refused.remedies[1:-1]
    assert [remedy.action for remedy in between] == ([action] if action else [])
    assert not action or word in between[0].text
    assert refused.remedies[0].action == "manager-of-language"
    assert refused.remedies[-1].action == "liveupdate"


# --- what holds for every client

VERSIONS = st.sampled_from(["any", "14.3 RU1", "14.3 RU2", "14.3.4700.2000", "14.3 RU3"])
LANGUAGES = st.sampled_from(["any", "French", "German", "English", "SymAllLanguages"])
STREAMS = st.sampled_from([None, VIRUS, PATCH, patch("French"), patch("", "14.3 RU2"), patch("en", "14.3")])
RULES = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["enforce", "report", "off"]),
        "version_match": st.sampled_from(["release", "build"]),
        "undeclared": st.sampled_from(["serve", "refuse"]),
        "unlisted": st.sampled_from(["serve", "refuse"]),
        "download_client_patches": st.booleans(),
        "content_types": st.sampled_from([[], ["client_patches"], ["virus_definitions"]]),
        "english_after_autoupgrade": st.booleans(),
    }
)
KINDS = st.sampled_from(["manager", "gup", "liveupdate"])


@given(VERSIONS, LANGUAGES, KINDS, STREAMS, RULES, VERSIONS, LANGUAGES)
def test_a_standing_decision_holds_whoever_asks(manager, language, kind, stream, rules, version, spoken):
    rulebook = book(manager, language, kind, **rules)
    origin = rulebook.origins["m"]
    decision = decide(rulebook, stream, version, spoken)
    standing = rulebook.standing(stream, origin)
    assert standing in (None, decision)
    if standing is not None:
        assert standing.client is NOBODY
    assert decision.allowed == (decision.rule is None)
    assert decision.allowed or decision.remedies
    assert decision.allowed or rules["mode"] != "off"
    assert rulebook.refuses(decision) == (not decision.allowed and rules["mode"] == "enforce")


@pytest.mark.parametrize(
    ("manager", "language", "stream", "depends"),
    [
        ("14.3 RU2", "French", VIRUS, False),
        ("14.3 RU2", "French", None, False),
        ("14.3 RU2", "French", PATCH, True),
        ("any", "French", PATCH, True),
        ("14.3 RU2", "any", PATCH, True),
        ("14.3 RU1", "French", PATCH, False),
        ("any", "any", PATCH, False),  # nothing configured: no rule costs anything
        ("any", "any", patch("French"), True),
    ],
)
def test_only_client_patches_of_known_managers_depend_on_the_client(manager, language, stream, depends):
    rulebook = book(manager, language)
    assert (rulebook.standing(stream, rulebook.origins["m"]) is None) is depends


def test_rules_are_those_that_are_counted():
    labels = dict(BY_NAME["gup_rule_refusals_total"].labels)
    assert set(labels["rule"]) == {str(rule) for rule in Rule} | {"hold", "canary"}  # those two are no Rule


# --- how it is told


def test_a_refusal_is_a_problem_that_helps():
    rulebook = book("14.3 RU2", "French", liveupdate="http://lu:7070")
    told = problem(decide(rulebook, PATCH, "14.3 RU3", "xx"), rulebook.liveupdate_url)
    assert (told.slug, told.status) == ("rule-refused", 403)
    assert told.headers == (("Link", '<http://lu:7070>; rel="alternate"'),)
    assert told.detail.startswith("The client is 14.3 RU3 and the manager 14.3 RU2; ")
    assert told.extensions["rule"] == "version"
    assert told.extensions["client"] == {"version": "14.3 RU3", "language": None}
    assert told.extensions["fits"] == {"version": "14.3 RU2", "language": "French"}
    remedies = ["upgrade-manager", "upgrade-client", "liveupdate"]
    assert [one["action"] for one in told.extensions["remedies"]] == remedies
    assert told.extensions["remedies"][-1]["url"] == "http://lu:7070"
    assert "'xx'" in told.extensions["notes"][0]


def test_no_link_without_a_server_or_where_liveupdate_is_no_way_out():
    rulebook = book("14.3 RU2")
    assert problem(decide(rulebook, PATCH, "14.3 RU3"), rulebook.liveupdate_url).headers == ()
    off = decide(book(download_client_patches=False), PATCH)
    told = problem(off, "http://lu:7070")
    assert told.headers == ()
    assert "notes" not in told.extensions


def test_decisions_as_json_and_as_lines():
    rulebook = book("14.3 RU2", "French")
    refused = document(decide(rulebook, PATCH, "14.3 RU3"), "http://lu:7070")
    assert (refused["allowed"], refused["rule"], refused["type"]) == (False, "version", "client_patches")
    text = list(lines(refused))
    assert text[0].startswith("refused by the rule version: the client is 14.3 RU3")
    assert "fits: version 14.3 RU2, language French" in text
    assert any(line.startswith("remedy: ") and line.endswith("(http://lu:7070)") for line in text)
    allowed = document(decide(rulebook, None), None)
    assert list(lines(allowed)) == ["allowed: no catalogue lists it, so no rule applies"]
    assert (allowed["rule"], allowed["type"], allowed["remedies"]) == (None, None, [])
    noted = document(decide(book(), PATCH), None)
    assert list(lines(noted))[-1].startswith("note: version and language of the upstream m are not set")
    half = document(decide(book("14.3 RU2"), PATCH), None)
    assert "fits: version 14.3 RU2, language any" in list(lines(half))


# --- settings


def test_the_liveupdate_server_is_the_settings_or_an_upstreams():
    upstreams = [{"url": "http://m:1"}, {"url": "http://lu:2", "kind": "liveupdate"}]
    assert Rulebook(Settings.model_validate({"upstream": upstreams})).liveupdate_url == "http://lu:2"
    own = {"upstream": upstreams, "rules": {"liveupdate": "http://other:3"}}
    assert Rulebook(Settings.model_validate(own)).liveupdate_url == "http://other:3"
    assert book().liveupdate_url is None


def test_every_mistake_of_the_rules_is_told_with_its_key():
    settings = {
        "upstream": [{"url": "http://a:1"}, {"url": "http://b:1", "version": "new", "language": "Frrench"}],
        "rules": {
            "content_types": ["virus"],
            "supported_languages": ["xx"],
            "version_sources": ["a b"],
            "language_sources": ["X:"],
            "releases": {"RU11": "14.3.13000.11000", "14.3 RU12": "soon"},
        },
    }
    with pytest.raises(SettingsError) as caught:
        Rulebook(Settings.model_validate(settings))
    told = caught.value.problems
    keys = (
        "releases.RU11 releases.14.3_RU12 content_types supported_languages version_sources language_sources"
    )
    expected = [f"rules.{key.replace('_RU', ' RU')}" for key in keys.split()]
    expected[2:2] = ["upstream#2.version", "upstream#2.language"]
    assert [text.split(": ")[0] for text in told] == expected
    assert "'virus'" in told[4]
    assert "virus_definitions" in told[4]
