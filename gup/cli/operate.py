"""The commands that ask a running service: status, reload, cache. They show its answers; it does the work."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

import json
from typing import Annotated, Any

import typer

from gup.cli import archives, verify
from gup.cli.asking import Where, asking
from gup.cli.options import AdminFlag, CaFlag, ConfigFlag, JsonFlag, TokenFlag
from gup.cli.tables import show_table
from gup.content.key import Kind

cache = typer.Typer(help="Look at and change what a service keeps.", no_args_is_help=True)

Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="As `gup cache list` shows them.")]


def status(
    *,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Show what a running service saved, keeps and does."""
    with asking(Where(admin, config, token_file, ca_file)) as asked:
        answer = asked.status()
        if json_output:
            _print_json(answer)
            return
        from gup.cli.words import FILL_HEADS, UPSTREAM_HEADS, fill_row, status_lines, upstream_row

        for line in status_lines(answer):
            typer.echo(line)
        show_table(UPSTREAM_HEADS, [upstream_row(row) for row in answer["upstreams"]])
        show_table(FILL_HEADS, [fill_row(row) for row in answer["fills"]])


def reload(
    *,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Have a running service read its settings again; exit status 1 if it can't use them."""
    with asking(Where(admin, config, token_file, ca_file)) as asked:
        answer = asked.reload()
    if json_output:
        _print_json(answer)
    elif answer["reloaded"]:
        typer.echo("the settings were read again and are in force")
    else:
        typer.echo("the settings before stay in force:", err=True)
        for problem in answer["problems"]:
            typer.echo(f"  {problem}", err=True)
    if not answer["reloaded"]:
        raise typer.Exit(1)


@cache.command("list")
def list_entries(  # noqa: PLR0913 - each filter is a flag
    *,
    product: Annotated[str | None, typer.Option(help="Only of this product.")] = None,
    version: Annotated[str | None, typer.Option(help="Only of this version.")] = None,
    language: Annotated[str | None, typer.Option(help="Only of this language.")] = None,
    stream: Annotated[str | None, typer.Option(help="Only of this moniker.")] = None,
    revision: Annotated[str | None, typer.Option(help="Only of this revision.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only files of this kind.")] = None,
    order: Annotated[
        str, typer.Option(help="key, used, stored, length or hits; -used is the other way round.")
    ] = "key",
    limit: Annotated[int, typer.Option(min=0, help="How many at most; 0 lists all.")] = 100,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """List entries; with --json each is one line."""
    named = {
        "product": product,
        "version": version,
        "language": language,
        "stream": stream,
        "revision": revision,
        "kind": kind,
        "order": order,
    }
    with asking(Where(admin, config, token_file, ca_file)) as asked:
        from gup.cli.words import ENTRY_HEADS, entry_row

        filters = {name: str(value) for name, value in named.items() if value is not None}
        for page in asked.entries(filters, limit):
            if json_output:
                for entry in page:
                    typer.echo(json.dumps(entry, ensure_ascii=False))
            else:
                show_table(ENTRY_HEADS, [entry_row(entry) for entry in page])


cache.command("verify")(verify.verify)
cache.command("export")(archives.export)
cache.command("import")(archives.import_)


@cache.command("purge")
def purge(
    keys: Keys,
    *,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Remove entries; clients that are being sent one get the whole of it."""
    with asking(Where(admin, config, token_file, ca_file)) as asked:
        from gup.units import bytes_in_words

        for key in keys:
            answer = asked.purge(key)
            _tell(answer, f"purged {key}: {bytes_in_words(answer['freed_bytes'])}", json_output=json_output)


@cache.command("pin")
def pin(
    keys: Keys,
    *,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Keep entries whatever the limits say."""
    with asking(Where(admin, config, token_file, ca_file)) as asked:
        for key in keys:
            _tell(asked.pin(key, pinned=True), f"pinned {key}", json_output=json_output)


@cache.command("unpin")
def unpin(
    keys: Keys,
    *,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Let the limits apply to entries again."""
    with asking(Where(admin, config, token_file, ca_file)) as asked:
        for key in keys:
            _tell(asked.pin(key, pinned=False), f"unpinned {key}", json_output=json_output)


def _tell(answer: dict[str, Any], words: str, *, json_output: bool) -> None:
    """One line for one key: it is printed as soon as it is done."""
    typer.echo(json.dumps(answer, ensure_ascii=False) if json_output else words)


def _print_json(answer: dict[str, Any]) -> None:
    typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))
