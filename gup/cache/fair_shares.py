"""What each client has of what all clients share, counted over all workers; and what counts as one client.

Every worker counts in columns of its own in a shared file: no locks are needed, and what a killed worker
counted is gone when its successor clears its columns. A column is a count-min sketch: two rows of counts in
which a client has one cell each. A count is never too low, and too high only for a client that shares both
cells with others.
"""

import ipaddress
import mmap
import os
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import lru_cache

import xxhash

_CELLS = 1 << 15
_COLUMN_WORDS = 2 * _CELLS
_COLUMN_BYTES = 4 * _COLUMN_WORDS
_COUNT_BITS = 20
_COUNT_MASK = (1 << _COUNT_BITS) - 1
"""Of a cell that counts what comes in a second: its count in the lower bits, the second above."""


class Shared(IntEnum):
    """What is counted by client."""

    CONNECTIONS = 0
    DOWNLOADS = 1
    FILLS = 2
    MISSES = 3


class ClientCounts:
    """How much each client has of one thing. This process's own part is exact."""

    def __init__(self, column: "memoryview[int]", others: "Sequence[memoryview[int]]") -> None:
        """`column` is cleared, and written by this process alone."""
        self._own: dict[str, int] = {}
        self._column = column
        self._others = others

    @classmethod
    def alone(cls) -> "ClientCounts":
        """For a single process."""
        return cls(memoryview(bytearray(_COLUMN_BYTES)).cast("I"), ())

    def own(self, client: str) -> int:
        """How much it has in this process."""
        return self._own.get(client, 0)

    def of(self, client: str) -> int:
        """How much it has now."""
        first, second = _cells(client)
        return self.own(client) + sum(min(other[first], other[second]) for other in self._others)

    def add(self, client: str) -> int:
        """Count one more; returns how much it has then."""
        self._own[client] = self._own.get(client, 0) + 1
        for cell in _cells(client):
            self._column[cell] += 1
        return self.of(client)

    def remove(self, client: str) -> None:
        self._own[client] -= 1
        if not self._own[client]:
            del self._own[client]
        for cell in _cells(client):
            self._column[cell] -= 1

    # --- a rate

    def add_within(self, client: str, second: int) -> int:
        """Count one more that comes in this second; returns how many came in it. Never mix it with `add`."""
        cells, stamp = _cells(client), (second & 0xFFF) << _COUNT_BITS
        for cell in cells:
            count = self._column[cell] & _COUNT_MASK if self._column[cell] & ~_COUNT_MASK == stamp else 0
            self._column[cell] = stamp | min(count + 1, _COUNT_MASK)
        columns = (self._column, *self._others)
        return sum(
            min(column[at] & _COUNT_MASK if column[at] & ~_COUNT_MASK == stamp else 0 for at in cells)
            for column in columns
        )


class FairShares:
    """The shared file, mapped by the worker that has the column of this number."""

    def __init__(self, fd: int, number: int, used: int | None = None) -> None:
        """`fd` is of the file that `shares_file` made; only its first `used` columns are looked at."""
        self._file = mmap.mmap(fd, 0)
        self._words = memoryview(self._file).cast("I")
        per_kind = len(self._words) // len(Shared)
        self._views: list[memoryview[int]] = []
        self.counts: list[ClientCounts] = []
        for kind in Shared:
            starts = range(kind * per_kind, (kind + 1) * per_kind, _COLUMN_WORDS)[:used]
            columns = [self._words[at : at + _COLUMN_WORDS] for at in starts]
            self._views += columns
            own = columns.pop(number)
            own[:] = memoryview(bytes(_COLUMN_BYTES)).cast("I")
            self.counts.append(ClientCounts(own, columns))

    def close(self) -> None:
        for view in (*self._views, self._words):
            view.release()
        self._file.close()


def _cells(client: str) -> tuple[int, int]:
    hashed = xxhash.xxh3_64_intdigest(client.encode())
    return hashed % _CELLS, _CELLS + (hashed >> 32) % _CELLS


def shares_file(columns: int) -> int:
    """A descriptor of the shared file for that many workers; it is memory of this run alone.

    A column takes memory when it is first used.
    """
    fd = os.memfd_create("gup-shares", os.MFD_CLOEXEC)
    os.ftruncate(fd, _COLUMN_BYTES * columns * len(Shared))
    return fd


def clear_column(fd: int, number: int) -> None:
    """The worker that had this column has exited, perhaps by a signal, and has no successor."""
    per_kind = os.fstat(fd).st_size // len(Shared)
    for kind in Shared:
        os.pwrite(fd, bytes(_COLUMN_BYTES), kind * per_kind + number * _COLUMN_BYTES)


# --- who is one client


def networks_of(texts: Sequence[str]) -> Callable[[str], bool]:
    """Whether an address is in one of these networks."""
    networks = [ipaddress.ip_network(text) for text in texts]

    def contains(address: str) -> bool:
        ip = _ip(address)
        return any(ip in network for network in networks if network.version == ip.version)

    return lru_cache(20_000)(contains)


def _ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    ip = ipaddress.ip_address(address.partition("%")[0])
    return ip.ipv4_mapped or ip if isinstance(ip, ipaddress.IPv6Address) else ip


@lru_cache(20_000)
def client_of(address: str) -> str:
    """The client that an address belongs to: the IPv4 address itself, or the /64 of an IPv6 address."""
    ip = _ip(address)
    if ip.version == 4 or ip.is_link_local:  # all hosts of a link have the same /64 there
        return str(ip)
    return str(ipaddress.ip_network((ip.packed[:8] + bytes(8), 64)))
