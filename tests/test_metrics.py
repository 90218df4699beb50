"""The metrics' table: names, labels, the layout of their words, and counting."""

import re
from itertools import pairwise

import pytest
from harness.private import private_counters
from hypothesis import given, settings
from hypothesis import strategies as st

from gup.metrics import (
    BY_NAME,
    FILL_BUCKETS,
    KINDS,
    MAX_SHOWN,
    MAX_STREAMS,
    METRICS,
    PURPOSES,
    SOURCES,
    TTFB_BUCKETS,
    label_sets,
    layout,
    series,
)

UNITS = ("_bytes", "_seconds", "_bytes_per_second", "_total", "_info", "_in_progress")
MAX_SERIES = 650
SERIES = re.compile(r'[a-z_]+(?:\{[a-z]+="[^"{}\\]*"(?:,[a-z]+="[^"{}\\]*")*\})?')

# In the design's words: what dashboards and alerts are written against.
PROMISED = set(
    """
gup_requests_total gup_client_sent_bytes_total gup_upstream_received_bytes_total gup_upstream_requests_total
gup_upstream_wasted_bytes_total gup_stream_sent_bytes_total gup_stream_received_bytes_total
gup_fills_in_progress gup_fill_waiters gup_fills_total gup_fill_duration_seconds gup_fill_resumes_total
gup_time_to_first_byte_seconds gup_client_connections gup_client_downloads_in_progress
gup_client_downloads_queued gup_clients_seen gup_cache_entries gup_cache_size_bytes gup_cache_limit_bytes
gup_disk_free_bytes gup_evictions_total gup_evicted_bytes_total gup_integrity_failures_total gup_upstream_up
gup_bandwidth_limit_bytes_per_second gup_rule_refusals_total gup_newest_content_timestamp_seconds
gup_full_storm gup_worker_restarts_total gup_config_last_reload_successful gup_build_info gup_site_info
gup_start_time_seconds
""".split()  # noqa: SIM905 - a list of 34 quoted words reads worse
)


def exposed(upstreams):
    """How many series the stored figures make, with each histogram's count, before streams and members."""
    histograms = [metric for metric in METRICS if metric.kind == "histogram"]
    counts = sum(len(list(label_sets(metric, upstreams))) for metric in histograms)
    return (
        len([name for name in layout(upstreams) if not name.startswith(("gup_stream_", "gup_peer_"))])
        + counts
    )


def test_the_promised_names_are_there():
    assert set(BY_NAME) >= PROMISED
    assert len(BY_NAME) == len(METRICS)


def test_names_follow_the_rules():
    for metric in METRICS:
        assert re.fullmatch(r"gup_[a-z]+(?:_[a-z]+)*", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric
        assert metric.help.endswith("."), metric
        assert (metric.kind == "histogram") == bool(metric.buckets), metric
        assert metric.kind != "histogram" or metric.name.endswith("_seconds"), metric
        measured = re.search(r"bytes|size|limit|rate", metric.name)
        assert not measured or metric.name.removesuffix("_total").endswith(UNITS), metric


def test_labels_never_name_a_client_an_url_or_a_revision():
    for metric in METRICS:
        labels = [label for label, _ in metric.labels]
        assert len(labels) == len(set(labels)), metric
        assert not {"url", "client", "address", "revision", "path", "moniker", "le"} & set(labels), metric


def test_buckets_rise_to_fills_of_four_hours():
    assert all(low < high for buckets in (FILL_BUCKETS, TTFB_BUCKETS) for low, high in pairwise(buckets))
    assert FILL_BUCKETS[-1] == 4 * 3600


def test_the_layout_names_each_word_once():
    words = layout(["hq", "spare:8014", "[::1]:80"])
    assert len(words) == len(set(words))
    assert all(SERIES.fullmatch(word) for word in words), [w for w in words if not SERIES.fullmatch(w)]


def test_upstreams_add_words_and_nothing_else_moves():
    none, one = layout([]), layout(["hq"])
    added = [word for word in one if word not in none]
    assert [word for word in one if word in none] == none
    assert added
    assert all('upstream="hq"' in word for word in added)


def test_the_series_of_a_site_are_bounded():
    assert exposed(["hq", "spare"]) + 9 * MAX_SHOWN < MAX_SERIES - 50


def test_every_result_has_its_codes_and_no_other():
    pairs = [(labels["result"], labels["code"]) for labels in label_sets(BY_NAME["gup_requests_total"], [])]
    assert len(pairs) == len(set(pairs))
    assert {result for result, _ in pairs} == {
        *("hit", "miss", "collapsed", "revalidated", "stale", "bypass", "refused", "error")
    }
    assert all(re.fullmatch(r"[2-5]\d\d", code) for _, code in pairs)


def test_enumerated_labels_are_those_of_the_design():
    assert SOURCES == ("cache", "fill", "bypass")
    assert PURPOSES == ("fill", "index", "prefetch", "repair", "catalog", "bypass")
    assert KINDS == ("full", "delta", "index", "other")


def test_a_series_has_one_spelling():
    assert series("gup_x", {}) == "gup_x"
    assert (
        series("gup_x", {"b": "2", "a": "1"}) == series("gup_x", {"a": "1", "b": "2"}) == 'gup_x{a="1",b="2"}'
    )


def test_everything_starts_at_zero_and_counts_apart():
    counters = private_counters(["hq"])
    assert not any(counters.words)
    counters.add("gup_requests_total", result="hit", code="200")
    counters.add("gup_requests_total", 4, result="hit", code="206")
    counters.add("gup_upstream_received_bytes_total", 2**40, upstream="hq", purpose="fill")
    counters.set("gup_fill_waiters", 7)
    counters.words[counters.position("gup_client_sent_bytes_total", source="cache")] += 5
    assert counters.get("gup_client_sent_bytes_total", source="cache") == 5
    assert counters.get("gup_requests_total", result="hit", code="200") == 1
    assert counters.get("gup_requests_total", result="hit", code="206") == 4
    assert counters.get("gup_upstream_received_bytes_total", upstream="hq", purpose="fill") == 2**40
    assert counters.get("gup_fill_waiters") == 7
    assert sum(1 for word in counters.words if word) == 5


def test_streams_are_counted_by_slot_and_direction():
    counters = private_counters()
    counters.add_stream("sent", MAX_STREAMS, "delta", 3)
    counters.add_stream("received", 0, "full", 2)
    assert counters.get("gup_stream_sent_bytes_total", slot=str(MAX_STREAMS), kind="delta") == 3
    assert counters.get("gup_stream_received_bytes_total", slot="0", kind="full") == 2
    with pytest.raises(KeyError):
        counters.add_stream("sent", MAX_STREAMS + 1, "full", 1)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("gup_nothing_total", {}),
        ("gup_requests_total", {"result": "hit", "code": "404"}),
        ("gup_requests_total", {"result": "hit"}),
        ("gup_upstream_requests_total", {"upstream": "unknown", "outcome": "ok"}),
    ],
)
def test_what_is_not_in_the_table_is_our_mistake(name, labels):
    with pytest.raises(KeyError):
        private_counters(["hq"]).add(name, **labels)


@settings(deadline=None)
@given(st.floats(0, 1e6), st.sampled_from(["hit", "miss", "bypass"]))
def test_an_observation_falls_into_the_first_bucket_that_holds_it(seconds, result):
    counters = private_counters()
    counters.observe("gup_time_to_first_byte_seconds", seconds, result=result)
    edges = [f"{edge:g}" for edge in TTFB_BUCKETS] + ["+Inf"]
    name = "gup_time_to_first_byte_seconds_bucket"
    counted = [edge for edge in edges if counters.get(name, result=result, le=edge)]
    assert counted == [next(edge for edge in edges if seconds <= float(edge))]
    total_ns = counters.get("gup_time_to_first_byte_seconds_sum", result=result)
    assert total_ns == round(seconds * 1e9)


def test_a_clock_that_runs_backward_does_not_undo_a_sum():
    counters = private_counters()
    counters.observe("gup_fill_duration_seconds", 1.5)
    counters.observe("gup_fill_duration_seconds", -1.0)
    assert counters.get("gup_fill_duration_seconds_sum") == 1_500_000_000
