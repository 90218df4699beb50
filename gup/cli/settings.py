"""`gup config`: looks at settings without starting anything."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

from pathlib import Path
from typing import Annotated

import typer

from gup.cli.complaining import complaining

config = typer.Typer(help="Look at settings without starting anything.", no_args_is_help=True)


@config.command("check")
def check(file: Annotated[Path, typer.Argument(metavar="FILE", help="The settings' file (TOML).")]) -> None:
    """Say whether `gup serve --config FILE` could start, or every mistake."""
    from gup.cli.usable import require_usable
    from gup.config import load
    from gup.units import format_size

    with complaining():
        settings = load(file)
        require_usable(settings)
    names = ", ".join(upstream.name for upstream in settings.upstream)
    listen, cache = settings.listen, settings.cache
    typer.echo(
        f"{file}: ok: listens on {listen.address} port {listen.port}, "
        f"keeps up to {format_size(cache.max_size)} in {cache.directory}, "
        + (f"fetches from {names}" if names else "has no upstream: serve it with --upstream URL")
    )


@config.command("show")
def show(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The settings' file (TOML).")] = None,
) -> None:
    """Print all settings in force, from FILE, the environment and the defaults; secrets are masked."""
    from gup.cli.reference import settings_toml
    from gup.config import load

    with complaining():
        text = settings_toml(load(file))
    typer.echo(text, nl=False)
