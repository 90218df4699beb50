"""What workers tell the controller, as datagrams of JSON: their forms, and reading them. Decides nothing.

Events may be lost (a full queue) or doubled; nothing here may be relied on that reconciling can't heal.
"""

import ipaddress
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gup.content.catalog import normal_moniker
from gup.content.key import ContentKey, Kind
from gup.errors import PROBLEMS

MAX_DATAGRAM_BYTES = 256 * 1024
_BATCH = 256


@dataclass(frozen=True, slots=True)
class Committed:
    """A body is in the store. `replaced` says that there was an older generation."""

    key: ContentKey
    length_bytes: int
    kind: Kind
    replaced: bool


@dataclass(frozen=True, slots=True)
class Use:
    """How often a key was asked for since the last event, and the body bytes sent, 0 when not told."""

    key: str
    count: int
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class Used:
    """What one worker served, once a second. `at` is Unix seconds."""

    uses: tuple[Use, ...]
    at: float


@dataclass(frozen=True, slots=True)
class Asked:
    """What one worker was asked for and did not have whole, once a second: bodies that are still arriving."""

    uses: tuple[Use, ...]


@dataclass(frozen=True, slots=True)
class Begun:
    """What a client asked for has begun to arrive; `path` is as upstream was asked for it."""

    key: ContentKey
    path: str


@dataclass(frozen=True, slots=True)
class FullsTaken:
    """Which addresses asked how often for which full: address, key, times."""

    rows: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True, slots=True)
class ClientsSeen:
    """Addresses of clients that asked for content."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Need:
    """A worker wants room now."""

    size_bytes: int
    refused: bool = False
    """Whether the disk refused a write: then something has to go whatever the figures say."""


@dataclass(frozen=True, slots=True)
class Unstorable:
    """A body was not stored: too large, or the disk refuses."""

    key: str
    detail: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A fill failed."""

    key: str
    problem: str
    detail: str


@dataclass(frozen=True, slots=True)
class UpstreamTrouble:
    """A request or a check of an upstream went wrong."""

    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class Unlisted:
    """A client asked for a moniker that no catalogue lists."""

    moniker: str


Event = (
    Committed
    | Used
    | Asked
    | Begun
    | FullsTaken
    | ClientsSeen
    | Need
    | Unstorable
    | Failed
    | UpstreamTrouble
    | Unlisted
)


def parse_event(datagram: bytes) -> Event:
    """The event in a datagram; ValueError when it is none."""
    try:
        fields = json.loads(datagram)
        read = _READERS.get(fields["type"])
        if read is None:
            raise ValueError(f"an unknown type of event: {fields['type']!r:.40}")
        return read(fields)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not an event: {error!r:.200}") from error


def _amount(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"not an amount: {value!r:.40}")
    return value


def _committed(fields: Mapping[str, Any]) -> Committed:
    length = _amount(fields["length"])
    return Committed(
        ContentKey.parse(fields["key"]), length, Kind(fields["kind"]), bool(fields.get("replaced"))
    )


def _used(fields: Mapping[str, Any]) -> Used:
    at = fields["at"]
    if not isinstance(at, int | float) or not 0 <= at < 1e11:
        raise ValueError(f"not a time: {at!r:.40}")
    return Used(tuple(_use(*use) for use in fields["uses"]), float(at))


def _use(key: Any, count: Any, sent_bytes: Any = 0) -> Use:
    return Use(ContentKey.parse(key).text, _amount(count), _amount(sent_bytes))


def _asked(fields: Mapping[str, Any]) -> Asked:
    return Asked(tuple(_use(*use) for use in fields["uses"]))


def _begun(fields: Mapping[str, Any]) -> Begun:
    return Begun(ContentKey.parse(fields["key"]), str(fields["path"])[:2000])


def _fulls(fields: Mapping[str, Any]) -> FullsTaken:
    return FullsTaken(tuple(_taken(*row) for row in fields["rows"]))


def _taken(address: Any, key: Any, times: Any) -> tuple[str, str, int]:
    return str(ipaddress.ip_address(address)), ContentKey.parse(key).text, _amount(times)


def _clients(fields: Mapping[str, Any]) -> ClientsSeen:
    return ClientsSeen(tuple(str(ipaddress.ip_address(address)) for address in fields["addresses"]))


def _need(fields: Mapping[str, Any]) -> Need:
    return Need(_amount(fields["bytes"]), fields.get("refused") is True)


def _unstorable(fields: Mapping[str, Any]) -> Unstorable:
    return Unstorable(ContentKey.parse(fields["key"]).text, str(fields["detail"])[:500])


def _failed(fields: Mapping[str, Any]) -> Failed:
    problem = fields["problem"]
    if problem not in PROBLEMS:
        raise ValueError(f"an unknown problem: {problem!r:.40}")
    return Failed(ContentKey.parse(fields["key"]).text, problem, str(fields.get("detail", ""))[:500])


def _upstream(fields: Mapping[str, Any]) -> UpstreamTrouble:
    return UpstreamTrouble(str(fields["name"])[:64], str(fields.get("detail", ""))[:500])


def _unlisted(fields: Mapping[str, Any]) -> Unlisted:
    moniker = normal_moniker(str(fields["moniker"])[:64])
    if moniker is None:
        raise ValueError(f"not a moniker: {fields['moniker']!r:.80}")
    return Unlisted(moniker)


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Event]] = {
    "committed": _committed,
    "used": _used,
    "asked": _asked,
    "begun": _begun,
    "fulls": _fulls,
    "clients": _clients,
    "need": _need,
    "unstorable": _unstorable,
    "failed": _failed,
    "upstream": _upstream,
    "unlisted": _unlisted,
}


def receive(source: socket.socket) -> Iterator[bytes]:
    """The datagrams that are waiting, at most 256 at once so that the loop gets its turn."""
    for _ in range(_BATCH):
        try:
            datagram = source.recv(MAX_DATAGRAM_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        yield datagram
