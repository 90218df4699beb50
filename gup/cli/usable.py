"""Checks that a service can start with given settings: the files that they name, the log, the rules.

`gup config check`, `gup serve` and every reload ask this, so that all three refuse the same.
"""

import stat
from collections.abc import Callable, Iterator
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
    problems = [*_untrusted(settings), *_catalogue(settings.catalog.file), *_folder(settings.cache.directory)]
    checks: tuple[Callable[[], object], ...] = (
        lambda: require_access(settings.listen),
        lambda: log.require_destination(settings.log),
        lambda: Rulebook(settings),
    )
    for check in checks:
        try:
            check()
        except SettingsError as error:
            problems += error.problems
    if problems:
        raise SettingsError(problems)


def _untrusted(settings: Settings) -> Iterator[str]:
    for number, upstream in enumerate(settings.upstream, 1):
        if upstream.ca_file is not None:
            try:
                trust(upstream.ca_file)
            except FileError as error:
                yield f"upstream#{number}.ca_file: {error}"


def _catalogue(file: Path | None) -> Iterator[str]:
    right = "it must be a manager's ContentInfo.txt, with lines {MONIKER}: product - … - language"
    if file is None:
        return
    try:
        if not parse_catalog(read_file(file, MAX_CATALOG_BYTES)):
            yield f"catalog.file: {str(file)!r} lists nothing: {right}"
    except FileError as error:
        yield f"catalog.file: {error}: {right}"


def _folder(folder: Path) -> Iterator[str]:
    """The folder may be missing, but no file may stand in its place or in that of a folder above it."""
    for path in (folder, *folder.parents):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            yield f"cache.directory: {str(path)!r} can't be looked at: {error.strerror}"
            return
        if not stat.S_ISDIR(mode):
            yield f"cache.directory: {str(path)!r} is no folder: it must be one, or not be there yet"
        return
