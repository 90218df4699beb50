"""`gup rules`: says what the delivery rules decide, and why; starts and changes nothing."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

import json
from typing import Annotated, Any

import typer

from gup.cli.complaining import complaining
from gup.cli.options import ConfigFlag, JsonFlag

rules = typer.Typer(help="Ask what the delivery rules decide.", no_args_is_help=True)


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
    """Say for each upstream whether the client may have the stream from it, and why."""
    from gup.cli.flags import serve_flags
    from gup.config import load, require_servable
    from gup.content.variant_choice import explained

    with complaining():
        given = serve_flags(upstream=upstream or [], listen=None, admin=None, cache_dir=None, workers=None)
        settings = load(config, flags=given)
        require_servable(settings)
        told = _explain(settings, moniker, client_version, client_language)
    if json_output:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    for line in explained(told):
        typer.echo(line)


def _explain(
    settings: Any, moniker: str, client_version: str | None, client_language: str | None
) -> dict[str, Any]:
    from gup.cli.catalogues import find
    from gup.content.catalog import Catalogues, normal_moniker
    from gup.content.rules import Rulebook
    from gup.content.variant_choice import explain as explanation
    from gup.errors import SettingsError

    stream = normal_moniker(moniker)
    if stream is None:
        raise SettingsError([f"--moniker: {moniker!r} is not right: must be a GUID, with braces or without"])
    book = Rulebook(settings)
    client = book.identities.stated(client_version, client_language)
    found = {upstream.name: find(settings, upstream) for upstream in settings.upstream}
    rows = {name: one.rows for name, one in found.items() if one.rows is not None}
    sources = {name: one.source for name, one in found.items()}
    catalogues = Catalogues(rows, settings.upstream, book.types)
    return explanation(book, catalogues, settings.upstream, sources, stream, client)
