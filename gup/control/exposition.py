"""The Prometheus exposition for `/metrics`: the counters, and the figures computed on request."""

import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import gup
from gup.control.state import OTHER, ControlState, Label, numbers
from gup.control.traffic import newest_times
from gup.metrics import (
    KINDS,
    MAX_MEMBERS,
    MAX_SHOWN,
    MAX_STREAMS,
    METRICS,
    Metric,
    label_sets,
    parse_series,
    peer_series,
    series,
    stream_series,
)

Samples = Sequence[tuple[Mapping[str, str], float]]


def shown_labels(labels: Iterable[Label]) -> list[Label]:
    """The label of each slot: the first MAX_SHOWN products and languages, the rest as OTHER.

    A slot is never given to another stream, so the shown ones stay the same while the catalogue does.
    """
    apart = list(dict.fromkeys(label for label in labels if label != OTHER))[:MAX_SHOWN]
    return [label if label in apart else OTHER for label in labels]


_DIRECTIONS: tuple[Literal["sent", "received"], ...] = ("sent", "received")
_NANOSECONDS = 1_000_000_000


def expose(
    totals: Mapping[str, int], upstreams: Sequence[str], gauges: Mapping[str, Samples], accept: str
) -> tuple[bytes, str]:
    """The exposition in the format that `accept` asks for (text or OpenMetrics), and its content type.

    `totals` are the counters by series name, `gauges` the samples of what is not stored, by metric.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(totals, upstreams, gauges))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


@dataclass(eq=False)
class _Families(Collector):
    totals: Mapping[str, int]
    upstreams: Sequence[str]
    gauges: Mapping[str, Samples]

    def collect(self) -> Iterable[Family]:
        totals: dict[str, dict[str, int]] = defaultdict(dict)
        for name, value in self.totals.items():
            totals[name.partition("{")[0]][name] = value
        for metric in METRICS:
            if metric.kind == "histogram":
                yield _histogram(metric, self.totals)
            elif metric.stored:  # enumerated labels that were not counted yet are 0
                samples = {series(metric.name, row): 0 for row in label_sets(metric, self.upstreams)}
                samples |= totals[metric.name]
                yield _family(metric, [(parse_series(name)[1], value) for name, value in samples.items()])
            elif rows := self.gauges.get(metric.name):
                yield _family(metric, rows)


def _family(metric: Metric, rows: Sequence[tuple[Mapping[str, str], float]]) -> Family:
    names = sorted(rows[0][0]) if rows else []
    make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = make(metric.name, metric.help, labels=names)
    for labels, value in rows:
        family.add_metric([labels[name] for name in names], value)
    return family


def _histogram(metric: Metric, totals: Mapping[str, int]) -> Family:
    family = HistogramMetricFamily(metric.name, metric.help, labels=sorted(dict(metric.labels)))
    for row in label_sets(metric, ()):
        buckets, cumulated = [], 0
        for edge in [*(f"{edge:g}" for edge in metric.buckets), "+Inf"]:
            cumulated += totals.get(series(metric.name + "_bucket", row | {"le": edge}), 0)
            buckets.append((edge, cumulated))
        total = totals.get(series(metric.name + "_sum", row), 0)
        family.add_metric([row[name] for name in sorted(row)], buckets, total / _NANOSECONDS)
    return family


def stream_bytes(totals: Mapping[str, int], labels: Sequence[Label]) -> dict[str, Samples]:
    """Bytes by product, language and kind, of streams that were counted; `labels` are those of the slots.

    Both directions appear together, so that their difference is defined from the first byte on.
    """
    sums: dict[str, Counter[tuple[Label, str]]] = {way: Counter() for way in _DIRECTIONS}
    shown = shown_labels(labels)
    for slot, kind in product(range(MAX_STREAMS + 1), KINDS):
        ways = {way: totals.get(stream_series(way, slot, kind), 0) for way in _DIRECTIONS}
        if any(ways.values()):
            for way, value in ways.items():
                sums[way][shown[slot], kind] += value
    return {
        f"gup_stream_{way}_bytes_total": [
            (_product(label) | {"kind": kind}, value) for (label, kind), value in counts.items()
        ]
        for way, counts in sums.items()
    }


def peer_bytes(totals: Mapping[str, int], names: Sequence[str]) -> dict[str, Samples]:
    """Bytes to and from each member; `names` are those of the slots, all others are counted as OTHER."""
    return {
        f"gup_peer_{way}_bytes_total": [
            ({"member": name}, totals.get(peer_series(way, slot), 0))
            for slot, name in [*enumerate(names), (MAX_MEMBERS, OTHER[0])]
        ]
        for way in _DIRECTIONS
    }


def newest_and_storms(
    newest: Mapping[str, Mapping[Label, float]], storms: Mapping[Label, bool], labels: Iterable[Label]
) -> dict[str, Samples]:
    """Times of the newest revisions ("held", "requested") and storms, of at most MAX_SHOWN labels each.

    First come those whose bytes have series of their own. Present storms come before all calm streams.
    """
    apart = set(shown_labels(labels))
    known = dict.fromkeys(label for times in newest.values() for label in times)
    first = sorted(known, key=lambda label: label not in apart)[:MAX_SHOWN]
    order = sorted(storms, key=lambda label: (not storms[label], label not in apart))
    return {
        "gup_newest_content_timestamp_seconds": [
            (_product(label) | {"where": where}, times[label])
            for label in first
            for where, times in newest.items()
            if label in times
        ],
        "gup_full_storm": [(_product(label), storms[label]) for label in order[:MAX_SHOWN]],
    }


def _product(label: Label) -> dict[str, str]:
    return {"product": label[0], "language": label[1]}


async def gauges(state: ControlState, totals: Mapping[str, int]) -> dict[str, Samples]:
    disk, settings, dependencies = await state.evictor.measure(), state.settings, state.dependencies
    storms: dict[Label, bool] = {}
    state.traffic.look()
    for stream, storm in state.traffic.flags().items():
        label = state.label(stream)
        storms[label] = storm or storms.get(label, False)
    newest = {
        "held": newest_times(state.index.rows.newest_held(), state.label),
        "requested": newest_times(state.traffic.newest(), state.label),
    }
    cluster = dependencies.cluster
    members = len(cluster.membership.members()) + 1 if cluster is not None else 1
    # Of the site's rate the equal part: shares of a moment would not add up to it.
    limits = {"upstream": dependencies.site_rate() // members, "client": settings.clients.rate}
    rates = [({"direction": name}, limit) for name, limit in limits.items() if limit]
    labels, upstreams = state.slot_labels(), dependencies.upstream_states()
    return {
        **stream_bytes(totals, labels),
        **newest_and_storms(newest, storms, labels),
        "gup_clients_seen": [({"window": w}, n) for w, n in state.clients.counts(state.clock()).items()],
        "gup_clients_by_age": [({"age": age}, n) for age, n in state.reports.ages.items()],
        "gup_clients_sick": [({"finding": name}, n) for name, n in state.doctor.found.counts.items()]
        if state.reports.mode != "off"
        else [],
        "gup_cache_entries": [({}, len(state.index.rows))],
        "gup_cache_size_bytes": [({}, disk.size_bytes)],
        "gup_cache_limit_bytes": [({}, settings.cache.max_size)],
        "gup_disk_free_bytes": [({}, disk.free_bytes)],
        "gup_upstream_up": [({"upstream": name}, state != "down") for name, (state, _) in upstreams.items()],
        "gup_bandwidth_limit_bytes_per_second": rates,
        "gup_allowed_at_once": [({"of": name}, limit) for name, limit in numbers(settings).items()],
        "gup_alarm_messages_waiting": [({"to": to}, n) for to, n in state.notifications.waiting().items()],
        "gup_config_last_reload_successful": [({}, dependencies.config_ok())],
        "gup_start_time_seconds": [({}, dependencies.started_at)],
        "gup_build_info": [({"version": gup.__version__, "python": platform.python_version()}, 1)],
        **(peer_bytes(totals, cluster.slots) if cluster is not None else {}),
        "gup_cluster_members": [({}, members)] if cluster is not None else [],
        "gup_site_info": [({"site": settings.site.name}, 1)],
    }
