"""`gup config` and `gup rules`: explain settings without a service."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

import time
from pathlib import Path
from typing import Annotated

import typer

from gup.cli.shared import (
    Columns,
    Commands,
    ConfigFlag,
    JsonFlag,
    Row,
    Where,
    asking,
    print_json,
    show_table,
    with_connection_flags,
)
from gup.errors import SettingsError

config = typer.Typer(cls=Commands, help="Check and print settings.", no_args_is_help=True)


@config.command("check")
def check(file: Annotated[Path, typer.Argument(metavar="FILE", help="The settings' file (TOML).")]) -> None:
    """Check whether `gup serve --config FILE` can start; list every mistake."""
    from gup.cli.usable import usable
    from gup.process.start_check import doubts
    from gup.units import format_size

    settings = usable(file, servable=False)
    for doubt in doubts(settings, time.time()):
        typer.echo(f"gup: warning: {doubt}", err=True)
    names = ", ".join(upstream.name for upstream in settings.upstream)
    listen, cache = settings.listen, settings.cache
    typer.echo(
        f"{file}: ok: listens on {listen.address} port {listen.port}, "
        f"keeps up to {format_size(cache.max_size)} in {cache.directory}, "
        + (f"fetches from {names}" if names else "has no upstream: serve it with --upstream URL")
    )


@config.command("show")
def show(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="The settings' file (TOML).")] = None,
) -> None:
    """Print all settings in force, from FILE, the environment and the defaults; secrets are masked."""
    from gup.cli.reference import settings_toml
    from gup.config import load

    typer.echo(settings_toml(load(file)), nl=False)


@config.command("try")
@with_connection_flags
def try_settings(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The settings' file (TOML).")],
    *,
    days: Annotated[int, typer.Option(min=1, max=3660, metavar="N", help="Number of days.")] = 7,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Try settings: what the recorded demand would have been under them, beside the present ones."""
    from gup.cli.usable import usable
    from gup.control.dry_run import known_part

    given = {"settings": known_part(usable(file, servable=False)), "days": days}
    with asking(where) as admin:
        answer = admin.ask("POST", "try", given, patience_seconds=_REPLAY_SECONDS)
        if answer["problems"]:
            raise SettingsError(answer["problems"])
        if json_output:
            print_json(answer)
        else:
            _show_trial(answer)


_REPLAY_SECONDS = 660.0
_OUTCOMES: Columns = {
    "": "of",
    "#over the WAN": "wan_bytes",
    "#fetches": "fetches",
    "#hits": lambda row: "-" if row["hit_ratio"] is None else f"{row['hit_ratio']:.1%}",
    "#most in a minute": "peak_minute_bytes_per_second",
    "#in an hour": "peak_hour_bytes_per_second",
    "#longest wait": "longest_wait_seconds",
    "#too late": "late_fetches",
}
_RULES: Columns = {
    "rule": "rule",
    "enforced": lambda row: "yes" if row["enforced"] else "no",
    "#clients": "clients",
    "#requests": "requests",
    "#clients now": "present_clients",
    "#requests now": "present_requests",
    "some": lambda row: ", ".join(client["address"] for client in row["some_clients"][:3]) or "-",
}


def _show_trial(answer: Row) -> None:
    changed = ", ".join(answer["changed"])
    typer.echo(f"changed: {changed}" if changed else "nothing that a dry run knows is changed")
    for sentence in answer["saying"]:
        typer.echo(sentence)
    if not answer["requests"]:
        return
    really = dict.fromkeys(("fetches", "hit_ratio", "peak_hour_bytes_per_second"))
    really |= dict.fromkeys(("longest_wait_seconds", "late_fetches"))
    really |= {"wan_bytes": answer["received_bytes"], "of": "as it really was"}
    really |= {"peak_minute_bytes_per_second": answer["peak_minute_bytes_per_second"]}
    rows = [
        answer["present"] | {"of": "present settings"},
        answer["tried"] | {"of": "these settings"},
        really,
    ]
    show_table(_OUTCOMES, rows)
    show_table(_RULES, answer["refusals"], title="Refused by rules")


rules = typer.Typer(cls=Commands, help="Evaluate the delivery rules.", no_args_is_help=True)


@rules.callback()
def _rules() -> None:
    """Keeps `explain` a command of its own: typer would fold a single one into `gup rules`."""


@rules.command("explain")
def explain(
    *,
    moniker: Annotated[str, typer.Option(metavar="MONIKER", help="The stream, as in /content/{MONIKER}/.")],
    client_version: Annotated[
        str | None, typer.Option(metavar="VERSION", help="What the client states, such as 14.3 RU2.")
    ] = None,
    client_language: Annotated[
        str | None, typer.Option(metavar="LANGUAGE", help="What the client states, such as French or fr.")
    ] = None,
    upstream: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A server to ask about; may be repeated; replaces all others."),
    ] = None,
    config: ConfigFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Show for each upstream whether the client may have the stream, and why."""
    from gup.cli.serve import serve_flags
    from gup.cli.usable import read_catalog
    from gup.config import read
    from gup.content import variant_choice
    from gup.content.catalog import Catalogues, normal_moniker
    from gup.content.rules import Rulebook

    flags, _ = serve_flags(upstream=upstream or [])
    settings, problems = read(config, flags=flags, servable=True)
    stream = normal_moniker(moniker)
    if stream is None:
        problems.append(f"--moniker: {moniker!r} is not right: must be a GUID, with braces or without")
    if problems or stream is None:
        raise SettingsError(problems)
    book = Rulebook(settings)
    client = book.identities.stated(client_version, client_language)
    found = {upstream.name: read_catalog(settings, upstream) for upstream in settings.upstream}
    rows = {name: listed for name, (listed, _) in found.items() if listed is not None}
    sources = {name: source for name, (_, source) in found.items()}
    catalogues = Catalogues(rows, settings.upstream, book.types)
    explanation = variant_choice.explain(book, catalogues, settings.upstream, sources, stream, client)
    if json_output:
        print_json(explanation)
    else:
        for line in variant_choice.explained(explanation):
            typer.echo(line)
