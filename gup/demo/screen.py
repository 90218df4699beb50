"""The output of the demo: progress while it runs, then the summary with its verdict."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table

from gup.content.key import Kind
from gup.demo.clients import Figures, milliseconds
from gup.demo.manager import Counts
from gup.units import bytes_in_words

RIGHT, WRONG_BYTE, FETCHED_TWICE, NOT_STARTED, FIGURES_DISAGREE = range(5)
"""Exit statuses of the demo; the lowest that applies (but 0) is given."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A run so far: `counts` are the management server's, `own` are gup's totals (None: no answer)."""

    figures: Figures
    counts: Counts
    clients: int
    seconds: float
    own: Mapping[str, int] | None = None

    @property
    def agrees(self) -> bool:
        """Whether gup received from the WAN what the manager sent, and sent at least what clients received.

        More may have been sent than received: a client that breaks off leaves bytes on the way.
        """
        sent, got, own = self.counts.sent_bytes, self.figures.received_bytes, self.own
        return own is not None and own["upstream_received_bytes"] == sent and own["client_sent_bytes"] >= got

    @property
    def status(self) -> int:
        """A download that failed for good counts as wrong bytes."""
        if not self.figures.right:
            return WRONG_BYTE
        if self.counts.refetched:
            return FETCHED_TWICE
        return RIGHT if self.agrees else FIGURES_DISAGREE

    def document(self) -> dict[str, Any]:
        figures, counts = self.figures, self.counts
        fetches = [row.fetches for row in counts.files.values() if row.kind is not Kind.INDEX and row.fetches]
        index = [row for row in counts.files.values() if row.kind is Kind.INDEX]
        saved_bytes = figures.received_bytes - counts.sent_bytes
        return figures.document() | {
            "status": self.status,
            "clients": self.clients,
            "seconds": self.seconds,
            "wan_bytes": counts.sent_bytes,
            "saved_bytes": saved_bytes,
            "saved_share": saved_bytes / figures.received_bytes if figures.received_bytes else None,
            "deltas": figures.downloads[Kind.DELTA],
            "fulls": figures.downloads[Kind.FULL],
            "files_fetched": len(fetches),
            "fetches_per_file_min": min(fetches, default=0),
            "fetches_per_file_median": statistics.median(fetches) if fetches else 0,
            "fetches_per_file_max": max(fetches, default=0),
            "files_fetched_twice": counts.refetched,
            "index_fetches": sum(row.fetches for row in index),
            "index_not_modified": sum(row.not_modified for row in index),
            "own": self.own,
            "own_figures_agree": self.agrees,
        }


def rows_so_far(summary: Summary) -> list[tuple[str, str]]:
    """Shown while it runs, and first at the end."""
    fields, figures = summary.document(), summary.figures
    got, wan_bytes, share = fields["received_bytes"], fields["wan_bytes"], fields["saved_share"]
    results = ", ".join(f"{count:,} {word}" for word, count in fields["cache_status"].items())
    if figures.wrong or figures.failed:
        compared = f"{figures.wrong} bodies WRONG, {figures.failed} downloads FAILED"
    else:
        compared = f"all {got:,}, all right" if got else "NOTHING was received"
    return [
        ("clients got", bytes_in_words(got)),
        ("over the WAN", f"{bytes_in_words(wan_bytes)}, as the management server counted"),
        ("saved", bytes_in_words(fields["saved_bytes"]) + (f" ({share:.1%})" if got else "")),
        ("downloads", f"{fields['deltas']:,} deltas, {fields['fulls']:,} fulls, {figures.resumes:,} resumed"),
        ("requests", f"{figures.requests:,} ({results}), {figures.retries:,} repeated"),
        ("bytes compared", compared),
    ]


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    fields, own, words = summary.document(), summary.own, "not available"
    least, middle, most = (fields[f"fetches_per_file_{which}"] for which in ("min", "median", "max"))
    each = f"min {least}, median {middle:g}, max {most} of {fields['files_fetched']} files"
    median, p99 = (milliseconds(fields[f"{which}_time_to_first_byte_seconds"]) for which in ("median", "p99"))
    if own is not None:
        words = "they agree" if summary.agrees else "THEY DISAGREE"
        fetched, sent = (
            bytes_in_words(own[name]) for name in ("upstream_received_bytes", "client_sent_bytes")
        )
        words = f"received {fetched}, sent {sent}: {words}"
    return [
        ("clients", f"{summary.clients:,} for {summary.seconds:.1f} s"),
        *rows_so_far(summary),
        ("fetches per file", f"{each}; {fields['files_fetched_twice']} fetched more than once"),
        (
            "ContentInfo.txt",
            f"fetched {fields['index_fetches']}, confirmed (304) {fields['index_not_modified']}",
        ),
        ("time to first byte", f"median {median}, p99 {p99}"),
        ("gup's own figures", words),
    ]


def print_summary(console: Console, summary: Summary) -> None:
    colour = "green" if summary.status == RIGHT else "red"
    console.print(_table(summary_rows(summary), title="gup demo", style=colour))
    for complaint in summary.figures.complaints:
        console.print(complaint, highlight=False, soft_wrap=True, markup=False, style="red")


def progress(summary: Summary, total_seconds: float) -> Table:
    """Redrawn in place on a terminal while it runs."""
    done = min(summary.seconds, total_seconds)
    bar = ProgressBar(total=total_seconds, completed=done, width=40)
    return _table([("time", bar), *rows_so_far(summary)])


def _table(rows: Sequence[tuple[str, RenderableType]], title: str | None = None, style: str = "") -> Table:
    table = Table(title=title, show_header=False, border_style=style)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
