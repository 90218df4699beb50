"""What workers tell the controller, as datagrams of JSON: their forms, and reading them. Decides nothing.

Events may be lost (a full queue) or doubled; nothing here may be relied on that reconciling can't heal.
"""

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gup.addresses import is_name
from gup.content.catalog import normal_moniker
from gup.content.key import ContentKey, Kind
from gup.errors import PROBLEMS, quoted

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
    """Which clients (addresses, or hashes of them) asked how often for which full: client, key, times."""

    rows: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True, slots=True)
class ClientsSeen:
    """Clients that asked for something: addresses, or hashes of them."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Take:
    """A client was sent a body, with what the client states of itself.

    `part` is where what was sent begins and ends, and the body's length; None: all of it. With `asked`
    nothing of it was sent.
    """

    client: str
    key: ContentKey
    version: str
    language: str
    part: tuple[int, int, int] | None = None
    asked: bool = False


@dataclass(frozen=True, slots=True)
class Taken:
    """What one worker's clients took and asked for. `at` is Unix seconds."""

    takes: tuple[Take, ...]
    at: float


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
    disk: bool = True
    """Whether it is the disk that refuses, not a limit of the settings."""


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
    | Taken
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


_key = lru_cache(maxsize=4096)(ContentKey.parse)


def _amount(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"not an amount: {value!r:.40}")
    return value


def _time(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1e11:
        raise ValueError(f"not a time: {value!r:.40}")
    return float(value)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not is_name(value):
        raise ValueError(f"not a client: {value!r:.60}")
    return value


def _committed(fields: Mapping[str, Any]) -> Committed:
    length = _amount(fields["length"])
    return Committed(
        ContentKey.parse(fields["key"]), length, Kind(fields["kind"]), bool(fields.get("replaced"))
    )


def _used(fields: Mapping[str, Any]) -> Used:
    return Used(tuple(_use(*use) for use in fields["uses"]), _time(fields["at"]))


def _use(key: Any, count: Any, sent_bytes: Any = 0) -> Use:
    return Use(ContentKey.parse(key).text, _amount(count), _amount(sent_bytes))


def _asked(fields: Mapping[str, Any]) -> Asked:
    return Asked(tuple(_use(*use) for use in fields["uses"]))


def _begun(fields: Mapping[str, Any]) -> Begun:
    return Begun(ContentKey.parse(fields["key"]), str(fields["path"])[:2000])


def _fulls(fields: Mapping[str, Any]) -> FullsTaken:
    return FullsTaken(tuple(_full(*row) for row in fields["rows"]))


def _full(client: Any, key: Any, times: Any) -> tuple[str, str, int]:
    return _name(client), ContentKey.parse(key).text, _amount(times)


def _clients(fields: Mapping[str, Any]) -> ClientsSeen:
    return ClientsSeen(tuple(_name(address) for address in fields["addresses"]))


def _taken(fields: Mapping[str, Any]) -> Taken:
    return Taken(tuple(_take(*row) for row in fields["rows"]), _time(fields["at"]))


def _take(client: Any, key: Any, version: Any, language: Any, what: Any) -> Take:
    part = None
    if isinstance(what, list):
        start, stop, length = (_amount(number) for number in what)
        if not start < stop <= length:
            raise ValueError(f"not a part of a body: {what!r:.60}")
        part = (start, stop, length)
    elif what not in (0, 1):
        raise ValueError(f"neither taken nor asked for: {what!r:.40}")
    texts = str(version)[:64], str(language)[:64]
    return Take(_name(client), _key(key), *texts, part, asked=what == 0)


def _need(fields: Mapping[str, Any]) -> Need:
    return Need(_amount(fields["bytes"]), fields.get("refused") is True)


def _unstorable(fields: Mapping[str, Any]) -> Unstorable:
    key, disk = ContentKey.parse(fields["key"]), fields.get("disk") is not False
    return Unstorable(key.text, quoted(str(fields["detail"])), disk)


def _failed(fields: Mapping[str, Any]) -> Failed:
    problem = fields["problem"]
    if problem not in PROBLEMS:
        raise ValueError(f"an unknown problem: {problem!r:.40}")
    return Failed(ContentKey.parse(fields["key"]).text, problem, quoted(str(fields.get("detail", ""))))


def _upstream(fields: Mapping[str, Any]) -> UpstreamTrouble:
    return UpstreamTrouble(str(fields["name"])[:64], quoted(str(fields.get("detail", ""))))


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
    "taken": _taken,
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
