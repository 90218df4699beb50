"""The claim of one entry: whoever changes an entry on disk holds it, from before the change to its end."""

import asyncio
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from gup.cache.claim import Claims
from gup.content.key import ContentKey
from gup.errors import GupError

PATIENCE_SECONDS = 5.0
"""How long an operator's command waits for a fill of the same key."""
_POLL_SECONDS = 0.01
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


class BusyError(GupError):
    """The entry can't be changed now: another process fills, revalidates or mends it."""

    def __init__(self, key: ContentKey) -> None:
        super().__init__(
            f"{key.text} is being fetched or checked at this moment, so nothing was changed: "
            "try again when that has ended"
        )


async def change(
    claims: Claims,
    key: ContentKey,
    work: Callable[[], _Result],
    *,
    patience_seconds: float = PATIENCE_SECONDS,
) -> _Result:
    """Run `work` in a thread, holding the key's claim.

    BusyError when somebody else holds it for longer than `patience_seconds`.
    """
    give_up_at = time.monotonic() + patience_seconds
    while not claims.try_claim(key.claim_offset):
        if time.monotonic() >= give_up_at:
            raise BusyError(key)
        await asyncio.sleep(_POLL_SECONDS)
    try:
        return await to_its_end(work)
    finally:
        claims.release(key.claim_offset)


async def to_its_end(
    work: Callable[_Given, _Result], *arguments: _Given.args, **named: _Given.kwargs
) -> _Result:
    """Run `work` in a thread; whoever is cancelled meanwhile stays until it has ended.

    A thread can't be stopped: a claim that is released at the cancellation would be released too early.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments, **named))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise
