"""Writes docs/metrics.md from the table of metrics; counts and shows no figure."""

from collections.abc import Iterator

from gup.metrics import MAX_SHOWN, METRICS, Metric

_HEAD = f"""\
# Metrics

<!-- Written by `python -m gup.cli.reference` from the table in gup/metrics.py. Change it there. -->

`GET /metrics` on the control plane shows them to Prometheus ([monitoring.md](monitoring.md)), as text or,
when asked, as OpenMetrics. Units are bytes and seconds. Byte counters count bodies, without heads. Counters
are exact after a crash of any process and survive restarts. They begin at 0 for every value that a label can
have, but for those of streams, which appear when they have counted.

`product` and `language` are what the catalogue calls a stream, else its moniker and its variant's language.
The first {MAX_SHOWN} pairs are shown apart, the rest as `other`. No label holds an URL, a client or a
revision.

Bandwidth saved is `gup_client_sent_bytes_total` minus `gup_upstream_received_bytes_total`.
"""


def metrics_page() -> str:
    """The text of docs/metrics.md."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    rows += [f"| `{row.name}` | {row.kind} | {_labels(row)} | {_meaning(row)} |" for row in METRICS]
    return "\n".join([_HEAD, *rows, ""])


def _labels(metric: Metric) -> str:
    return "<br>".join(_each_label(metric)) or "none"


def _each_label(metric: Metric) -> Iterator[str]:
    if metric.upstream:
        yield "`upstream`: the settings' names"
    for label, values in metric.labels:
        yield f"`{label}`: {', '.join(values)}" if values else f"`{label}`"


def _meaning(metric: Metric) -> str:
    if metric.kind != "histogram":
        return metric.help
    return f"{metric.help} Buckets end at {', '.join(f'{edge:g}' for edge in metric.buckets)} s."
