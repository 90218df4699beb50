"""Sums over stored bytes: a body's chunks, and JSON files that know their own sum; opens no file itself."""

import json
from collections.abc import Iterable
from typing import Any

import xxhash

CHUNK_BYTES = 1 << 20
"""Bodies are summed in pieces of this size; the last piece is what is left."""


class ChunkSums:
    """Sums a body as it is written, piece after piece (xxh3-64 of each chunk)."""

    def __init__(self, done: list[int] | None = None) -> None:
        self.done: list[int] = done or []
        self._open = xxhash.xxh3_64()
        self._open_bytes = 0

    def add(self, piece: bytes | memoryview) -> list[int]:
        """Sum `piece`; the sums of the chunks that it completed."""
        rest = memoryview(piece)
        completed: list[int] = []
        while rest:
            part = rest[: CHUNK_BYTES - self._open_bytes]
            self._open.update(part)
            self._open_bytes += len(part)
            rest = rest[len(part) :]
            if self._open_bytes == CHUNK_BYTES:
                completed.append(self._close())
        return completed

    def so_far(self) -> tuple[int, ...]:
        """The sums of all that was added; the last may be that of a chunk that is not whole yet."""
        return (*self.done, self._open.intdigest()) if self._open_bytes else tuple(self.done)

    def foretold(self, pieces: Iterable[bytes | memoryview]) -> list[int]:
        """The sums that adding `pieces`, the body's last, would bring about; nothing is added."""
        other = ChunkSums()
        other._open, other._open_bytes = self._open.copy(), self._open_bytes
        for piece in pieces:
            other.add(piece)
        return list(other.finish())

    def finish(self) -> tuple[int, ...]:
        """All sums of the body, a last short chunk included."""
        if self._open_bytes:
            self._close()
        return tuple(self.done)

    def _close(self) -> int:
        value = self._open.intdigest()
        self.done.append(value)
        self._open = xxhash.xxh3_64()
        self._open_bytes = 0
        return value


def chunk_sum(piece: bytes | memoryview) -> int:
    """The sum of one whole chunk."""
    return xxhash.xxh3_64_intdigest(piece)


def pack_sums(sums: tuple[int, ...] | list[int]) -> str:
    """Sums as text: 16 hexadecimal digits each, joined."""
    return "".join(f"{value:016x}" for value in sums)


def unpack_sums(text: str) -> tuple[int, ...]:
    """What `pack_sums` packed; ValueError when it is not such a text."""
    if len(text) % 16:
        raise ValueError("chunk sums are 16 hexadecimal digits each")
    return tuple(int(text[at : at + 16], 16) for at in range(0, len(text), 16))


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def seal(fields: dict[str, Any]) -> bytes:
    """`fields` as JSON with a `checksum` member over the rest."""
    checksum = xxhash.xxh3_64_hexdigest(_canonical(fields))
    return json.dumps({**fields, "checksum": checksum}, ensure_ascii=False, indent=1).encode() + b"\n"


def unseal(text: bytes) -> dict[str, Any]:
    """The fields of a JSON text made by `seal`; ValueError when a bit of it is wrong."""
    fields = json.loads(text)  # a JSONDecodeError and a UnicodeDecodeError are ValueErrors
    if not isinstance(fields, dict):
        raise ValueError("not a sealed object")  # noqa: TRY004 - callers expect one kind of error
    checksum = fields.pop("checksum", None)
    if checksum != xxhash.xxh3_64_hexdigest(_canonical(fields)):
        raise ValueError("the checksum is wrong")
    return fields
