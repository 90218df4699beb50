"""Admission of client connections: allowed networks, and limits in all and for each address."""

from collections.abc import Callable

from gup import config
from gup.cache.fair_shares import ClientCounts, client_of, networks_of
from gup.metrics import Counters


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
        addresses: ClientCounts,
        total: Callable[[], int],
        *,
        most_here: int,
    ) -> None:
        self._counters, self._open = counters, counters.position("gup_client_connections")
        self._addresses, self._total, self._most_here = addresses, total, most_here
        self.apply(settings)

    def apply(self, settings: config.Settings) -> None:
        self.is_allowed = networks_of(settings.clients.allow)
        """Whether an address is in `clients.allow`."""
        proxies = settings.listen.proxy_protocol
        self.is_proxy = networks_of(proxies) if proxies else None
        """Whether connections from an address begin with a PROXY header; None if none do."""
        self._most = settings.listen.max_connections
        self._most_of_address = settings.clients.max_connections_per_address

    def admit(self, address: str, make_room: Callable[[], bool]) -> bool:
        """Count a connection, or its refusal. `make_room` closes an idle connection, False when there is
        none.
        """
        if not self.is_allowed(address):
            return self.refuse("network")
        if self._addresses.add(client_of(address)) > self._most_of_address > 0:
            self._addresses.remove(client_of(address))
            return self.refuse("address")
        if not self.reserve(make_room):
            self._addresses.remove(client_of(address))
            return False
        return True

    def reserve(self, make_room: Callable[[], bool]) -> bool:
        """Count a connection whose client is not known yet, until `release`; or its refusal."""
        words = self._counters.words
        words[self._open] += 1
        if (words[self._open] > self._most_here or self._total() > self._most) and not make_room():
            self.release()
            return self.refuse("limit")
        return True

    def release(self) -> None:
        self._counters.words[self._open] -= 1

    def count(self, address: str) -> None:
        """Count a connection that another worker has admitted."""
        self._addresses.add(client_of(address))
        self._counters.words[self._open] += 1

    def refuse(self, reason: str) -> bool:
        """Count a refusal."""
        self._counters.add("gup_connections_refused_total", reason=reason)
        return False

    def leave(self, address: str) -> None:
        self.release()
        self._addresses.remove(client_of(address))

    def among(self, client: str) -> float:
        """How many workers' parts a client's rate has, by its connections here and in all."""
        return self._addresses.of(client) / max(1, self._addresses.own(client))
