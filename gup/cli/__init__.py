"""The command `gup`: reads flags, calls the other packages, shows the results."""


def main() -> None:
    from gup.cli.app import app  # noqa: PLC0415 - `import gup.cli` alone must stay cheap

    app(prog_name="gup")
