"""How a record of the log reads: a line of text, or a JSON object. Writes nothing."""

import json
import logging
import re
import time
from typing import Any

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


_BARE = re.compile(r'[^\s"=]+')


def extras(record: logging.LogRecord) -> dict[str, Any]:
    """What `extra=` gave; nothing that is None."""
    given = vars(record).items()
    return {name: value for name, value in given if name not in _PLAIN and value is not None}


def _shown(value: object) -> str:
    """One value in a line of text: quoted when it would not be one word."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`time level logger[pid]: message name=value …`, a traceback's lines indented after it.

    Control characters are escaped: what a client sent can neither begin a line nor colour a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        head = f"{_time(record)} {record.levelname.lower()} {record.name}[{record.process}]: "
        more = "".join(f" {name}={_shown(value)}" for name, value in extras(record).items())
        line = head + (record.getMessage() + more).translate(_ESCAPES)
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
        return json.dumps(fields | {n: v for n, v in extras(record).items() if n not in fields}, default=str)
