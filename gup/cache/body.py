"""Bodies as a connection reads them, of whatever kind, and how a request came to one."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from gup.cache.records import Head

CUT = -1
"""What `available` answers when the rest will never come: the connection is to be cut."""

Callback = Callable[[], None]


class Body(Protocol):
    """What a connection needs of a body. Offsets and lengths in bytes."""

    @property
    def head(self) -> Head:
        """What is told of it."""

    @property
    def source(self) -> str:
        """Under which name its bytes are counted."""

    @property
    def fd(self) -> int:
        """Descriptor to send from, -1 when the bytes are to be had from `view` only."""

    def available(self, offset: int, want: int) -> int:
        """How many bytes from `offset` can be sent now without blocking; 0: wait; CUT: never."""

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes themselves, for bodies without a descriptor."""

    def wait(self, offset: int, callback: Callback) -> None:
        """Call back once when asking for `offset` again is worth it."""

    def forget(self, callback: Callback) -> None:
        """Take a `wait` back."""

    def end(self) -> int | None:
        """The body's length as soon as it is sure."""

    def leave(self) -> None:
        """A reader is gone. Called once by each."""

    def unreadable(self) -> None:
        """Sending from `fd`, or `view`, raised an error of the disk: this reader is being cut."""


async def read_whole(body: Body, most: int) -> bytes:
    """The first `most` bytes of a body, for use in this process; what can't be had is left out."""
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
