"""What is to be fetched ahead, and what became of it; bounded, kept over restarts. Fetches nothing."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from gup.content.deltas import named
from gup.content.key import ContentKey, Kind
from gup.content.routes import leads_to
from gup.control.rows import Stream, stream_of
from gup.jsonmodel import InvalidError, Members, plain_text, shown

MAX_WISHES = 1000
"""All rows; the oldest that have ended are forgotten."""
MAX_PENDING = 900
_MAX_TEXT = 9000

By = Literal["traffic", "operator"]


class Outcome(StrEnum):
    """Of a wish."""

    QUEUED = "queued"
    FETCHING = "fetching"
    STORED = "stored"
    PRESENT = "present"
    """It was in the store already, or somebody else's fill brought it."""
    ABSENT = "absent"
    """No upstream has it."""
    FAILED = "failed"
    SUPERSEDED = "superseded"
    """A newer revision was asked for before its turn came."""


TRANSITIONS: dict[Outcome, frozenset[Outcome]] = {
    Outcome.QUEUED: frozenset({Outcome.FETCHING, Outcome.PRESENT, Outcome.SUPERSEDED}),
    Outcome.FETCHING: frozenset(
        {Outcome.STORED, Outcome.PRESENT, Outcome.ABSENT, Outcome.FAILED, Outcome.QUEUED}
    ),
    Outcome.STORED: frozenset(),
    Outcome.PRESENT: frozenset(),
    Outcome.ABSENT: frozenset(),
    Outcome.FAILED: frozenset(),
    Outcome.SUPERSEDED: frozenset(),
}
"""FETCHING to QUEUED: it failed in a way that may pass, or the controller ended meanwhile."""

PENDING = frozenset({Outcome.QUEUED, Outcome.FETCHING})


@dataclass(slots=True, kw_only=True)
class Wish:
    """One body to fetch ahead. The prefetcher alone changes it; times are Unix seconds."""

    key: ContentKey
    path: str
    """As upstream is asked for it."""
    kind: Kind
    by: By
    asked_at: float
    outcome: Outcome = Outcome.QUEUED
    detail: str = ""
    ended_at: float | None = None
    due_at: float = 0.0
    tries: int = 0

    @property
    def pending(self) -> bool:
        return self.outcome in PENDING

    def move(self, outcome: Outcome, now: float, detail: str = "") -> None:
        assert outcome in TRANSITIONS[self.outcome], (self.outcome, outcome)
        self.outcome, self.detail = outcome, plain_text(detail, _MAX_TEXT)
        self.ended_at = None if self.pending else now

    def to_json(self) -> dict[str, Any]:
        """All of it; `from_json` reads it back."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {"key": self.key.text, "kind": str(self.kind), "outcome": str(self.outcome)}

    @classmethod
    def from_json(cls, fields: object) -> "Wish":
        """InvalidError when `fields` are no wish. What was being fetched is queued again."""
        members = Members(fields, "wish")
        key, path = ContentKey.parse(members["key"]), members.text("path", _MAX_TEXT)
        if not leads_to(path, key):
            raise InvalidError(f"wish: 'path' does not lead to {key.text}: {shown(path)}")
        outcome = members.one_of("outcome", Outcome)
        by: By = "operator" if members["by"] == "operator" else "traffic"
        return cls(
            key=key,
            path=path,
            kind=members.one_of("kind", Kind),
            by=by,
            asked_at=members.time("asked_at"),
            outcome=Outcome.QUEUED if outcome is Outcome.FETCHING else outcome,
            detail=members.text("detail", _MAX_TEXT),
            ended_at=members.time("ended_at") if "ended_at" in members else None,
            tries=members.whole("tries"),
        )


class Wishes:
    """By key, the latest at the end. `changed` is set False by whoever writes them down."""

    def __init__(self) -> None:
        self._rows: OrderedDict[ContentKey, Wish] = OrderedDict()
        self.changed = False

    def __iter__(self) -> Iterator[Wish]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: ContentKey) -> Wish | None:
        return self._rows.get(key)

    @property
    def pending(self) -> int:
        return sum(wish.pending for wish in self)

    def add(self, wish: Wish) -> bool:
        """Put it at the end, in place of an earlier one of its key; False when too many are pending."""
        if self.pending >= MAX_PENDING:
            return False
        self._rows[wish.key] = wish
        self._rows.move_to_end(wish.key)
        self._forget()
        self.changed = True
        return True

    def move(self, wish: Wish, outcome: Outcome, now: float, detail: str = "") -> None:
        wish.move(outcome, now, detail)
        self.changed = True

    def due(self, kinds: frozenset[Kind], now: float) -> Wish | None:
        """The next to fetch of these kinds: an operator's first, then in their order."""
        found = [
            wish
            for wish in self
            if wish.outcome is Outcome.QUEUED and wish.kind in kinds and wish.due_at <= now
        ]
        return min(found, key=lambda wish: wish.by != "operator", default=None)

    def supersede(self, stream: Stream, newest: str, now: float) -> None:
        """Nobody needs what leads to an older revision, and was not asked for by an operator."""
        for wish in self:
            if wish.outcome is Outcome.QUEUED and wish.by == "traffic" and stream_of(wish.key) == stream:
                names = named(wish.key)
                if names is not None and names.revision < newest:
                    self.move(wish, Outcome.SUPERSEDED, now, f"{newest} is asked for by now")

    def _forget(self) -> None:
        if len(self._rows) > MAX_WISHES:
            oldest = next(wish for wish in self if not wish.pending)
            del self._rows[oldest.key]

    def to_json(self) -> list[dict[str, Any]]:
        return [wish.to_json() for wish in self]

    def restore(self, rows: Any) -> None:
        """Take back what `to_json` gave, before those that have come since; what is no wish is left out."""
        newer, self._rows = self._rows, OrderedDict()
        for row in rows if isinstance(rows, list) else ():
            try:
                wish = Wish.from_json(row)
            except ValueError:
                continue
            self._rows[wish.key] = wish
        self._rows |= newer
        for key in newer:
            self._rows.move_to_end(key)
        while len(self._rows) > MAX_WISHES:
            self._rows.popitem(last=False)
