"""The command itself: its help, its start, and that nothing from outside steers the terminal."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.commands import run
from harness.processes import MEASURED
from typer.main import get_command

import gup
from gup.cli.app import app
from gup.cli.shared import printable

ROOT = Path(__file__).parents[2]


def test_nothing_from_outside_steers_the_terminal():
    assert printable("a\x1b[2Jb\r\n\u202ec") == "a\ufffd[2Jb\ufffd\ufffd\ufffdc"


def commands(command, *names):
    yield names
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, *names, name)


COMMANDS = list(commands(get_command(app)))


def test_the_commands_are_those_of_the_design():
    assert {" ".join(names) for names in COMMANDS} >= set(
        """serve|demo|simulate manager|simulate clients|config check|config show|status|reload
        upgrade|cache list|cache verify|cache purge|cache pin|cache unpin|cache export|cache import
        rules explain|prefetch|report content
        report clients|report savings""".replace("\n        ", "|").split("|")
    )


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_every_command_has_its_help_in_whole_sentences_without_types_of_pythons(names, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run(*names, "--help")
    assert result.exit_code == 0
    usage, _, text = result.stdout.partition("\n")
    assert f"gup {' '.join(names)}".strip() in usage.replace("root", "gup")
    assert not re.search(r"<[a-z\[]|\.\.\.|[|]", text), text


@pytest.mark.parametrize(
    ("typed", "found"),
    [("gup ca", ["cache"]), ("gup cache pur", ["purge"]), ("gup reload --tok", ["--token-file"])],
)
def test_a_shell_completes_commands_and_flags(typed, found):
    words = typed.split()
    script = f"""source '{ROOT}/deploy/completions/gup.bash'
    COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}
    _gup gup; echo "${{COMPREPLY[*]}}" """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
    )
    assert done.stdout.split() == found
    for shell in ("zsh", "fish"):
        asked = {"_GUP_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": typed}
        asked |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        program = [sys.executable, "-m", "gup"]
        told = subprocess.run(program, capture_output=True, text=True, check=True, env=os.environ | asked)
        assert found[0] in told.stdout
        (script,) = (ROOT / "deploy" / "completions").glob({"zsh": "_gup", "fish": "*.fish"}[shell])
        assert set(re.findall(r"_[A-Z]+_[A-Z_]+(?==)", script.read_text())) <= set(asked)


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
        (
            (
                "from gup.cli.usable import Webhook; from gup.config import Alarms; "
                f"Webhook.read(Alarms(webhook='http://a/', webhook_secret='whsec_{'a' * 32}'))"
            ),
            ("aiohttp", "diskcache", "sqlite3"),
        ),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code, heavy):
    """Commands start quickly, and so do children."""
    program = f"{code}; import sys; print(*sorted(set({heavy}) & set(sys.modules)))"
    env = {name: text for name, text in os.environ.items() if name != MEASURED}  # coverage imports some
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True, env=env
    )
    assert done.stdout.split() == []
