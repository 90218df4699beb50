"""What the simulated management server tells its clients to have, as JSON; never any I/O.

It stands for policy: clients learn newest revisions and digests from it, asked of the server directly.
"""

from dataclasses import dataclass

import xxhash
from pydantic import TypeAdapter

from gup.content.key import Kind

CATALOGUE_PATH = "/simulation/catalog"
COUNTS_PATH = "/simulation/counts"
PUBLISH_PATH = "/simulation/publish"


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file on offer: `digest` is 32 hexadecimal digits of XXH3-128 over its `length` bytes."""

    path: str
    kind: Kind
    length: int
    digest: str
    from_revision: str | None = None


@dataclass(frozen=True, slots=True)
class PublishedStream:
    """A moniker's revisions, oldest first, and the files that lead to the newest."""

    moniker: str
    product: str
    language: str
    revisions: tuple[str, ...]
    full: PublishedFile
    deltas: tuple[PublishedFile, ...]

    @property
    def newest(self) -> str:
        return self.revisions[-1]

    def delta_from(self, revision: str) -> PublishedFile | None:
        """The delta that leads from `revision` to the newest, if one reaches back that far."""
        return next((delta for delta in self.deltas if delta.from_revision == revision), None)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Everything on offer; `serial` rises with every publication."""

    serial: int
    content_info: PublishedFile
    streams: tuple[PublishedStream, ...]


@dataclass(frozen=True, slots=True)
class FileCounts:
    """What the server sent of one file: `fetches` are GETs answered with bytes (200 or 206)."""

    kind: Kind
    length: int
    fetches: int
    not_modified: int
    other_requests: int
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Everything that went over the simulated WAN since the server started. Byte counts are of bodies.

    `files` are those on offer now; of files withdrawn only the sums are kept.
    """

    requests: int
    not_found: int
    sent_bytes: int
    sending: int
    withdrawn_files: int
    withdrawn_fetched_again: int
    files: dict[str, FileCounts]


CATALOGUE_JSON = TypeAdapter(Catalogue)
COUNTS_JSON = TypeAdapter(Counts)


def digest_of(body: bytes) -> str:
    """The digest that a PublishedFile carries, of a whole body in memory."""
    return xxhash.xxh3_128_hexdigest(body)
