"""Admission of client connections: allowed networks, and limits in all and for each address."""

import ipaddress
import mmap
import os
from collections.abc import Callable, Sequence
from functools import lru_cache

import xxhash

from gup import config
from gup.metrics import Counters

_CELLS = 1 << 16
_COLUMN_WORDS = 2 * _CELLS


class Admission:
    """Admits or refuses a connection at accept, and counts open ones.

    Limits are per machine; `total` sums over its workers, `most_here` is limited by this process's
    descriptors. A connection is counted before it is compared: workers that accept at the same moment may
    both refuse where one had room, but never both admit.
    """

    def __init__(
        self,
        settings: config.Settings,
        counters: Counters,
        addresses: "AddressCounts",
        total: Callable[[], int],
        *,
        most_here: int,
    ) -> None:
        self._counters, self._open = counters, counters.position("gup_client_connections")
        self._addresses, self._total, self._most_here = addresses, total, most_here
        self.apply(settings)

    def apply(self, settings: config.Settings) -> None:
        self.is_allowed = lru_cache(20_000)(allowed_networks(settings.clients.allow))
        """Whether an address is in `clients.allow`."""
        self._most = settings.listen.max_connections
        self._most_of_address = settings.clients.max_connections_per_address

    def admit(self, address: str, make_room: Callable[[], bool]) -> bool:
        """Count a connection, or its refusal. `make_room` closes an idle connection, False when there is
        none.
        """
        if not self.is_allowed(address):
            return self._refuse("network")
        if self._addresses.add(address) > self._most_of_address > 0:
            self._addresses.remove(address)
            return self._refuse("address")
        words = self._counters.words
        words[self._open] += 1
        if (words[self._open] > self._most_here or self._total() > self._most) and not make_room():
            self.leave(address)
            return self._refuse("limit")
        return True

    def _refuse(self, reason: str) -> bool:
        self._counters.add("gup_connections_refused_total", reason=reason)
        return False

    def leave(self, address: str) -> None:
        self._counters.words[self._open] -= 1
        self._addresses.remove(address)


def allowed_networks(texts: Sequence[str]) -> Callable[[str], bool]:
    networks = [ipaddress.ip_network(text) for text in texts]

    def contains(address: str) -> bool:
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return any(ip in network for network in networks if network.version == ip.version)

    return contains


class AddressCounts:
    """Open connections by address on the whole machine.

    Every worker counts in a column of its own in a shared file: no locks are needed, and a killed worker's
    counts go when its successor clears the column. A column is a count-min sketch: two rows of counts in
    which an address has one cell each. It is never too low, and too high only for an address that shares both
    cells with others. This worker's own connections are counted exactly.
    """

    def __init__(self, fd: int, column: int) -> None:
        """`fd` is of the file that `address_file` made; `column` is this worker's."""
        self._own: dict[str, int] = {}
        self._file = mmap.mmap(fd, 0)
        words = memoryview(self._file).cast("I")
        self._others = [words[at : at + _COLUMN_WORDS] for at in range(0, len(words), _COLUMN_WORDS)]
        self._column = self._others.pop(column)
        self._column[:] = memoryview(bytes(4 * _COLUMN_WORDS)).cast("I")

    def add(self, address: str) -> int:
        """Count one more connection of the address; returns its connections now."""
        mine = self._own[address] = self._own.get(address, 0) + 1
        first, second = _cells(address)
        self._column[first] += 1
        self._column[second] += 1
        return mine + sum(min(other[first], other[second]) for other in self._others)

    def remove(self, address: str) -> None:
        self._own[address] -= 1
        if not self._own[address]:
            del self._own[address]
        for cell in _cells(address):
            self._column[cell] -= 1

    def close(self) -> None:
        for view in (self._column, *self._others):
            view.release()
        self._file.close()


def _cells(address: str) -> tuple[int, int]:
    hashed = xxhash.xxh3_64_intdigest(address.encode())
    return hashed % _CELLS, _CELLS + (hashed >> 32) % _CELLS


def address_file(columns: int) -> int:
    """A shared file with a column for each worker, in memory: it goes with the service."""
    fd = os.memfd_create("gup-addresses", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * _COLUMN_WORDS * columns)
    return fd
