"""How the demo looks: live in a terminal, plain lines elsewhere, or nothing; never decides anything."""

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from gup.content.key import Kind
from gup.demo.figures import Figures
from gup.demo.summary import RIGHT, Summary

_PLAIN_EVERY_SECONDS = 2.0
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class Progress:
    """One moment of a run. `wan_bytes` is the management server's count."""

    elapsed_seconds: float
    total_seconds: float
    figures: Figures
    wan_bytes: int
    wan_bytes_per_second: float


class Screen(Protocol):
    """Where progress, notes and the summary go; a context manager around the run."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def note(self, sentence: str) -> None:
        """Tell of an event."""

    def show(self, progress: Progress) -> None:
        """Tell how far the run is; may be called as often as one likes."""


class Quiet:
    """Shows nothing while it runs: for JSON."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, sentence: str) -> None:
        pass

    def show(self, progress: Progress) -> None:
        pass


class Plain:
    """Plain lines, one every two seconds: for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_seconds = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, sentence: str) -> None:
        self._console.print(sentence, highlight=False, soft_wrap=True, markup=False)

    def show(self, progress: Progress) -> None:
        if progress.elapsed_seconds < self._next_seconds:
            return
        self._next_seconds = progress.elapsed_seconds + _PLAIN_EVERY_SECONDS
        cells = "; ".join(f"{name}: {value}" for name, value in progress_rows(progress))
        self.note(f"{progress.elapsed_seconds:5.1f} s  {cells}")


class Terminal:
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
    results = ", ".join(f"{count:,} {word}" for word, count in sorted(figures.cache_status.items()))
    return [
        ("clients got", size(figures.received_bytes)),
        ("over the WAN", f"{size(progress.wan_bytes)}, now {size(progress.wan_bytes_per_second)}/s"),
        ("saved", size(saved) + share),
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
        ("clients got", size(summary.received_bytes)),
        ("over the WAN", f"{size(summary.wan_bytes)}, as the management server counted"),
        ("saved", size(summary.saved_bytes) + share),
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
        f"{size(herd.received_bytes)} to clients, {size(herd.wan_bytes)} over the WAN"
    )


def _own(summary: Summary) -> str:
    if summary.own is None:
        return "not available"
    word = "they agree" if summary.own_figures_agree else "THEY DISAGREE"
    return (
        f"received {size(summary.own.upstream_received_bytes)}, sent {size(summary.own.client_sent_bytes)}, "
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


def size(size_bytes: float) -> str:
    """A number of bytes for people: three digits and a decimal unit."""
    for unit in _UNITS:
        if abs(size_bytes) < 1000 or unit == _UNITS[-1]:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    raise AssertionError("no unit fits")


def milliseconds(seconds: float | None) -> str:
    """A duration for people, in milliseconds."""
    return "none" if seconds is None else f"{seconds * 1000:.3g} ms"
