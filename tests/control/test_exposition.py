import pytest
from harness.private import private_counters
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gup.control.exposition import expose, newest_and_storms, peer_bytes, shown_labels, stream_bytes
from gup.control.state import OTHER
from gup.metrics import (
    CODES_OF_RESULT,
    MAX_MEMBERS,
    MAX_SHOWN,
    MAX_STREAMS,
    METRICS,
    SICK_FINDINGS,
    layout,
    parse_series,
    series,
)

UPSTREAMS = ["manager"]


def totals(counters):
    return {name: counters.words[at] for at, name in enumerate(layout(UPSTREAMS))}


LABELS = [("SEPC Virus Definitions", "any"), *[OTHER] * MAX_STREAMS]
SITE = {"gup_site_info": [({"site": 'br"anch\\7\n'}, 1)]}
"""A name that must be escaped."""


def everything(words, labels=LABELS, upstreams=UPSTREAMS):
    """A sample of each metric that is not stored."""
    named = dict.fromkeys(label for label in labels if label != OTHER)
    samples = SITE | stream_bytes(words, labels)
    newest = dict.fromkeys(("held", "requested"), dict.fromkeys(named, 1.0))
    samples |= newest_and_storms(newest, dict.fromkeys(named, False) | {[*named][-1]: True}, labels)
    limited = ("connections", "connections_per_address", "downloads", "fills", "queue")
    samples |= peer_bytes(words, ["b"])
    samples |= {
        "gup_alarm_messages_waiting": [({"to": to}, 0) for to in ("webhook", "command")],
        "gup_clients_seen": [({"window": window}, 0) for window in ("1h", "1d", "7d")],
        "gup_clients_by_age": [({"age": age}, 0) for age in ("1d", "3d", "7d", "30d", "older", "unknown")],
        "gup_clients_sick": [({"finding": name}, 0) for name in SICK_FINDINGS],
        "gup_upstream_up": [({"upstream": name}, True) for name in upstreams],
        "gup_bandwidth_limit_bytes_per_second": [({"direction": d}, 1) for d in ("upstream", "client")],
        "gup_allowed_at_once": [({"of": name}, 1) for name in limited],
        "gup_build_info": [({"version": "1", "python": "3"}, 1)],
    }
    return {metric.name: [({}, 0)] for metric in METRICS if not metric.stored} | samples


def exposed(counters=None, gauges=SITE, upstreams=UPSTREAMS, words=None):
    words = words or totals(counters or private_counters(UPSTREAMS))
    body, _ = expose(words, upstreams, gauges, "text/plain")
    return list(parse_text(body.decode()))


def samples(*given, **more):
    return {
        series(sample.name, sample.labels): sample.value
        for family in exposed(*given, **more)
        for sample in family.samples
    }


def test_a_fresh_site_with_one_upstream_has_at_most_500_series_all_at_zero():
    found = samples()
    assert len(found) <= 650
    assert found['gup_site_info{site="br"anch\\7\n"}'] == 1
    for name in CODES_OF_RESULT:
        assert found[series("gup_requests_total", {"result": name, "code": CODES_OF_RESULT[name][0]})] == 0
    counted = [name for name in found if "_total" in name or "_count" in name or "_bucket" in name]
    assert counted
    assert all(found[name] == 0 for name in counted)


def test_every_metric_of_the_table_is_shown_with_its_help_and_labels():
    counters = private_counters(UPSTREAMS)
    counters.add_stream("sent", 0, "full", 1)
    families = {family.name: family for family in exposed(counters, everything(totals(counters)))}
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert family.documentation == metric.help
        assert family.type == metric.kind
        assert family.samples
        promised = dict(metric.labels) | ({"upstream": tuple(UPSTREAMS)} if metric.upstream else {})
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(promised), sample
            for label, values in promised.items():
                assert not values or sample.labels[label] in values, sample


def test_counted_words_come_out_as_they_were_counted():
    counters = private_counters(UPSTREAMS)
    counters.add("gup_requests_total", 3, result="hit", code="206")
    counters.add("gup_upstream_received_bytes_total", 2**40 + 1, upstream="manager", purpose="fill")
    counters.set("gup_fills_in_progress", 2)
    for seconds in (0.002, 0.002, 7.0, 99.0):
        counters.observe("gup_time_to_first_byte_seconds", seconds, result="miss")
    found, first_byte = samples(counters), "gup_time_to_first_byte_seconds"
    edges = {"0.001": 0, "0.005": 2, "10": 3, "30": 3, "+Inf": 4}  # a histogram is cumulative
    buckets = {series(f"{first_byte}_bucket", {"result": "miss", "le": le}): n for le, n in edges.items()}
    expected = buckets | {
        'gup_requests_total{code="206",result="hit"}': 3,
        'gup_upstream_received_bytes_total{purpose="fill",upstream="manager"}': 2**40 + 1,
        "gup_fills_in_progress": 2,
        f'{first_byte}_count{{result="miss"}}': 4,
        f'{first_byte}_sum{{result="miss"}}': pytest.approx(106.004),  # seconds
        "gup_fill_duration_seconds_count": 0,
    }
    assert {name: found[name] for name in expected} == expected


def test_streams_of_one_product_are_added_up():
    counters = private_counters(UPSTREAMS)
    counters.add_stream("sent", 0, "full", 100)
    counters.add_stream("sent", 1, "full", 20)
    counters.add_stream("received", 1, "delta", 3)
    counters.add_stream("sent", 2, "other", 5)
    counters.add_stream("sent", MAX_STREAMS, "index", 7)
    definitions = ("SEPC Virus Definitions", "SymAllLanguages")
    labels = [definitions, definitions, ("{X}", "de"), *[OTHER] * MAX_STREAMS]
    found = samples(counters, stream_bytes(totals(counters), labels))
    expected = {
        (*definitions, "full"): (120, 0),
        (*definitions, "delta"): (0, 3),
        ("{X}", "de", "other"): (5, 0),
        ("other", "other", "index"): (7, 0),
    }
    sent, received = (
        {
            series(
                f"gup_stream_{way}_bytes_total", dict(zip(("product", "language", "kind"), at, strict=True))
            ): n
            for at, ways in expected.items()
            for n in ways[column : column + 1]
        }
        for column, way in enumerate(("sent", "received"))
    )
    assert {name: n for name, n in found.items() if name.startswith("gup_stream_")} == sent | received


def test_bytes_of_members_come_out_by_name():
    counters = private_counters(UPSTREAMS)
    for slot, amount in ((0, 5), (1, 7), (MAX_MEMBERS, 9)):
        counters.add("gup_peer_sent_bytes_total", amount, slot=str(slot))
    rows = peer_bytes(totals(counters), ["b", "c"])
    assert rows["gup_peer_sent_bytes_total"] == [
        ({"member": name}, amount) for name, amount in (("b", 5), ("c", 7), ("other", 9))
    ]
    assert [amount for _, amount in rows["gup_peer_received_bytes_total"]] == [0, 0, 0]


def test_a_site_of_fifty_streams_and_two_upstreams_stays_within_650_series():
    upstreams = ["manager", "spare"]
    words = dict.fromkeys(layout(upstreams), 1)
    labels = [(f"{{{slot:08X}}}", "any") for slot in range(MAX_STREAMS)]
    for slot in range(MAX_STREAMS):  # what there is of a moniker: no other kind (routes)
        for way in ("sent", "received"):
            words[series(f"gup_stream_{way}_bytes_total", {"slot": str(slot), "kind": "other"})] = 0
    found = samples(gauges=everything(words, [*labels, OTHER], upstreams), upstreams=upstreams, words=words)
    assert len(found) <= 650
    sent = [value for name, value in found.items() if name.startswith("gup_stream_sent_bytes_total")]
    assert sum(sent) == 3 * MAX_STREAMS + 4, "what is not shown apart is shown as other"
    storm = series("gup_full_storm", {"product": labels[-1][0], "language": "any"})
    assert found[storm] == 1, "a storm is shown, however many streams there are"


def test_what_is_shown_apart_is_the_first_and_stays_so():
    names = [(f"{{{slot}}}", "any") for slot in range(MAX_STREAMS)]
    for known in range(MAX_STREAMS + 1):
        labels = shown_labels([*names[:known], *[OTHER] * (MAX_STREAMS + 1 - known)])
        apart = min(known, MAX_SHOWN)
        assert labels[:apart] == names[:apart]
        assert set(labels[apart:]) == {OTHER}
    rows = newest_and_storms({"held": dict.fromkeys([names[49], names[1], names[0]], 1.0)}, {}, names)
    shown = [labels["product"] for labels, _ in rows["gup_newest_content_timestamp_seconds"]]
    assert shown == ["{1}", "{0}", "{49}"]


def test_an_upstream_that_was_removed_keeps_its_count():
    old = 'gup_upstream_received_bytes_total{purpose="fill",upstream="old"}'
    found = samples(words={old: 9}, upstreams=["new"])
    assert found[old] == 9
    assert found['gup_upstream_received_bytes_total{purpose="fill",upstream="new"}'] == 0


def test_openmetrics_is_spoken_when_asked_for():
    counters = private_counters(UPSTREAMS)
    counters.add("gup_requests_total", 3, result="hit", code="200")
    accept = "application/openmetrics-text; version=1.0.0,text/plain;q=0.5"
    body, content_type = expose(totals(counters), UPSTREAMS, {}, accept)
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
