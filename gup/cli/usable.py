"""Checks that a service can start with given settings: the files that they name, the log, the rules.

`gup config check`, `gup serve` and every reload ask this, so that all three refuse the same.
"""

import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gup import log
from gup.config import Settings
from gup.content.catalog import MAX_CATALOG_BYTES, parse_catalog
from gup.content.rules import Rulebook
from gup.control.auth import require_access
from gup.errors import SettingsError
from gup.files import FileError, read_file, trust


def require_usable(settings: Settings) -> None:
    """SettingsError with every problem: the setting, the file, the cause and what would be right."""
    problems: list[str] = []
    checks: list[tuple[str, Callable[[], object]]] = [
        (f"upstream#{number}.ca_file", partial(trust, upstream.ca_file))
        for number, upstream in enumerate(settings.upstream, 1)
        if upstream.ca_file is not None
    ]
    checks += [
        ("catalog.file", lambda: _require_catalogue(settings.catalog.file)),
        ("cache.directory", lambda: _require_folder(settings.cache.directory)),
        ("listen", lambda: require_access(settings.listen)),
        ("log", lambda: log.require_destination(settings.log)),
        ("rules", lambda: Rulebook(settings)),
    ]
    for setting, check in checks:
        try:
            check()
        except FileError as error:
            problems.append(f"{setting}: {error}")
        except SettingsError as error:
            problems += error.problems
    if problems:
        raise SettingsError(problems)


def _require_catalogue(file: Path | None) -> None:
    right = "it must be a manager's ContentInfo.txt, with lines {MONIKER}: product - … - language"
    if file is None:
        return
    try:
        if parse_catalog(read_file(file, MAX_CATALOG_BYTES)):
            return
    except FileError as error:
        raise FileError(f"{error}: {right}") from error
    raise FileError(f"{str(file)!r} lists nothing: {right}")


def _require_folder(folder: Path) -> None:
    """The folder may be missing, but no file may stand in its place or in that of a folder above it."""
    for path in (folder, *folder.parents):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise FileError(f"{str(path)!r} can't be looked at: {error.strerror}") from error
        if not stat.S_ISDIR(mode):
            raise FileError(f"{str(path)!r} is no folder: it must be one, or not be there yet")
        return
