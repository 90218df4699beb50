"""Where lines of the log go: a stream, a file that is rotated, the journal. Blocks; for the log's thread."""

import contextlib
import errno
import logging
import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TextIO

from gup.log.formats import extras

_PIPE_BYTES = 4096
"""So much is written to a pipe at once or not at all (PIPE_BUF): lines of several processes stay whole."""
_JOURNAL = "/run/systemd/journal/socket"
_JOURNAL_SECONDS = 5.0
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class Destination(Protocol):
    """Takes records, in order; OSError when it can't take them now."""

    def write(self, records: Sequence[logging.LogRecord]) -> None:
        """All of them, or OSError."""

    def close(self) -> None:
        """Let go of what is open; nothing is written after that."""


class StreamDestination:
    """Standard error or output, whose descriptor is not this one's to close, or a stream in memory."""

    def __init__(self, stream: TextIO, formatter: logging.Formatter) -> None:
        self._stream = stream
        self._formatter = formatter
        try:
            self._fd: int | None = stream.fileno()
        except (OSError, ValueError, AttributeError):  # in memory
            self._fd = None

    def write(self, records: Sequence[logging.LogRecord]) -> None:
        lines = [self._formatter.format(record) + "\n" for record in records]
        if self._fd is None:
            self._stream.write("".join(lines))
            return
        # past the stream's own buffer, whose lock a thread that hangs here would hold at the exit
        for piece in _pieces([line.encode(errors="backslashreplace") for line in lines]):
            _write_all(self._fd, piece)

    def close(self) -> None:
        if self._fd is None:
            self._stream.flush()


class FileDestination:
    """A file to which several processes append whole lines; one that was renamed is left for a new one."""

    def __init__(self, path: str, formatter: logging.Formatter) -> None:
        """OSError when it can't be opened."""
        self._path = path
        self._formatter = formatter
        self._torn = False
        self._fd = self._open()

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        fd = os.open(self._path, flags, 0o640)  # non-blocking: a pipe that nobody reads is an error
        os.set_blocking(fd, True)
        return fd

    def _look(self) -> None:
        """Open the path anew if what is open is not there any more (logrotate renames, then may create)."""
        own = os.fstat(self._fd)
        with contextlib.suppress(OSError):
            there = Path(self._path).stat()
            if (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino):
                return
        fd = self._open()
        os.close(self._fd)
        self._fd, self._torn = fd, False

    def write(self, records: Sequence[logging.LogRecord]) -> None:
        with contextlib.suppress(OSError):  # it can't be opened anew: better the old file than none
            self._look()
        text = "".join(self._formatter.format(record) + "\n" for record in records)
        piece = text.encode(errors="backslashreplace")
        if self._torn:  # a full disk took half a line: the next begins on a line of its own
            piece = b"\n" + piece
        done = os.write(self._fd, piece)
        self._torn = done != len(piece) and (done > 0 or self._torn)
        if done != len(piece):
            _write_all(self._fd, piece[done:])
            self._torn = False

    def close(self) -> None:
        os.close(self._fd)


class JournalDestination:
    """systemd's journal, with a field for each part of a record (systemd.journal-fields(7))."""

    def __init__(self, path: str = "") -> None:
        """`path` is the journal's socket, where it is not in its usual place. OSError: nobody listens."""
        self._path = path or _JOURNAL
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(_JOURNAL_SECONDS)
            self._socket.connect(self._path)
        except OSError:
            self._socket.close()
            raise
        self._traces = logging.Formatter()

    def write(self, records: Sequence[logging.LogRecord]) -> None:
        for record in records:
            self._send(self._message(record))

    def _message(self, record: logging.LogRecord) -> bytes:
        message = record.getMessage()
        given = extras(record)
        if given:
            message += "".join(f" {name}={value}" for name, value in given.items())
        if record.exc_info:
            message += "\n" + self._traces.formatException(record.exc_info)
        fields: dict[str, object] = {
            "MESSAGE": message,
            "PRIORITY": _PRIORITIES.get(record.levelno, 6),
            "SYSLOG_IDENTIFIER": "gup",
            "LOGGER": record.name,
        }
        fields |= {f"GUP_{name.upper()}": value for name, value in given.items()}
        return b"".join(_journal_field(name, str(value)) for name, value in fields.items())

    def _send(self, message: bytes) -> None:
        try:
            self._send_once(message)
        except (ConnectionError, FileNotFoundError):  # the journal was restarted: its socket is another one
            self._socket.connect(self._path)
            self._send_once(message)

    def _send_once(self, message: bytes) -> None:
        try:
            self._socket.send(message)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):  # too long for a datagram
                raise
            self._send_file(message)

    def _send_file(self, message: bytes) -> None:
        fd = os.memfd_create("gup-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            _write_all(fd, message)
            socket.send_fds(self._socket, [b""], [fd])
        finally:
            os.close(fd)

    def close(self) -> None:
        self._socket.close()


def _journal_field(name: str, value: str) -> bytes:
    """The journal's own form: NAME=value, or with a length where the value has several lines."""
    text = value.encode(errors="backslashreplace")
    if b"\n" not in text:
        return name.encode() + b"=" + text + b"\n"
    return name.encode() + b"\n" + len(text).to_bytes(8, "little") + text + b"\n"


def _pieces(lines: Sequence[bytes]) -> list[bytes]:
    """Whole lines together, as many as go to a pipe at once."""
    pieces: list[bytes] = []
    for line in lines:
        if pieces and len(pieces[-1]) + len(line) <= _PIPE_BYTES:
            pieces[-1] += line
        else:
            pieces.append(line)
    return pieces


def _write_all(fd: int, piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:  # somebody who shares the descriptor made it non-blocking
            select.select([], [fd], [])
