"""Flags that several commands share, and how commands end."""
# ruff: noqa: PLC0415 - the control plane's client is for commands that ask

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gup.errors import GupError, SettingsError
from gup.units import parse_duration, parse_rate, parse_size

if TYPE_CHECKING:
    from gup.cli.admin_client import Admin

Command = Callable[..., None]

FAILED = 1
UNUSABLE = 2
"""Exit statuses: the work failed; flags or settings can't be used (as for unknown flags)."""


@contextmanager
def exiting() -> Iterator[None]:
    """Around a command's work: errors become lines on standard error and an exit status."""
    try:
        yield
    except SettingsError as error:
        for problem in error.problems:
            typer.echo(f"gup: {problem}", err=True)
        raise typer.Exit(UNUSABLE) from error
    except GupError as error:
        typer.echo(f"gup: {error}", err=True)
        raise typer.Exit(FAILED) from error


# --- quantities


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


# --- the control plane


ConfigFlag = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", envvar="GUP_CONFIG", help="The settings' file (TOML)."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SeedFlag = Annotated[int, typer.Option(help="Another number makes other content and other clients.")]


@dataclass(frozen=True, slots=True)
class Where:
    """What the flags say of the control plane. Without a `url` the settings tell where it is."""

    url: str | None = None
    config: Path | None = None
    token_file: Path | None = None
    ca_file: Path | None = None


def _connection_flags(
    *,
    admin: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="GUP_ADMIN",
            help="The control plane; without it, where the settings put it.",
        ),
    ] = None,
    config: ConfigFlag = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="GUP_TOKEN_FILE",
            help="A file with a token; without it, what the settings name, or what the service left in run/.",
        ),
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", envvar="GUP_CA_FILE", help="Certificates (PEM) to trust for an https:// URL."
        ),
    ] = None,
) -> Where:
    return Where(admin, config, token_file, ca_file)


def with_flags(**bundles: Callable[..., Any]) -> Callable[[Command], Command]:
    """A command whose parameter of each bundle's name is made from the flags that the bundle has.

    So flags that stand on many commands stand here once; in the help they stand in the parameter's place.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def flagged(**given: Any) -> None:
            for name, bundle in bundles.items():
                given[name] = bundle(
                    **{flag: given.pop(flag) for flag in inspect.signature(bundle).parameters}
                )
            command(**given)

        own = inspect.signature(command)
        parameters: list[inspect.Parameter] = []
        for name, parameter in own.parameters.items():
            bundle = bundles.get(name)
            parameters += inspect.signature(bundle).parameters.values() if bundle else [parameter]
        flagged.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return flagged

    return decorate


with_connection_flags = with_flags(where=_connection_flags)


@contextmanager
def asking(where: Where) -> Iterator["Admin"]:
    """The control plane; its refusals become sentences and an exit status."""
    with exiting():
        from gup.cli.admin_client import AdminError, admin_at

        admin = admin_at(where)
        try:
            yield admin
        except KeyError as error:
            raise AdminError(
                f"{admin.url}: the answer has no {error}: that gup is of another version"
            ) from error
