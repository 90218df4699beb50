"""Exposition: the counters and the figures worked out on request as Prometheus families, for `/metrics`.

Names, labels and help of all metrics are in gup.metrics.
"""

import platform
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import gup
from gup.metrics import KINDS, MAX_SHOWN, MAX_STREAMS, METRICS, Metric, label_sets, stream_series

Label = tuple[str, str]
"""Product and language."""
OTHER: Label = ("other", "other")

StreamNames = Sequence[tuple[str, str, str]]
ProductOf = Callable[[tuple[str, str, str]], Label | None]
"""Product and language of a stream (version, language, moniker); None where no catalogue lists it."""


def stream_labels(names: StreamNames, slot: int, product_of: ProductOf) -> Label:
    """Product and language of stream `slot`: from the catalogue, else moniker and variant."""
    if slot >= min(len(names), MAX_STREAMS):
        return OTHER
    _, language, stream = names[slot]
    return product_of(names[slot]) or (stream, language)


def shown_labels(names: StreamNames, product_of: ProductOf) -> list[Label]:
    """The label of each slot: the first MAX_SHOWN products and languages apart, the rest as OTHER.

    A slot is never given to another stream, so the labels stay the same while the catalogue does.
    """
    shown: dict[Label, None] = {}
    labels = []
    for slot in range(MAX_STREAMS + 1):
        label = stream_labels(names, slot, product_of)
        if label not in shown and (label == OTHER or len(shown) >= MAX_SHOWN):
            label = OTHER
        else:
            shown[label] = None
        labels.append(label)
    return labels


def first_shown(names: StreamNames, product_of: ProductOf, labels: Iterable[Label]) -> list[Label]:
    """At most MAX_SHOWN of `labels`, in their order: first those whose bytes have series of their own."""
    apart = set(shown_labels(names, product_of))
    return sorted(labels, key=lambda label: label not in apart)[:MAX_SHOWN]


_NANOSECONDS = 1_000_000_000
_LABEL = re.compile(r'([a-z_]+)="([^"]*)"')
_DIRECTIONS: tuple[Literal["sent", "received"], ...] = ("sent", "received")


@dataclass(frozen=True, slots=True)
class Figures:
    """All that the exposition shows.

    `totals` are the counters by series name; `newest` has the Unix time of the newest revision by product,
    language and where ("held", "requested"); `storms` tells by product and language whether there is one.
    """

    totals: Mapping[str, int]
    upstreams: Sequence[str]
    stream_names: StreamNames
    product_of: ProductOf
    entries: int = 0
    size_bytes: int = 0
    limit_bytes: int = 0
    free_bytes: int = 0
    clients_seen: Mapping[str, int] = field(default_factory=dict)
    upstreams_up: Mapping[str, bool] = field(default_factory=dict)
    wan_bytes_per_second: int = 0
    client_bytes_per_second: int = 0
    limits: Mapping[str, int] = field(default_factory=dict)
    newest: Mapping[tuple[str, str, str], float] = field(default_factory=dict)
    storms: Mapping[tuple[str, str], bool] = field(default_factory=dict)
    config_ok: bool = True
    site: str = ""
    started_at: float = 0.0


def parse_series(name: str) -> tuple[str, dict[str, str]]:
    """Metric and labels of a series name, as gup.metrics.series spells it."""
    base, _, labels = name.partition("{")
    return base, dict(_LABEL.findall(labels))


def expose(figures: Figures, accept: str) -> tuple[bytes, str]:
    """The exposition in the format that `accept` asks for (text or OpenMetrics), and its content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(figures))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Figures(Collector):
    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Family]:
        words: dict[str, dict[_Labels, int]] = defaultdict(dict)
        for name, value in self._figures.totals.items():
            base, labels = parse_series(name)
            words[base][tuple(sorted(labels.items()))] = value
        for metric in METRICS:
            if metric.kind == "histogram":
                yield _histogram(metric, words)
            elif metric.stored:  # enumerated labels that were not counted yet are 0
                samples = {
                    tuple(sorted(row.items())): 0 for row in label_sets(metric, self._figures.upstreams)
                }
                samples |= words[metric.name]
                yield _family(metric, [(dict(labels), value) for labels, value in samples.items()])
            elif rows := list(_ROWS[metric.name](self._figures)):
                yield _family(metric, rows)


_Labels = tuple[tuple[str, str], ...]
"""Sorted pairs of name and value."""


def _family(metric: Metric, rows: Sequence[tuple[Mapping[str, str], float]]) -> Family:
    names = sorted(rows[0][0]) if rows else []
    make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = make(metric.name, metric.help, labels=names)
    for labels, value in rows:
        family.add_metric([labels[name] for name in names], value)
    return family


def _histogram(metric: Metric, words: Mapping[str, Mapping[_Labels, int]]) -> Family:
    family = HistogramMetricFamily(metric.name, metric.help, labels=sorted(dict(metric.labels)))
    for row in label_sets(metric, ()):
        buckets, cumulated = [], 0
        for edge in [*(f"{edge:g}" for edge in metric.buckets), "+Inf"]:
            labels = tuple(sorted({**row, "le": edge}.items()))
            cumulated += words.get(metric.name + "_bucket", {}).get(labels, 0)
            buckets.append((edge, cumulated))
        labels = tuple(sorted(row.items()))
        total = words.get(metric.name + "_sum", {}).get(labels, 0)
        family.add_metric([value for _, value in labels], buckets, total / _NANOSECONDS)
    return family


_Samples = Iterable[tuple[Mapping[str, str], float]]


def _streams(direction: Literal["sent", "received"]) -> Callable[[Figures], _Samples]:
    """Bytes by product, language and kind, of streams that were counted.

    Both directions appear together, so that their difference is defined from the first byte on.
    """

    def samples(figures: Figures) -> _Samples:
        sums: dict[tuple[Label, str], int] = {}
        labels = shown_labels(figures.stream_names, figures.product_of)
        for slot, kind in product(range(MAX_STREAMS + 1), KINDS):
            ways = {way: figures.totals.get(stream_series(way, slot, kind), 0) for way in _DIRECTIONS}
            if any(ways.values()):
                row = (labels[slot], kind)
                sums[row] = sums.get(row, 0) + ways[direction]
        for ((name, language), kind), value in sums.items():
            yield {"product": name, "language": language, "kind": kind}, value

    return samples


def _limits(figures: Figures) -> _Samples:
    for direction, limit in (
        ("upstream", figures.wan_bytes_per_second),
        ("client", figures.client_bytes_per_second),
    ):
        if limit:
            yield {"direction": direction}, limit


def _newest(figures: Figures) -> _Samples:
    known = {(name, language): at for (name, language, _), at in figures.newest.items()}
    for name, language in first_shown(figures.stream_names, figures.product_of, known):
        for where in ("held", "requested"):
            at = figures.newest.get((name, language, where))
            if at is not None:
                yield {"product": name, "language": language, "where": where}, at


def _storms(figures: Figures) -> _Samples:
    """Present storms come first, so that the limit on series hides calm streams before them."""
    under_way = [label for label, storm in figures.storms.items() if storm]
    calm = [label for label, storm in figures.storms.items() if not storm]
    shown = first_shown(figures.stream_names, figures.product_of, calm)
    for name, language in [*under_way, *shown][:MAX_SHOWN]:
        yield {"product": name, "language": language}, figures.storms[name, language]


_ROWS: Mapping[str, Callable[[Figures], _Samples]] = {
    "gup_stream_sent_bytes_total": _streams("sent"),
    "gup_stream_received_bytes_total": _streams("received"),
    "gup_clients_seen": lambda f: [({"window": window}, n) for window, n in f.clients_seen.items()],
    "gup_cache_entries": lambda f: [({}, f.entries)],
    "gup_cache_size_bytes": lambda f: [({}, f.size_bytes)],
    "gup_cache_limit_bytes": lambda f: [({}, f.limit_bytes)],
    "gup_disk_free_bytes": lambda f: [({}, f.free_bytes)],
    "gup_upstream_up": lambda f: [({"upstream": name}, up) for name, up in f.upstreams_up.items()],
    "gup_bandwidth_limit_bytes_per_second": _limits,
    "gup_allowed_at_once": lambda f: [({"of": name}, limit) for name, limit in f.limits.items()],
    "gup_newest_content_timestamp_seconds": _newest,
    "gup_full_storm": _storms,
    "gup_config_last_reload_successful": lambda f: [({}, f.config_ok)],
    "gup_start_time_seconds": lambda f: [({}, f.started_at)],
    "gup_build_info": lambda _: [({"version": gup.__version__, "python": platform.python_version()}, 1)],
    "gup_site_info": lambda f: [({"site": f.site}, 1)],
}
