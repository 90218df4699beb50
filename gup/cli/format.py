"""Output for people: tables that fit a terminal, and figures in words."""
# ruff: noqa: PLC0415 - rich takes a tenth of a second to import

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import typer

from gup.units import bytes_in_words, time_in_words

Row = Mapping[str, Any]
Columns = Mapping[str, str | Callable[[Row], object]]
"""What stands under each head: a member of the row, or what is made of the row."""


def print_json(answer: object) -> None:
    typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))


def show_table(columns: Columns, rows: Iterable[Row], *, title: str = "") -> None:
    """Print rows under their heads; a head that begins with # is a column of numbers.

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
    """`text` with everything that could steer a terminal made visible."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
