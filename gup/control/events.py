"""What workers tell the controller, as datagrams of JSON: their forms, and reading them. Decides nothing.

Events may be lost (a full queue) or doubled; nothing here may be relied on that reconciling can't heal.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gup.client_names import is_name
from gup.content.catalog import normal_moniker
from gup.content.key import ContentKey, Kind
from gup.content.routes import leads_to
from gup.errors import PROBLEMS, quoted
from gup.jsonmodel import MAX_TIME, InvalidError, Members, parse, plain_text, shown, text, whole

MAX_DATAGRAM_BYTES = 256 * 1024
_MAX_ROWS = 10_000
_MAX_NAME = 200
_MAX_KEY = 5 * 241
_MAX_STATED = 64
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
class Rejected:
    """What an upstream sent can't be the content asked for."""

    key: str
    upstream: str
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
    | Rejected
    | UpstreamTrouble
    | Unlisted
)


def parse_event(datagram: bytes) -> Event:
    """The event in a datagram; InvalidError when it is none."""
    members = Members(parse(datagram, "event", MAX_DATAGRAM_BYTES), "event")
    read = _READERS.get(members.text("type", _MAX_NAME))
    if read is None:
        raise InvalidError(f"event: 'type' is unknown: {shown(members['type'])}")
    return read(members)


_parsed = lru_cache(maxsize=4096)(ContentKey.parse)


def _key(value: object) -> ContentKey:
    return _parsed(text(value, "event: a key", _MAX_KEY))


def _client(value: object) -> str:
    name = text(value, "event: a client", _MAX_NAME)
    if not is_name(name):
        raise InvalidError(f"event: not a client: {shown(name)}")
    return name


def _row(value: object, least: int, most: int) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise InvalidError(f"event: a row must be an array of {least} to {most}, not {shown(value)}")
    return value


def _words(value: object, most: int) -> str:
    """What others said, for people: it may be of any length, and hold anything."""
    if not isinstance(value, str):
        raise InvalidError(f"event: not a text: {shown(value)}")
    return plain_text(value[:most], most)


def _detail(members: Members) -> str:
    return quoted(_words(members["detail"], MAX_DATAGRAM_BYTES)) if "detail" in members else ""


def _committed(members: Members) -> Committed:
    replaced = "replaced" in members and members.flag("replaced")
    return Committed(_key(members["key"]), members.whole("length"), members.one_of("kind", Kind), replaced)


def _uses(members: Members) -> tuple[Use, ...]:
    return tuple(_use(row) for row in members.rows("uses", _MAX_ROWS))


def _use(value: object) -> Use:
    key, *amounts = _row(value, 2, 3)
    count, sent_bytes = (whole(amount, "event: an amount") for amount in (*amounts, 0)[:2])
    return Use(_key(key).text, count, sent_bytes)


def _used(members: Members) -> Used:
    return Used(_uses(members), members.number("at", 0, MAX_TIME))


def _asked(members: Members) -> Asked:
    return Asked(_uses(members))


def _begun(members: Members) -> Begun:
    key, path = _key(members["key"]), members.text("path", MAX_DATAGRAM_BYTES)
    if not leads_to(path, key):
        raise InvalidError(f"event: 'path' does not lead to {key.text}: {shown(path)}")
    return Begun(key, path)


def _fulls(members: Members) -> FullsTaken:
    rows = (_row(row, 3, 3) for row in members.rows("rows", _MAX_ROWS))
    return FullsTaken(
        tuple(
            (_client(client), _key(key).text, whole(times, "event: an amount")) for client, key, times in rows
        )
    )


def _clients(members: Members) -> ClientsSeen:
    return ClientsSeen(tuple(_client(address) for address in members.rows("addresses", _MAX_ROWS)))


def _taken(members: Members) -> Taken:
    takes = tuple(_take(row) for row in members.rows("rows", _MAX_ROWS))
    return Taken(takes, members.number("at", 0, MAX_TIME))


def _take(value: object) -> Take:
    client, key, version, language, what = _row(value, 5, 5)
    part = None
    if isinstance(what, list):
        start, stop, length = (whole(number, "event: a part's limit") for number in _row(what, 3, 3))
        if not start < stop <= length:
            raise InvalidError(f"event: not a part of a body: {start} to {stop} of {length}")
        part = (start, stop, length)
    else:
        what = whole(what, "event: 1 for taken, 0 for asked for", 0, 1)
    stated = _words(version, _MAX_STATED), _words(language, _MAX_STATED)
    return Take(_client(client), _key(key), *stated, part, asked=what == 0)


def _need(members: Members) -> Need:
    return Need(members.whole("bytes"), "refused" in members and members.flag("refused"))


def _unstorable(members: Members) -> Unstorable:
    disk = "disk" not in members or members.flag("disk")
    return Unstorable(_key(members["key"]).text, _detail(members), disk)


def _failed(members: Members) -> Failed:
    problem = members.text("problem", _MAX_NAME)
    if problem not in PROBLEMS:
        raise InvalidError(f"event: 'problem' is unknown: {shown(problem)}")
    return Failed(_key(members["key"]).text, problem, _detail(members))


def _rejected(members: Members) -> Rejected:
    return Rejected(_key(members["key"]).text, _words(members["upstream"], _MAX_STATED), _detail(members))


def _upstream(members: Members) -> UpstreamTrouble:
    return UpstreamTrouble(_words(members["name"], _MAX_STATED), _detail(members))


def _unlisted(members: Members) -> Unlisted:
    moniker = normal_moniker(members.text("moniker", _MAX_NAME))
    if moniker is None:
        raise InvalidError(f"event: not a moniker: {shown(members['moniker'])}")
    return Unlisted(moniker)


_READERS: Mapping[str, Callable[[Members], Event]] = {
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
    "rejected": _rejected,
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
