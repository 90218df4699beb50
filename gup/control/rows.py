"""One row of the index: what the controller remembers of an entry. Values only; never any I/O.

A row is a view of the entry's record, plus what no record holds: hits and bytes sent.
"""

import re
import sys
from dataclasses import dataclass, replace
from typing import Any

from gup.cache.store import Stored
from gup.content.key import ContentKey, Kind, delta_step
from gup.jsonmodel import Members

_REVISION = re.compile(r"\d{9}")

Stream = tuple[str, str, str]
"""Version, language and moniker: what revisions are compared within."""


def stream_of(key: ContentKey) -> Stream:
    return (key.version, key.language, key.stream)


def content_revision(kind: Kind, revision: str, file: str) -> str | None:
    """The revision that a body brings a client to; None when the names do not tell.

    A delta's folder is its old revision in one source and the newest in another (FIELD.md), so its file
    name decides. Only nine-digit names can be compared.
    """
    step = delta_step(file) if kind is Kind.DELTA else None
    found = step.to_revision if step else revision
    return found if _REVISION.fullmatch(found) else None


@dataclass(frozen=True, slots=True)
class Row:
    """An entry as the index knows it. Times are Unix seconds."""

    key: str
    version: str
    language: str
    stream: str
    revision: str
    file: str
    kind: Kind
    length_bytes: int
    stored_at: float
    used_at: float
    hits: int = 0
    pinned: bool = False
    sent_bytes: int = 0
    received_bytes: int = 0

    @property
    def stream_id(self) -> Stream:
        return (self.version, self.language, self.stream)

    @property
    def content_revision(self) -> str | None:
        """The revision that the body brings a client to; None when the names do not tell."""
        return content_revision(self.kind, self.revision, self.file)

    def used(self, count: int, sent_bytes: int, at: float) -> "Row":
        return replace(
            self,
            hits=self.hits + count,
            sent_bytes=self.sent_bytes + sent_bytes,
            used_at=max(self.used_at, at),
        )

    def to_json(self) -> dict[str, Any]:
        """All of the row; `from_json` reads it back."""
        return {name: getattr(self, name) for name in self.__slots__} | {"kind": str(self.kind)}

    @classmethod
    def from_json(cls, fields: object) -> "Row":
        """InvalidError when `fields` are no row."""
        members = Members(fields, "row of the index")
        return make_row(
            ContentKey.parse(members["key"]),
            members.one_of("kind", Kind),
            members.whole("length_bytes"),
            stored_at=members.time("stored_at"),
            used_at=members.time("used_at"),
            hits=members.whole("hits"),
            pinned=members.flag("pinned"),
            sent_bytes=members.whole("sent_bytes"),
            received_bytes=members.whole("received_bytes"),
        )


def make_row(
    key: ContentKey, kind: Kind, length_bytes: int, *, stored_at: float, used_at: float, **more: Any
) -> Row:
    """A row for `key`. Names that many rows share are kept once (1e5 rows are to fit in some 50 MB)."""
    return Row(
        key.text,
        sys.intern(key.version),
        sys.intern(key.language),
        sys.intern(key.stream),
        sys.intern(key.revision),
        sys.intern(key.file),
        kind,
        length_bytes,
        stored_at,
        used_at,
        **more,
    )


def row_of(stored: Stored, known: Row | None = None) -> Row:
    """The row of a body found on disk; hits and totals are taken from the row known before."""
    record = stored.record
    assert record is not None
    return make_row(
        record.key,
        record.kind,
        stored.size_bytes,
        stored_at=record.stored_at,
        used_at=max(stored.used_at, known.used_at if known else 0.0),
        hits=known.hits if known else 0,
        pinned=record.pinned,
        sent_bytes=known.sent_bytes if known else 0,
        received_bytes=known.received_bytes if known else stored.size_bytes,
    )
