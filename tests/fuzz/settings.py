"""Settings: any bytes as a TOML file, and after a line `#environment` any variables, NAME=VALUE a line."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fuzz import Check
from gup.cli.reference import settings_toml
from gup.cli.usable import usable
from gup.config import Settings, read
from gup.content.routes import Routes
from gup.content.rules import Rulebook
from gup.errors import SettingsError

_ENVIRONMENT = b"\n#environment\n"
_BEGINNING = re.compile(
    rf"(?:/.*/gup\.toml|(?i:GUP_).*|(?:{'|'.join(Settings.model_fields)})(?:[.#].*)?): \S"
)


@contextmanager
def target() -> Iterator[Check]:
    """A file is settings, which print as a file that reads the same, or mistakes: a printable sentence each,
    which begins with the key, the variable or the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gup.toml")

        def check(given: bytes) -> None:
            text, _, variables = given.partition(_ENVIRONMENT)
            file.write_bytes(text)
            _read(file, _variables(variables))
            try:
                usable(file, servable=True)
            except SettingsError as error:
                _require_sentences(error.problems)

        yield check


def _variables(lines: bytes) -> dict[str, str]:
    pairs = (line.decode(errors="surrogateescape").partition("=") for line in lines.splitlines())
    return {name: text for name, _, text in pairs}


def _read(file: Path, environment: dict[str, str]) -> None:
    settings, problems = read(file, environment=environment)
    assert isinstance(settings, Settings)
    _require_sentences(problems)
    if problems:
        return
    try:
        Rulebook(settings)
    except SettingsError as error:
        _require_sentences(error.problems)
    Routes.of(settings.upstream)
    if any(upstream.headers or upstream.proxy for upstream in settings.upstream):
        return  # printed without its secrets
    printed = settings_toml(settings)
    file.write_text(printed, encoding="utf-8")
    again, problems = read(file, environment={})
    assert not problems, problems
    assert again == settings, printed


def _require_sentences(problems: list[str]) -> None:
    for problem in problems:
        assert problem.isprintable(), repr(problem)
        assert _BEGINNING.match(problem) or ": unknown key; " in problem, problem
