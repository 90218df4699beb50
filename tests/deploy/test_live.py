"""A real Prometheus scrapes a real gup under load: every query of every panel and rule is executed."""

import json
import time

import pytest
from cluster.services import UNLIMITED, owned_by, running
from deploy.deployed import DEPLOY, Prometheus, rules, run
from harness.content import NEXT_REVISION, REVISION, Tree, content_path, noise, zip_of
from harness.needs import program
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer, Nginx

STREAMS = 50
MAX_SERIES = 650
RANGE = {"$__range": "1h", "$__rate_interval": "30s"}
MONIKERS = [f"{{{number:08X}-0000-4000-8000-000000000000}}" for number in range(STREAMS)]
DELTA = f"xdelta{REVISION}_To_{NEXT_REVISION}.dax"
EMPTY_WHERE_ALL_IS_WELL = {"Alerts", "Clients, of a week ago", "Members", "Between members"}
"""No alert, no week behind a gup that was just started, and no cluster."""


def load(gup):
    """Full and delta of every stream, fetched and then hit; what is not there; what nobody serves."""
    for _ in range(2):
        with gup.connect() as client:
            for moniker in MONIKERS:
                for file in ("full.zip", DELTA):
                    assert client.get(content_path(file, moniker)).status == 200
    assert gup.get(content_path("full.zip", MONIKERS[0], "999999999")).status == 404
    assert gup.get("/elsewhere").status == 404


def targets():
    """Each dashboard's queries: where they stand, the PromQL, whether at an instant, and a table's labels."""
    for file in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            organised = [s["options"] for s in panel.get("transformations", []) if s["id"] == "organize"]
            names = organised[0]["renameByName"] if organised else {}
            labels = {name for name in names if not name.startswith("Value")}
            for target in panel.get("targets", []):
                heading = names.get(f"Value #{target['refId']}", panel["title"])
                yield f"{file.stem}: {panel['title']}: {heading}", heading, target, labels


def filled_in(expr, site):
    for name, value in {**RANGE, "$site": site}.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, expr
    return expr


def problems_of_panels(prometheus, began):
    for where, heading, target, labels in targets():
        expr = filled_in(target["expr"], "lyon")
        try:
            if target.get("instant"):
                found = prometheus.query(expr)
            else:
                found = prometheus.query_range(expr, began, time.time())
        except AssertionError as error:
            yield f"{where}: {error}"
            continue
        if bool(found) == (heading in EMPTY_WHERE_ALL_IS_WELL):
            yield f"{where}: {len(found)} series for {expr}"
        for series in found:
            if labels and set(series["metric"]) != labels:
                yield f"{where}: a row for {series['metric']}, not for {labels}"


def problems_of_rules(prometheus):
    for rule in prometheus.rules():
        if rule["health"] != "ok":
            yield f"{rule['name']}: {rule['health']}, {rule.get('lastError')}"
    for rule in rules():
        found = prometheus.query(rule.get("record") or rule["expr"])
        if bool(found) != ("record" in rule):
            yield f"{rule.get('record') or rule['alert']}: {len(found)} series where all is well"


def problems_of_figures(prometheus, gup):
    """How many series there are, and what is saved, to the byte."""
    (series,) = prometheus.query('count({job="gup"})')
    if not 300 < int(series["value"][1]) <= MAX_SERIES:
        yield f"{series['value'][1]} series"
    metrics = gup.metrics()
    saved = metrics("gup_client_sent_bytes_total") - metrics("gup_upstream_received_bytes_total")
    for figure in prometheus.query("site:gup_client_sent_bytes:sum - site:gup_upstream_received_bytes:sum"):
        if float(figure["value"][1]) != saved or saved <= 0:
            yield f"saved {saved}, and Prometheus says {figure['value'][1]}"


@pytest.fixture
def upstreams(tmp_path):
    tree = Tree(tmp_path / "tree")
    for moniker in MONIKERS:
        tree.put(content_path("full.zip", moniker), zip_of(moniker, 20_000))
        tree.put(content_path(DELTA, moniker), noise(moniker, 2_000))
    with Nginx(tree, tmp_path / "manager") as manager, Nginx(tree, tmp_path / "spare") as spare:
        yield [
            {"name": "manager", "url": manager.url},
            {"name": "spare", "url": spare.url, "priority": 1},
        ]


@pytest.mark.timeout(150)
@pytest.mark.needs("nginx", "prometheus")
def test_every_query_is_answered_and_a_site_has_few_series(tmp_path, upstreams):
    settings = {
        "upstream": upstreams,
        "wan": {"rate": "50MB/s", "budget": {"bytes": "1TB"}},
        "clients": {"rate": "900MB/s", "max_downloads": 100},
        "site": {"name": "lyon"},
    }
    with (
        Gup(tmp_path / "cache", settings=settings) as gup,
        Prometheus(tmp_path / "prometheus", {"lyon": [gup.admin]}) as prometheus,
    ):
        began = time.time()
        until(lambda: prometheus.query("site:gup_requests_for_content:sum == 0"), "a scrape before", 30)
        load(gup)
        sent = gup.metric("gup_client_sent_bytes_total")
        assert sent == 2 * STREAMS * 22_000
        until(lambda: prometheus.query(f"site:gup_client_sent_bytes:sum == {sent:.0f}"), "a scrape after", 30)
        newest = 'gup_newest_content_timestamp_seconds{where="requested"}'
        until(lambda: prometheus.query(newest), "the controller heard of the uses", 30)
        until(lambda: prometheus.query("site:gup_content_kept:days"), "rates over what was scraped", 30)

        prometheus.settled(lambda: [*problems_of_panels(prometheus, began), *problems_of_rules(prometheus)])
        prometheus.settled(lambda: problems_of_figures(prometheus, gup))
        sites = prometheus.label_values("site", "gup_build_info")  # what the dashboards' variable asks for
        assert sites == ["lyon"]
        run(program("promtool"), "check", "metrics", input=gup.metrics().text)
        assert gup.stop() == 0


ROW = ("Members", "Between members", "Each gup's part")


@pytest.mark.long
@pytest.mark.needs("prometheus")
def test_the_row_of_a_cluster_and_the_savings_of_its_site(tmp_path):
    """Of three gups with one site: each query of the row has a series of each, and savings are the site's."""
    with running(tmp_path / "site") as site:
        limited = UNLIMITED | {"wan": {"rate": "30MB/s"}}
        gups = [site.start(name, settings=limited) for name in ("a", "b", "c")]
        until(site.all_ask_all, "all ask all", 30)
        with Prometheus(tmp_path / "prometheus", {"lyon": [gup.admin for gup in gups]}) as prometheus:
            until(lambda: prometheus.query("site:gup_client_sent_bytes:sum == 0"), "a scrape before", 30)
            began, made = time.time(), owned_by("a", 3, 500_000)
            for path, body in made.items():
                site.upstream.answer(path, Answer(body, etag='"a"'))
                assert [gup.get(path).body for gup in gups] == [body] * 3
            total = 3 * 500_000
            until(lambda: prometheus.query(f"site:gup_client_sent_bytes:sum == {3 * total}"), "a scrape", 30)
            rows = [(where, target) for where, _, target, _ in targets() if where.split(": ")[1] in ROW]
            assert len(rows) == 5
            for where, target in rows:
                found = prometheus.query_range(filled_in(target["expr"], "lyon"), began, time.time())
                assert len(found) == 3, (where, found)
            (wan,) = prometheus.query("site:gup_upstream_received_bytes:sum")
            assert float(wan["value"][1]) == total
            (between,) = prometheus.query("sum(gup_peer_received_bytes_total)")
            assert float(between["value"][1]) == 2 * total
            saved = next(
                target for where, _, target, _ in targets() if where.startswith("site: Saved, in the")
            )
            # increase() misses what came before the first scrape, and extends to the ends of the range
            until(
                lambda: float(prometheus.query(filled_in(saved["expr"], "lyon"))[0]["value"][1]) > total,
                "saved",
                30,
            )
            until(lambda: idle(site), "no gup has more than a hundredth", 30)
            at = time.time()
            scraped = f"count(timestamp(gup_build_info) > {at}) == 3"
            until(lambda: prometheus.query(scraped), "scrapes of idle gups", 30)
            limit = 'sum(gup_bandwidth_limit_bytes_per_second{direction="upstream"})'
            assert float(prometheus.query(limit)[0]["value"][1]) == 30_000_000, "though each idles"
            assert prometheus.query("ALERTS") == []
            wrong = [words for words in problems_of_panels(prometheus, began) if " series for " not in words]
            assert wrong == [], "no query that takes a site for one gup"
            assert [rule["name"] for rule in prometheus.rules() if rule["health"] != "ok"] == []


def idle(site):
    shares = [member["share_bytes_per_second"] for member in site.seen_by("a")["members"]]
    return None not in shares and max(shares) <= 100_000
