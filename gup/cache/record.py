"""What is known of a body: the head it was fetched with, and the record of a committed one; opens no file."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from gup.cache.checksum import CHUNK_BYTES, pack_sums, seal, unpack_sums, unseal
from gup.content.key import ContentKey, Kind

FORMAT = 1
"""Version of the records and state files; others are refused (and fetched anew)."""


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
    def from_json(cls, fields: dict[str, Any]) -> "Head":
        """ValueError or KeyError when `fields` are no head."""
        head = cls(**{name: fields[name] for name in cls.__slots__})
        if head.length is not None and not (isinstance(head.length, int) and head.length > 0):
            raise ValueError(f"not a length: {head.length!r}")
        return head


@dataclass(frozen=True, slots=True)
class Record:
    """A committed body. Times are Unix seconds; `body_mtime_ns` ties the record to its body file.

    `path` is what upstream was asked for, "" in records of before it was kept.
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
    body_mtime_ns: int
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
        mtime_ns: int,
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
            body_mtime_ns=mtime_ns,
            sums=sums,
            path=path,
        )

    @property
    def head(self) -> Head:
        return Head(
            self.length, self.etag, self.content_type, self.last_modified, self.upstream, self.upstream_etag
        )

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
    def from_json(cls, fields: dict[str, Any]) -> "Record":
        """ValueError when `fields` are no record of this format, or contradict themselves."""
        try:
            if fields["format"] != FORMAT:
                raise ValueError(f"unknown format {fields['format']!r}")
            values = {name: fields[name] for name in cls.__slots__ if name != "path"}
            values["path"] = str(fields.get("path", ""))
            values["key"] = ContentKey.parse(fields["key"])
            values["kind"] = Kind(fields["kind"])
            values["sums"] = unpack_sums(fields["sums"])
            record = cls(**values)
            chunks = -(-record.length // CHUNK_BYTES)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a record: {error}") from error
        if record.length <= 0 or len(record.sums) != chunks:
            raise ValueError("length and chunk sums do not fit each other")
        return record

    def encode(self) -> bytes:
        return seal(self.to_json())

    @classmethod
    def decode(cls, text: bytes) -> "Record":
        """ValueError when the text is damaged."""
        return cls.from_json(unseal(text))
