"""Every metric declared once, and the counters that processes write; never formats or serves them.

A stored figure is one 64-bit word in a block that one process alone writes, at the moment of counting: exact
also after that process was killed. The control plane sums the blocks when it is asked.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

_SERVED = ("200", "206", "304", "412", "416")
CODES_OF_RESULT: Mapping[str, tuple[str, ...]] = {
    "hit": _SERVED,
    "miss": _SERVED,
    "collapsed": _SERVED,
    "revalidated": _SERVED,
    "stale": _SERVED,
    "bypass": _SERVED,
    "refused": ("400", "403", "404", "405", "408", "414", "431", "503", "505", "508"),
    "error": ("404", "410", "500", "502", "503", "504"),
}
"""Which status codes a result can have: the series of `gup_requests_total`."""
KINDS = ("full", "delta", "index", "other")
SOURCES = ("cache", "fill", "bypass")
PURPOSES = ("fill", "index", "prefetch", "repair", "catalog", "bypass")
WASTED = ("overlap", "mismatch", "aborted", "rejected")
RESUME_REASONS = ("cut", "timeout", "failover", "takeover")
MAX_STREAMS = 50
"""Streams (variant and moniker) counted apart; the rest share the slot after the last."""
MAX_SHOWN = 24
"""Products and languages with series of their own in an exposition; the rest are shown as one.

Each takes up to nine series (full, delta and index both ways, newest held and requested, storm): with two
upstreams this keeps a site below 500, whatever its clients ask for.
"""

TTFB_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0)
FILL_BUCKETS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 7200.0, 14400.0)
_NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of METRICS.

    `labels` are the labels with their values, without these where they are not known before; `upstream` adds
    that label with the configured names.
    `stored` figures live in the blocks (one word a series, histograms one a bucket and one for the sum);
    the others the controller works out when it is asked.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    upstream: bool = False
    buckets: tuple[float, ...] = ()
    stored: bool = True


def _counter(name: str, help_: str, *labels: tuple[str, tuple[str, ...]], upstream: bool = False) -> Metric:
    return Metric(name, "counter", help_, labels, upstream)


def _gauge(
    name: str,
    help_: str,
    *labels: tuple[str, tuple[str, ...]],
    stored: bool = False,
    upstream: bool = False,
) -> Metric:
    return Metric(name, "gauge", help_, labels, upstream, stored=stored)


_RESULTS = tuple(CODES_OF_RESULT)
_WITH_CONTENT = tuple(result for result, codes in CODES_OF_RESULT.items() if codes is _SERVED)
_LABELS_OF_STREAM: tuple[tuple[str, tuple[str, ...]], ...] = (("product", ()), ("language", ()))
_OF_STREAM = (*_LABELS_OF_STREAM, ("kind", KINDS))

METRICS: tuple[Metric, ...] = (
    _counter("gup_requests_total", "Requests answered.", ("result", _RESULTS), ("code", ())),
    _counter("gup_client_sent_bytes_total", "Body bytes sent to clients.", ("source", SOURCES)),
    _counter(
        "gup_upstream_received_bytes_total",
        "Body bytes received from upstream.",
        ("purpose", PURPOSES),
        upstream=True,
    ),
    _counter(
        "gup_upstream_requests_total",
        "Requests sent upstream.",
        ("outcome", ("ok", "not_modified", "not_found", "error", "timeout", "unreachable", "rejected")),
        upstream=True,
    ),
    _counter("gup_upstream_wasted_bytes_total", "Bytes received and not used.", ("reason", WASTED)),
    _counter("gup_fills_total", "Fills ended.", ("outcome", ("committed", "failed", "unstorable"))),
    _counter("gup_fill_resumes_total", "Fills resumed.", ("reason", RESUME_REASONS)),
    Metric("gup_fill_duration_seconds", "histogram", "From claim to commit.", buckets=FILL_BUCKETS),
    Metric(
        "gup_time_to_first_byte_seconds",
        "histogram",
        "From a request's head to the first byte of content, hot hits left out.",
        labels=(("result", _WITH_CONTENT),),
        buckets=TTFB_BUCKETS,
    ),
    _gauge("gup_fills_in_progress", "Fills under way.", stored=True),
    _gauge("gup_fill_waiters", "Requests attached to fills under way.", stored=True),
    _gauge("gup_client_connections", "Client connections open.", stored=True),
    _gauge(
        "gup_client_downloads_in_progress",
        "Bodies over 256 KiB being sent, index files left out.",
        stored=True,
    ),
    _gauge("gup_client_downloads_queued", "Requests waiting for a download slot.", stored=True),
    _counter("gup_client_downloads_total", "Such bodies that were sent, or broken off."),
    _counter(
        "gup_evictions_total", "Entries evicted.", ("reason", ("unused", "revision", "size", "free", "part"))
    ),
    _counter(
        "gup_evicted_bytes_total",
        "Bytes evicted.",
        ("reason", ("unused", "revision", "size", "free", "part")),
    ),
    _counter(
        "gup_integrity_failures_total",
        "Damage found in the store.",
        ("where", ("body", "part", "record", "index", "state")),
    ),
    _counter(
        "gup_rule_refusals_total",
        "Requests that a rule refused or would refuse.",
        (
            "rule",
            (
                "client_patches_off",
                "content_type",
                "manager_too_old",
                "version",
                "language",
                "undeclared",
                "unlisted",
            ),
        ),
        ("mode", ("enforce", "report")),
    ),
    _counter(
        "gup_connections_refused_total",
        "Connections closed at accept.",
        ("reason", ("network", "limit", "address")),
    ),
    _counter("gup_events_lost_total", "Events for the controller that found its queue full."),
    _counter("gup_worker_restarts_total", "Workers restarted after they died."),
    Metric("gup_stream_sent_bytes_total", "counter", "Body bytes sent, by stream.", _OF_STREAM, stored=False),
    Metric(
        "gup_stream_received_bytes_total",
        "counter",
        "Body bytes received, by stream.",
        _OF_STREAM,
        stored=False,
    ),
    _gauge("gup_clients_seen", "Client addresses seen.", ("window", ("1h", "1d", "7d"))),
    _gauge("gup_cache_entries", "Entries in the store."),
    _gauge("gup_cache_size_bytes", "Bodies and parts in the store."),
    _gauge("gup_cache_limit_bytes", "cache.max_size."),
    _gauge("gup_disk_free_bytes", "Free on the cache's file system."),
    _gauge("gup_upstream_up", "Whether content is asked of the upstream; 0 while it is down.", upstream=True),
    _gauge(
        "gup_bandwidth_limit_bytes_per_second",
        "Limit in force; absent when unlimited.",
        ("direction", ("upstream", "client")),
    ),
    _gauge(
        "gup_allowed_at_once",
        "How many may be at once; absent when unlimited.",
        ("of", ("connections", "connections_per_address", "downloads", "fills", "queue")),
    ),
    _gauge(
        "gup_newest_content_timestamp_seconds",
        "Date of the newest revision.",
        *_LABELS_OF_STREAM,
        ("where", ("held", "requested")),
    ),
    _gauge("gup_full_storm", "Whether clients ask for fulls where deltas exist.", *_LABELS_OF_STREAM),
    _gauge("gup_config_last_reload_successful", "Whether the last reload took."),
    _gauge("gup_start_time_seconds", "When the service was started."),
    _gauge("gup_build_info", "Version of gup and of Python.", ("version", ()), ("python", ())),
    _gauge("gup_site_info", "Name of the site.", ("site", ())),
)

STREAM_WASTED = Metric(
    "gup_stream_wasted_bytes_total", "counter", "Bytes received and not used, by stream.", stored=False
)
"""Counted for the savings ledger alone: as a metric it would be too many series."""
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}


def series(name: str, labels: Mapping[str, str]) -> str:
    """The one spelling of a series: `name{label="value",…}`, labels in the order of their names."""
    if not labels:
        return name
    return name + "{" + ",".join(f'{label}="{labels[label]}"' for label in sorted(labels)) + "}"


def label_sets(metric: Metric, upstreams: Sequence[str]) -> Iterator[dict[str, str]]:
    """Every combination of label values that `metric` starts with, at 0."""
    if metric.name == "gup_requests_total":
        yield from ({"result": r, "code": c} for r, codes in CODES_OF_RESULT.items() for c in codes)
        return
    axes = [[("upstream", name) for name in upstreams]] if metric.upstream else []
    axes += [[(label, value) for value in values] for label, values in metric.labels]
    for combination in product(*axes):
        yield dict(combination)


def stream_series(direction: Literal["sent", "received", "wasted"], slot: int, kind: str) -> str:
    """The series that counts stream number `slot` (0…MAX_STREAMS); names come when it is read."""
    return series(f"gup_stream_{direction}_bytes_total", {"slot": str(slot), "kind": kind})


def layout(upstreams: Sequence[str]) -> list[str]:
    """Series in the order of their words. A histogram's are its buckets (`le`), then its `_sum` (ns)."""
    words: list[str] = []
    for metric in METRICS:
        if not metric.stored:
            continue
        for labels in label_sets(metric, upstreams):
            if metric.kind != "histogram":
                words.append(series(metric.name, labels))
                continue
            edges = [f"{edge:g}" for edge in metric.buckets] + ["+Inf"]
            words += [series(metric.name + "_bucket", {**labels, "le": edge}) for edge in edges]
            words.append(series(metric.name + "_sum", labels))
    for slot in range(MAX_STREAMS + 1):
        for kind in KINDS:
            words += [stream_series("sent", slot, kind), stream_series("received", slot, kind)]
            words.append(stream_series("wasted", slot, kind))
    return words


class Counters:
    """One process's block of 64-bit `words`, which it alone writes, and where each series stands."""

    def __init__(self, words: "memoryview[int]", positions: Mapping[str, int]) -> None:
        self.words = words
        self._positions = positions

    @classmethod
    def private(cls, upstreams: Sequence[str] = ()) -> "Counters":
        """Counters in memory of this process alone, for tests and tools."""
        names = layout(upstreams)
        return cls(
            memoryview(bytearray(8 * len(names))).cast("Q"),
            {name: position for position, name in enumerate(names)},
        )

    def position(self, name: str, /, **labels: str) -> int:
        """The word of a series, for callers that count often: `counters.words[position] += n`."""
        return self._positions[series(name, labels)]

    def add(self, name: str, amount: int = 1, /, **labels: str) -> None:
        self.words[self._positions[series(name, labels)]] += amount

    def set(self, name: str, amount: int, /, **labels: str) -> None:
        self.words[self._positions[series(name, labels)]] = amount

    def get(self, name: str, /, **labels: str) -> int:
        return self.words[self._positions[series(name, labels)]]

    def add_stream(self, direction: Literal["sent", "received"], slot: int, kind: str, amount: int) -> None:
        self.words[self._positions[stream_series(direction, slot, kind)]] += amount

    def waste(self, reason: str, stream: tuple[int, str], amount: int) -> None:
        """Count bytes that came from upstream for nothing; `stream` is the number and the kind."""
        self.add("gup_upstream_wasted_bytes_total", amount, reason=reason)
        self.words[self._positions[stream_series("wasted", *stream)]] += amount

    def observe(self, name: str, seconds: float, /, **labels: str) -> None:
        """Count `seconds` into a histogram."""
        edges = BY_NAME[name].buckets
        at = bisect_left(edges, seconds)
        edge = f"{edges[at]:g}" if at < len(edges) else "+Inf"
        self.add(name + "_bucket", 1, **labels, le=edge)
        self.add(name + "_sum", max(0, round(seconds * _NANOSECONDS)), **labels)
