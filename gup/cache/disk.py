"""What the cache directory's disk refuses is told apart here, where it is refused, from every other error."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import TypeVar

from gup.errors import GupError

_Result = TypeVar("_Result")


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
    return await asyncio.get_running_loop().run_in_executor(executor, told_apart()(work), *arguments)
