"""`gup report`: tables, CSV or JSON of a running service's reports."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from gup.cli.format import moment, print_json, printable, show_table
from gup.cli.options import UNUSABLE, JsonFlag, Where, asking, with_connection_flags
from gup.units import bytes_in_words, time_in_words

report = typer.Typer(help="What clients took, who waits for a restart, what was saved.", no_args_is_help=True)

CsvFlag = Annotated[bool, typer.Option("--csv", help="Print CSV, times in UTC.")]
Report = dict[str, Any]
_DAY_SECONDS = 86400
_SHOWN = 20
"""Clients in a table; --json and --csv have more."""


@report.command()
@with_connection_flags
def content(*, where: Where, csv_output: CsvFlag = False, json_output: JsonFlag = False) -> None:
    """Content taken here: who stands at which revision, what lags, and who."""
    from gup.control.stats.tables import CONTENT

    _report("content", {}, where, csv_output, json_output, CONTENT.csv, _show_content)


@report.command()
@with_connection_flags
def clients(*, where: Where, csv_output: CsvFlag = False, json_output: JsonFlag = False) -> None:
    """Clients by the version they state, and those that may wait for a restart after a client patch."""
    from gup.control.stats.tables import RESTARTS

    _report("clients", {}, where, csv_output, json_output, RESTARTS.csv, _show_clients)


@report.command()
@with_connection_flags
def savings(
    *,
    days: Annotated[int, typer.Option(min=1, max=3660, help="The last so many days.")] = 30,
    where: Where,
    csv_output: CsvFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """What was sent, fetched, saved and wasted, by day and by stream."""
    from gup.control.stats.tables import SAVINGS

    _report("savings", {"days": days}, where, csv_output, json_output, SAVINGS.csv, _show_savings)


def _report(
    name: str,
    parameters: dict[str, int],
    where: Where,
    csv_output: bool,
    json_output: bool,
    as_csv: Callable[[Report], str],
    show: Callable[[Report], None],
) -> None:
    if csv_output and json_output:
        typer.echo("gup: --csv and --json: one of them, not both", err=True)
        raise typer.Exit(UNUSABLE)
    with asking(where) as admin:
        answer = admin.report(name, parameters)
        if json_output:
            print_json(answer)
        elif csv_output:
            typer.echo(as_csv(answer), nl=False)
        else:
            show(answer)


# --- tables


def _show_content(answer: Report) -> None:
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
        _show_revisions(row)
        _show_lagging(row)


def _show_revisions(row: Report) -> None:
    show_table(
        ("revision", "#clients now at it", "#clients that took it", "first taken", "last taken"),
        [
            (
                count["revision"],
                count["clients"],
                count["took"],
                moment(count["first_taken_at"]),
                moment(count["last_taken_at"]),
            )
            for count in row["revisions"]
        ],
        title=_titled(row),
    )


def _show_lagging(row: Report) -> None:
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
                moment(client["seen_at"]),
            )
            for client in row["lagging"][:_SHOWN]
        ],
        title=_titled(row),
    )
    if more > 0:
        typer.echo(f"and {more} more; --csv and --json list 1000 of a stream")


def _show_clients(answer: Report) -> None:
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
                moment(row["taken_at"]),
                moment(row["seen_at"]),
            )
            for row in answer["restart_pending"]
        ],
    )
    if answer["restart_pending"]:
        typer.echo(answer["saying"])


def _show_savings(answer: Report) -> None:
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
