"""The table of all metrics, and the counters that processes write; formatting is elsewhere.

A stored figure is one 64-bit word in a block that one process alone writes, at the moment of counting: it
stays exact when that process is killed. The control plane sums the blocks when it is asked.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from gup.phases import FILL_PHASES, REQUEST_PHASES

_SERVED = ("200", "206", "304", "412", "416")
CODES_OF_RESULT: Mapping[str, tuple[str, ...]] = {
    "hit": _SERVED,
    "miss": _SERVED,
    "collapsed": _SERVED,
    "revalidated": _SERVED,
    "stale": _SERVED,
    "bypass": _SERVED,
    "refused": ("307", "400", "403", "404", "405", "408", "414", "431", "503", "505", "508"),
    "error": ("404", "410", "500", "502", "503", "504"),
}
"""Status codes by result: the series of `gup_requests_total`."""
KINDS = ("full", "delta", "index", "other")
SOURCES = ("cache", "fill", "bypass")
PURPOSES = ("fill", "index", "prefetch", "repair", "catalog", "bypass")
WASTED = ("overlap", "mismatch", "aborted", "rejected")
SICK_FINDINGS = ("repeated-full", "no-delta", "behind", "refused", "unfinished")
RESUME_REASONS = ("cut", "timeout", "failover", "takeover")
MAX_STREAMS = 50
"""Streams (variant and moniker) counted separately; the rest share the last slot."""
MAX_MEMBERS = 16
"""Members of a cluster counted separately; the rest share the last slot."""
MAX_SHOWN = 24
"""Products and languages with series of their own in an exposition; the rest are summed.

Each takes up to nine series (full, delta and index both ways, newest held and requested, storm): with two
upstreams this keeps a site below 650, whatever its clients ask for.
"""

TTFB_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0)
FILL_BUCKETS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 7200.0, 14400.0)
PHASE_BUCKETS = (0.1, 1.0, 10.0, 60.0)
_NANOSECONDS = 1_000_000_000

Direction = Literal["sent", "received", "wasted"]
Label = tuple[str, tuple[str, ...]]
"""A label with its values; without values where they are not known in advance."""


@dataclass(frozen=True, slots=True)
class Metric:
    """`upstream` adds that label with the configured names. `stored` figures live in the blocks: one word a
    series, histograms one a bucket and one for the sum. The controller computes the others when asked.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[Label, ...] = ()
    upstream: bool = False
    buckets: tuple[float, ...] = ()
    stored: bool = True


def _counter(name: str, text: str, *labels: Label, upstream: bool = False, stored: bool = True) -> Metric:
    return Metric(name, "counter", text, labels, upstream, stored=stored)


def _level(name: str, text: str) -> Metric:
    return Metric(name, "gauge", text)


def _gauge(name: str, text: str, *labels: Label, upstream: bool = False) -> Metric:
    return Metric(name, "gauge", text, labels, upstream, stored=False)


_RESULT = ("result", tuple(CODES_OF_RESULT))
_SERVED_AS = ("result", tuple(name for name, codes in CODES_OF_RESULT.items() if codes is _SERVED))
_PURPOSE = ("purpose", PURPOSES)
_OUTCOMES = ("ok", "not_modified", "not_found", "error", "timeout", "unreachable", "rejected")
_ENDS = ("outcome", ("committed", "failed", "unstorable"))
_EVICTED = ("reason", ("unused", "revision", "size", "free", "part"))
_WHERE = ("where", ("body", "part", "record", "index", "state"))
RECEIVERS = ("webhook", "command")
_RECEIVER: Label = ("to", RECEIVERS)
_TRIED = ("outcome", ("accepted", "failed", "dropped"))
_OF_PATCHES = ("client_patches_off", "manager_too_old", "version", "language", "undeclared")
_RULE = ("rule", ("content_type", "unlisted", *_OF_PATCHES, "hold", "canary"))
_CLOSED = ("reason", ("network", "limit", "address", "proxy"))
_LIMITED = ("of", ("connections", "connections_per_address", "downloads", "fills", "queue"))
_PRODUCT: Label = ("product", ())
_LANGUAGE: Label = ("language", ())
_MEMBER: Label = ("member", ())
HELD_BACK = ("background", "full", "delta")
"""Classes of fills that the WAN's budget holds back, in this order."""
_BUDGET_HELP = "wan.budget.bytes: the site's in each period; absent without a budget."
_BUDGET_USED_HELP = "What the site has used of it in this period, without cheap hours."
_NEWEST = (_PRODUCT, _LANGUAGE, ("where", ("held", "requested")))
_STREAM = (_PRODUCT, _LANGUAGE, ("kind", KINDS))
_TTFB_HELP = "From a request's head to the first byte of content, hot hits left out."
_SICK_HELP = "Clients that something seems to be wrong with; absent without client records."
_OF_FILL, _OF_REQUEST = (("phase", FILL_PHASES),), (("phase", REQUEST_PHASES),)
_FILL_PHASE_HELP = "Where the seconds of fills went; a phase below 1 ms is not counted."
_REQUEST_PHASE_HELP = "The same of requests that took longer than reports.slow."
_DOWNLOADS_HELP = "Bodies over 256 KiB being sent, index files left out."
_UP_HELP = "Whether content is requested from the upstream; 0 while it is down."
_AGE_HELP = "Clients active within 7 days, by age of the revision that they took or stated."
_RULES_HELP = "Requests that a rule refused or would refuse."
_LIMIT_HELP = "Limit in force, in a cluster an equal part of the site's; absent when unlimited."
_SIZING_HELP = "What had crossed the WAN in 30 days with a store of so many times its size."
_STORM_HELP = "Whether clients ask for fulls where deltas exist."

METRICS: tuple[Metric, ...] = (
    _counter("gup_requests_total", "Requests answered.", _RESULT, ("code", ())),
    _counter("gup_client_sent_bytes_total", "Body bytes sent to clients.", ("source", SOURCES)),
    _counter("gup_upstream_received_bytes_total", "Body bytes from upstream.", _PURPOSE, upstream=True),
    _counter("gup_upstream_requests_total", "Requests sent upstream.", ("outcome", _OUTCOMES), upstream=True),
    _counter("gup_upstream_wasted_bytes_total", "Bytes received and not used.", ("reason", WASTED)),
    _counter(
        "gup_peer_received_bytes_total", "Body bytes from a member of the cluster.", _MEMBER, stored=False
    ),
    _counter("gup_peer_sent_bytes_total", "Body bytes to a member of the cluster.", _MEMBER, stored=False),
    _counter("gup_fills_total", "Fills ended.", _ENDS),
    _counter("gup_fill_resumes_total", "Fills resumed.", ("reason", RESUME_REASONS)),
    Metric("gup_fill_duration_seconds", "histogram", "From claim to commit.", buckets=FILL_BUCKETS),
    Metric("gup_time_to_first_byte_seconds", "histogram", _TTFB_HELP, (_SERVED_AS,), buckets=TTFB_BUCKETS),
    Metric("gup_fill_phase_seconds", "histogram", _FILL_PHASE_HELP, _OF_FILL, buckets=PHASE_BUCKETS),
    Metric("gup_request_phase_seconds", "histogram", _REQUEST_PHASE_HELP, _OF_REQUEST, buckets=PHASE_BUCKETS),
    _level("gup_fills_in_progress", "Fills under way."),
    _level("gup_fill_waiters", "Requests attached to fills under way."),
    _level("gup_client_connections", "Client connections open."),
    _level("gup_client_downloads_in_progress", _DOWNLOADS_HELP),
    _level("gup_client_downloads_queued", "Requests waiting for a download slot."),
    _counter("gup_client_downloads_total", "Such bodies that were sent, or broken off."),
    _counter("gup_evictions_total", "Entries evicted.", _EVICTED),
    _counter("gup_evicted_bytes_total", "Bytes evicted.", _EVICTED),
    _counter("gup_integrity_failures_total", "Damage found in the store.", _WHERE),
    _counter("gup_rule_refusals_total", _RULES_HELP, _RULE, ("mode", ("enforce", "report"))),
    _counter("gup_connections_refused_total", "Connections closed at accept.", _CLOSED),
    _counter("gup_events_lost_total", "Events for the controller that found its queue full."),
    _counter("gup_worker_restarts_total", "Workers restarted after they died."),
    _counter(
        "gup_alarm_messages_total", "Alarm messages: accepted, failed tries, given up.", _RECEIVER, _TRIED
    ),
    _counter("gup_stream_sent_bytes_total", "Body bytes sent, by stream.", *_STREAM, stored=False),
    _counter("gup_stream_received_bytes_total", "Body bytes received, by stream.", *_STREAM, stored=False),
    _counter("gup_wan_budget_held_back_total", "Fills held back by the WAN's budget.", ("class", HELD_BACK)),
    _gauge("gup_wan_budget_bytes", _BUDGET_HELP),
    _gauge("gup_wan_budget_used_bytes", _BUDGET_USED_HELP),
    _gauge("gup_outbreak", "Whether an outbreak opens the WAN for definitions."),
    _gauge("gup_clients_seen", "Client addresses seen.", ("window", ("1h", "1d", "7d"))),
    _gauge("gup_clients_by_age", _AGE_HELP, ("age", ("1d", "3d", "7d", "30d", "older", "unknown"))),
    _gauge("gup_clients_sick", _SICK_HELP, ("finding", SICK_FINDINGS)),
    _gauge("gup_cache_entries", "Entries in the store."),
    _gauge("gup_cache_size_bytes", "Bodies and parts in the store."),
    _gauge("gup_cache_limit_bytes", "cache.max_size."),
    _gauge("gup_disk_free_bytes", "Free on the cache's file system."),
    _gauge("gup_upstream_up", _UP_HELP, upstream=True),
    _gauge("gup_bandwidth_limit_bytes_per_second", _LIMIT_HELP, ("direction", ("upstream", "client"))),
    _gauge("gup_allowed_at_once", "How many may be at once; absent when unlimited.", _LIMITED),
    _gauge("gup_newest_content_timestamp_seconds", "Date of the newest revision.", *_NEWEST),
    _gauge("gup_full_storm", _STORM_HELP, _PRODUCT, _LANGUAGE),
    _gauge("gup_alarm_messages_waiting", "Alarm messages not accepted yet.", _RECEIVER),
    _gauge("gup_config_last_reload_successful", "Whether the last reload succeeded."),
    _gauge("gup_start_time_seconds", "When the service was started."),
    _gauge("gup_build_info", "Version of gup and of Python.", ("version", ()), ("python", ())),
    _gauge("gup_cluster_members", "Members of the cluster, this one among them; absent when it is alone."),
    _gauge("gup_site_info", "Name of the site.", ("site", ())),
    _gauge("gup_sizing_wan_bytes", _SIZING_HELP, ("factor", ())),
    _gauge("gup_demand_record_bytes", "Size of the record of demand on disk."),
)

STREAM_WASTED = Metric(
    "gup_stream_wasted_bytes_total", "counter", "Bytes received and not used, by stream.", stored=False
)
"""For the savings ledger only: as a metric it would have too many series."""
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}


def series(name: str, labels: Mapping[str, str]) -> str:
    """Canonical spelling of a series: `name{label="value",…}`, labels in the order of their names."""
    pairs = ",".join(f'{label}="{labels[label]}"' for label in sorted(labels))
    return f"{name}{{{pairs}}}" if pairs else name


def parse_series(name: str) -> tuple[str, dict[str, str]]:
    """Inverse of `series`."""
    base, _, labels = name.partition("{")
    return base, dict(re.findall(r'([a-z_]+)="([^"]*)"', labels))


def label_sets(metric: Metric, upstreams: Sequence[str]) -> Iterator[dict[str, str]]:
    """Every combination of label values that `metric` starts with, at 0."""
    if metric.name == "gup_requests_total":
        yield from ({"result": r, "code": c} for r, codes in CODES_OF_RESULT.items() for c in codes)
        return
    axes = [[("upstream", name) for name in upstreams]] if metric.upstream else []
    axes += [[(label, value) for value in values] for label, values in metric.labels]
    for combination in product(*axes):
        yield dict(combination)


def stream_series(direction: Direction, slot: int, kind: str) -> str:
    """The series of stream number `slot` (0…MAX_STREAMS); names are added when it is read."""
    return series(f"gup_stream_{direction}_bytes_total", {"slot": str(slot), "kind": kind})


def peer_series(way: Literal["sent", "received"], slot: int) -> str:
    """The series of member number `slot` (0…MAX_MEMBERS, the last one for all others)."""
    return series(f"gup_peer_{way}_bytes_total", {"slot": str(slot)})


def layout(upstreams: Sequence[str]) -> list[str]:
    """Series in the order of their words. A histogram's are its buckets (`le`), then its `_sum` (ns)."""
    words: list[str] = []
    for metric in METRICS:
        for labels in label_sets(metric, upstreams) if metric.stored else ():
            if metric.kind != "histogram":
                words.append(series(metric.name, labels))
                continue
            edges = [f"{edge:g}" for edge in metric.buckets] + ["+Inf"]
            words += [series(metric.name + "_bucket", {**labels, "le": edge}) for edge in edges]
            words.append(series(metric.name + "_sum", labels))
    for slot, kind, direction in product(range(MAX_STREAMS + 1), KINDS, get_args(Direction)):
        words.append(stream_series(direction, slot, kind))
    words += [peer_series("sent", slot) for slot in range(MAX_MEMBERS + 1)]
    words += [peer_series("received", slot) for slot in range(MAX_MEMBERS + 1)]
    return words


class Counters:
    """One process's block of 64-bit `words`, which it alone writes, and the position of each series."""

    def __init__(self, words: "memoryview[int]", positions: Mapping[str, int]) -> None:
        self.words = words
        self._positions = positions
        self._known: dict[tuple[object, ...], int] = {}
        """Positions that were asked for before, so that a series is not spelled again."""

    def position(self, name: str, /, **labels: str) -> int:
        """The word of a series, for callers that count often: `counters.words[position] += n`."""
        asked = (name, *labels.items())
        at = self._known.get(asked)
        if at is None:
            at = self._known[asked] = self._positions[series(name, labels)]
        return at

    def add(self, name: str, amount: int = 1, /, **labels: str) -> None:
        self.words[self.position(name, **labels)] += amount

    def set(self, name: str, amount: int, /, **labels: str) -> None:
        self.words[self.position(name, **labels)] = amount

    def get(self, name: str, /, **labels: str) -> int:
        return self.words[self.position(name, **labels)]

    def add_stream(self, direction: Direction, slot: int, kind: str, amount: int) -> None:
        asked = (direction, slot, kind)
        at = self._known.get(asked)
        if at is None:
            at = self._known[asked] = self._positions[stream_series(direction, slot, kind)]
        self.words[at] += amount

    def waste(self, reason: str, stream: tuple[int, str], amount: int) -> None:
        """Count bytes received and not used; `stream` is the number and the kind."""
        self.add("gup_upstream_wasted_bytes_total", amount, reason=reason)
        self.add_stream("wasted", *stream, amount)

    def observe(self, name: str, seconds: float, /, **labels: str) -> None:
        edges = BY_NAME[name].buckets
        at = bisect_left(edges, seconds)
        edge = f"{edges[at]:g}" if at < len(edges) else "+Inf"
        self.add(name + "_bucket", 1, **labels, le=edge)
        self.add(name + "_sum", max(0, round(seconds * _NANOSECONDS)), **labels)
