"""Rows for people: tables that fit a terminal, and whole in a pipe. Knows no figure's meaning."""
# ruff: noqa: PLC0415 - rich takes a tenth of a second to import

from collections.abc import Iterable, Sequence


def show_table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """Print rows under their heads; a head that begins with # is a column of numbers.

    What comes from outside can neither mark up nor move the cursor. Without a row nothing is printed.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    found = [[Text(printable(str(cell))) for cell in row] for row in rows]
    if not found:
        return
    table = Table(box=None, title=title or None, title_justify="left", pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(
            Text(head.removeprefix("#")),
            justify="right" if head.startswith("#") else "left",
            overflow="fold",
            no_wrap=head.startswith("#"),
        )
    for row in found:
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        wide = console.options.update(max_width=100_000)
        console.width = Measurement.get(console, wide, table).maximum
    console.print(table)


def printable(text: str) -> str:
    """`text` with everything that could steer a terminal made visible."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
