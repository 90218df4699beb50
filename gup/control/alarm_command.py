"""The alarm command: runs a program for a message, with limits of time and output."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence

from gup.control.webhook import NotAcceptedError
from gup.errors import quoted

_OUTPUT_BYTES = 4096
_LAST_OUTPUT_SECONDS = 1.0
_KEPT = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ")
"""What the program gets of the service's environment, which may hold secrets."""


async def run_command(
    command: Sequence[str], body: bytes, variables: Mapping[str, str], seconds: float
) -> str:
    """Run it with `body` on its standard input; return what it wrote, shortened.

    NotAcceptedError unless it ends with status 0 within `seconds`. What it leaves running in its process
    group is killed; a daemon, which has left the group, goes on.
    """
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    with contextlib.ExitStack() as stack:
        # A file as its input and a pipe of our own: asyncio then waits for its end, not for its pipes.
        given = os.memfd_create("alarm")
        stack.callback(os.close, given)
        os.write(given, body)
        os.lseek(given, 0, os.SEEK_SET)
        ours, its = os.pipe()
        output = _Output()
        loop = asyncio.get_running_loop()
        pipe, _ = await loop.connect_read_pipe(lambda: output, os.fdopen(ours, "rb", 0))
        stack.callback(pipe.close)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=given,
                stdout=its,
                stderr=its,
                env={**kept, **variables},
                start_new_session=True,
            )
        except OSError as error:
            raise NotAcceptedError(f"{command[0]} can't be run: {error.strerror or error}") from error
        finally:
            os.close(its)
        try:
            async with asyncio.timeout(seconds):
                await process.wait()
        except TimeoutError:
            words = f"{command[0]} did not end within {seconds:g} s (alarms.command_timeout) and was killed"
            raise NotAcceptedError(words + output.words()) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        with contextlib.suppress(TimeoutError):  # a child in a group of its own may hold the pipe
            async with asyncio.timeout(_LAST_OUTPUT_SECONDS):
                await output.ended.wait()
    if process.returncode:
        why = f"status {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
        raise NotAcceptedError(f"{command[0]} ended with {why}{output.words()}")
    return quoted(output.text.strip())


class _Output(asyncio.Protocol):
    """The beginning of what a program writes; the rest is read and forgotten."""

    def __init__(self) -> None:
        self.text = b""
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.text += data[: _OUTPUT_BYTES - len(self.text)]

    def connection_lost(self, _error: Exception | None) -> None:
        self.ended.set()

    def words(self) -> str:
        return f": {quoted(text)}" if (text := self.text.strip()) else ""
