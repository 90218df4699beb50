"""The interface of a body as a connection reads it."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from gup.cache.records import Head

CUT = -1
"""Returned by `available` when the rest will never come: the connection is to be cut."""

Callback = Callable[[], None]


class Body(Protocol):
    """A body, complete or growing. Offsets and lengths are in bytes."""

    @property
    def head(self) -> Head: ...

    @property
    def source(self) -> str:
        """Label `source` of gup_client_sent_bytes_total."""

    @property
    def fd(self) -> int:
        """Descriptor to send from; -1 when the bytes are available from `view` only."""

    def available(self, offset: int, want: int) -> int:
        """How many bytes from `offset` on can be sent now without blocking; 0: wait; CUT: never."""

    def view(self, offset: int, length: int) -> memoryview: ...

    def wait(self, offset: int, callback: Callback) -> None:
        """Call back once when `available` may return something else for `offset`."""

    def forget(self, callback: Callback) -> None:
        """Cancel a `wait`."""

    def end(self) -> int | None:
        """The length, once it is certain."""

    def leave(self) -> None:
        """A reader is done. Each calls it once."""

    def unreadable(self) -> None:
        """Reading the body raised an error of the disk: this reader is being cut."""


async def read_whole(body: Body, most: int) -> bytes:
    """The first `most` bytes, fewer if the body breaks off; for use in this process."""
    got = bytearray()
    while len(got) < min(most, body.end() or most):
        amount = body.available(len(got), most - len(got))
        if amount > 0:
            got += body.view(len(got), amount)
            continue
        if amount == CUT:
            break
        woken = asyncio.Event()
        body.wait(len(got), woken.set)
        await woken.wait()
    return bytes(got)
