"""The latest bytes of a body that can't be stored, in bounded memory; knows no readers, waits for nobody."""

RING_BYTES = 1 << 20
"""The most that is held of one body."""


class Ring:
    """Bytes `start` to `end` of a body. Before `origin`, where the ring begins, its part file has them.

    Only what `drop_before` gave up makes room; nothing that is held is ever overwritten.
    """

    def __init__(self, origin: int, size_bytes: int = RING_BYTES) -> None:
        self.origin = self.start = self.end = origin
        self._buffer = bytearray(size_bytes)

    @property
    def whole(self) -> bool:
        """Whether nothing has been dropped yet."""
        return self.start == self.origin

    @property
    def room(self) -> int:
        """How many bytes can be added."""
        return len(self._buffer) - (self.end - self.start)

    def add(self, piece: bytes | memoryview) -> None:
        """Take the next bytes; there must be room for them."""
        assert len(piece) <= self.room
        at = self.end % len(self._buffer)
        first = min(len(piece), len(self._buffer) - at)
        self._buffer[at : at + first] = piece[:first]
        self._buffer[: len(piece) - first] = piece[first:]
        self.end += len(piece)

    def drop_before(self, offset: int) -> None:
        """Give up what lies before `offset`."""
        assert offset <= self.end
        self.start = max(self.start, offset)

    def view(self, offset: int, length: int) -> memoryview:
        """At most `length` bytes from `offset` on, as many as lie together; good until the next `add`."""
        assert self.start <= offset
        at = offset % len(self._buffer)
        stop = min(at + length, at + self.end - offset, len(self._buffer))
        return memoryview(self._buffer)[at:stop]

    def read(self, offset: int, length: int) -> bytes:
        """A copy of exactly these bytes; ValueError when they are not held (any more)."""
        if offset < self.start or offset + length > self.end:
            raise ValueError(f"bytes {offset} to {offset + length} are not held")
        first = bytes(self.view(offset, length))
        return first + bytes(self.view(offset + len(first), length - len(first))) if length else b""
