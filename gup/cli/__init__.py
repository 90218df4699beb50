"""The command `gup`: reads flags, calls the other packages, shows the results."""

import os
import signal
import sys


def main() -> None:
    if sys.argv[1:2] == ["serve"]:  # they would end the process: they wait until the supervisor takes them
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR2))
    from gup.cli.app import app  # noqa: PLC0415 - `import gup.cli` alone must stay cheap

    if "_GUP_COMPLETE" in os.environ:  # a shell asks what could stand there: see deploy/completions
        from typer import completion  # noqa: PLC0415

        completion.completion_init()  # type: ignore[attr-defined]
    app(prog_name="gup")
