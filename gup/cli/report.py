"""The commands that print reports of a running service: tables, CSV or JSON. They work nothing out."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer

from gup.cli.asking import Where, asking
from gup.cli.complaining import UNUSABLE
from gup.cli.options import AdminFlag, CaFlag, ConfigFlag, JsonFlag, TokenFlag
from gup.cli.tables import printable, show_table
from gup.units import bytes_in_words, time_in_words

report = typer.Typer(help="What clients took, who waits for a restart, what was saved.", no_args_is_help=True)

CsvFlag = Annotated[bool, typer.Option("--csv", help="Print CSV, times in UTC.")]
Report = dict[str, Any]
_DAY_SECONDS = 86400
_SHOWN = 20
"""Clients in a table; --json and --csv have more."""


@report.command()
def content(
    *,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    csv_output: CsvFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Content taken here: who stands at which revision, what lags, and who."""
    _check(csv_output, json_output)
    with asking(Where(admin, config, token_file, ca_file)) as asked:
        answer = asked.report("content")
        from gup.control.stats.tables import of_content

        _print(answer, csv_output, json_output, of_content, _content)


@report.command()
def clients(
    *,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    csv_output: CsvFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Clients by the version they state, and those that may wait for a restart after a client patch."""
    _check(csv_output, json_output)
    with asking(Where(admin, config, token_file, ca_file)) as asked:
        answer = asked.report("clients")
        from gup.control.stats.tables import of_restarts

        _print(answer, csv_output, json_output, of_restarts, _clients)


@report.command()
def savings(
    *,
    days: Annotated[int, typer.Option(min=1, max=3660, help="The last so many days.")] = 30,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    csv_output: CsvFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """What was sent, fetched, saved and wasted, by day and by stream."""
    _check(csv_output, json_output)
    with asking(Where(admin, config, token_file, ca_file)) as asked:
        answer = asked.report("savings", days=days)
        from gup.control.stats.tables import of_savings

        _print(answer, csv_output, json_output, of_savings, _savings)


def _check(csv_output: bool, json_output: bool) -> None:
    if csv_output and json_output:
        typer.echo("gup: --csv and --json: one of them, not both", err=True)
        raise typer.Exit(UNUSABLE)


def _print(
    answer: Report,
    csv_output: bool,
    json_output: bool,
    lines: Callable[[Report], Iterable[tuple[object, ...]]],
    show: Callable[[Report], None],
) -> None:
    if json_output:
        typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))
    elif csv_output:
        from gup.control.stats.tables import csv_text

        typer.echo(csv_text(lines(answer)), nl=False)
    else:
        show(answer)


# --- tables


def _content(answer: Report) -> None:
    if answer["note"]:
        typer.echo(answer["note"])
    rows = answer["content"]
    if not rows:
        typer.echo("nothing was taken yet")
    show_table(
        ("product", "language", "held", "asked for", "site lags", "#clients", "#current", "#behind"),
        [
            (
                row["product"],
                row["language"],
                row["newest_held"] or "-",
                row["newest_asked"] or "-",
                _lag(row["lag_revisions"], row["lag_seconds"]),
                *(row[name] for name in ("clients", "current", "behind")),
            )
            for row in rows
        ],
    )
    for row in rows:
        _revisions(row)
        _lagging(row)


def _revisions(row: Report) -> None:
    show_table(
        ("revision", "#clients now at it", "#clients that took it", "first taken", "last taken"),
        [
            (
                count["revision"],
                count["clients"],
                count["took"],
                _time(count["first_taken_at"]),
                _time(count["last_taken_at"]),
            )
            for count in row["revisions"]
        ],
        title=_titled(row),
    )


def _lagging(row: Report) -> None:
    more = row["behind"] - len(row["lagging"][:_SHOWN])
    show_table(
        ("lagging client", "version", "stands at", "lags", "asked for", "seen"),
        [
            (
                client["address"],
                client["version"] or "-",
                client["revision"] or "not known",
                _lag(client["lag_revisions"], client["lag_seconds"]),
                client["asked"] or "-",
                _time(client["seen_at"]),
            )
            for client in row["lagging"][:_SHOWN]
        ],
        title=_titled(row),
    )
    if more > 0:
        typer.echo(f"and {more} more; --csv and --json list 1000 of a stream")


def _clients(answer: Report) -> None:
    if answer["note"]:
        typer.echo(answer["note"])
    show_table(
        ("version", "language", "#clients"),
        [
            (group["version"] or "not stated", group["language"] or "not stated", group["clients"])
            for group in answer["clients"]
        ],
    )
    if not answer["catalogue_known"]:
        typer.echo("without a catalogue nobody knows which streams are client patches")
        return
    typer.echo(f"restart pending: {answer['pending']}, not known: {answer['unknown']}")
    show_table(
        ("client", "state", "states", "stated then", "patch", "revision", "taken", "seen"),
        [
            (
                row["address"],
                row["state"],
                row["version"] or "nothing",
                row["version_then"] or "nothing",
                row["product"],
                row["revision"],
                _time(row["taken_at"]),
                _time(row["seen_at"]),
            )
            for row in answer["restart_pending"]
        ],
    )
    if answer["restart_pending"]:
        typer.echo(answer["saying"])


def _savings(answer: Report) -> None:
    heads = ("#to clients", "#over the WAN", "#saved", "#share", "#wasted", "of which")
    spans = (("today", "today"), ("last 30 days", "last_30_days"), ("since install", "since_install"))
    show_table(("", *heads), [(words, *_figures(answer[name])) for words, name in spans])
    days = answer["days"]
    show_table(("day", *heads), [(day["day"] or "earlier", *_figures(day)) for day in days], title="By day")
    show_table(
        ("day", "product", "language", "kind", "#to clients", "#over the WAN", "#saved", "#wasted"),
        [
            (
                day["day"] or "earlier",
                *(row[name] for name in ("product", "language", "kind")),
                *(bytes_in_words(row[f"{name}_bytes"]) for name in ("sent", "received", "saved", "wasted")),
            )
            for day in days
            for row in day["streams"]
        ],
        title="By stream",
    )


def _figures(figures: Report) -> Sequence[str]:
    sent, saved = figures["sent_bytes"], figures["saved_bytes"]
    wasted = (f"{reason} {bytes_in_words(count)}" for reason, count in figures["wasted"].items() if count)
    return (
        *(bytes_in_words(figures[name]) for name in ("sent_bytes", "received_bytes", "saved_bytes")),
        f"{saved / sent:.1%}" if sent else "-",
        bytes_in_words(figures["wasted_bytes"]),
        ", ".join(wasted),
    )


def _titled(row: Report) -> str:
    return printable(f"{row['product']}, {row['language']}")


def _lag(revisions: int, seconds: float | None) -> str:
    if not revisions:
        return "-"
    days = round((seconds or 0) / _DAY_SECONDS)
    words = "1 revision" if revisions == 1 else f"{revisions} revisions"
    return f"{words}, {time_in_words(days * _DAY_SECONDS)}" if days else words


def _time(at: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) if at else "-"
