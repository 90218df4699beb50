"""The log: lines of text or JSON on standard error; decides nothing about what is worth a line."""

import json
import logging
import sys
import time
from typing import Any, Literal, TextIO

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; whatever else it has was given by `extra=`."""
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160))} | {
    10: "\\n",
    13: "\\r",
    9: "\\t",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def _time(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, milliseconds."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _PLAIN}


class TextFormatter(logging.Formatter):
    """`time level logger[pid]: message name=value …`, a traceback's lines indented after it.

    Control characters are escaped: what a client sent can neither begin a line nor colour a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        head = f"{_time(record)} {record.levelname.lower()} {record.name}[{record.process}]: "
        extras = "".join(f" {name}={value}" for name, value in _extras(record).items())
        line = head + (record.getMessage() + extras).translate(_ESCAPES)
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "".join("\n    " + row.translate(_ESCAPES) for row in trace.splitlines())
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, pid, message, exception, and what `extra=` gave."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(_extras(record) | fields, default=str)


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that `configure` finds the one it put up before."""


def configure(
    level: Literal["debug", "info", "warning", "error"],
    format_: Literal["text", "json"],
    stream: TextIO | None = None,
) -> None:
    """Send records of at least `level` to `stream` (default: standard error); again after a reload."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format_ == "json" else TextFormatter())
    root.addHandler(handler)
    root.setLevel(level.upper())
