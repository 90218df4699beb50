"""Prometheus's files as promtool judges them, and that each alert is tested and explained."""

import re

import pytest
from deploy.deployed import DEPLOY, ROOT, alerts, load, rules, run
from harness.needs import program

FOLDER = DEPLOY / "prometheus"
TESTS = sorted((FOLDER / "tests").glob("*.yml"))


@pytest.mark.needs("prometheus")
def test_the_configuration_and_the_rules_are_sound():
    said = run(program("promtool"), "check", "config", FOLDER / "prometheus.yml")
    assert "SUCCESS: 2 rule files found" in said
    for file in (FOLDER / "rules").glob("*.yml"):
        run(program("promtool"), "check", "rules", "--lint-fatal", file)


@pytest.mark.needs("prometheus")
@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_the_alerts_fire_when_they_should_and_only_then(file):
    run(program("promtool"), "test", "rules", file)


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not():
    fires, rests = set(), set()
    for file in TESTS:
        for case in load(file)["tests"]:
            for asked in case.get("alert_rule_test", []):
                (fires if asked["exp_alerts"] else rests).add(asked["alertname"])
                sites = re.findall(r'site="(\w+)"', str(case["input_series"]))
                named = {alert["exp_labels"].get("site") for alert in asked["exp_alerts"]}
                assert named < set(sites) or len(set(sites)) == 1, "a site for which it must not fire"
    assert fires == rests == set(alerts())


@pytest.mark.parametrize("name", alerts())
def test_every_alert_says_what_is_wrong_what_to_do_and_where_more_is_written(name):
    alert = alerts()[name]
    assert re.fullmatch(r"Gup[A-Z]\w+", name)
    assert alert["labels"]["severity"] in {"warning", "critical"}
    notes = alert["annotations"]
    assert "$labels.site" in notes["summary"]
    assert re.fullmatch(r"Cause(, by reason)?: .+\. Remedy: .+\.", notes["description"])
    assert notes["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    section = re.search(rf"^## {name}\n(.+?)(?=^## |\Z)", runbook, re.MULTILINE | re.DOTALL)
    assert section, f"docs/runbook.md has no section {name}"
    assert len(section[1].split()) > 40, "a section that helps nobody"
    named = re.findall(r"`([^`]+)`|\b([a-z]+\.[a-z_]+)\b", notes["description"])
    told = section[1] + runbook.partition("\n## ")[0]
    assert [word for pair in named for word in pair if word and word.split(" --")[0] not in told] == []


def test_the_runbook_knows_no_alert_that_is_not_there():
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    assert set(re.findall(r"^## (Gup\w+)$", runbook, re.MULTILINE)) == set(alerts())


def test_recorded_rules_are_named_by_level_metric_and_operation():
    for rule in rules():
        if "record" in rule:
            assert re.fullmatch(r"[a-z_]+:gup_[a-z0-9_]+:[a-z0-9]+", rule["record"]), rule["record"]
