"""What a run of the demo comes to: three parties' figures side by side, and the verdict. Pure."""

import re
import statistics
from dataclasses import asdict, dataclass

from gup.content.key import Kind
from gup.demo.catalogue import Counts
from gup.demo.figures import Figures

RIGHT, WRONG_BYTE, FETCHED_TWICE, NOT_STARTED, FIGURES_DISAGREE = range(5)
"""Exit statuses of the demo; the lowest that applies (but 0) is given."""

_SAMPLE = re.compile(r"([a-z_]+)(?:\{([^}]*)\})? ([0-9.eE+-]+)")


@dataclass(frozen=True, slots=True)
class OwnFigures:
    """What gup says of itself on `/metrics`; bytes are of bodies."""

    upstream_received_bytes: int
    client_sent_bytes: int
    fills_committed: int


def own_figures(exposition: str) -> OwnFigures:
    """The sums that matter here, from the Prometheus text format."""
    sums = {
        "gup_upstream_received_bytes_total": 0.0,
        "gup_client_sent_bytes_total": 0.0,
        "gup_fills_total": 0.0,
    }
    for line in exposition.splitlines():
        match = _SAMPLE.match(line)
        if match is None or match[1] not in sums:
            continue
        if match[1] != "gup_fills_total" or 'outcome="committed"' in (match[2] or ""):
            sums[match[1]] += float(match[3])
    return OwnFigures(*(round(value) for value in sums.values()))


@dataclass(frozen=True, slots=True)
class Herd:
    """The moment when all clients learned of new revisions at once, until they had them."""

    clients: int
    downloads: int
    seconds: float
    received_bytes: int
    wan_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything the demo reports, and judges by."""

    clients: int
    seconds: float
    requests: int
    received_bytes: int
    wan_bytes: int
    saved_bytes: int
    saved_share: float | None
    deltas: int
    fulls: int
    resumes: int
    retries: int
    files_fetched: int
    fetches_per_file_min: int
    fetches_per_file_median: float
    fetches_per_file_max: int
    files_fetched_twice: int
    index_fetches: int
    index_not_modified: int
    wrong: int
    failed: int
    median_time_to_first_byte_seconds: float | None
    p99_time_to_first_byte_seconds: float | None
    hit_median_time_to_first_byte_seconds: float | None
    cache_status: dict[str, int]
    herd: Herd | None
    own: OwnFigures | None
    own_figures_agree: bool
    complaints: tuple[str, ...]

    @property
    def status(self) -> int:
        """The exit status; a download that failed for good counts as bytes that were not right."""
        if self.wrong or self.failed or not self.deltas + self.fulls:
            return WRONG_BYTE
        if self.files_fetched_twice:
            return FETCHED_TWICE
        return RIGHT if self.own_figures_agree else FIGURES_DISAGREE

    def document(self) -> dict[str, object]:
        """The summary as plain values, ready for JSON."""
        return {"status": self.status, **asdict(self)}


def agree(own: OwnFigures, counts: Counts, figures: Figures) -> bool:
    """Whether gup took from the WAN what the manager sent, and sent at least what clients got.

    More may have been sent than received: a client that breaks off leaves bytes on the way.
    """
    return (
        own.upstream_received_bytes == counts.sent_bytes and own.client_sent_bytes >= figures.received_bytes
    )


def summarise(
    figures: Figures,
    counts: Counts,
    own: OwnFigures | None,
    *,
    clients: int,
    seconds: float,
    herd: Herd | None = None,
) -> Summary:
    """The summary of a run; `counts` are the management server's, `own` is gup's view (None: no answer)."""
    content = [row for row in counts.files.values() if row.kind is not Kind.INDEX]
    index = [row for row in counts.files.values() if row.kind is Kind.INDEX]
    fetches = [row.fetches for row in content if row.fetches]
    saved_bytes = figures.received_bytes - counts.sent_bytes
    return Summary(
        clients=clients,
        seconds=seconds,
        requests=figures.requests,
        received_bytes=figures.received_bytes,
        wan_bytes=counts.sent_bytes,
        saved_bytes=saved_bytes,
        saved_share=saved_bytes / figures.received_bytes if figures.received_bytes else None,
        deltas=figures.downloads[Kind.DELTA],
        fulls=figures.downloads[Kind.FULL],
        resumes=figures.resumes,
        retries=figures.retries,
        files_fetched=len(fetches),
        fetches_per_file_min=min(fetches, default=0),
        fetches_per_file_median=statistics.median(fetches) if fetches else 0,
        fetches_per_file_max=max(fetches, default=0),
        files_fetched_twice=sum(count > 1 for count in fetches) + counts.withdrawn_fetched_again,
        index_fetches=sum(row.fetches for row in index),
        index_not_modified=sum(row.not_modified for row in index),
        wrong=figures.wrong,
        failed=figures.failed,
        median_time_to_first_byte_seconds=figures.time_to_first_byte.quantile(0.5),
        p99_time_to_first_byte_seconds=figures.time_to_first_byte.quantile(0.99),
        hit_median_time_to_first_byte_seconds=figures.hit_time_to_first_byte.quantile(0.5),
        cache_status=dict(figures.cache_status),
        herd=herd,
        own=own,
        own_figures_agree=own is not None and agree(own, counts, figures),
        complaints=tuple(figures.complaints),
    )
