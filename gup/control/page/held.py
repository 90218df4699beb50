"""What is cached, by product, version and language, with its revisions. Pure; never looks at the disk."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import nlargest
from urllib.parse import unquote

from gup.content.key import ABSENT, Kind
from gup.control.index import Row, Stream

MAX_STREAMS = 40
MAX_REVISIONS = 10


@dataclass(frozen=True, slots=True)
class Revision:
    """One revision's bodies together; `wholes` are those that are no deltas. Times are Unix seconds."""

    name: str
    wholes: int
    deltas: int
    size_bytes: int
    hits: int
    stored_at: float
    used_at: float
    pinned: bool


@dataclass(frozen=True, slots=True)
class Held:
    """One stream: the newest of its revisions, and figures of all of them."""

    product: str
    version: str
    language: str
    revisions: tuple[Revision, ...]
    more: int
    entries: int
    size_bytes: int
    hits: int
    sent_bytes: int

    @property
    def stored_at(self) -> float:
        """When the newest revision's last body came."""
        return self.revisions[0].stored_at


@dataclass(frozen=True, slots=True)
class Holdings:
    """The largest streams, and how many were left out."""

    streams: tuple[Held, ...]
    more: int


def holdings(rows: Iterable[Row], label: Callable[[Stream], tuple[str, str, str]]) -> Holdings:
    """The view of all rows; `label` gives a stream's product, version and language."""
    streams: dict[Stream, list[Row]] = {}
    for row in rows:
        streams.setdefault(row.stream_id, []).append(row)
    largest = nlargest(MAX_STREAMS, streams.items(), key=lambda item: _size(item[1]))
    held = [_held(*label(stream), rows_of) for stream, rows_of in largest]
    held.sort(key=lambda one: (one.product.casefold(), one.version, one.language))
    return Holdings(tuple(held), len(streams) - len(held))


def _size(rows: Iterable[Row]) -> int:
    return sum(row.length_bytes for row in rows)


def _held(product: str, version: str, language: str, rows: list[Row]) -> Held:
    by_revision: dict[str, list[Row]] = {}
    for row in rows:
        by_revision.setdefault(row.content_revision or _name(row), []).append(row)
    newest = sorted(by_revision, reverse=True)
    return Held(
        product,
        version,
        language,
        tuple(_revision(name, by_revision[name]) for name in newest[:MAX_REVISIONS]),
        max(0, len(newest) - MAX_REVISIONS),
        len(rows),
        _size(rows),
        sum(row.hits for row in rows),
        sum(row.sent_bytes for row in rows),
    )


def _name(row: Row) -> str:
    """What tells bodies apart that have no revision: their file's name."""
    return row.revision if row.revision != ABSENT else unquote(row.file)


def _revision(name: str, rows: list[Row]) -> Revision:
    return Revision(
        name,
        sum(row.kind is not Kind.DELTA for row in rows),
        sum(row.kind is Kind.DELTA for row in rows),
        _size(rows),
        sum(row.hits for row in rows),
        max(row.stored_at for row in rows),
        max(row.used_at for row in rows),
        any(row.pinned for row in rows),
    )
