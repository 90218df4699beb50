"""Records of stored bodies, states of fills, heads: models that are stored as JSON with a checksum."""

import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, NamedTuple

import xxhash
from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator, Strict, TypeAdapter

from gup.cluster.orders import KnownText
from gup.content.key import ContentKey, Kind
from gup.content.routes import Route, leads_to, path_of
from gup.errors import PROBLEMS, Problem
from gup.jsonmodel import Count, Flag, InvalidError, Time, parse, plain_text, read, shown
from gup.upstream.exchange import RemoteHead, UpstreamFailure, Validators

CHUNK_BYTES = 1 << 20
"""Bodies are summed in pieces of this size; the last piece is the rest."""


class ChunkSums:
    """Sums a body as it is written: xxh3-64 of each chunk."""

    def __init__(self, done: list[int] | None = None) -> None:
        self.done: list[int] = done or []
        self._open = xxhash.xxh3_64()
        self._open_bytes = 0

    def add(self, piece: bytes | memoryview) -> list[int]:
        """The sums of the chunks that `piece` completes."""
        rest, before = memoryview(piece), len(self.done)
        while rest:
            part = rest[: CHUNK_BYTES - self._open_bytes]
            self._open.update(part)
            self._open_bytes += len(part)
            rest = rest[len(part) :]
            if self._open_bytes == CHUNK_BYTES:
                self.done.append(self._open.intdigest())
                self._open, self._open_bytes = xxhash.xxh3_64(), 0
        return self.done[before:]

    def finish(self) -> tuple[int, ...]:
        """All sums, including that of a last short chunk."""
        return (*self.done, self._open.intdigest()) if self._open_bytes else tuple(self.done)

    def foretold(self, pieces: list[memoryview]) -> list[int]:
        """The sums that `finish` would return after adding `pieces`; nothing is added."""
        other = ChunkSums()
        other._open, other._open_bytes = self._open.copy(), self._open_bytes
        for piece in pieces:
            other.add(piece)
        return list(other.finish())


chunk_sum = xxhash.xxh3_64_intdigest


def seal(fields: dict[str, Any]) -> bytes:
    """`fields` as a line of JSON with a `checksum` member over the rest."""
    text = _canonical(fields)
    return f'{text[:-1]},"checksum":"{xxhash.xxh3_64_hexdigest(text.encode())}"}}\n'.encode()


def unseal(text: bytes, model: str, most_bytes: int) -> dict[str, Any]:
    """Inverse of `seal`; InvalidError when the text is too long or damaged."""
    members = parse(text, model, most_bytes)
    if not isinstance(members, dict):
        raise InvalidError(f"{model} must be an object, not {shown(members)}")
    checksum = members.pop("checksum", None)
    try:
        right = _checksum(members)
    except (ValueError, RecursionError) as error:  # what UTF-8 can't encode
        raise InvalidError(f"{model}: not text in UTF-8: {shown(str(error))}") from error
    if checksum != right:
        raise InvalidError(f"{model}: the checksum is wrong")
    if type(members.get("format")) is not int or members["format"] not in READABLE_FORMATS:
        raise InvalidError(f"{model}: unknown format {shown(members.get('format'))}")
    return members


def _checksum(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(_canonical(fields).encode())


def _canonical(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


FORMAT = 2
"""Version of the records and state files that are written."""
READABLE_FORMATS = (1, 2)
"""Format 1 ties a record to its body by the file's modification time at the commit."""
MAX_BODY_BYTES = 64 << 30
"""Limit of a stored body, which bounds a record's sums. A larger one is unstorable."""
MAX_RECORD_BYTES = 16 * (MAX_BODY_BYTES // CHUNK_BYTES) + 64 * 1024
MAX_STATE_BYTES = 1 << 20

_TIME_STEPS_NS = (1, 100, 1_000, 1_000_000_000, 2_000_000_000)
"""Resolutions of modification times in file systems."""
_MAX_FIELD = 1024
_FIELD = r"^[\t\x20-\x7e\x80-\xff]+$"
"""A field's value (RFC 9110 section 5.5): no control but the tab; bytes over 127 mean nothing."""
_TAG = r'^"[\x21\x23-\x7e\x80-\xff]*"$'
"""A strong entity tag (RFC 9110 section 8.8.3)."""

_Length = Annotated[int, Strict(), Field(ge=1, le=MAX_BODY_BYTES)]
_HeaderField = Annotated[str, Field(max_length=_MAX_FIELD, pattern=_FIELD)]
_Tag = Annotated[str, Field(max_length=_MAX_FIELD, pattern=_TAG)]
_Upstream = Annotated[str, Field(max_length=_MAX_FIELD, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Path = Annotated[str, Field(max_length=8193)]
_Key = Annotated[ContentKey, PlainValidator(ContentKey.parse), PlainSerializer(lambda key: key.text)]


def _unpack_sums(text: object) -> tuple[int, ...]:
    if not isinstance(text, str) or len(text) % 16 or not re.fullmatch("[0-9a-f]*", text):
        raise InvalidError(f"must be 16 hexadecimal digits a chunk, not {shown(text)}")
    return tuple(int(text[at : at + 16], 16) for at in range(0, len(text), 16))


_Sums = Annotated[
    tuple[int, ...],
    PlainValidator(_unpack_sums),
    PlainSerializer(lambda sums: "".join(f"{value:016x}" for value in sums)),
]


def _require_path(path: str, key: ContentKey, model: str) -> None:
    if path and not leads_to(path, key):
        raise InvalidError(f"{model}: 'path' does not lead to {key.text}: {shown(path)}")


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a body, fixed with the first upstream response's head.

    `etag` is gup's own, None while the length is unknown; `upstream_etag` (if strong) and `last_modified` are
    the upstream's validators.
    """

    length: _Length | None
    etag: _Tag | None
    content_type: _HeaderField
    last_modified: _HeaderField | None
    upstream: _Upstream
    upstream_etag: _Tag | None
    order: KnownText = field(default="", kw_only=True)
    """What was known of purges when its fetch began (gup.cache.purges)."""


@dataclass(frozen=True, slots=True)
class Record(Head):
    """A committed body. Times are Unix seconds.

    `generation` is the body file's modification time in ns: it ties the two together. `path` is the path
    requested upstream, "" in old records.
    """

    length: _Length
    etag: _Tag
    key: _Key
    kind: Kind
    stored_at: Time
    validated_at: Time
    pinned: Flag
    generation: Count
    sums: _Sums
    path: _Path = ""

    @classmethod
    def of(
        cls,
        key: ContentKey,
        kind: Kind,
        head: Head,
        sums: _Sums,
        now: float,
        generation: int,
        path: str,
        *,
        validated_at: float | None = None,
        pinned: bool = False,
    ) -> "Record":
        return cls(
            head.length or 0,  # `head` is of a body that is complete: both are known
            head.etag or "",
            head.content_type,
            head.last_modified,
            head.upstream,
            head.upstream_etag,
            key,
            kind,
            now,
            now if validated_at is None else validated_at,
            pinned,
            generation,
            sums,
            path,
            order=head.order,
        )

    @property
    def head(self) -> Head:
        return Head(**{name: getattr(self, name) for name in Head.__slots__})

    @property
    def asked_path(self) -> str:
        return self.path or path_of(self.key)

    def fits(self, body: os.stat_result) -> bool:
        """Whether this file can be the body: its length, and its time at the file system's resolution."""
        times = (self.generation // step * step for step in _TIME_STEPS_NS)
        return body.st_size == self.length and body.st_mtime_ns in times

    def is_same_body(self, other: "Record") -> bool:
        return all(getattr(self, it) == getattr(other, it) for it in ("etag", "length", "generation", "sums"))

    def to_json(self) -> dict[str, Any]:
        return {**_record_model().dump_python(self, mode="json"), "format": FORMAT}

    def encode(self) -> bytes:
        return seal(self.to_json())

    @classmethod
    def decode(cls, text: bytes) -> "Record":
        """InvalidError when the text is damaged, of another format or contradicts itself."""
        members = unseal(text, "record", MAX_RECORD_BYTES)
        if members["format"] == 1:
            members["generation"] = members.get("body_mtime_ns")
        record = read(_record_model(), members, "record")
        if len(record.sums) != -(-record.length // CHUNK_BYTES):
            raise InvalidError(f"record: {len(record.sums)} sums of a body of {record.length} bytes")
        _require_path(record.asked_path, record.key, "record")
        return record


@cache
def _record_model() -> TypeAdapter[Record]:
    return TypeAdapter(Record)


MEMORY_SECONDS = 86400.0
"""How long after its fetch a wrong body is remembered: then it may be fetched once more."""
_MAX_DETAIL = 2000
_Detail = Annotated[str, Field(max_length=_MAX_DETAIL)]


class Phase(StrEnum):
    CLAIMED = "claimed"
    REQUESTED = "requested"
    STREAMING = "streaming"
    COMMITTED = "committed"
    FAILED = "failed"
    UNSTORABLE = "unstorable"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.CLAIMED: frozenset({Phase.REQUESTED, Phase.FAILED, Phase.UNSTORABLE, Phase.COMMITTED}),
    Phase.REQUESTED: frozenset({Phase.STREAMING, Phase.FAILED, Phase.UNSTORABLE}),
    Phase.STREAMING: frozenset({Phase.COMMITTED, Phase.FAILED, Phase.UNSTORABLE}),
    Phase.COMMITTED: frozenset(),
    Phase.FAILED: frozenset(),
    Phase.UNSTORABLE: frozenset({Phase.FAILED}),
}
"""Forward only; CLAIMED to COMMITTED is a takeover of a complete part. UNSTORABLE: readers get the body from
memory (gup.cache.memory_files), which may still break off.
"""


def _known_problem(slug: str) -> str:
    if slug not in PROBLEMS:
        raise InvalidError(f"is unknown: {shown(slug)}")
    return slug


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure to answer with; no upstream is asked before it ends.

    `until` is on the monotonic clock, which all processes share; `ttl` bounds it, since that clock starts
    again at boot.
    """

    slug: Annotated[str, AfterValidator(_known_problem)]
    detail: _Detail
    ttl: Time
    until: Time

    @classmethod
    def of(cls, problem: Problem, ttl: float, monotonic_now: float) -> "Failure":
        return cls(problem.slug, plain_text(problem.detail, _MAX_DETAIL), ttl, monotonic_now + ttl)

    def is_current(self, monotonic_now: float) -> bool:
        return 0 < self.until - monotonic_now <= self.ttl

    def problem(self, monotonic_now: float) -> Problem:
        left = self.until - monotonic_now
        retry = None if PROBLEMS[self.slug].status in (404, 410) else max(left, 1.0)
        return Problem(self.slug, self.detail, retry_after_seconds=retry, stands_seconds=left)


BodyIdentity = tuple[_Detail | None, _Detail | None, Count | None]
"""ETag, Last-Modified and length, which identify an upstream's body."""


class Hold(NamedTuple):
    """One upstream that is not to be asked for a key until `until` (monotonic), `wait` seconds in all.

    `identity` is that of its body that was found wrong, `times` times: a body with the same is not read until
    `forgotten_at`.
    """

    upstream: _Detail
    until: Time
    wait: Time
    times: Count = 0
    identity: BodyIdentity | None = None
    forgotten_at: Time = 0.0

    def seconds_left(self, monotonic_now: float) -> float:
        """Until the upstream may be asked. A restart of the clock at boot ends it."""
        left = self.until - monotonic_now
        return left if 0 < left <= self.wait else 0.0

    def remembers(self, monotonic_now: float) -> bool:
        return self.seconds_left(monotonic_now) > 0 or 0 < self.forgotten_at - monotonic_now <= MEMORY_SECONDS


@dataclass(slots=True)
class FillState:
    key: _Key
    kind: Kind
    generation: Count
    phase: Phase
    head: Head | None = None
    failure: Failure | None = None
    path: _Path = ""
    """The path to request upstream: allows any process to take the fill over."""
    holds: Annotated[tuple[Hold, ...], Field(max_length=256)] = ()
    """Upstreams not to be asked for it, or not to be trusted."""
    background: Flag = False
    """A background fill: continued by prefetch, or for a client that asks."""
    pinned: Flag = False
    stored_at: Time | None = None
    """Of a demoted entry, restored with the entry. Unix seconds."""
    passed_through: Flag = False
    """UNSTORABLE, and not only because of the disk: each client is passed through."""
    service_start: Time = 0.0
    """Of the service whose leader wrote this. A part of an earlier service may be torn: it is not read before
    the present leader has compared it and written its own state. Unix seconds.
    """
    told: Mapping[str, Validators] = field(default_factory=dict)
    """The validators of each upstream that has sent a part of the body, for comparison at a resume."""
    from_wan: Flag = False
    """The body arrives over the WAN, not from a member of the cluster: others may join it."""

    def is_current(self, monotonic_now: float) -> bool:
        """Whether any upstream is still not to be asked."""
        failed = self.failure is not None and self.failure.is_current(monotonic_now)
        return failed or any(hold.remembers(monotonic_now) for hold in self.holds)

    def encode(self) -> bytes:
        return seal({**_state_model().dump_python(self, mode="json"), "format": FORMAT})

    @classmethod
    def decode(cls, sealed: bytes) -> "FillState":
        """InvalidError when the text is damaged, of another format or contradicts itself."""
        state = read(_state_model(), unseal(sealed, "state", MAX_STATE_BYTES), "state")
        _require_path(state.path, state.key, "state")
        if state.phase is Phase.STREAMING and state.head is None:
            raise InvalidError("state: a body under way without its head")
        if state.phase in (Phase.FAILED, Phase.UNSTORABLE) and state.failure is None:
            raise InvalidError("state: a failure without its cause")
        return state


@cache
def _state_model() -> TypeAdapter[FillState]:
    return TypeAdapter(FillState)


def route_of(kept: Record | FillState) -> Route:
    key = kept.key
    path = kept.asked_path if isinstance(kept, Record) else kept.path
    immutable = kept.kind is not Kind.INDEX
    return Route(kept.kind, immutable, key.stream, key.revision, key.file, path, key.variant)


def head_of(key: ContentKey, remote: RemoteHead, order: str = "", *, changed: bool = False) -> Head:
    """The head of a body that `remote` announces, whose fetch began when `order` was known.

    Its strong ETag is made of key, length and the first response's validators; random if it has none, or
    other bytes were known under them (`changed`). A member's head is kept as it is.
    """
    if (given := remote.given) is not None:
        validators = given.last_modified, given.upstream, given.upstream_etag
        return Head(remote.length, given.etag, remote.content_type, *validators, order=given.order)

    def kept(text: str | None, pattern: str) -> str | None:
        return text if text is not None and len(text) <= _MAX_FIELD and re.fullmatch(pattern, text) else None

    etag = None
    if remote.length is not None:
        validator = (not changed and (remote.etag or remote.last_modified)) or secrets.token_hex(16)
        name = "\n".join((key.text, str(remote.length), validator))
        etag = f'"{xxhash.xxh3_128_hexdigest(name.encode())}"'
    return Head(
        length=remote.length,
        etag=etag,
        content_type=kept(remote.content_type, _FIELD) or "application/octet-stream",
        last_modified=kept(remote.last_modified, _FIELD),
        upstream=remote.upstream,
        upstream_etag=kept(remote.etag, _TAG),
        order=order,
    )


def remote_of(head: Head) -> RemoteHead:
    validators = head.upstream_etag, head.last_modified
    return RemoteHead(200, 0, head.length, *validators, head.content_type, head.upstream)


def absent(remote: RemoteHead) -> Problem | UpstreamFailure:
    """The failure that a response without a body means."""
    if remote.status == 304:
        detail = f"{remote.upstream} answered 304 to a request without a condition"
        return UpstreamFailure("error", "upstream-error", detail, again=False)
    slug = "upstream-gone" if remote.status == 410 else "upstream-not-found"
    return Problem(slug, f"{remote.upstream} answered {remote.status}")
