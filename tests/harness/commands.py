"""gup's commands, as an administrator gives them; in this process, since starts cost more than they do."""

import os
import subprocess
import sys
from dataclasses import dataclass

from typer.testing import CliRunner, Result

from gup.cli.app import app
from harness.processes import environment
from harness.service import Gup


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Result:
    """One command as it stands, with whatever exception it ended in."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def command(*arguments: object, **env: str) -> Done:
    """One command to its end; GUP_… variables come from `env` only."""
    unset: dict[str, str | None] = {name: None for name in os.environ if name.startswith("GUP_")}
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={**unset, **env})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def on(gup: Gup, *arguments: object) -> Done:
    """One command for a running service, by its URL and with its token."""
    return command(
        *arguments, "--admin", gup.admin_url, GUP_TOKEN_FILE=str(gup.cache_dir / "run" / "admin-token")
    )


def started(*arguments: object) -> Done:
    """One command in a process of its own, to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "gup", *map(str, arguments)],
        env=environment("command"),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)
