"""`gup report`: tables, CSV or JSON of a running service's reports."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

import typer

from gup.cli.shared import (
    FAILED,
    UNUSABLE,
    Columns,
    Commands,
    JsonFlag,
    Row,
    Where,
    asking,
    print_json,
    printable,
    show_table,
    with_connection_flags,
)
from gup.units import bytes_in_words, time_in_words

report = typer.Typer(
    cls=Commands,
    help="Content by client, pending restarts, bandwidth saved, who had what when.",
    no_args_is_help=True,
)

CsvFlag = Annotated[bool, typer.Option("--csv", help="Print CSV, times in UTC.")]
_DAY_SECONDS = 86400
_REPLAY_SECONDS = 660.0
_SHOWN = 20
"""Clients in a table; --json and --csv have more."""


@report.command()
@with_connection_flags
def content(*, where: Where, csv_output: CsvFlag = False, json_output: JsonFlag = False) -> None:
    """Content by revision: which clients have which, and which lag."""
    _report("content", where, csv_output, json_output, _show_content)


@report.command()
@with_connection_flags
def clients(
    *,
    sick: Annotated[bool, typer.Option("--sick", help="Those that seem to be in trouble.")] = False,
    where: Where,
    csv_output: CsvFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Clients by stated version, and those that may need a restart after a client patch.

    With --sick those that take the same full again and again, never get a delta, fall behind their
    neighbours, ask for what the rules refuse, or never finish a download: what was seen, the likely cause,
    what to do.
    """
    show = _show_sick if sick else _show_clients
    _report("sick" if sick else "clients", where, csv_output, json_output, show)


@report.command()
@with_connection_flags
def savings(
    *,
    days: Annotated[int, typer.Option(min=1, max=3660, metavar="N", help="Number of days.")] = 30,
    where: Where,
    csv_output: CsvFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Bytes sent, fetched, saved and wasted, by day and by stream."""
    _report("savings", where, csv_output, json_output, _show_savings, days=days)


@report.command()
@with_connection_flags
def timeline(
    *,
    client: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A client's address, or its hash.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help='Such as "2026-11-20 14:05", in site.time_zone, or with a zone: 2026-11-20T14:05Z.',
        ),
    ] = None,
    stream: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A moniker, or a part of the product's name.")
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=3660, metavar="N", help="List the changes of so many days.")
    ] = None,
    where: Where,
    csv_output: CsvFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Which revision a client had when; without --client, the site's clients by age of their revision."""
    given = {"client": client, "at": at, "stream": stream, "days": days}
    asked = {name: value for name, value in given.items() if value is not None}
    _report("timeline", where, csv_output, json_output, _show_timeline, **asked)


@report.command()
@with_connection_flags
def sizing(
    *,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="A size to compare, such as 40GB; may be repeated."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3660, metavar="N", help="Number of days.")] = 30,
    where: Where,
    csv_output: CsvFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """What stores of other sizes would have saved, by a replay of the recorded demand."""
    asked: dict[str, Any] = {"days": days, **({"sizes": ",".join(size)} if size else {})}
    _report("sizing", where, csv_output, json_output, _show_sizing, _REPLAY_SECONDS, **asked)


@report.command()
@with_connection_flags
def statement(
    *,
    month: Annotated[
        str | None, typer.Option(metavar="YYYY-MM", help="The month; default: the last whole one.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it to this file; default: standard output.")
    ] = None,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """A month for those who pay the link: savings, money, incidents; one HTML file, for print too.

    With --json its figures. An existing file is replaced.
    """
    query = "?" + urlencode({} if month is None else {"month": month})
    with asking(where) as admin:
        if json_output:
            text = json.dumps(admin.ask("GET", f"report/month{query}"), indent=2, ensure_ascii=False) + "\n"
            body = text.encode()
        else:
            body = b"".join(admin.pieces("GET", f"report/statement{query}"))
    if output is None:
        typer.echo(body, nl=False)
        return
    try:
        output.write_bytes(body)
    except OSError as error:
        typer.echo(f"gup: {output}: it can't be written: {error.strerror or error}", err=True)
        raise typer.Exit(FAILED) from error


def _report(
    name: str,
    where: Where,
    csv_output: bool,
    json_output: bool,
    show: Callable[[Row], None],
    patience_seconds: float = 10.0,
    /,
    **parameters: object,
) -> None:
    if csv_output and json_output:
        typer.echo("gup: use --csv or --json, not both", err=True)
        raise typer.Exit(UNUSABLE)
    resource = f"report/{name}?" + urlencode(parameters | {"format": "csv" if csv_output else "json"})
    with asking(where) as admin:
        if csv_output:
            for piece in admin.pieces("GET", resource, patience_seconds=patience_seconds):
                typer.echo(piece, nl=False)
        elif json_output:
            print_json(admin.ask("GET", resource, patience_seconds=patience_seconds))
        else:
            show(admin.ask("GET", resource, patience_seconds=patience_seconds))


# --- content


def _lag(row: Row) -> str:
    count, days = row["lag_revisions"], round((row["lag_seconds"] or 0) / _DAY_SECONDS)
    if not count:
        return "-"
    words = "1 revision" if count == 1 else f"{count} revisions"
    return f"{words}, {time_in_words(days * _DAY_SECONDS)}" if days else words


_CONTENT: Columns = {
    "product": "product",
    "language": "language",
    "held": "newest_held",
    "requested": "newest_asked",
    "site lags": _lag,
    "#clients": "clients",
    "#current": "current",
    "#behind": "behind",
}
_REVISIONS: Columns = {
    "revision": "revision",
    "#clients at it now": "clients",
    "#clients that took it": "took",
    "first taken": "first_taken_at",
    "last taken": "last_taken_at",
}
_LAGGING: Columns = {
    "lagging client": "address",
    "version": "version",
    "stands at": "revision",
    "lags": _lag,
    "asked for": "asked",
    "seen": "seen_at",
}


def _show_content(answer: Row) -> None:
    if answer["note"]:
        typer.echo(answer["note"])
    if not answer["content"]:
        typer.echo("nothing was taken yet")
    show_table(_CONTENT, answer["content"])
    for row in answer["content"]:
        title = printable(f"{row['product']}, {row['language']}")
        show_table(_REVISIONS, row["revisions"], title=title)
        show_table(_LAGGING, row["lagging"][:_SHOWN], title=title)
        more = row["behind"] - len(row["lagging"][:_SHOWN])
        if more > 0:
            typer.echo(f"and {more} more; --csv and --json list 1000 of a stream")


# --- clients


_GROUPS: Columns = {"version": "version", "language": "language", "#clients": "clients"}
_RESTARTS: Columns = {
    "client": "address",
    "state": "state",
    "states": "version",
    "stated then": "version_then",
    "patch": "product",
    "revision": "revision",
    "taken": "taken_at",
    "seen": "seen_at",
}


def _show_clients(answer: Row) -> None:
    if answer["note"]:
        typer.echo(answer["note"])
    show_table(_GROUPS, answer["clients"])
    if not answer["catalogue_known"]:
        typer.echo("without a catalogue it is not known which streams are client patches")
        return
    typer.echo(f"restart pending: {answer['pending']}, not known: {answer['unknown']}")
    show_table(_RESTARTS, answer["restart_pending"])
    if answer["restart_pending"]:
        typer.echo(answer["saying"])


_SICK: Columns = {"client": "address", "finding": "finding", "seen": "seen", "last": "last_at"}


def _show_sick(answer: Row) -> None:
    if answer["note"]:
        typer.echo(answer["note"])
        return
    rest = f"; {answer['left_out']} addresses of several machines left out" if answer["left_out"] else ""
    typer.echo(f"{answer['sick']} of {answer['clients']} clients have a finding{rest}")
    show_table(_SICK, answer["rows"])
    told = {row["finding"]: row for row in answer["rows"]}
    for name, row in told.items():
        typer.echo(printable(f"{name}: {row['cause']}\n  {row['what_to_do']}"))


# --- savings


def _share(figures: Row) -> str:
    sent = figures["sent_bytes"]
    return f"{figures['saved_bytes'] / sent:.1%}" if sent else "-"


def _reasons(figures: Row) -> str:
    reasons = figures["wasted"].items()
    return ", ".join(f"{reason} {bytes_in_words(count)}" for reason, count in reasons if count)


_FLOW: Columns = {"#to clients": "sent_bytes", "#over the WAN": "received_bytes", "#saved": "saved_bytes"}
_WASTED: Columns = {"#wasted": "wasted_bytes"}
_FIGURES: Columns = {**_FLOW, "#share": _share, **_WASTED, "of which": _reasons}
_STREAM: Columns = {"product": "product", "language": "language", "kind": "kind"}
_SPANS = {"today": "today", "last_30_days": "last 30 days", "since_install": "since install"}


def _show_savings(answer: Row) -> None:
    show_table({"": "span", **_FIGURES}, [answer[name] | {"span": words} for name, words in _SPANS.items()])
    days = [day | {"day": day["day"] or "earlier"} for day in answer["days"]]
    show_table({"day": "day", **_FIGURES}, days, title="By day")
    streams = [row | {"day": day["day"]} for day in days for row in day["streams"]]
    show_table({"day": "day", **_STREAM, **_FLOW, **_WASTED}, streams, title="By stream")


# --- timeline


def _age(row: Row) -> str:
    age = row["age_days"]
    return "-" if age is None else "1 day" if age == 1 else f"{age} days"


def _is_exact(row: Row) -> str:
    return "yes" if row["exact"] else "no: that day's last change is kept"


def _part(age: str) -> Callable[[Row], str]:
    return lambda row: f"{row['ages'][age] / row['clients']:.1%}" if row["clients"] else "-"


def _show_timeline(answer: Row) -> None:
    zone = ZoneInfo(answer["time_zone"]) if answer["time_zone"] else None

    def local(at: float | None) -> str:
        return "-" if at is None else f"{datetime.fromtimestamp(at, zone):%Y-%m-%d %H:%M}"

    for note in filter(None, (answer["moment_note"], answer["note"])):
        typer.echo(printable(note))
    if answer["client"] is not None:
        moment = answer["at"] if answer["moment"] is None else answer["moment"]
        seen = answer["seen_at"]
        last = "no record of it is left" if seen is None else f"seen last {local(seen)}"
        standings: Columns = {
            "product": "product",
            "language": "language",
            "revision": lambda row: row["revision"] or "unknown",
            "how": "how",
            "since": lambda row: local(row["changed_at"]),
            "#age then": _age,
            "next": "next_revision",
            "next since": lambda row: local(row["next_at"]),
            "exact": _is_exact,
        }
        show_table(standings, answer["standings"], title=f"{answer['client']} at {local(moment)}; {last}")
        changes: Columns = {
            "changed": lambda row: local(row["at"]),
            "product": "product",
            "revision": "revision",
            "how": "how",
        }
        show_table(changes, answer["changes"], title=f"Changes of {answer['client']}")
    shares: Columns = {
        "hour": lambda row: local(row["at"]),
        "#clients": "clients",
        "#at the newest": "current",
        **{f"#{words}": _part(age) for age, words in _AGES.items()},
    }
    site = [row for row in answer["shares"] if row["product"] is None]
    streams = [row for row in answer["shares"] if row["product"] is not None]
    latest = max((row["at"] for row in streams), default=0)
    days = round(answer["active_seconds"] / _DAY_SECONDS)
    show_table(shares, site, title=f"Clients that requested content within {days} days, by age of revision")
    named: Columns = {"product": "product", "language": "language", "newest then": "newest", **shares}
    show_table(named, [row for row in streams if row["at"] == latest], title="By stream, the latest hour")
    _show_reservations(answer, local)


def _show_reservations(answer: Row, local: Callable[[float], str]) -> None:
    typer.echo(answer["saying"])
    if answer["node"] is not None:
        typer.echo(
            f"This is the record of {printable(answer['node'])} alone: clients may have taken content from "
            "other members, which have their own records"
        )
    exact = answer["exact_since"]
    thinned = f"; before {local(exact)} the last change of each day" if exact > answer["since"] else ""
    zone = answer["time_zone"] or "the machine's time zone"
    typer.echo(f"Changes are known from {local(answer['since'])} on{thinned}. Times are in {zone}.")


_AGES = {"1d": "≤ 1 day", "3d": "≤ 3", "7d": "≤ 7", "30d": "≤ 30", "older": "older", "unknown": "unknown"}


# --- sizing


_SIZING: Columns = {
    "#size": "size_bytes",
    "#of the present": lambda row: f"{row['factor']:g}",
    "#over the WAN": "wan_bytes",
    "#fetches": "fetches",
    "#saved more": "saved_more_bytes",
}


def _show_sizing(answer: Row) -> None:
    for sentence in answer["saying"]:
        typer.echo(sentence)
    if answer["requests"]:
        show_table(_SIZING, answer["points"])
