"""Records of committed bodies, states of fills, heads: models that are kept as JSON with a checksum."""

import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

import xxhash

from gup.content.key import ContentKey, Kind
from gup.content.routes import leads_to
from gup.errors import PROBLEMS, Problem
from gup.jsonmodel import MAX_TIME, Form, InvalidError, Members, number, parse, plain_text, shown, text, whole
from gup.upstream.exchange import RemoteHead, UpstreamFailure, Validators

CHUNK_BYTES = 1 << 20
"""Bodies are summed in pieces of this size; the last piece is what is left."""


_SUMS = re.compile(r"[0-9a-f]*")


class ChunkSums:
    """Sums a body as it is written, piece after piece (xxh3-64 of each chunk)."""

    def __init__(self, done: list[int] | None = None) -> None:
        self.done: list[int] = done or []
        self._open = xxhash.xxh3_64()
        self._open_bytes = 0

    def add(self, piece: bytes | memoryview) -> list[int]:
        """Sum `piece`; the sums of the chunks that it completed."""
        rest = memoryview(piece)
        completed: list[int] = []
        while rest:
            part = rest[: CHUNK_BYTES - self._open_bytes]
            self._open.update(part)
            self._open_bytes += len(part)
            rest = rest[len(part) :]
            if self._open_bytes == CHUNK_BYTES:
                completed.append(self._close())
        return completed

    def so_far(self) -> tuple[int, ...]:
        """The sums of all that was added; the last may be that of a chunk that is not whole yet."""
        return (*self.done, self._open.intdigest()) if self._open_bytes else tuple(self.done)

    def foretold(self, pieces: Iterable[bytes | memoryview]) -> list[int]:
        """The sums that adding `pieces`, the body's last, would bring about; nothing is added."""
        other = ChunkSums()
        other._open, other._open_bytes = self._open.copy(), self._open_bytes
        for piece in pieces:
            other.add(piece)
        return list(other.finish())

    def finish(self) -> tuple[int, ...]:
        """All sums of the body, a last short chunk included."""
        if self._open_bytes:
            self._close()
        return tuple(self.done)

    def _close(self) -> int:
        value = self._open.intdigest()
        self.done.append(value)
        self._open = xxhash.xxh3_64()
        self._open_bytes = 0
        return value


def chunk_sum(piece: bytes | memoryview) -> int:
    """The sum of one whole chunk."""
    return xxhash.xxh3_64_intdigest(piece)


def pack_sums(sums: tuple[int, ...] | list[int]) -> str:
    """Sums as text: 16 hexadecimal digits each, joined."""
    return "".join(f"{value:016x}" for value in sums)


def unpack_sums(text: str, length: int) -> tuple[int, ...]:
    """What `pack_sums` packed of a body of `length` bytes; InvalidError when it is not such a text."""
    if not _SUMS.fullmatch(text) or len(text) != 16 * -(-length // CHUNK_BYTES):
        raise InvalidError(f"the chunk sums are not those of a body of {length} bytes: {shown(text)}")
    return tuple(int(text[at : at + 16], 16) for at in range(0, len(text), 16))


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def seal(fields: dict[str, Any]) -> bytes:
    """`fields` as JSON with a `checksum` member over the rest."""
    checksum = xxhash.xxh3_64_hexdigest(_canonical(fields))
    return json.dumps({**fields, "checksum": checksum}, ensure_ascii=False, indent=1).encode() + b"\n"


def unseal(text: bytes, model: str, most_bytes: int) -> Members:
    """The members of a JSON text made by `seal`; InvalidError when it is too long or a bit of it is wrong."""
    members = Members(parse(text, model, most_bytes), model)
    checksum = members.values.pop("checksum", None)
    try:
        right = xxhash.xxh3_64_hexdigest(_canonical(members.values))
    except (ValueError, RecursionError) as error:  # what UTF-8 can't encode
        raise InvalidError(f"{model}: not what is written there: {error}") from error
    if checksum != right:
        raise InvalidError(f"{model}: the checksum is wrong")
    return members


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


MEMORY_SECONDS = 86400.0
"""So long after it was fetched a wrong body is remembered: then it may be fetched once more."""
MAX_STATE_BYTES = MAX_RECORD_BYTES + 64 * 1024
_MAX_DETAIL = 2000
_MAX_UPSTREAMS = 256


class Phase(StrEnum):
    """A fill's phases."""

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
"""Forward only; CLAIMED to COMMITTED is a takeover that finds nothing left to fetch. UNSTORABLE: the body
goes on to its readers from memory (gup.cache.memory_files), which may still break off.
"""


def may_move(before: Phase, after: Phase) -> bool:
    return after in TRANSITIONS[before]


@dataclass(frozen=True, slots=True)
class Failure:
    """What to answer, and for how long: nobody asks upstream before it ends.

    `until` is on the machine's monotonic clock (shared by processes, untouched by clock changes); `ttl`
    bounds it, since that clock starts anew at boot.
    """

    slug: str
    detail: str
    ttl: float
    until: float

    def stands(self, monotonic_now: float) -> bool:
        return 0 < self.until - monotonic_now <= self.ttl

    def problem(self, monotonic_now: float) -> Problem:
        """The problem to tell a client. `Retry-After` stands where trying again may help."""
        retry = None if PROBLEMS[self.slug].status in (404, 410) else max(self.until - monotonic_now, 1.0)
        return Problem(self.slug, self.detail, retry_after_seconds=retry)

    @classmethod
    def of(cls, problem: Problem, ttl: float, monotonic_now: float) -> "Failure":
        return cls(problem.slug, plain_text(problem.detail, _MAX_DETAIL), ttl, monotonic_now + ttl)

    @classmethod
    def from_json(cls, fields: object) -> "Failure":
        """InvalidError when `fields` are no failure."""
        members = Members(fields, "failure")
        slug = members.text("slug", _MAX_DETAIL)
        if slug not in PROBLEMS:
            raise InvalidError(f"failure: 'slug' is unknown: {shown(slug)}")
        return cls(
            slug,
            members.text("detail", _MAX_DETAIL),
            members.number("ttl", 0, MAX_TIME),
            members.number("until", -MAX_TIME, MAX_TIME),
        )


Told = tuple[str | None, str | None, int | None]
"""ETag, Last-Modified and length, by which an upstream's body is known again."""


@dataclass(frozen=True, slots=True)
class Hold:
    """One upstream that is not to be asked for a key for now. Times are on the monotonic clock.

    It is asked again at `until`, `wait` seconds after the hold began. `told` is what it told of a body that
    was found wrong; its body is not read while it tells the same, until `forgotten_at`. `times` counts how
    often it was found wrong.
    """

    upstream: str
    until: float
    wait: float
    times: int = 0
    told: Told | None = None
    forgotten_at: float = 0.0

    def seconds_left(self, monotonic_now: float) -> float:
        """Time until the upstream may be asked; 0: now. A clock that began anew at boot ends it."""
        left = self.until - monotonic_now
        return left if 0 < left <= self.wait else 0.0

    def remembers(self, monotonic_now: float) -> bool:
        """Whether it is of any use still."""
        return self.seconds_left(monotonic_now) > 0 or 0 < self.forgotten_at - monotonic_now <= MEMORY_SECONDS

    def to_json(self) -> list[object]:
        return [self.upstream, self.until, self.wait, self.times, self.told, self.forgotten_at]

    @classmethod
    def from_json(cls, fields: object) -> "Hold":
        """InvalidError when `fields` are no hold."""
        if not isinstance(fields, list) or len(fields) != len(cls.__slots__):
            raise InvalidError(f"hold: must be an array of {len(cls.__slots__)}, not {shown(fields)}")
        upstream, until, wait, times, told, forgotten_at = fields
        return cls(
            text(upstream, "hold: an upstream", _MAX_DETAIL),
            number(until, "hold: its end", -MAX_TIME, MAX_TIME),
            number(wait, "hold: its wait", 0, MAX_TIME),
            whole(times, "hold: a count"),
            None if told is None else _told(told),
            number(forgotten_at, "hold: its memory's end", -MAX_TIME, MAX_TIME),
        )


def _told(fields: object) -> Told:
    if not isinstance(fields, list) or len(fields) != 3:
        raise InvalidError(f"hold: what tells a body must be an array of 3, not {shown(fields)}")
    etag, last_modified, length = fields
    return (
        None if etag is None else text(etag, "hold: an ETag", _MAX_DETAIL),
        None if last_modified is None else text(last_modified, "hold: a date", _MAX_DETAIL),
        None if length is None else whole(length, "hold: a length"),
    )


@dataclass(frozen=True, slots=True)
class FillState:
    """One state file. COMMITTED carries the record: from it an interrupted commit is done again."""

    key: ContentKey
    kind: Kind
    generation: int
    phase: Phase
    head: Head | None = None
    failure: Failure | None = None
    record: Record | None = None
    path: str = ""
    """What upstream is asked for: lets anybody take the fill over."""
    holds: tuple[Hold, ...] = ()
    """Upstreams not to be asked for it, or not to be believed."""
    ahead: bool = False
    """Whether nobody had asked for it: then whoever fetches ahead goes on with it, or a client that asks."""
    pinned: bool = False
    stored_at: float | None = None
    """Of a demoted entry: they are the entry's again when it is whole. Unix seconds."""
    passed_through: bool = False
    """UNSTORABLE, and not for want of the disk alone: each client is passed through."""
    service_start: float = 0.0
    """Of the service whose leader wrote this. A part that an earlier service left may be torn: it is not read
    before the leader of today has compared it and written its own state. Unix seconds.
    """
    told: Mapping[str, Validators] = field(default_factory=dict)
    """The validators of each upstream that has given a part of the body: who goes on compares them."""

    def stands(self, monotonic_now: float) -> bool:
        """Whether it still says what is not to be asked, of any upstream or of one."""
        failed = self.failure is not None and self.failure.stands(monotonic_now)
        return failed or any(hold.remembers(monotonic_now) for hold in self.holds)

    def encode(self) -> bytes:
        failure = self.failure
        return seal(
            {
                "format": FORMAT,
                "key": self.key.text,
                "kind": str(self.kind),
                "generation": self.generation,
                "phase": str(self.phase),
                "head": self.head.to_json() if self.head else None,
                "failure": {name: getattr(failure, name) for name in Failure.__slots__} if failure else None,
                "record": self.record.to_json() if self.record else None,
                "path": self.path,
                "ahead": self.ahead,
                "pinned": self.pinned,
                "stored_at": self.stored_at,
                "passed_through": self.passed_through,
                "service_start": self.service_start,
                "told": {name: validators.to_json() for name, validators in self.told.items()},
                "holds": [hold.to_json() for hold in self.holds],
            }
        )

    @classmethod
    def decode(cls, sealed: bytes) -> "FillState":
        """InvalidError when the text is damaged, of another format or contradicts itself."""
        members = unseal(sealed, "state", MAX_STATE_BYTES)
        require_format(members)
        key = read_key(members)
        told = Members(members["told"], "validators") if "told" in members else None
        rows = members.rows("holds", _MAX_UPSTREAMS) if "holds" in members else []
        state = cls(
            key=key,
            kind=members.one_of("kind", Kind),
            generation=members.whole("generation"),
            phase=members.one_of("phase", Phase),
            head=Head.from_json(members["head"]) if "head" in members else None,
            failure=Failure.from_json(members["failure"]) if "failure" in members else None,
            record=Record.from_json(members["record"]) if "record" in members else None,
            path=read_path(members, key),
            ahead="ahead" in members and members.flag("ahead"),
            pinned="pinned" in members and members.flag("pinned"),
            stored_at=members.time("stored_at") if "stored_at" in members else None,
            passed_through="passed_through" in members and members.flag("passed_through"),
            service_start=members.time("service_start") if "service_start" in members else 0.0,
            told={name: Validators.from_json(row) for name, row in told.values.items()} if told else {},
            holds=tuple(Hold.from_json(row) for row in rows),
        )
        state._check()
        return state

    def _check(self) -> None:
        """What a phase goes with, and what others rely on."""
        if self.phase is Phase.COMMITTED and self.record is None:
            raise InvalidError("state: a commit without its record")
        if self.record is not None and self.record.key != self.key:
            raise InvalidError(f"state: its record is that of {self.record.key.text}")
        if self.phase is Phase.STREAMING and self.head is None:
            raise InvalidError("state: a body under way without its head")
        if self.phase in (Phase.FAILED, Phase.UNSTORABLE) and self.failure is None:
            raise InvalidError("state: a failure that does not tell why")


def make_etag(key: ContentKey, length: int, remote: RemoteHead) -> str:
    """Our strong ETag: of key, length and the first response's validators, or of chance if it has none."""
    validator = remote.etag or remote.last_modified
    return _tag(key, length, validator) if validator else etag_of_chance(key, length)


def etag_of_chance(key: ContentKey, length: int) -> str:
    """A tag that no other body has: for one whose validators do not tell it from others."""
    return _tag(key, length, secrets.token_hex(16))


def _tag(key: ContentKey, length: int, validator: str) -> str:
    name = "\n".join((key.text, str(length), validator))
    return f'"{xxhash.xxh3_128_hexdigest(name.encode())}"'


def head_of(key: ContentKey, remote: RemoteHead, *, changed: bool = False) -> Head:
    """What clients are told of a body that `remote` announces.

    `changed`: other bytes were known under these validators, so they make no tag.
    """
    etag = None
    if remote.length is not None:
        etag = etag_of_chance(key, remote.length) if changed else make_etag(key, remote.length, remote)
    return Head(
        length=remote.length,
        etag=etag,
        content_type=kept_field(remote.content_type) or "application/octet-stream",
        last_modified=kept_field(remote.last_modified),
        upstream=remote.upstream,
        upstream_etag=kept_tag(remote.etag),
    )


def remote_of(head: Head) -> RemoteHead:
    """What upstream told at first of a body that was begun."""
    return RemoteHead(
        200, 0, head.length, head.upstream_etag, head.last_modified, head.content_type, head.upstream
    )


def absent(remote: RemoteHead) -> Problem | UpstreamFailure:
    """What an answer without a body means."""
    if remote.status == 304:
        detail = f"{remote.upstream} answered 304 though nothing was asked conditionally"
        return UpstreamFailure("error", "upstream-error", detail, again=False)
    slug = "upstream-gone" if remote.status == 410 else "upstream-not-found"
    return Problem(slug, f"{remote.upstream} answered {remote.status}")
