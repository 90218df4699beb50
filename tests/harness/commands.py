"""gup's commands, run as an administrator runs them."""

import subprocess
import sys

from harness.processes import environment


def command(*arguments: object, **env: str) -> "subprocess.CompletedProcess[str]":
    """One command to its end; GUP_… variables come from `env` only."""
    return subprocess.run(
        [sys.executable, "-m", "gup", *map(str, arguments)],
        env=environment("command", env),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
