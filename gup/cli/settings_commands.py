"""`gup config` and `gup rules`: explain settings without a service."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

import time
from pathlib import Path
from typing import Annotated

import typer

from gup.cli.shared import Commands, ConfigFlag, JsonFlag, print_json

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
    from gup.errors import SettingsError

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
