"""Who may connect: networks, connections in all and of one address; closes and accepts no socket itself."""

import ipaddress
from collections import OrderedDict
from collections.abc import Callable, Sequence

from gup import config
from gup.server.addresses import Addresses
from gup.server.tally import Tally

_KNOWN_ADDRESSES = 20_000


class Gate:
    """Which addresses may connect (`clients.allow`); remembers what it decided of each."""

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]
        self._known: OrderedDict[str, bool] = OrderedDict()

    def allows(self, address: str) -> bool:
        known = self._known.get(address)
        if known is None:
            known = self._known[address] = self._decide(address)
            if len(self._known) > _KNOWN_ADDRESSES:
                self._known.popitem(last=False)
        return known

    def _decide(self, address: str) -> bool:
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return any(ip in network for network in self._networks if network.version == ip.version)


class Admission:
    """Decides at accept, and counts who is in. Limits are the machine's; `in_all` sums over its workers.

    A connection is counted first and compared then: workers that accept at the same moment may both refuse
    where one had room, but never both admit.
    """

    def __init__(
        self,
        settings: config.Settings,
        tally: Tally,
        addresses: Addresses,
        in_all: Callable[[], int],
        *,
        most_here: int,
    ) -> None:
        """`most_here` is what this process has descriptors for."""
        self._tally = tally
        self._addresses = addresses
        self._in_all = in_all
        self._most_here = most_here
        self.apply(settings)

    def apply(self, settings: config.Settings) -> None:
        """New settings for who connects from now on."""
        self._gate = Gate(settings.clients.allow)
        self._most = settings.listen.max_connections
        self._most_of_address = settings.clients.max_connections_per_address

    def admit(self, address: str, make_room: Callable[[], bool]) -> bool:
        """Count a connection in, or its refusal. `make_room` ends an idle one; False: there is none."""
        tally = self._tally
        words = tally.words
        if not self._gate.allows(address):
            words[tally.refused_network] += 1
            return False
        of_address = self._addresses.come(address)
        if of_address > self._most_of_address > 0:
            words[tally.refused_address] += 1
            self._addresses.gone(address)
            return False
        words[tally.connections] += 1
        if self._too_many() and not make_room():
            words[tally.refused_limit] += 1
            self.left(address)
            return False
        return True

    def _too_many(self) -> bool:
        here = self._tally.words[self._tally.connections]
        return here > self._most_here or self._in_all() > self._most

    def left(self, address: str) -> None:
        """A connection that was counted in is gone."""
        self._tally.words[self._tally.connections] -= 1
        self._addresses.gone(address)
