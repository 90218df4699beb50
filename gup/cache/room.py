"""One fill's room on the disk: what it was promised, and a new try when the disk is full; writes nothing."""

import errno
from collections.abc import Awaitable, Callable
from typing import TypeVar

from gup.cache.disk import DiskError
from gup.cache.record import MAX_BODY_BYTES
from gup.cache.space import Space
from gup.errors import GupError, is_exhausted

STEP_BYTES = 16 << 20
"""Room is promised in steps of this size while a body's length is unknown."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_Result = TypeVar("_Result")


class Unstorable(GupError):  # noqa: N818 - an outcome, not our error
    """The body can't be kept: it is too large, or no room could be made.

    `disk`: for want of room on the disk, which others fill too, not because of cache.max_size. `too_large`:
    it never can be.
    """

    def __init__(self, detail: str, *, disk: bool = False, too_large: bool = False) -> None:
        super().__init__(detail)
        self.disk = disk
        self.too_large = too_large


def refusal(error: DiskError | Unstorable) -> str:
    """What to tell of a disk that refused. Raises what is no refusal: descriptors or memory ran out."""
    if isinstance(error, DiskError):
        if is_exhausted(error):
            raise error
        return f"the cache directory refuses: {error.strerror or error}"
    return str(error)


class Room:
    """What one fill was promised. `promised` changes here alone."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._promised = 0

    async def reserve(self, amount: int) -> None:
        """Have room for so many bytes more; Unstorable when there is none."""
        wanted = self._promised + amount
        if wanted > MAX_BODY_BYTES:
            raise Unstorable(
                f"it takes more than a record can describe ({MAX_BODY_BYTES} bytes)", too_large=True
            )
        if self._space.too_large(wanted):
            raise Unstorable(f"it takes more than cache.max_size ({wanted} bytes)", too_large=True)
        if not await self._space.reserve(amount):
            if self._space.short_on_disk(amount) > 0:
                raise Unstorable("no room could be made: it would leave less than cache.min_free", disk=True)
            raise Unstorable("no room could be made below cache.max_size")
        self._promised = wanted

    async def keep(self, received: int) -> None:
        """Have room for a body of which so much is here; for one of unknown length it grows by steps."""
        while received > self._promised:
            await self.reserve(STEP_BYTES)

    def release(self, *, committed: bool) -> None:
        """Give the promise back."""
        if self._promised:
            self._space.release(self._promised, committed=committed)
            self._promised = 0

    async def twice(self, work: Callable[[], Awaitable[_Result]]) -> _Result:
        """Do `work`; when the disk is full, evict and do it once more. It must be fit to be repeated."""
        try:
            return await work()
        except DiskError as error:
            if error.errno not in _FULL or not await self._space.make_room():
                raise
        return await work()
