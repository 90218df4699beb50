import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gup.control.exposition import (
    OTHER,
    Figures,
    expose,
    first_shown,
    parse_series,
    shown_labels,
    stream_labels,
)
from gup.metrics import CODES_OF_RESULT, MAX_SHOWN, MAX_STREAMS, METRICS, Counters, layout, series

UPSTREAMS = ["manager"]
MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"


def totals(counters):
    return {name: counters.words[at] for at, name in enumerate(layout(UPSTREAMS))}


def figures(counters=None, **more):
    fixed = {
        "totals": totals(counters or Counters.private(UPSTREAMS)),
        "upstreams": UPSTREAMS,
        "stream_names": [],
        "product_of": lambda _: None,
        "clients_seen": {"1h": 0, "1d": 0, "7d": 0},
        "upstreams_up": {"manager": True},
        "wan_bytes_per_second": 8_000_000,
        "site": "branch-7",
    }
    return Figures(**(fixed | more))


def samples(shown):
    body, _ = expose(shown, "text/plain")
    return {
        series(sample.name, sample.labels): sample.value
        for family in parse_text(body.decode())
        for sample in family.samples
    }


def test_a_fresh_site_with_one_upstream_has_at_most_500_series_all_at_zero():
    found = samples(figures())
    assert len(found) <= 500
    for name in CODES_OF_RESULT:
        assert found[series("gup_requests_total", {"result": name, "code": CODES_OF_RESULT[name][0]})] == 0
    counted = [name for name in found if "_total" in name or "_count" in name or "_bucket" in name]
    assert counted
    assert all(found[name] == 0 for name in counted)


def test_every_metric_of_the_table_is_shown_with_its_help():
    counters = Counters.private(UPSTREAMS)
    counters.add_stream("sent", 0, "full", 1)
    shown = figures(
        counters,
        newest={("SEPC Virus Definitions", "any", "held"): 1.0},
        storms={("SEPC Virus Definitions", "any"): True},
        limits={"fills": 8},
    )
    families = {family.name: family for family in parse_text(expose(shown, "")[0].decode())}
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert family.documentation == metric.help
        assert family.type == metric.kind
        assert family.samples


def test_counted_words_come_out_as_they_were_counted():
    counters = Counters.private(UPSTREAMS)
    counters.add("gup_requests_total", 3, result="hit", code="206")
    counters.add("gup_upstream_received_bytes_total", 2**40 + 1, upstream="manager", purpose="fill")
    counters.set("gup_fills_in_progress", 2)
    found = samples(figures(counters))
    assert found['gup_requests_total{code="206",result="hit"}'] == 3
    assert found['gup_upstream_received_bytes_total{purpose="fill",upstream="manager"}'] == 2**40 + 1
    assert found["gup_fills_in_progress"] == 2


def test_histograms_are_cumulative_and_their_sums_are_seconds():
    counters = Counters.private(UPSTREAMS)
    for seconds in (0.002, 0.002, 7.0, 99.0):
        counters.observe("gup_time_to_first_byte_seconds", seconds, result="miss")
    found = samples(figures(counters))

    def bucket(edge):
        return found[series("gup_time_to_first_byte_seconds_bucket", {"result": "miss", "le": edge})]

    assert (bucket("0.001"), bucket("0.005"), bucket("10"), bucket("30"), bucket("+Inf")) == (0, 2, 3, 3, 4)
    assert found['gup_time_to_first_byte_seconds_count{result="miss"}'] == 4
    assert found['gup_time_to_first_byte_seconds_sum{result="miss"}'] == pytest.approx(106.004)
    assert found["gup_fill_duration_seconds_count"] == 0


def test_streams_are_named_by_the_catalogue_and_added_up():
    counters = Counters.private(UPSTREAMS)
    counters.add_stream("sent", 0, "full", 100)
    counters.add_stream("sent", 1, "full", 20)
    counters.add_stream("received", 1, "delta", 3)
    counters.add_stream("sent", 2, "other", 5)
    counters.add_stream("sent", MAX_STREAMS, "index", 7)
    names = [("14.3 RU2", "French", MONIKER), ("14.3 RU1", "French", MONIKER), ("any", "de", "{X}")]
    products = {MONIKER: ("SEPC Virus Definitions", "SymAllLanguages")}
    found = samples(figures(counters, stream_names=names, product_of=lambda of: products.get(of[2])))

    def sent(product, language, kind, direction="sent"):
        labels = {"product": product, "language": language, "kind": kind}
        return found[series(f"gup_stream_{direction}_bytes_total", labels)]

    assert sent("SEPC Virus Definitions", "SymAllLanguages", "full") == 120
    assert sent("SEPC Virus Definitions", "SymAllLanguages", "delta", "received") == 3
    assert sent("SEPC Virus Definitions", "SymAllLanguages", "delta") == 0
    assert sent("{X}", "de", "other") == 5
    assert sent("other", "other", "index") == 7
    assert sum(name.startswith("gup_stream_sent") for name in found) == 4


def test_a_slot_without_a_name_is_other():
    assert stream_labels([], 3, lambda _: None) == ("other", "other")


def test_a_site_of_fifty_streams_and_two_upstreams_stays_within_500_series():
    upstreams = ["manager", "spare"]
    words = dict.fromkeys(layout(upstreams), 1)
    names = [("14.3 RU2", "any", f"{{{slot:08X}}}") for slot in range(MAX_STREAMS)]
    labels = [(moniker, "any") for *_, moniker in names]
    for slot in range(MAX_STREAMS):  # what there is of a moniker: no other kind (routes)
        for way in ("sent", "received"):
            words[series(f"gup_stream_{way}_bytes_total", {"slot": str(slot), "kind": "other"})] = 0
    shown = figures(
        totals=words,
        upstreams=upstreams,
        stream_names=names,
        upstreams_up=dict.fromkeys(upstreams, True),
        newest={(*label, where): 1.0 for label in labels for where in ("held", "requested")},
        storms=dict.fromkeys(labels, False) | {labels[-1]: True},
        client_bytes_per_second=1,
        limits=dict.fromkeys(["connections", "connections_per_address", "downloads", "fills", "queue"], 1),
    )
    found = samples(shown)
    assert len(found) <= 500
    sent = [value for name, value in found.items() if name.startswith("gup_stream_sent_bytes_total")]
    assert sum(sent) == 3 * MAX_STREAMS + 4, "what is not shown apart is shown as other"
    storm = series("gup_full_storm", {"product": labels[-1][0], "language": "any"})
    assert found[storm] == 1, "a storm is shown, however many streams there are"


def test_series_have_the_labels_and_the_values_that_their_rows_give():
    counters = Counters.private(UPSTREAMS)
    counters.add_stream("sent", 0, "full", 1)
    shown = figures(
        counters,
        newest={("SEPC Virus Definitions", "any", "held"): 1.0},
        storms={("SEPC Virus Definitions", "any"): True},
        limits={"fills": 8},
    )
    families = {family.name: family for family in parse_text(expose(shown, "")[0].decode())}
    for metric in METRICS:
        promised = dict(metric.labels) | ({"upstream": tuple(UPSTREAMS)} if metric.upstream else {})
        for sample in families[metric.name.removesuffix("_total")].samples:
            assert set(sample.labels) - {"le"} == set(promised), sample
            for label, values in promised.items():
                assert not values or sample.labels[label] in values, sample


def test_what_is_shown_apart_is_the_first_and_stays_so():
    names = [("v", "any", f"{{{slot}}}") for slot in range(MAX_STREAMS)]
    for known in range(MAX_STREAMS + 1):
        labels = shown_labels(names[:known], lambda _: None)
        apart = min(known, MAX_SHOWN)
        assert labels[:apart] == [(f"{{{slot}}}", "any") for slot in range(apart)]
        assert set(labels[apart:]) == {OTHER}
    shown = first_shown(names, lambda _: None, [("{49}", "any"), ("{1}", "any"), ("{0}", "any")])
    assert shown == [("{1}", "any"), ("{0}", "any"), ("{49}", "any")]


def test_streams_of_one_product_take_one_place():
    names = [("v", "any", f"{{{slot}}}") for slot in range(MAX_STREAMS)]
    labels = shown_labels(names, lambda _: ("definitions", "any"))
    assert set(labels) == {("definitions", "any"), OTHER}
    assert labels.count(OTHER) == 1


def test_an_unlimited_rate_is_absent_and_a_limit_is_shown():
    name = 'gup_bandwidth_limit_bytes_per_second{direction="upstream"}'
    assert samples(figures())[name] == 8_000_000
    assert not any(one.startswith("gup_bandwidth") for one in samples(figures(wan_bytes_per_second=0)))


def test_an_upstream_that_was_removed_keeps_its_count():
    shown = figures(
        totals={'gup_upstream_received_bytes_total{purpose="fill",upstream="old"}': 9}, upstreams=["new"]
    )
    found = samples(shown)
    assert found['gup_upstream_received_bytes_total{purpose="fill",upstream="old"}'] == 9
    assert found['gup_upstream_received_bytes_total{purpose="fill",upstream="new"}'] == 0


def test_label_values_from_outside_are_escaped():
    found = samples(figures(site='br"anch\\7\n'))
    assert any(name.startswith("gup_site_info") and 'br"anch\\7\n' in name for name in found)


def test_openmetrics_is_spoken_when_asked_for():
    counters = Counters.private(UPSTREAMS)
    counters.add("gup_requests_total", 3, result="hit", code="200")
    body, content_type = expose(
        figures(counters), "application/openmetrics-text; version=1.0.0,text/plain;q=0.5"
    )
    assert content_type.startswith("application/openmetrics-text")
    families = {family.name: family for family in parse_openmetrics(body.decode())}
    assert families["gup_requests"].type == "counter"
    assert body.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("gup_fill_waiters", ("gup_fill_waiters", {})),
        (series("gup_x", {"a": "1", "b": "http://m:8014"}), ("gup_x", {"a": "1", "b": "http://m:8014"})),
        (series("gup_x", {"a": "x,y=z{}"}), ("gup_x", {"a": "x,y=z{}"})),
    ],
)
def test_series_names_are_read_as_they_are_spelt(name, parsed):
    assert parse_series(name) == parsed
