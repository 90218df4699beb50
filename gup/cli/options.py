"""Kinds of command-line options that several commands share; reads no setting."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gup.units import parse_duration, parse_rate, parse_size


def quantity(parse: Callable[[object], float], metavar: str, help_: str, default: str) -> Any:
    """An option whose text `parse` reads; what it can't read it explains. `default` is for the help."""

    def parser(text: str) -> float:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is not right: {error}") from error

    return typer.Option(parser=parser, metavar=metavar, help=help_, show_default=default)


def size(help_: str, default: str) -> Any:
    return quantity(parse_size, "SIZE", help_, default)


def rate(help_: str, default: str) -> Any:
    return quantity(parse_rate, "RATE", help_, default)


def duration(help_: str, default: str) -> Any:
    return quantity(parse_duration, "DURATION", help_, default)


ConfigFlag = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", envvar="GUP_CONFIG", help="The settings' file (TOML)."),
]
AdminFlag = Annotated[
    str | None,
    typer.Option(
        metavar="URL", envvar="GUP_ADMIN", help="The control plane; without it, where the settings put it."
    ),
]
TokenFlag = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="GUP_TOKEN_FILE",
        help="A file with a token; without it, what the settings name, or what the service left in run/.",
    ),
]
CaFlag = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", envvar="GUP_CA_FILE", help="Certificates (PEM) to trust for an https:// URL."
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SeedFlag = Annotated[int, typer.Option(help="Another number makes other content and other clients.")]
