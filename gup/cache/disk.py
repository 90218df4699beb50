"""What the cache directory's disk refuses is told apart here, where it is refused, from every other error."""

import asyncio
import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from gup.errors import GupError

_Result = TypeVar("_Result")
_SYNC_FILE_RANGE_WRITE = 2
_LIBC = ctypes.CDLL(None, use_errno=True)


class DiskError(GupError, OSError):
    """The disk of the cache directory refused. Any other OSError came from elsewhere: a socket, a lock, a
    file that a setting names.
    """


@contextmanager
def told_apart() -> Iterator[None]:
    """Around work on files of the cache directory: an OSError in it is a DiskError, the errno kept."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(error.errno, error.strerror or str(error), error.filename) from error


async def on_disk(executor: Executor, work: Callable[..., _Result], *arguments: object) -> _Result:
    """`work` on files of the cache directory, in a thread. DiskError when the disk refuses."""

    def apart() -> _Result:
        with told_apart():
            return work(*arguments)

    return await asyncio.get_running_loop().run_in_executor(executor, apart)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to write these bytes of a file to the disk (sync_file_range(2)); a mere hint."""
    span = ctypes.c_int64(offset), ctypes.c_int64(length)
    _LIBC.sync_file_range(ctypes.c_int(fd), *span, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def sync_file_system(folder: Path) -> None:
    """Write all that changed on a folder's file system to the disk (syncfs(2)). Blocks; OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _LIBC.syncfs(ctypes.c_int(fd)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(fd)
