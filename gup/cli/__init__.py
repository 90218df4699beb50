"""The command `gup`: reads flags, has other parts do the work, shows their answers; decides nothing."""

import os


def main() -> None:
    """Run the command line; leaves through SystemExit."""
    from gup.cli.app import app  # noqa: PLC0415 - `import gup.cli` alone must stay cheap

    if "_GUP_COMPLETE" in os.environ:  # a shell asks what could stand there: see deploy/completions
        from typer import completion  # noqa: PLC0415

        completion.completion_init()  # type: ignore[attr-defined]
    app(prog_name="gup")
