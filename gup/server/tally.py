"""What the data plane counts, at the words where it counts it; never formats or sums."""

from collections.abc import Callable, Mapping, Sequence

from gup.metrics import CODES_OF_RESULT, KINDS, MAX_STREAMS, SOURCES, Counters, stream_series

LARGE_BODY_BYTES = 256 * 1024
"""Bodies over this size are downloads, but for index files: they take a slot and are counted in progress."""

_ROWS = 200
"""Of each kind in one event."""
_MOST_TAKERS = 5000
"""Addresses and keys told in a second; there may be more."""


class Tally:
    """Positions of the data plane's words, worked out once: counting is one addition.

    `uses`, `asks`, `fulls` and `clients` gather what the controller is told once a second; `take_news`
    empties them.
    """

    def __init__(self, counters: Counters) -> None:
        self.words = counters.words
        self.counters = counters
        position = counters.position
        self.requests = {
            (result, int(code)): position("gup_requests_total", result=result, code=code)
            for result, codes in CODES_OF_RESULT.items()
            for code in codes
        }
        self.sent = {source: position("gup_client_sent_bytes_total", source=source) for source in SOURCES}
        self.stream = {
            (slot, kind): position(stream_series("sent", slot, kind))
            for slot in range(MAX_STREAMS + 1)
            for kind in KINDS
        }
        self.connections = position("gup_client_connections")
        self.downloads = position("gup_client_downloads_in_progress")
        self.downloads_ended = position("gup_client_downloads_total")
        self.queued = position("gup_client_downloads_queued")
        self.waiters = position("gup_fill_waiters")
        self.refused_network = position("gup_connections_refused_total", reason="network")
        self.refused_limit = position("gup_connections_refused_total", reason="limit")
        self.refused_address = position("gup_connections_refused_total", reason="address")
        self.uses: dict[str, int] = {}
        self.asks: dict[str, int] = {}
        self.fulls: dict[tuple[str, str], int] = {}
        self.clients: set[str] = set()

    def request(self, result: str, status: int) -> None:
        """Count one answered request."""
        at = self.requests.get((result, status))
        assert at is not None, f"no series for result {result} with code {status}"
        self.words[at] += 1

    def asked(self, key_text: str) -> None:
        """As `used`, of a body that is not here whole yet."""
        self.asks[key_text] = self.asks.get(key_text, 0) + 1

    def took_full(self, address: str, key_text: str) -> None:
        """Whose request for a full it was: the controller tells the operator who makes a storm."""
        who = (address, key_text)
        if who in self.fulls or len(self.fulls) < _MOST_TAKERS:
            self.fulls[who] = self.fulls.get(who, 0) + 1

    def used(self, key_text: str) -> None:
        self.uses[key_text] = self.uses.get(key_text, 0) + 1

    def take_news(
        self, tell: Callable[[Mapping[str, object]], object], now: float, name: Callable[[str], str]
    ) -> None:
        """Tell the controller which entries were used and which clients asked since the last time.

        `name` is what a client's address is called.
        """
        uses, self.uses = list(self.uses.items()), {}
        asks, self.asks = list(self.asks.items()), {}
        fulls, self.fulls = [(name(address), key, times) for (address, key), times in self.fulls.items()], {}
        clients, self.clients = list({name(address) for address in self.clients}), set()
        for at in range(0, max(len(uses), len(asks), len(fulls), len(clients)), _ROWS):
            rows: dict[str, Sequence[object]] = {
                "uses": uses,
                "asked": asks,
                "fulls": fulls,
                "clients": clients,
            }
            told = {name: part for name, all_ in rows.items() if (part := all_[at : at + _ROWS])}
            tell({"type": "used", "at": now, **told})
