"""Where a fill stands, for other processes and the next start: phases, their table, the state file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from gup.cache.checksum import seal, unseal
from gup.cache.record import FORMAT, MAX_RECORD_BYTES, Head, Record, read_key, read_path, require_format
from gup.content.key import ContentKey, Kind
from gup.errors import PROBLEMS, Problem
from gup.jsonmodel import MAX_TIME, InvalidError, Members, number, plain_text, shown, text, whole
from gup.upstream.exchange import Validators

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
