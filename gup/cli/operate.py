"""The commands that ask a running service: status, reload, cache. They show its answers; it does the work."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

import json
from typing import Annotated

import typer

from gup.cli import verify
from gup.cli.asking import asking
from gup.cli.options import AdminFlag, ConfigFlag, JsonFlag
from gup.content.key import Kind

cache = typer.Typer(help="Look at and change what a service keeps.", no_args_is_help=True)

Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="As `gup cache list` shows them.")]


def status(*, admin: AdminFlag = None, config: ConfigFlag = None, json_output: JsonFlag = False) -> None:
    """Show what a running service saved, keeps and does."""
    with asking(admin, config) as asked:
        answer = asked.status()
        if json_output:
            typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))
            return
        from gup.cli.words import status_lines

        for line in status_lines(answer):
            typer.echo(line)


def reload(*, admin: AdminFlag = None, config: ConfigFlag = None) -> None:
    """Have a running service read its settings again."""
    with asking(admin, config) as asked:
        asked.reload()
    typer.echo("asked for; `gup status` and the service's log say whether the settings took")


@cache.command("list")
def list_entries(
    *,
    version: Annotated[str | None, typer.Option(help="Only of this version.")] = None,
    language: Annotated[str | None, typer.Option(help="Only of this language.")] = None,
    stream: Annotated[str | None, typer.Option(help="Only of this moniker.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only files of this kind.")] = None,
    order: Annotated[
        str, typer.Option(help="key, used, stored, length or hits; -used is the other way round.")
    ] = "key",
    limit: Annotated[int, typer.Option(min=0, help="How many at most; 0 lists all.")] = 100,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """List entries."""
    named = {"version": version, "language": language, "stream": stream, "kind": kind, "order": order}
    with asking(admin, config) as asked:
        from gup.cli.words import ENTRY_HEAD, entry_line

        entries = asked.entries({name: str(value) for name, value in named.items() if value}, limit)
        for number, entry in enumerate(entries):
            if number == 0 and not json_output:
                typer.echo(ENTRY_HEAD)
            typer.echo(json.dumps(entry, ensure_ascii=False) if json_output else entry_line(entry))


cache.command("verify")(verify.verify)


@cache.command("purge")
def purge(keys: Keys, *, admin: AdminFlag = None, config: ConfigFlag = None) -> None:
    """Remove entries; clients that are being sent one get the whole of it."""
    with asking(admin, config) as asked:
        from gup.units import bytes_in_words

        for key in keys:
            freed = asked.purge(key)["freed_bytes"]
            typer.echo(f"purged {key}: {bytes_in_words(freed)}")


@cache.command("pin")
def pin(keys: Keys, *, admin: AdminFlag = None, config: ConfigFlag = None) -> None:
    """Keep entries whatever the limits say."""
    with asking(admin, config) as asked:
        for key in keys:
            asked.pin(key, pinned=True)
            typer.echo(f"pinned {key}")


@cache.command("unpin")
def unpin(keys: Keys, *, admin: AdminFlag = None, config: ConfigFlag = None) -> None:
    """Let the limits apply to entries again."""
    with asking(admin, config) as asked:
        for key in keys:
            asked.pin(key, pinned=False)
            typer.echo(f"unpinned {key}")
