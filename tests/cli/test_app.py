"""The command itself: its help, its start, and that nothing from outside steers the terminal."""

import subprocess
import sys

import pytest
from harness.commands import run

import gup
from gup.cli.shared import printable


def test_nothing_from_outside_steers_the_terminal():
    assert printable("a\x1b[2Jb\r\n\u202ec") == "a\ufffd[2Jb\ufffd\ufffd\ufffdc"


def test_every_command_has_its_help():
    for command in ("serve", "demo", "simulate manager", "simulate clients", "config check", "config show",
                    "status", "reload", "cache list", "cache verify", "cache purge", "cache pin",
                    "cache unpin", "cache export", "cache import", "rules explain", "prefetch",
                    "report content", "report clients", "report savings"):  # fmt: skip
        result = run(*command.split(), "--help")
        assert result.exit_code == 0, command
        assert f"gup {command}" in result.stdout.replace("root", "gup")


def test_python_m_gup_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "gup", "--version"], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gup {gup.__version__}\n", "")


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        (
            "import gup.cli.app",
            ("aiohttp", "asyncio", "diskcache", "pydantic", "pydantic_settings", "prometheus_client", "rich"),
        ),
        ("import gup.config; gup.config.Settings()", ("pydantic_settings",)),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code, heavy):
    """Commands start quickly, and so do children."""
    program = f"{code}; import sys; print(*sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.split() == []
