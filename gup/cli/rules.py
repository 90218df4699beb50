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

    with complaining():
        given = serve_flags(upstream=upstream or [], listen=None, admin=None, cache_dir=None, workers=None)
        settings = load(config, flags=given)
        require_servable(settings)
        told = _explain(settings, moniker, client_version, client_language)
    if json_output:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    for line in _lines(told):
        typer.echo(line)


def _explain(
    settings: Any, moniker: str, client_version: str | None, client_language: str | None
) -> dict[str, Any]:
    from gup.cli.catalogues import find
    from gup.content.catalog import normal_moniker
    from gup.content.refusal import document
    from gup.content.rulebook import Rulebook
    from gup.errors import SettingsError

    stream = normal_moniker(moniker)
    if stream is None:
        raise SettingsError([f"--moniker: {moniker!r} is not right: must be a GUID, with braces or without"])
    book = Rulebook(settings)
    client = book.identities.stated(client_version, client_language)
    answers = []
    for upstream in settings.upstream:
        catalogue = find(settings, upstream)
        listed = (catalogue.rows or {}).get(stream)
        decision = book.rules.decide(listed, book.origins[upstream.name], client)
        answers.append(
            {
                "upstream": upstream.name,
                "catalogue": catalogue.source,
                "product": None if listed is None else listed.product,
                "product_language": None if listed is None else listed.language or None,
                "refused": book.refuses(decision),
                **document(decision, book.liveupdate_url),
            }
        )
    return {
        "moniker": stream,
        "mode": book.mode,
        "allowed": any(answer["allowed"] for answer in answers),
        "decisions": answers,
        "client_notes": list(client.notes),
    }


def _lines(told: dict[str, Any]) -> list[str]:
    from gup.content.refusal import lines

    out = [f"{told['moniker']}: {'allowed' if told['allowed'] else 'refused'}"]
    if told["mode"] != "enforce":
        out[0] += f' (rules.mode is "{told["mode"]}": nothing is refused)'
    out += [f"note: {note}" for note in told["client_notes"]]
    for answer in told["decisions"]:
        out += ["", f"from {answer['upstream']}"]
        out.append(f"  product: {answer['product'] or 'not listed'} (catalogue: {answer['catalogue']})")
        out += [
            f"  {line}" for line in lines(answer) if line.removeprefix("note: ") not in told["client_notes"]
        ]
    return out
