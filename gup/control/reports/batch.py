"""What is still to be written of clients: merged as it comes, bounded. Never does I/O."""

from dataclasses import dataclass, field

from gup.content.key import Kind, delta_step
from gup.control.events import Take
from gup.control.reports.pieces import Pieces
from gup.control.rows import content_revision
from gup.control.streams import revision_time

MAX_PENDING = 100_000
_FIRST_DATE = 946_684_800.0
"""The beginning of the century that revisions have two digits of the year of."""
_AHEAD_SECONDS = 2 * 86400.0
"""A revision's date may be so far ahead: time zones, and clocks. One further ahead is not believed."""

StreamId = tuple[str, str, str]


_TOGETHER_SECONDS = 3.0
"""Workers tell once a second: of what a client took within so long nobody knows which came first."""


def supersedes(revision: str, at: float, other: str, other_at: float) -> bool:
    """Whether a client that took both, then and then, stands at `revision` since.

    A machine that was set up anew takes an older one: then the last one taken counts.
    """
    if abs(at - other_at) <= _TOGETHER_SECONDS:
        return revision > other
    return at > other_at


@dataclass(slots=True)
class Seen:
    """A client's sightings since the last write. Texts are "" where nothing was stated."""

    first_at: float
    seen_at: float
    version: str = ""
    language: str = ""


@dataclass(slots=True)
class Standing:
    """What one client did with one stream since the last write: took, asked for, said that it holds."""

    revision: str = ""
    taken_at: float = 0.0
    version_then: str = ""
    asked: str = ""
    asked_at: float = 0.0
    came_from: str = ""
    took: dict[str, float] = field(default_factory=dict)
    """Every revision taken, and when."""

    def take(self, revision: str, at: float, version: str) -> None:
        self.took[revision] = at
        if revision != self.revision and supersedes(revision, at, self.revision, self.taken_at):
            self.revision, self.taken_at, self.version_then = revision, at, version

    def ask(self, revision: str, at: float, came_from: str) -> None:
        if at >= self.asked_at:
            self.asked_at, self.came_from = at, came_from or self.came_from
        self.asked = max(self.asked, revision)


class Batch:
    """The news since the last write. `add` and `see` fill it; whoever writes it takes it whole."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self.standings: dict[tuple[str, StreamId], Standing] = {}

    def __bool__(self) -> bool:
        return bool(self.seen)

    @property
    def full(self) -> bool:
        return len(self.seen) + len(self.standings) >= MAX_PENDING

    def absorb(self, newer: "Batch") -> None:
        """Take in what came after this, which could not be written; as much as there is room for."""
        for client, seen in newer.seen.items():
            self.see(client, seen.seen_at, seen.version, seen.language)
        for where, news in newer.standings.items():
            if where not in self.standings and (self.full or where[0] not in self.seen):
                continue
            standing = self.standings.setdefault(where, Standing())
            standing.ask(news.asked, news.asked_at, news.came_from)
            for revision, at in news.took.items():
                standing.take(revision, at, news.version_then)

    def see(self, client: str, at: float, version: str = "", language: str = "") -> None:
        """A client asked for something."""
        seen = self.seen.get(client)
        if seen is None:
            if self.full:
                return
            seen = self.seen[client] = Seen(at, at)
        seen.seen_at = max(seen.seen_at, at)
        seen.version = version or seen.version
        seen.language = language or seen.language

    def add(self, take: Take, at: float, pieces: Pieces) -> None:
        """A client took or asked for a body."""
        self.see(take.client, at, take.version, take.language)
        whole = take.part is None and not take.asked
        if take.part is not None:
            whole = pieces.add(take.client, take.key.text, *take.part)
        revision = content_revision(kind_of(take), take.key.revision, take.key.file)
        date = revision_time(revision) if revision else None
        if revision is None or date is None or not _FIRST_DATE <= date <= at + _AHEAD_SECONDS:
            return
        where = (take.client, (take.key.version, take.key.language, take.key.stream))
        standing = self.standings.get(where)
        if standing is None:
            if self.full:
                return
            standing = self.standings[where] = Standing()
        step = delta_step(take.key.file)
        standing.ask(revision, at, step.from_revision if step else "")
        if whole:
            standing.take(revision, at, take.version)


def kind_of(take: Take) -> Kind:
    """Full or delta by the file's name; what is neither has no revision."""
    if delta_step(take.key.file):
        return Kind.DELTA
    return Kind.FULL if take.key.file.lower().startswith("full.") else Kind.OTHER
