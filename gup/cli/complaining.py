"""How commands end when something is wrong: sentences on standard error and an exit status. Mends nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from gup.errors import GupError, SettingsError

FAILED = 1
UNUSABLE = 2
"""Exit statuses: the work failed; flags or settings can't be used (as for unknown flags)."""


@contextmanager
def complaining() -> Iterator[None]:
    """Around a command's work: each problem goes to its own line."""
    try:
        yield
    except SettingsError as error:
        for problem in error.problems:
            typer.echo(f"gup: {problem}", err=True)
        raise typer.Exit(UNUSABLE) from error
    except GupError as error:
        typer.echo(f"gup: {error}", err=True)
        raise typer.Exit(FAILED) from error
