"""Files: read bounded, replaced atomically, synced, locked by ranges of bytes; what settings name."""

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import ssl
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from gup.errors import GupError

PEM_BYTES = 16 << 20
"""Upper limit on a bundle of certificates; what the largest systems trust takes 0.3 MB."""
_DER_BEGIN = b"\x30\x82"
"""A SEQUENCE with a length of two bytes: how a certificate in DER begins."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC_AT_ONCE = ctypes.PyDLL(None, use_errno=True)  # calls hold the interpreter's lock
_SYNC_FILE_RANGE_WRITE = 2
_FALLOC_FL_KEEP_SIZE = 1
_POLL = struct.Struct("ihh")  # struct pollfd: fd, events, revents
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid


class FileError(GupError, ValueError):
    """The text names the file and the cause."""


def read_regular(path: Path, most_bytes: int, flags: int = 0) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | flags)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "It is a pipe, a socket or a device")
        return os.read(fd, most_bytes)
    finally:
        os.close(fd)


def write_all(fd: int, content: bytes | memoryview) -> None:
    """write(2) may write less: on a disk that is nearly full, into a pipe."""
    rest = memoryview(content)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:  # another process made a shared descriptor non-blocking
            select.select([], [fd], [])


def replace_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write `content` beside `path`, readable by the owner only, and rename it there.

    Readers see the old file or the whole new one; with `durable` also after a power cut. One process at a
    time writes a path: the new file's name is fixed, so nothing piles up.
    """
    os.close(replaced_file(path, content, durable=durable))


def append_line(path: Path, line: bytes = b"", *, reserve_bytes: int = 64 * 1024) -> None:
    """Add a line, readable by the owner only, that survives a power cut; OSError, and then it may be torn.

    What a crash or a full disk left of an earlier line is ended first. Room for further lines is reserved, so
    that they can be written on a full disk, where the file system can do that; without a line only this is
    done.
    """
    new = not path.exists()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        if line:
            write_all(fd, (b"\n" if torn else b"") + line + b"\n")
            os.fsync(fd)
        end = os.fstat(fd).st_size
        _LIBC.fallocate(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(end), ctypes.c_int64(reserve_bytes))
    finally:
        os.close(fd)
    if new:
        sync_folder(path.parent)


def replaced_file(path: Path, content: bytes, *, durable: bool = True) -> int:
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)  # it may be another user's, with other rights
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, content)
        if durable:
            os.fsync(fd)
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        os.close(fd)
        temporary.unlink(missing_ok=True)
        raise
    return fd


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable (fsync(2)): a new file's, a renamed one's, a removed one's."""
    with _opened(folder) as fd:
        os.fsync(fd)


def lock_range(fd: int, start: int, length: int = 1, *, wait: bool) -> None:
    """Take the write lock of a range of bytes (F_OFD_SETLK, fcntl(2)); EAGAIN or EACCES when another has it.

    The kernel frees it when the open file description is closed, however its processes end.
    """
    _ask(fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, fcntl.F_WRLCK, start, length)


def unlock_range(fd: int, start: int, length: int = 1) -> None:
    _ask(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, start, length)


def is_range_locked(fd: int, start: int, length: int = 1) -> bool:
    answer = _ask(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, start, length)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _ask(fd: int, command: int, kind: int, start: int, length: int) -> bytes:
    asked = _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
    if command != fcntl.F_OFD_SETLK:
        return fcntl.fcntl(fd, command, asked)
    # It never waits, so the interpreter's lock is kept: to give it up and get it back would cost far more.
    if _LIBC_AT_ONCE.fcntl(fd, command, asked) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return asked


def pending_events(fd: int, wanted: int) -> int:
    """Which of the `wanted` events (poll(2)), or of those always reported, a descriptor has now."""
    asked = ctypes.create_string_buffer(_POLL.pack(fd, wanted, 0), _POLL.size)
    _LIBC_AT_ONCE.poll(asked, 1, 0)
    return int(_POLL.unpack(asked)[2])


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Start writing these bytes to the disk (sync_file_range(2)), without waiting: a hint to the kernel."""
    span = ctypes.c_int64(offset), ctypes.c_int64(length)
    _LIBC.sync_file_range(ctypes.c_int(fd), *span, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def sync_file_system(folder: Path) -> None:
    """Write all that changed on a folder's file system to the disk (syncfs(2)). Blocks; OSError."""
    with _opened(folder) as fd:
        if _LIBC.syncfs(ctypes.c_int(fd)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


# --- files that settings and flags name: a FileError says in words what is wrong with one


def read_file(path: Path, most_bytes: int) -> bytes:
    """The file, or its first `most_bytes`. FileError unless it is a regular file that can be read."""
    try:
        return read_regular(path, most_bytes)
    except OSError as error:
        raise FileError(f"{str(path)!r} can't be read: {error.strerror or error}") from error


def trust(path: Path) -> ssl.SSLContext:
    """A client's context that trusts the certificates in this file alone. FileError when it holds none."""
    right = "it must hold certificates, in PEM"
    try:
        text = read_file(path, PEM_BYTES)
    except FileError as error:
        raise FileError(f"{error}: {right}") from error
    with contextlib.suppress(ssl.SSLError, OSError, ValueError):
        context = ssl.create_default_context(cafile=path)
        if context.cert_store_stats()["x509"]:
            return context
    raise FileError(f"{str(path)!r} {_lacking(text)}: {right}")


def _lacking(text: bytes) -> str:
    if not text.strip():
        return "is empty"
    if b"-----BEGIN CERTIFICATE-----" in text or b"-----BEGIN TRUSTED CERTIFICATE-----" in text:
        return "holds a damaged certificate"
    if text.startswith(_DER_BEGIN):
        return "is no PEM but perhaps a certificate in DER (openssl x509 -inform der turns it into PEM)"
    return "holds a key but no certificate" if b"PRIVATE KEY-----" in text else "holds no certificate"
