"""One simulated client, without I/O: what it has and needs next, and its copy of a file as the bytes come."""

from dataclasses import dataclass, field
from random import Random

import xxhash

from gup.demo.content import ALL_LANGUAGES, PublishedFile, PublishedStream
from gup.errors import GupError

TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which a client asks again."""

_LANGUAGES = ("English", "English", "English", "French", "German")
_TAKES_STREAM, _REINSTALLED, _CUT = 0.6, 0.02, 0.05
_HELD_AT_START = ((0.25, 0), (0.75, 1), (0.90, 2), (0.95, 3))
"""Cumulated share of clients by the revisions they are behind at the start; the rest need a full."""


@dataclass(slots=True)
class Client:
    """One machine: its language, the streams it takes, and the revision it has of each.

    Changed only by its own task, after a download that was right.
    """

    number: int
    chance: Random
    language: str = ""
    held: dict[str, str] = field(default_factory=dict)
    declined: set[str] = field(default_factory=set)
    content_info_etag: str | None = None

    def __post_init__(self) -> None:
        self.language = self.chance.choice(_LANGUAGES)

    @property
    def address(self) -> str:
        """A loopback address of its own, so that a cache on this machine tells the clients apart."""
        return f"127.1.{self.number // 250}.{self.number % 250 + 1}"

    @property
    def user_agent(self) -> str:
        return f"simulated-client/{self.number:05d}"

    def takes(self, stream: PublishedStream) -> bool:
        """Whether the stream is for this machine; decided once, when the stream is first seen."""
        if stream.moniker in self.held:
            return True
        if stream.moniker in self.declined or stream.language not in (ALL_LANGUAGES, self.language):
            return False
        if stream.language == ALL_LANGUAGES and self.chance.random() >= _TAKES_STREAM:
            self.declined.add(stream.moniker)
            return False
        place = self.chance.random()
        behind = next((steps for share, steps in _HELD_AT_START if place < share), len(stream.revisions))
        known = behind < len(stream.revisions)
        self.held[stream.moniker] = stream.revisions[-1 - behind] if known else "none"
        return True

    def wants(self, stream: PublishedStream) -> PublishedFile | None:
        """The file that brings this machine up to date: a delta if there is one, else the full."""
        held = self.held[stream.moniker]
        if held == stream.newest:
            return None
        delta = None if self.chance.random() < _REINSTALLED else stream.delta_from(held)
        return delta or stream.full

    def cuts(self, file: PublishedFile) -> int | None:
        """Where the machine loses its connection, which it does occasionally."""
        if self.chance.random() >= _CUT:
            return None
        return round(file.length * self.chance.uniform(0.2, 0.8))


class WrongBodyError(GupError):
    """What was received is not what the management server published."""


@dataclass(slots=True)
class Transfer:
    """A client's copy of `file`, over as many responses as it takes. Changed only by the client's own task.

    `held_etag` is the entity tag of an earlier copy: an unchanged file need not be sent again.
    """

    file: PublishedFile
    held_etag: str | None = None
    received_bytes: int = 0
    etag: str | None = None
    _digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    def request_fields(self) -> dict[str, str]:
        """Header fields that ask for the whole, or for the rest after a break."""
        if self.etag is not None and 0 < self.received_bytes < self.file.length:
            return {"Range": f"bytes={self.received_bytes}-", "If-Range": self.etag}
        return {} if self.held_etag is None else {"If-None-Match": self.held_etag}

    def begin(self, status: int, content_range: str | None, etag: str | None) -> bool:
        """Take the head of a 200 or a 206; tells whether it goes on where the last response broke off.

        WrongBodyError when it is not the rest of a body of the published length (RFC 9110 section 14.4).
        """
        resumed = status == 206
        if resumed:
            length = self.file.length
            if content_range != f"bytes {self.received_bytes}-{length - 1}/{length}":
                raise WrongBodyError(f"a range that was not asked for: {content_range}")
        else:
            self.received_bytes = 0
            self._digest.reset()
        self.etag = etag
        return resumed

    def add(self, piece: bytes) -> None:
        self.received_bytes += len(piece)
        self._digest.update(piece)

    def check(self) -> None:
        """WrongBodyError unless the copy is complete and right."""
        if self.received_bytes != self.file.length:
            raise WrongBodyError(f"{self.received_bytes} bytes instead of {self.file.length}")
        if self._digest.hexdigest() != self.file.digest:
            raise WrongBodyError("other bytes than published")


def cache_result(cache_status: str | None) -> str:
    """hit, collapsed, miss, or none without a cache."""
    words = [word.strip().partition("=")[0] for word in (cache_status or "").split(";")[1:]]
    known = (("collapsed", "collapsed"), ("hit", "hit"), ("fwd", "miss"))
    return next((result for word, result in known if word in words), "none")
