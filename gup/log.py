"""The log: its two formats, its destinations, and the thread that writes to them.

`logging` puts records into a bounded queue and never waits; records that find no room, or can't be written,
are counted, and the log says how many were dropped.
"""

import contextlib
import errno
import json
import logging
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import QueueHandler, WatchedFileHandler
from pathlib import Path
from typing import Any

from gup import config
from gup.errors import SettingsError
from gup.files import write_all

ACCESS = "gup.access"

_MOST_RECORDS = 8192
_BATCH = 256
_GATHER_SECONDS = 0.02
_CLOSE_SECONDS = 2.0
"""Time limit at exit for a destination that takes no lines."""
_COMPLAIN_SECONDS = 60.0


def configure(own: config.Log) -> None:
    """Send records where `own` says; called again after a reload, which reopens files.

    SettingsError when the destination can't be written to; the previous log stays in force then.
    """
    handler = WritingHandler(_destination(own))
    logging.logThreads = logging.logMultiprocessing = False  # what no format shows is not looked up
    logging._srcfile = None  # noqa: SLF001 - as Python's logging HOWTO says
    root, before = logging.getLogger(), _handlers()
    root.addHandler(handler)
    for old in before:
        root.removeHandler(old)
        old.retire()
    root.setLevel(own.level.upper())
    logging.getLogger(ACCESS).setLevel(logging.INFO)


def configure_child(own: config.Log) -> None:
    """`configure` in a child, which must continue: a failure is logged where the log went before, else on
    stderr.
    """
    try:
        configure(own)
    except SettingsError as error:
        if not _handlers():
            configure(own.model_copy(update={"destination": "stderr"}))
        logging.getLogger("gup.log").error("%s", error)  # noqa: TRY400 - the error is a sentence


def close() -> None:
    """Write what is queued and end the thread; `logging` does so too when the process exits."""
    for handler in _handlers():
        logging.getLogger().removeHandler(handler)
        handler.close()


def require_destination(own: config.Log) -> None:
    """SettingsError when the log could not be written there. Creates no file: that is the service's task."""
    file = Path(own.destination)
    if not own.destination.startswith("/") or file.exists():
        _destination(own).close()
    elif not file.parent.is_dir():
        raise SettingsError([_unwritable(own.destination, f"the folder {str(file.parent)!r} does not exist")])


def _unwritable(destination: str, why: str) -> str:
    right = 'it must be a file in a folder that gup can write to, or "stderr", "stdout" or "journald"'
    return f"log.destination: {destination!r} can't be written to: {why}: {right}"


def _handlers() -> list["WritingHandler"]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, WritingHandler)]


def _destination(own: config.Log) -> "Destination":
    name, _, path = own.destination.partition(":")
    try:
        if name in ("stderr", "stdout"):
            destination: Destination = _DescriptorHandler(1 + (name == "stderr"))
        elif name == "journald":
            destination = _JournalHandler(path or _JOURNAL)
        else:
            destination = _FileHandler(own.destination)
    except OSError as error:
        raise SettingsError([_unwritable(own.destination, error.strerror or str(error))]) from error
    destination.setFormatter(_JsonFormatter() if own.format == "json" else _TextFormatter())
    return destination


# --- the queue and its thread


class WritingHandler(QueueHandler):
    """Queues records from any thread, at most 8192, for a thread that writes them to `destination`."""

    queue: "queue.SimpleQueue[logging.LogRecord | None]"

    def __init__(self, destination: "Destination") -> None:
        super().__init__(queue.SimpleQueue())
        self._destination = destination
        self._dropped = 0  # changed under the handler's lock
        self._failed = self._reported = 0  # used by the thread only, as what follows
        self._complain_at = 0.0
        self._retired = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.msg, record.args = record.getMessage(), None  # now: the arguments may change later
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.queue.qsize() < _MOST_RECORDS:
            self.queue.put(record)
        else:
            self._dropped += 1

    def retire(self) -> None:
        """Take no more; the queue is still written, then the destination is closed. Never waits."""
        if not self._retired:
            self._retired = True
            self.queue.put(None)

    def close(self) -> None:
        self.retire()
        self._thread.join(_CLOSE_SECONDS)
        super().close()

    def _run(self) -> None:
        """The thread. Takes no lock that a waiting thread could hold: `logging` locks while it closes."""
        batch: list[logging.LogRecord | None] = []
        while None not in batch[-1:]:
            batch = [self.queue.get()]
            if batch[0] is not None and self.queue.qsize() < _BATCH:
                time.sleep(_GATHER_SECONDS)  # lines that come meanwhile wake no thread
            while batch[-1] is not None and len(batch) < _BATCH and not self.queue.empty():
                batch.append(self.queue.get())
            self._write([record for record in batch if record is not None])
        self._destination.close()

    def _write(self, batch: list[logging.LogRecord]) -> None:
        """One write for many lines."""
        count, lost = len(batch), self._dropped + self._failed - self._reported
        if lost:
            text = "%d lines of the log were dropped: they came too fast, or could not be written"
            batch.append(logging.LogRecord("gup.log", logging.WARNING, __file__, 0, text, (lost,), None))
        try:
            if batch:
                self._destination.write(batch)
            self._reported += lost
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread must go on
            self._failed += count
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        """On standard error, at most once a minute: the only place left when the log can't be written."""
        now = time.monotonic()
        if now >= self._complain_at:
            self._complain_at = now + _COMPLAIN_SECONDS
            why = getattr(error, "strerror", None) or error
            with contextlib.suppress(OSError):
                os.write(2, f"gup: the log can't be written: {why}\n".encode())


# --- destinations


class Destination(logging.Handler):
    """Where records go, in order; used by one thread."""

    def write(self, records: Sequence[logging.LogRecord]) -> None:
        for record in records:
            self.emit(record)


class _DescriptorHandler(Destination):
    """Standard output or error, without Python's stream: a hanging thread would hold its lock at exit."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        write_all(self._fd, _line(self, record))


class _FileHandler(WatchedFileHandler, Destination):
    """A file to which several processes append whole lines; a renamed one is closed and a new one opened."""

    _torn = False

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=_open_log)

    def write(self, records: Sequence[logging.LogRecord]) -> None:
        self.reopenIfNeeded()
        if self.stream is None:  # the last attempt to reopen it failed
            self.stream = self._open()
            self._statstream()
        # After a line that a full disk cut, the next one begins on a line of its own.
        piece = b"\n" * self._torn + b"".join([_line(self, record) for record in records])
        done = os.write(self.stream.fileno(), piece)
        if done != len(piece):
            self._torn = done > 0 or self._torn
            write_all(self.stream.fileno(), piece[done:])
        self._torn = False


def _line(handler: logging.Handler, record: logging.LogRecord) -> bytes:
    return (handler.format(record) + "\n").encode(errors="backslashreplace")


def _open_log(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NOCTTY | os.O_NONBLOCK, 0o640)  # a pipe without a reader is an error
    os.set_blocking(fd, True)
    return fd


_JOURNAL = "/run/systemd/journal/socket"
_JOURNAL_SECONDS = 5.0
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _JournalHandler(Destination):
    """systemd's journal, with a field for each part of a record (systemd.journal-fields(7))."""

    def __init__(self, path: str) -> None:
        """OSError when nothing listens at the socket."""
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(_JOURNAL_SECONDS)
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise

    def emit(self, record: logging.LogRecord) -> None:
        message = _journal_message(record)
        try:
            self._send(message)
        except (ConnectionError, FileNotFoundError):  # the journal was restarted and has a new socket
            self._socket.connect(self._path)
            self._send(message)

    def _send(self, message: bytes) -> None:
        try:
            self._socket.send(message)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):  # too long for a datagram
                raise
            fd = os.memfd_create("gup-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                write_all(fd, message)
                socket.send_fds(self._socket, [b""], [fd])
            finally:
                os.close(fd)

    def close(self) -> None:
        self._socket.close()
        super().close()


def _journal_message(record: logging.LogRecord) -> bytes:
    """The journal's own form: NAME=value, or with a length where the value has several lines."""
    given = _extras(record)
    text = record.getMessage() + "".join(f" {name}={value}" for name, value in given.items())
    if record.exc_info:
        text += "\n" + logging.Formatter().formatException(record.exc_info)
    fields = {"MESSAGE": text, "PRIORITY": _PRIORITIES.get(record.levelno, 6), "SYSLOG_IDENTIFIER": "gup"}
    fields |= {"LOGGER": record.name} | {f"GUP_{name.upper()}": value for name, value in given.items()}
    message = b""
    for name, value in fields.items():
        content = str(value).encode(errors="backslashreplace")
        length = b"\n" + len(content).to_bytes(8, "little") if b"\n" in content else b"="
        message += name.encode() + length + content + b"\n"
    return message


# --- formats


_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""Attributes of every record; the others come from `extra=`."""
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BARE = re.compile(r'[^\s"=]+')


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    given = vars(record).items()
    return {name: value for name, value in given if name not in _PLAIN and value is not None}


def _time(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


class _TextFormatter(logging.Formatter):
    """`time level logger[pid]: message name=value …`, a traceback's lines indented after it.

    Control characters are escaped: text from a client can neither begin a line nor colour a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        head = f"{_time(record)} {record.levelname.lower()} {record.name}[{record.process}]: "
        more = "".join(f" {name}={_shown(value)}" for name, value in _extras(record).items())
        rows = [head + record.getMessage() + more]
        if record.exc_info:
            rows += self.formatException(record.exc_info).splitlines()
        return "\n    ".join(_CONTROLS.sub(lambda found: ascii(found[0])[1:-1], row) for row in rows)


def _shown(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


class _JsonFormatter(logging.Formatter):
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
