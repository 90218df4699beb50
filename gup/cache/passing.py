"""A body that goes on without the disk: into a ring, at the pace of its readers; fetches nothing."""

import asyncio
from collections.abc import Callable

from gup.cache.disk import DiskError
from gup.cache.growing import GrowingBody, Reader
from gup.cache.part import WITHHELD_BYTES, ZIP_TAIL_BYTES, PartWriter
from gup.cache.ring import RING_BYTES, Ring
from gup.errors import GupError
from gup.upstream.download import OVERLAP_BYTES
from gup.upstream.exchange import UpstreamFailure

_KEPT_BYTES = 2 * max(OVERLAP_BYTES, ZIP_TAIL_BYTES)
"""The end of what was received is held even when all readers have it: to compare and to check with."""
_LOOK_SECONDS = 1.0


class NobodyReads(GupError):  # noqa: N818 - an observation, not our error
    """All readers have left, or none began: there is nobody to fetch the rest for."""


class PassingWriter:
    """Takes a body's bytes as `PartWriter` does, and withholds its end as that does.

    The ring drops what the slowest reader has passed, and waits for that reader. But one that others wait
    for, and that takes less than a ring in `patience` seconds, is left behind. Readers that have not begun
    (their turn to download has not come) are waited for only while nobody else reads.
    """

    def __init__(
        self,
        body: GrowingBody,
        earlier: PartWriter | None,
        patience: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        """`earlier` has written the body's beginning. It goes on in this writer's ring."""
        self.received = self.written = earlier.written if earlier is not None else 0
        self._ring = Ring(self.written)
        self._earlier = earlier
        self._body = body
        self._patience = patience
        self._clock = clock
        self._moved = asyncio.Event()
        self._holding: dict[Reader, tuple[float, int]] = {}
        """The readers that are waited for: since when, and where they stood then."""
        self._idle_since: float | None = None
        body.go_on_in(self._ring)
        body.on_move = self._moved.set

    async def add(self, piece: bytes) -> None:
        """Take the next bytes as readers make room for them. NobodyReads when there are none."""
        rest = memoryview(piece)
        while rest:
            room = await self._room()
            self._ring.add(rest[:room])
            self.received += len(rest[:room])
            rest = rest[room:]
            last_sure = (self._body.head.length or self.received) - WITHHELD_BYTES
            self._publish(min(self.received, last_sure))

    async def write_withheld(self) -> None:
        """Publish the end: the whole has been found right."""
        self._publish(self.received)

    async def reread(self, offset: int, length: int) -> bytes:
        """Bytes received before; UpstreamFailure when they are not held any more, so can't be compared."""
        before = min(max(self._ring.origin - offset, 0), length)
        try:
            piece = await self._earlier.reread(offset, before) if self._earlier and before else b""
            return piece + self._ring.read(offset + len(piece), length - len(piece))
        except (ValueError, DiskError) as error:
            detail = f"what upstream sent can't be compared any more: {error}"
            raise UpstreamFailure("error", "upstream-bad-body", detail, again=False) from error

    def _publish(self, size: int) -> None:
        if size > self.written:
            self.written = size
            self._body.publish(size)

    async def _room(self) -> int:
        while True:
            if not self._ring.room:
                self._drop()
            if self._ring.room:
                self._idle_since = None
                return self._ring.room
            if not self._body.readers:
                raise NobodyReads("all who read it have left")
            self._moved.clear()
            self._body.wake()
            if not self._moved.is_set():
                await self._wait()
            self._judge()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                await self._moved.wait()
        except TimeoutError:
            return

    def _reading(self) -> list[Reader]:
        return [reader for reader in self._body.readers if reader.begun and not reader.left_behind]

    def _drop(self) -> None:
        """Give up what all who read have passed."""
        passed = min((reader.position for reader in self._reading()), default=self._ring.start)
        self._ring.drop_before(max(self._ring.start, min(passed, self._ring.end - _KEPT_BYTES)))
        if not self._ring.whole:
            self._body.file = self._earlier = None  # everybody is past it: the disk gets its blocks back

    def _judge(self) -> None:
        """Leave behind who has kept others waiting for too long."""
        now, patience, reading = self._clock(), self._patience(), self._reading()
        if not reading:
            self._idle_since = self._idle_since if self._idle_since is not None else now
            if now - self._idle_since > patience:
                raise NobodyReads("nobody who waits for it has begun to read")
            return
        slowest = min(reader.position for reader in reading)
        holding = [reader for reader in reading if reader.position <= max(slowest, self._ring.start)]
        self._holding = {reader: self._holding.get(reader, (now, reader.position)) for reader in holding}
        for reader, (since, position) in self._holding.items():
            if reader.position - position >= RING_BYTES:
                self._holding[reader] = now, reader.position
            elif now - since > patience and len(reading) > len(holding):
                reader.left_behind = True
