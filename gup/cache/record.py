"""What is known of a body: the head it was fetched with, and the record of a committed one; opens no file."""

import os
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from gup.cache.checksum import CHUNK_BYTES, pack_sums, seal, unpack_sums, unseal
from gup.content.key import ContentKey, Kind
from gup.content.routes import leads_to
from gup.jsonmodel import Form, InvalidError, Members, shown

FORMAT = 2
"""Version of the records and state files that are written."""
READABLE_FORMATS = (1, 2)
"""Format 1 ties a record to its body by the time that the body's file happened to have."""
MAX_BODY_BYTES = 64 << 30
"""Of a body that is stored: what bounds a record's sums. What is larger is unstorable."""
MAX_RECORD_BYTES = 16 * (MAX_BODY_BYTES // CHUNK_BYTES) + 64 * 1024

_TIME_STEPS_NS = (1, 100, 1_000, 1_000_000_000, 2_000_000_000)
"""What file systems cut modification times to."""
_MAX_FIELD = 1024
_FIELD = Form(re.compile("[\t\x20-\x7e\x80-\xff]+"), "header field's value")
"""A field's value (RFC 9110 section 5.5): no control but the tab; bytes over 127 mean nothing."""
_TAG = Form(re.compile('"[\x21\x23-\x7e\x80-\xff]*"'), "strong entity tag")
"""A strong entity tag (RFC 9110 section 8.8.3)."""
_NAME = Form(re.compile(r"[^\x00-\x1f\x7f]*"), "name of an upstream")
_MAX_KEY = 5 * 241
_MAX_PATH = 8193


def kept_field(text: str | None) -> str | None:
    """A header field's value as a record can keep it; None for what it can't: too long, or no such value."""
    return text if text is not None and len(text) <= _MAX_FIELD and _FIELD.pattern.fullmatch(text) else None


def kept_tag(text: str | None) -> str | None:
    """The same of a strong entity tag."""
    return text if text is not None and len(text) <= _MAX_FIELD and _TAG.pattern.fullmatch(text) else None


def read_key(members: Members) -> ContentKey:
    """The content key that a record or a state is about."""
    return ContentKey.parse(members.text("key", _MAX_KEY))


def read_path(members: Members, key: ContentKey) -> str:
    """What upstream was asked for: a path that leads to `key`, or "" when that was not kept."""
    path = members.text("path", _MAX_PATH) if "path" in members else ""
    if path and not leads_to(path, key):
        raise InvalidError(f"{members.model}: 'path' does not lead to {key.text}: {shown(path)}")
    return path


def require_format(members: Members) -> None:
    if members.whole("format") not in READABLE_FORMATS:
        raise InvalidError(f"{members.model}: unknown format {shown(members['format'])}")


@dataclass(frozen=True, slots=True)
class Head:
    """What clients are told of a body, fixed when the first upstream response's head is known.

    `etag` is ours, with quotes, None while the length is unknown; `upstream_etag` and `last_modified` are the
    upstream's validators (the first kept only when strong).
    """

    length: int | None
    etag: str | None
    content_type: str
    last_modified: str | None
    upstream: str
    upstream_etag: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: object, model: str = "head") -> "Head":
        """InvalidError when `fields` are no head."""
        members = Members(fields, model)
        return cls(
            length=None if members["length"] is None else members.whole("length", 1, MAX_BODY_BYTES),
            etag=members.text_or_none("etag", _MAX_FIELD, _TAG),
            content_type=members.text("content_type", _MAX_FIELD, _FIELD),
            last_modified=members.text_or_none("last_modified", _MAX_FIELD, _FIELD),
            upstream=members.text("upstream", _MAX_FIELD, _NAME),
            upstream_etag=members.text_or_none("upstream_etag", _MAX_FIELD, _TAG),
        )


@dataclass(frozen=True, slots=True)
class Record:
    """A committed body. Times are Unix seconds.

    `generation` is the body file's modification time in ns: it ties the two together. `path` is what upstream
    was asked for, "" in records of before it was kept.
    """

    key: ContentKey
    kind: Kind
    length: int
    etag: str
    content_type: str
    last_modified: str | None
    upstream: str
    upstream_etag: str | None
    stored_at: float
    validated_at: float
    pinned: bool
    generation: int
    sums: tuple[int, ...]
    path: str = ""

    @classmethod
    def of(
        cls,
        key: ContentKey,
        kind: Kind,
        head: Head,
        sums: tuple[int, ...],
        now: float,
        generation: int,
        path: str = "",
    ) -> "Record":
        """The record of a body that has just been written whole."""
        assert head.length is not None
        assert head.etag is not None
        return cls(
            key=key,
            kind=kind,
            length=head.length,
            etag=head.etag,
            content_type=head.content_type,
            last_modified=head.last_modified,
            upstream=head.upstream,
            upstream_etag=head.upstream_etag,
            stored_at=now,
            validated_at=now,
            pinned=False,
            generation=generation,
            sums=sums,
            path=path,
        )

    @property
    def head(self) -> Head:
        return Head(
            self.length, self.etag, self.content_type, self.last_modified, self.upstream, self.upstream_etag
        )

    def fits(self, body: os.stat_result) -> bool:
        """Whether this file can be the body: its length, and its time as far as the file system keeps it."""
        if body.st_size != self.length:
            return False
        return any(self.generation // step * step == body.st_mtime_ns for step in _TIME_STEPS_NS)

    def with_pin(self, pinned: bool) -> "Record":
        return replace(self, pinned=pinned)

    def validated(self, now: float) -> "Record":
        return replace(self, validated_at=now)

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {
            **fields,
            "format": FORMAT,
            "key": self.key.text,
            "kind": str(self.kind),
            "sums": pack_sums(self.sums),
        }

    @classmethod
    def from_json(cls, fields: object) -> "Record":
        """InvalidError when `fields` are no record of this format, or contradict each other."""
        members = Members(fields, "record")
        require_format(members)
        head = Head.from_json(fields, "record")
        key = read_key(members)
        if head.length is None or head.etag is None:
            raise InvalidError("record: 'length' and 'etag' must be there")
        return cls(
            key=key,
            kind=members.one_of("kind", Kind),
            length=head.length,
            etag=head.etag,
            content_type=head.content_type,
            last_modified=head.last_modified,
            upstream=head.upstream,
            upstream_etag=head.upstream_etag,
            stored_at=members.time("stored_at"),
            validated_at=members.time("validated_at"),
            pinned=members.flag("pinned"),
            generation=_read_generation(members),
            sums=unpack_sums(members.text("sums", MAX_RECORD_BYTES), head.length),
            path=read_path(members, key),
        )

    def encode(self) -> bytes:
        return seal(self.to_json())

    @classmethod
    def decode(cls, text: bytes) -> "Record":
        """InvalidError when the text is damaged."""
        return cls.from_json(unseal(text, "record", MAX_RECORD_BYTES).values)


def _read_generation(members: Members) -> int:
    name = "body_mtime_ns" if members["format"] == 1 else "generation"
    return members.whole(name, least=-(2**63))


def is_same_body(one: Record, other: Record) -> bool:
    """Whether two records tell of one body: neither of another generation, nor of one put in its place."""
    return (one.etag, one.length, one.generation, one.sums) == (
        other.etag,
        other.length,
        other.generation,
        other.sums,
    )
