"""Sets up the process's log as the settings say; owns the one handler. Formats and writes nothing itself."""

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from gup import config
from gup.errors import SettingsError
from gup.log.destinations import Destination, FileDestination, JournalDestination, StreamDestination
from gup.log.formats import JsonFormatter, TextFormatter
from gup.log.writer import WritingHandler

ACCESS = "gup.access"
"""The logger of requests: `log.access` decides of it, `log.level` does not."""


def configure(own: config.Log, stream: TextIO | None = None) -> None:
    """Send records where `own` says (or to `stream`); again after a reload, which opens files anew.

    SettingsError when that can't be written to; what was in force before stays so then.
    """
    destination = _destination(own, stream)
    root = logging.getLogger()
    before = [handler for handler in root.handlers if isinstance(handler, WritingHandler)]
    root.addHandler(WritingHandler(destination))
    for handler in before:
        root.removeHandler(handler)
        handler.retire()
    root.setLevel(own.level.upper())
    logging.getLogger(ACCESS).setLevel(logging.INFO)


def configure_child(own: config.Log) -> None:
    """The same in a child, which must go on: the log in force, else standard error, tells what is wrong."""
    try:
        configure(own)
    except SettingsError as error:
        if not any(isinstance(handler, WritingHandler) for handler in logging.getLogger().handlers):
            configure(own.model_copy(update={"destination": "stderr"}))
        logging.getLogger("gup.log").error("%s", error)  # noqa: TRY400 - its own sentence


def close() -> None:
    """Write what is due and end the log's thread; without it that happens at the process's exit."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, WritingHandler)]:
        root.removeHandler(handler)
        handler.close()


def require_destination(own: config.Log) -> None:
    """SettingsError when the log could not be written there; makes no file, that being the service's."""
    name, why = own.destination.partition(":")[0], ""
    if name == "journald":
        _destination(own, None).close()
    elif name.startswith("/"):
        file = Path(own.destination)
        if file.is_dir():
            why = "Is a directory"
        elif file.exists():
            why = "" if os.access(file, os.W_OK) else "Permission denied"
        elif not file.parent.is_dir():
            why = f"there is no folder {str(file.parent)!r}"
    if why:
        raise SettingsError([_unwritable(own.destination, why)])


def _unwritable(destination: str, why: str) -> str:
    right = 'it must be a file in a folder that gup can write to, or "stderr", "stdout" or "journald"'
    return f"log.destination: {destination!r} can't be written to: {why}: {right}"


def _destination(own: config.Log, stream: TextIO | None) -> Destination:
    formatter = JsonFormatter() if own.format == "json" else TextFormatter()
    if stream is not None:
        return StreamDestination(stream, formatter)
    name, _, path = own.destination.partition(":")
    try:
        match name:
            case "stderr":
                return StreamDestination(sys.stderr, formatter)
            case "stdout":
                return StreamDestination(sys.stdout, formatter)
            case "journald":
                return JournalDestination(path)
        return FileDestination(own.destination, formatter)
    except OSError as error:
        raise SettingsError([_unwritable(own.destination, error.strerror or str(error))]) from error
