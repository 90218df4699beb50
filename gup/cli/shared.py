"""Shared by commands: flags, exit statuses, access to the control plane, tables for people."""
# ruff: noqa: PLC0415 - not every command asks, and rich takes a tenth of a second to import

import functools
import inspect
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperArgument, TyperGroup

from gup.units import bytes_in_words, time_in_words

if TYPE_CHECKING:
    from gup.cli.admin_client import Admin

FAILED, UNUSABLE, WAITING = 1, 2, 3
"""Exit statuses: the work failed; flags or settings can't be used; some settings wait for a restart."""


class Commands(TyperGroup):
    """Commands under one name. The help shows whole sentences, and no types of Python's."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        for command in self.commands.values():
            for parameter in command.params:
                if isinstance(parameter, TyperArgument):
                    parameter.display_type_rich = lambda **_: ""  # type: ignore[method-assign]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, sentence(self.commands[name])) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def sentence(command: Any) -> str:
    """The first sentence of a command's help, in one line."""
    return " ".join((command.help or "").split("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."


ConfigFlag = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", envvar="GUP_CONFIG", help="The settings' file (TOML)."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SeedFlag = Annotated[int, typer.Option(metavar="N", help="Seed of the generated content and clients.")]


def quantity(parse: Callable[[object], float], metavar: str, help_: str, default: str) -> Any:
    """An option whose text `parse` reads, or explains why not. `default` is for the help."""

    def parser(text: str) -> float:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is not right: {error}") from error

    return typer.Option(parser=parser, metavar=metavar, help=help_, show_default=default or False)


def with_flags(**bundles: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose parameter of each bundle's name is made from the bundle's flags.

    So flags of many commands are declared once; in the help they are in the parameter's place.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def flagged(**given: Any) -> None:
            for name, bundle in bundles.items():
                flags = inspect.signature(bundle).parameters
                given[name] = bundle(**{flag: given.pop(flag) for flag in flags})
            command(**given)

        own = inspect.signature(command)
        parameters: list[inspect.Parameter] = []
        for name, parameter in own.parameters.items():
            bundle = bundles.get(name)
            parameters += inspect.signature(bundle).parameters.values() if bundle else [parameter]
        flagged.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return flagged

    return decorate


# --- the control plane


@dataclass(frozen=True, slots=True)
class Where:
    """The flags about the control plane. Without a `url` the settings give it."""

    url: str | None
    config: Path | None
    token_file: Path | None
    ca_file: Path | None


_ADMIN = "URL of the control plane; default: the address in the settings."
_TOKEN_FILE = "A file with a token; default: the file named in the settings, else run/admin-token."  # noqa: S105
_CA_FILE = "Certificates (PEM) to trust for an https:// URL."


def _connection_flags(
    *,
    admin: Annotated[str | None, typer.Option(metavar="URL", envvar="GUP_ADMIN", help=_ADMIN)] = None,
    config: ConfigFlag = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", envvar="GUP_TOKEN_FILE", help=_TOKEN_FILE)
    ] = None,
    ca_file: Annotated[Path | None, typer.Option(metavar="FILE", envvar="GUP_CA_FILE", help=_CA_FILE)] = None,
) -> Where:
    return Where(admin, config, token_file, ca_file)


with_connection_flags = with_flags(where=_connection_flags)


@contextmanager
def asking(where: Where) -> Iterator["Admin"]:
    """The control plane. A response without the expected members is from another version."""
    from gup.cli.admin_client import AdminError, admin_at

    admin = admin_at(*astuple(where))
    try:
        yield admin
    except KeyError as error:
        words = f"{admin.url}: the answer has no {error}: the service is another version of gup"
        raise AdminError(words) from error


# --- output


Row = Mapping[str, Any]
Columns = Mapping[str, str | Callable[[Row], object]]
"""By heading: a member of the row, or a function of it."""


def print_json(answer: object) -> None:
    typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))


def show_table(columns: Columns, rows: Iterable[Row], *, title: str = "") -> None:
    """Print rows under their headings; a heading that begins with # is a column of numbers.

    Fitted to a terminal, whole in a pipe. Text from outside can neither mark up nor move the cursor. Without
    a row nothing is printed. KeyError: the rows are of another version of gup.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    found = [[Text(printable(_cell(column, row))) for column in columns.values()] for row in rows]
    if not found:
        return
    table = Table(box=None, title=title or None, title_justify="left", pad_edge=False, padding=(0, 2, 0, 0))
    for head in columns:
        number = head.startswith("#")
        justify: Any = "right" if number else "left"
        table.add_column(Text(head.removeprefix("#")), justify=justify, overflow="fold", no_wrap=number)
    for cells in found:
        table.add_row(*cells)
    console = Console(highlight=False)
    if not console.is_terminal:
        wide = console.options.update(max_width=100_000)
        console.width = Measurement.get(console, wide, table).maximum
    console.print(table)


def _cell(column: str | Callable[[Row], object], row: Row) -> str:
    name = column if isinstance(column, str) else ""
    value: Any = column(row) if callable(column) else row[column]
    if name.endswith(("_at", "since")):
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(value)) if value else "-"
    if value is None:
        return "-"
    if name.endswith(("_bytes", "bytes_per_second")):
        return bytes_in_words(value)
    return time_in_words(value) if name.endswith("_seconds") else str(value)


def printable(text: str) -> str:
    """`text` without characters that could control a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
