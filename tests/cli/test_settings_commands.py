"""`gup rules explain`, and what it reads; mistakes of the rules stop the start."""

import json

import pytest
from harness.commands import run
from harness.upstreams import Answer, ScriptedUpstream

from gup.cache.catalog_cache import Kept, write_kept
from gup.cli.usable import read_catalog
from gup.config import Settings
from gup.content.catalog import parse_catalog

PATCH = "{11111111-1111-1111-1111-111111111111}"
VIRUS = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
CATALOGUE = (
    f"{PATCH}: SEPC Client Patch Win64 14.3 RU2 - Patch - French\r\n"
    f"{VIRUS}: SEPC Virus Definitions Win32 12.1 RU6 - MicroDefsB.CurDefs - SymAllLanguages\r\n"
).encode("utf-16")


@pytest.fixture
def manager():
    """A manager that has a catalogue, at two places."""
    with ScriptedUpstream() as manager:
        for path in ("/content/ContentInfo.txt", "/b/content/ContentInfo.txt"):
            manager.answer(path, Answer(CATALOGUE))
        yield manager


def settings_file(tmp_path, text):
    file = tmp_path / "gup.toml"
    file.write_text(text)
    return file


def upstream(url, more=""):
    return f'[[upstream]]\nurl = "{url}"\n{more}\n'


def explained(file, *arguments):
    result = run("rules", "explain", "--config", file, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_each_manager_has_its_decision(tmp_path, manager):
    paris = 'name = "paris"\nversion = "14.3 RU2"\nlanguage = "French"\nheaders = {X-Site = "lyon"}'
    berlin = 'name = "berlin"\nversion = "14.3 RU3"\nlanguage = "German"'
    file = settings_file(tmp_path, upstream(manager.url, paris) + upstream(f"{manager.url}/b", berlin))
    told = explained(file, "--moniker", PATCH[1:-1].lower(), "--client-version", "14.3.4700.2000",
                     "--client-language", "fr-CA")  # fmt: skip
    asked = [(seen.path, seen.header("x-site")) for seen in manager.seen]
    assert asked == [("/content/ContentInfo.txt", "lyon"), ("/b/content/ContentInfo.txt", None)]
    assert (told["moniker"], told["mode"], told["allowed"]) == (PATCH, "enforce", True)
    first, second = told["decisions"]
    assert (first["upstream"], first["allowed"], first["refused"]) == ("paris", True, False)
    assert first["catalogue"] == f"{manager.url}/content/ContentInfo.txt"
    assert (first["product"], first["product_language"]) == ("SEPC Client Patch Win64 14.3 RU2", "French")
    assert (second["upstream"], second["rule"], second["refused"]) == ("berlin", "version", True)


def test_the_decision_in_words(tmp_path):
    (tmp_path / "ContentInfo.txt").write_bytes(CATALOGUE)
    file = settings_file(
        tmp_path,
        f'[catalog]\nfile = "{tmp_path}/ContentInfo.txt"\n[rules]\nliveupdate = "http://lu:7070"\n'
        'mode = "report"\n' + upstream("http://127.0.0.1:9", 'version = "14.3 RU2"\nlanguage = "French"'),
    )
    result = run("rules", "explain", "--config", file, "--moniker", PATCH, "--client-version", "new",
                 "--client-language", "German")  # fmt: skip
    assert result.exit_code == 0, result.output
    because = "the client is German and the manager French; client patches need the same language on both"
    unsupported = "If German is not supported: enable AutoUpgrade, which installs the English package and"
    then = "To serve those here, set rules.english_after_autoupgrade or add an English manager."
    assert result.stdout.splitlines() == [
        f'{PATCH}: refused (rules.mode is "report": nothing is refused)',
        "note: the version stated in client-version, 'new', can't be read and counts as not stated",
        "",
        "from 127.0.0.1:9",
        f"  product: SEPC Client Patch Win64 14.3 RU2 (catalogue: {tmp_path}/ContentInfo.txt)",
        f"  refused by the rule language: {because}",
        "  type of content: client_patches",
        "  fits: version 14.3 RU2, language French",
        "  remedy: Serve it from a manager in German.",
        f"  remedy: {unsupported} English client patches. {then}",
        "  remedy: Until then the client can use a LiveUpdate server. (http://lu:7070)",
    ]


def test_without_a_catalogue_nothing_is_known_to_be_bound(tmp_path, manager):
    manager.answer("/content/ContentInfo.txt", Answer(b"<html>sign in</html>"))
    told = explained(
        settings_file(tmp_path, f'[cache]\ndirectory = "{tmp_path}"\n'),
        "--upstream",
        manager.url,
        "--moniker",
        VIRUS,
    )
    (decision,) = told["decisions"]
    assert (decision["allowed"], decision["product"]) == (True, None)
    assert "can't be read (its catalogue lists nothing)" in decision["catalogue"]


def test_the_copy_in_the_cache_stands_in_for_a_manager_that_is_away(tmp_path):
    copy = tmp_path / "run" / "catalogs.json"
    copy.parent.mkdir(parents=True)
    url = "http://127.0.0.1:9/content/ContentInfo.txt"
    write_kept(copy.parent, {"127.0.0.1:9": Kept(url, parse_catalog(CATALOGUE))})
    file = settings_file(
        tmp_path,
        f'[cache]\ndirectory = "{tmp_path}"\n' + upstream("http://127.0.0.1:9", 'version = "14.3 RU2"'),
    )
    (decision,) = explained(file, "--moniker", PATCH, "--client-version", "14.3 RU1")["decisions"]
    assert decision["rule"] == "version"
    assert decision["catalogue"] == f"{copy} (the manager does not answer)"
    write_kept(copy.parent, {"127.0.0.1:9": Kept("http://other/", parse_catalog(CATALOGUE))})
    (decision,) = explained(file, "--moniker", PATCH, "--client-version", "14.3 RU1")["decisions"]
    assert decision["allowed"]
    assert "Connection refused" in decision["catalogue"]


def test_liveupdate_is_not_asked_for_a_catalogue():
    settings = Settings.model_validate({"upstream": [{"url": "http://lu:1", "kind": "liveupdate"}]})
    assert read_catalog(settings, settings.upstream[0]) == (None, "LiveUpdate has no catalogue")


@pytest.mark.parametrize(
    ("text", "arguments", "status", "words"),
    [
        ("", ["--moniker", "x"], 2, "--moniker: 'x' is not right"),
        ('[catalog]\nfile = "/nowhere"\n', ["--moniker", PATCH], 1, "catalog.file: '/nowhere' can't be read"),
        ('[rules]\ncontent_types = ["virus"]\n', ["--moniker", PATCH], 2, "rules.content_types: 'virus'"),
    ],
)
def test_what_cannot_be_explained(tmp_path, text, arguments, status, words):
    file = settings_file(tmp_path, text + upstream("http://127.0.0.1:9"))
    result = run("rules", "explain", "--config", file, *arguments)
    assert result.exit_code == status
    assert words in result.stderr


def test_without_an_upstream_there_is_nothing_to_explain():
    result = run("rules", "explain", "--moniker", PATCH)
    assert result.exit_code == 2
    assert "upstream: none is given" in result.stderr


@pytest.mark.parametrize("command", [["config", "check"], ["serve", "--config"]])
def test_rules_that_cannot_be_applied_stop_the_start(tmp_path, called, command):
    started = called("gup.process.supervisor.serve")
    file = settings_file(tmp_path, upstream("http://m:1", 'version = "newest"\nlanguage = "Frrench"'))
    result = run(*command, file)
    assert result.exit_code == 2
    assert "gup: upstream#1.version: 'newest' is not right: must be a release or a build" in result.stderr
    assert "gup: upstream#1.language: 'Frrench' is not right" in result.stderr
    assert not started
    assert (
        run(*command, settings_file(tmp_path, upstream("http://m:1", 'version = "14.3 RU2"'))).exit_code == 0
    )
