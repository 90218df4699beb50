"""The command `gup`: reads flags, calls the other packages, shows the results."""

import os


def main() -> None:
    from gup.cli.app import app  # noqa: PLC0415 - `import gup.cli` alone must stay cheap

    if "_GUP_COMPLETE" in os.environ:  # a shell asks what could stand there: see deploy/completions
        from typer import completion  # noqa: PLC0415

        completion.completion_init()  # type: ignore[attr-defined]
    app(prog_name="gup")
