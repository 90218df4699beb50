"""The dashboards in the repository are those that the code builds, and show what there is."""

import json
import re

import pytest
from deploy.deployed import DEPLOY, load, rules

from gup.metrics import METRICS
from gup_dashboards.build import DASHBOARDS, write_all

COMMITTED = DEPLOY / "grafana" / "dashboards"


def dashboard(name):
    return json.loads((COMMITTED / name).read_text())


def panels(name):
    return [panel for panel in dashboard(name)["panels"] if panel["type"] != "row"]


def test_the_files_are_those_that_the_code_builds(tmp_path):
    write_all(tmp_path)
    assert {file.name for file in COMMITTED.iterdir()} == set(DASHBOARDS)
    for name in DASHBOARDS:
        assert (COMMITTED / name).read_text() == (tmp_path / name).read_text(), "run `make dashboards`"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_has_a_place_a_title_a_sentence_and_queries(name):
    ids, taken = set(), set()
    for panel in dashboard(name)["panels"]:
        assert panel["id"] not in ids
        ids.add(panel["id"])
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells
    for panel in panels(name):
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["targets"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.parametrize("name", DASHBOARDS)
def test_queries_ask_for_metrics_and_rules_that_exist(name):
    known = {rule["record"] for rule in rules() if "record" in rule}
    for metric in METRICS:
        ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        known |= {metric.name + end for end in ends}
    for panel in panels(name):
        for target in panel["targets"]:
            asked = set(re.findall(r"(?:[a-z_]+:)?gup_[a-z0-9_]+(?::[a-z0-9]+)?", target["expr"]))
            assert asked - {"gup"} <= known, panel["title"]
            assert "$site" in target["expr"] or panel["title"] == "Oldest content"


def test_the_site_shows_what_was_promised():
    titles = {panel["title"] for panel in panels("site.json")}
    assert titles >= {
        "Saved, in the range",
        "Saved, 30 days",
        "Byte hit ratio",
        "Request hit ratio",
        "Clients per fill",
        "WAN against its limit",
        "To clients, by source",
        "Time to first byte",
        "Duration of fills",
        "Full against delta, to clients",
        "Streams",
        "Disk",
        "Days kept",
        "Upstreams",
        "Errors and refusals",
        "Integrity failures, in the range",
        "Members",
        "Between members",
    }


def test_the_fleet_has_a_site_variable_and_a_table_of_the_worst():
    site = next(v for v in dashboard("fleet.json")["templating"]["list"] if v["name"] == "site")
    assert site["multi"]
    assert site["includeAll"]
    table = next(panel for panel in panels("fleet.json") if panel["title"] == "The worst sites")
    assert table["type"] == "table"
    orders = [step["options"]["sort"] for step in table["transformations"] if step["id"] == "sortBy"]
    assert orders == [[{"field": "Trouble", "desc": True}]]


def test_grafana_is_provisioned_with_the_source_and_the_dashboards():
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = load(folder / "datasources" / "prometheus.yml")["datasources"]
    assert source["type"] == "prometheus"
    (provider,) = load(folder / "dashboards" / "gup.yml")["providers"]
    volumes = load(DEPLOY / "container" / "compose.yml")["services"]["grafana"]["volumes"]
    assert f"../grafana/dashboards:{provider['options']['path']}:ro" in volumes
    assert dashboard("site.json")["uid"] == "gup-site"  # the fleet's table links there
