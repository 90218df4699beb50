"""Where a fill stands, for other processes and the next start: phases, their table, the state file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from gup.cache.checksum import seal, unseal
from gup.cache.record import FORMAT, Head, Record
from gup.content.key import ContentKey, Kind
from gup.errors import PROBLEMS, Problem
from gup.upstream.validators import Validators

MEMORY_SECONDS = 86400.0
"""So long after it was fetched a wrong body is remembered: then it may be fetched once more."""


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
        return cls(problem.slug, problem.detail, ttl, monotonic_now + ttl)


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

    def to_json(self) -> list[Any]:
        return [self.upstream, self.until, self.wait, self.times, self.told, self.forgotten_at]

    @classmethod
    def from_json(cls, fields: Any) -> "Hold":
        """ValueError or TypeError when `fields` are no hold."""
        upstream, until, wait, times, told, forgotten_at = fields
        etag, last_modified, length = told or (None, None, None)
        known = (
            None if etag is None else str(etag),
            None if last_modified is None else str(last_modified),
            None if length is None else int(length),
        )
        return cls(
            str(upstream), float(until), float(wait), int(times), known if told else None, float(forgotten_at)
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
                "told": {name: validators.to_json() for name, validators in self.told.items()},
                "holds": [hold.to_json() for hold in self.holds],
            }
        )

    @classmethod
    def decode(cls, text: bytes) -> "FillState":
        """ValueError when the text is damaged or of another format."""
        fields = unseal(text)
        try:
            return cls._from_json(fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a state file: {error}") from error

    @classmethod
    def _from_json(cls, fields: dict[str, Any]) -> "FillState":
        if fields["format"] != FORMAT:
            raise ValueError(f"unknown format {fields['format']!r}")
        return cls(
            key=ContentKey.parse(fields["key"]),
            kind=Kind(fields["kind"]),
            generation=int(fields["generation"]),
            phase=Phase(fields["phase"]),
            head=Head.from_json(fields["head"]) if fields["head"] else None,
            failure=Failure(**fields["failure"]) if fields["failure"] else None,
            record=Record.from_json(fields["record"]) if fields["record"] else None,
            path=str(fields["path"]),
            ahead=fields.get("ahead") is True,
            told={name: Validators.from_json(row) for name, row in fields.get("told", {}).items()},
            holds=tuple(Hold.from_json(row) for row in fields.get("holds", ())),
        )
