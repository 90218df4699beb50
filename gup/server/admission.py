"""Admission of client connections: allowed networks, and limits in all and for each address."""

import ipaddress
import logging
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from gup import config
from gup.metrics import Counters

log = logging.getLogger("gup.admission")

_KNOWN_ADDRESSES = 20_000
_ROWS = 2
_CELLS = 1 << 16
_COLUMN_WORDS = _ROWS * _CELLS
_COLUMN_BYTES = 4 * _COLUMN_WORDS
_MASK = _CELLS - 1


class Admission:
    """Admits or refuses a connection at accept, and counts those that are open.

    Limits are the machine's; `total` sums over its workers. A connection is counted first and compared then:
    workers that accept at the same moment may both refuse where one had room, but never both admit.
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
        """`most_here` is what this process has descriptors for."""
        self._words = counters.words
        self._connections = counters.position("gup_client_connections")
        self._refused = {
            reason: counters.position("gup_connections_refused_total", reason=reason)
            for reason in ("network", "limit", "address")
        }
        self._addresses = addresses
        self._total = total
        self._most_here = most_here
        self.apply(settings)

    def apply(self, settings: config.Settings) -> None:
        """Use new settings for connections that come from now on."""
        self._allowed = AllowedNetworks(settings.clients.allow)
        self._most = settings.listen.max_connections
        self._most_of_address = settings.clients.max_connections_per_address

    def admit(self, address: str, make_room: Callable[[], bool]) -> bool:
        """Count a connection, or its refusal. `make_room` closes an idle connection; False: there is none."""
        words = self._words
        if not self._allowed.contains(address):
            words[self._refused["network"]] += 1
            return False
        if self._addresses.add(address) > self._most_of_address > 0:
            words[self._refused["address"]] += 1
            self._addresses.remove(address)
            return False
        words[self._connections] += 1
        too_many = words[self._connections] > self._most_here or self._total() > self._most
        if too_many and not make_room():
            words[self._refused["limit"]] += 1
            self.leave(address)
            return False
        return True

    def leave(self, address: str) -> None:
        """A connection that was admitted has closed."""
        self._words[self._connections] -= 1
        self._addresses.remove(address)


class AllowedNetworks:
    """The networks of `clients.allow`; remembers the answer for each address."""

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]
        self._known: OrderedDict[str, bool] = OrderedDict()

    def contains(self, address: str) -> bool:
        known = self._known.get(address)
        if known is None:
            known = self._known[address] = self._look_up(address)
            if len(self._known) > _KNOWN_ADDRESSES:
                self._known.popitem(last=False)
        return known

    def _look_up(self, address: str) -> bool:
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return any(ip in network for network in self._networks if network.version == ip.version)


class AddressCounts:
    """Open connections by address on the whole machine.

    Every worker counts in a column of its own in a shared file: no locks are needed, and what a killed worker
    counted is gone when its successor clears the column. A column is a count-min sketch: two rows of counts
    in which an address has one cell each. It is small, bounded and never too low; it is too high only for an
    address that shares both cells with others, which the size makes rare. This worker's own connections are
    counted exactly.
    """

    def __init__(self, path: Path, column: int, columns: int) -> None:
        """`column` of `columns` is this worker's. If the file can't be mapped, each worker counts alone."""
        self._own: dict[str, int] = {}
        self._file = _map(path, columns)
        words = memoryview(self._file).cast("I")
        parts = [
            words[n * _COLUMN_WORDS : (n + 1) * _COLUMN_WORDS] for n in range(len(words) // _COLUMN_WORDS)
        ]
        alone = len(parts) < columns
        self._column = parts.pop(0 if alone else column)
        self._others = parts
        self._column[:] = memoryview(bytes(_COLUMN_BYTES)).cast("I")

    def add(self, address: str) -> int:
        """Count one more connection of the address; returns how many it has now."""
        mine = self._own[address] = self._own.get(address, 0) + 1
        first, second = _cells(address)
        self._column[first] += 1
        self._column[second] += 1
        return mine + sum(min(other[first], other[second]) for other in self._others)

    def remove(self, address: str) -> None:
        """Count one connection less."""
        left = self._own[address] - 1
        if left:
            self._own[address] = left
        else:
            del self._own[address]
        for cell in _cells(address):
            self._column[cell] -= 1

    def close(self) -> None:
        for view in (self._column, *self._others):
            view.release()
        if isinstance(self._file, mmap.mmap):
            self._file.close()


def _cells(address: str) -> tuple[int, int]:
    hashed = xxhash.xxh3_64_intdigest(address.encode())
    return hashed & _MASK, _CELLS + (hashed >> 32 & _MASK)


def _map(path: Path, columns: int) -> "mmap.mmap | bytearray":
    """The shared file, made as long as it has to be; memory for one column if that fails."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # allocate all blocks before mapping: a store into a hole kills the process when the disk is full
            os.posix_fallocate(fd, 0, columns * _COLUMN_BYTES)
            return mmap.mmap(fd, columns * _COLUMN_BYTES)
        finally:
            os.close(fd)
    except OSError as error:
        log.warning("connections per address are counted by each worker alone: %s: %s", path, error.strerror)
        return bytearray(_COLUMN_BYTES)
