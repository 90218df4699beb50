"""The tables of settings and metrics can't drift apart from config/gup.toml and the pages in docs/."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from harness.needs import program

from gup.cli.manual import STATUSES, manual_pages
from gup.cli.reference import reference_page, reference_toml, rows, settings_toml, tables, write_all
from gup.config import Settings, load

ROOT = Path(__file__).parents[2]


def every_row():
    return [(head.strip("[]"), row) for head, table in tables() for row in rows(table)]


def test_the_files_are_those_that_the_table_gives(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "docs").mkdir()
    write_all(tmp_path)
    for name in ("config/gup.toml", "docs/settings.md", "docs/metrics.md"):
        assert (ROOT / name).read_text() == (tmp_path / name).read_text(), (
            f"{name} is old: run `python -m gup.cli.reference`"
        )


@pytest.mark.needs("groff")
def test_manual_pages_are_sound_and_statuses_are_those_of_the_documentation():
    files = sorted((ROOT / "deploy" / "man").iterdir())
    assert {file.name: file.read_text() for file in files} == manual_pages(), "run `python -m gup.cli.manual`"
    judged = subprocess.run(
        [program("groff"), "-man", "-ww", "-Tutf8", *files], capture_output=True, text=True, check=True
    )
    assert judged.stderr == ""
    assert "gup-cache-purge" in judged.stdout
    page = (ROOT / "docs" / "commands.md").read_text().partition("## Exit statuses")[2].partition("\n## ")[0]
    told = {int(status) for status in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert told == {status for rows in STATUSES.values() for status in rows}


def test_the_reference_gives_the_defaults():
    assert load(ROOT / "config" / "gup.toml", environment={}) == Settings()


def test_every_key_stands_in_both_texts_with_its_sentence():
    text, page = reference_toml(), reference_page()
    toml = " ".join(text.replace("\n# ", " ").split())
    for path, row in every_row():
        assert re.search(rf"^#?{row.key} = ", text, re.MULTILINE), (path, row.key)
        assert f"{row.field.description} ({row.type})" in toml, (path, row.key)
        assert f"| `{row.key}` | {row.type} |" in page, (path, row.key)
        assert row.field.description in page, (path, row.key)
        assert row.field.description[-1] == ".", (path, row.key)
    assert len(every_row()) > 50
    assert all(table.__doc__ in page for _, table in tables())


def test_the_examples_are_settings_too():
    text = re.sub(r"^#(?=[a-z\[])", "", reference_toml(), flags=re.MULTILINE)
    values = tomllib.loads(text)
    values["cluster"]["sentinels"] = ["valkey:26379"]  # sentinel_name, an example, needs some
    settings = Settings.model_validate(values)
    assert settings.upstream[0].url == "http://manager:8014"
    assert settings.wan.schedule[0].rate == 2_000_000
    assert settings.site.name == "headquarters"


@pytest.mark.parametrize(
    ("path", "key", "word"),
    [
        ("cache", "max_size", "size"),
        ("wan", "rate", "rate"),
        ("wan.schedule", "rate", "rate"),
        ("cache", "max_unused", "duration"),
        ("listen", "idle_timeout", "duration"),
        ("listen", "port", "whole number"),
        ("upstream", "ca_file", "path"),
        ("upstream", "headers", "table of texts"),
        ("upstream", "verify_tls", "true or false"),
        ("clients", "allow", "list of texts"),
        ("log", "format", 'one of "text", "json"'),
        ("site", "name", "text"),
    ],
)
def test_types_in_words(path, key, word):
    assert [row.type for at, row in every_row() if (at, row.key) == (path, key)] == [word]


def test_settings_in_force_are_a_file_that_gives_them_again(tmp_path):
    source = tmp_path / "source.toml"
    source.write_text(
        '[cache]\nmax_size = "3GiB"\nmax_unused = "36h"\n[site]\nname = "lyon"\n'
        '[[upstream]]\nurl = "http://a:1"\npriority = 2\n[[upstream]]\nurl = "http://b:2"\nname = "zürich"\n'
        '[[wan.schedule]]\ndays = ["sat", "sun"]\nfrom = "00:00"\nto = "24:00"\nrate = "0"\n'
    )
    settings = load(source, environment={})
    shown = tmp_path / "shown.toml"
    shown.write_text(settings_toml(settings))
    assert load(shown, environment={}) == settings
    assert 'max_size = "3GiB"' in shown.read_text()
    assert 'max_unused = "36h"' in shown.read_text()


def test_secrets_are_masked_in_settings_in_force():
    upstream = {
        "url": "http://a",
        "headers": {"Authorization": "s3cret"},
        "proxy": "http://me:s3cret@proxy:1",
    }
    text = settings_toml(Settings.model_validate({"upstream": [upstream]}))
    assert "s3cret" not in text
    assert 'headers = {"Authorization" = "***"}' in text
    assert 'proxy = "http://me:***@proxy:1"' in text
