"""Where a fill stands, for other processes and the next start: phases, their table, the state file."""

from dataclasses import dataclass
from enum import StrEnum

from gup.cache.checksum import seal, unseal
from gup.cache.record import FORMAT, MAX_RECORD_BYTES, Head, Record, read_key, read_path, require_format
from gup.content.key import ContentKey, Kind
from gup.errors import PROBLEMS, Problem
from gup.jsonmodel import MAX_TIME, InvalidError, Members, plain_text, shown

MAX_STATE_BYTES = MAX_RECORD_BYTES + 64 * 1024
_MAX_DETAIL = 2000


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
goes on to its readers from memory (gup.cache.passing), which may still break off.
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
    ahead: bool = False
    """Whether nobody had asked for it: then whoever fetches ahead goes on with it, or a client that asks."""

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
            }
        )

    @classmethod
    def decode(cls, text: bytes) -> "FillState":
        """InvalidError when the text is damaged, of another format or contradicts itself."""
        members = unseal(text, "state", MAX_STATE_BYTES)
        require_format(members)
        key = read_key(members)
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
