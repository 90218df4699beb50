"""The output of the demo: progress while it runs, then the summary with its verdict."""

import re
import statistics
from dataclasses import asdict, dataclass
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from gup.content.key import Kind
from gup.demo.clients import Figures
from gup.demo.content import Counts
from gup.units import bytes_in_words

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


_PLAIN_EVERY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Progress:
    """One moment of a run. `wan_bytes` is the management server's count."""

    elapsed_seconds: float
    total_seconds: float
    figures: Figures
    wan_bytes: int
    wan_bytes_per_second: float


class Screen:
    """Where progress and notes go, a context manager around the run. This one shows nothing: for JSON."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, sentence: str) -> None:
        """Show an event."""

    def show(self, progress: Progress) -> None:
        """Show the progress; may be called at any rate."""


class Plain(Screen):
    """Plain lines, one every two seconds: for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_seconds = 0.0

    def note(self, sentence: str) -> None:
        self._console.print(sentence, highlight=False, soft_wrap=True, markup=False)

    def show(self, progress: Progress) -> None:
        if progress.elapsed_seconds < self._next_seconds:
            return
        self._next_seconds = progress.elapsed_seconds + _PLAIN_EVERY_SECONDS
        cells = "; ".join(f"{name}: {value}" for name, value in progress_rows(progress))
        self.note(f"{progress.elapsed_seconds:5.1f} s  {cells}")


class Terminal(Screen):
    """A table that stays in place, with notes scrolling above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def note(self, sentence: str) -> None:
        self._console.print(f"[dim]·[/] {sentence}", highlight=False)

    def show(self, progress: Progress) -> None:
        bar = ProgressBar(
            total=progress.total_seconds,
            completed=min(progress.elapsed_seconds, progress.total_seconds),
            width=60,
        )
        self._live.update(Group(bar, _table(progress_rows(progress))), refresh=True)


def progress_rows(progress: Progress) -> list[tuple[str, str]]:
    """What is shown while it runs."""
    figures = progress.figures
    saved = figures.received_bytes - progress.wan_bytes
    share = f" ({saved / figures.received_bytes:.1%})" if figures.received_bytes else ""
    now = bytes_in_words(progress.wan_bytes_per_second)
    results = ", ".join(f"{count:,} {word}" for word, count in sorted(figures.cache_status.items()))
    return [
        ("clients got", bytes_in_words(figures.received_bytes)),
        (
            "over the WAN",
            f"{bytes_in_words(progress.wan_bytes)}, now {now}/s",
        ),
        ("saved", bytes_in_words(saved) + share),
        ("downloads", f"{figures.downloads[Kind.DELTA]:,} deltas, {figures.downloads[Kind.FULL]:,} fulls"),
        ("requests", f"{figures.requests:,} ({results})"),
        ("wrong or failed", f"{figures.wrong} or {figures.failed}"),
    ]


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """What is shown at the end."""
    share = "" if summary.saved_share is None else f" ({summary.saved_share:.1%})"
    results = ", ".join(f"{count:,} {word}" for word, count in sorted(summary.cache_status.items()))
    rows = [
        ("clients", f"{summary.clients:,} for {summary.seconds:.1f} s"),
        ("clients got", bytes_in_words(summary.received_bytes)),
        ("over the WAN", f"{bytes_in_words(summary.wan_bytes)}, as the management server counted"),
        ("saved", bytes_in_words(summary.saved_bytes) + share),
        ("downloads", f"{summary.deltas:,} deltas, {summary.fulls:,} fulls, {summary.resumes:,} resumed"),
        ("fetches per file", _fetches(summary)),
        ("ContentInfo.txt", f"fetched {summary.index_fetches}, confirmed (304) {summary.index_not_modified}"),
        ("requests", f"{summary.requests:,} ({results}), {summary.retries:,} repeated"),
        ("time to first byte", _time_to_first_byte(summary)),
    ]
    if summary.herd is not None:
        rows.append(("the herd", _herd(summary)))
    return [*rows, ("gup's own figures", _own(summary)), ("bytes compared", _compared(summary))]


def _fetches(summary: Summary) -> str:
    return (
        f"min {summary.fetches_per_file_min}, median {summary.fetches_per_file_median:g}, "
        f"max {summary.fetches_per_file_max} of {summary.files_fetched} files; "
        f"{summary.files_fetched_twice} fetched more than once"
    )


def _time_to_first_byte(summary: Summary) -> str:
    return (
        f"median {milliseconds(summary.median_time_to_first_byte_seconds)}, "
        f"p99 {milliseconds(summary.p99_time_to_first_byte_seconds)}; "
        f"hits' median {milliseconds(summary.hit_median_time_to_first_byte_seconds)}"
    )


def _herd(summary: Summary) -> str:
    herd = summary.herd
    assert herd is not None
    return (
        f"{herd.clients:,} clients at once: {herd.downloads:,} downloads in {herd.seconds:.1f} s, "
        f"{bytes_in_words(herd.received_bytes)} to clients, {bytes_in_words(herd.wan_bytes)} over the WAN"
    )


def _own(summary: Summary) -> str:
    if summary.own is None:
        return "not available"
    word = "they agree" if summary.own_figures_agree else "THEY DISAGREE"
    return (
        f"received {bytes_in_words(summary.own.upstream_received_bytes)}, "
        f"sent {bytes_in_words(summary.own.client_sent_bytes)}, "
        f"{summary.own.fills_committed} fills: {word}"
    )


def _compared(summary: Summary) -> str:
    if summary.wrong or summary.failed:
        return f"{summary.wrong} bodies WRONG, {summary.failed} downloads FAILED"
    return f"all {summary.received_bytes:,}, all right" if summary.received_bytes else "NOTHING was received"


def print_summary(console: Console, summary: Summary) -> None:
    """The summary's table, and what went wrong."""
    colour = "green" if summary.status == RIGHT else "red"
    console.print(_table(summary_rows(summary), title="gup demo", style=colour))
    for complaint in summary.complaints:
        console.print(complaint, highlight=False, soft_wrap=True, markup=False, style="red")


def _table(rows: list[tuple[str, str]], title: str | None = None, style: str = "") -> Table:
    table = Table(title=title, show_header=False, border_style=style)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def milliseconds(seconds: float | None) -> str:
    """A duration for people, in milliseconds."""
    return "none" if seconds is None else f"{seconds * 1000:.3g} ms"
