"""The command `gup`: reads flags, has other parts do the work, shows their answers; decides nothing."""


def main() -> None:
    """Run the command line; leaves through SystemExit."""
    from gup.cli.app import app  # noqa: PLC0415 - `import gup.cli` alone must stay cheap

    app(prog_name="gup")
