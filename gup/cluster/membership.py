"""Who belongs to the cluster, as one node sees it. Pure: rows and answers in, a list out.

Rows come with each beat and live a little longer than a beat at the engine. A row that is missing takes
nobody off the list; silence does: neither a row nor an answer to a direct probe for `member_timeout`. So
without the engine the list holds as long as its members answer.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from gup.cluster.member_list import Member

PROTOCOL = 1
"""Of what members ask each other, with the routes and keys in it. Raised when an older version would err."""
PROBE_SECONDS = 1.0
"""Between two probes of a member, and the longest wait for its answer."""
_FAILURES = 2
"""Probes in a row without an answer, until a member is no longer asked."""
MOST_SECONDS = 600.0
_MINUTE = 60.0
GONE_SECONDS = 86400.0
"""For so long it is told who was a member."""
_MOST_GONE = 16
State = Literal["ready", "not-ready", "unreachable", "unlike", "unknown"]


@dataclass(frozen=True, slots=True)
class Row:
    """What a node tells of itself with each beat. Newer versions may say more: that is left out."""

    name: str
    start: int
    address: str
    protocol: int
    fingerprint: str
    """Of its upstreams: nodes that would fetch other things are not asked."""
    apart: bool = False
    """It has had no recent answer from the engine, so it takes its part of the WAN's rate without a grant."""
    leaving: bool = False
    share: int = 0
    """Of the WAN's rate, in bytes/s, as it had it before this beat."""
    received_rate: int = 0
    """What it reads from the WAN, in bytes/s."""
    totals: Mapping[str, int] = field(default_factory=dict)


_ROW = TypeAdapter(Row)


def write_row(row: Row) -> str:
    return _ROW.dump_json(row).decode()


def read_row(text: str | None) -> Row | None:
    """None for what is no row."""
    if text is None:
        return None
    try:
        return _ROW.validate_json(text)
    except ValidationError:
        return None


@dataclass(frozen=True, slots=True)
class Gone:
    """Who was a member; `left`: it said goodbye, else it fell silent at `at` (monotonic seconds)."""

    name: str
    address: str
    row: Row | None
    at: float
    left: bool


@dataclass(slots=True)
class Peer:
    """Another member. Times are monotonic seconds."""

    name: str
    address: str
    seen_at: float
    """When its last row came, or when this node began to wait for one."""
    fits: bool
    row: Row | None = None
    fresh: bool = False
    """Its row was in the last beat's answer."""
    answered_at: float | None = None
    probed_at: float = float("-inf")
    failures: int = 0
    refused: bool = False
    """Its machine answers that nobody listens: it takes no part of the WAN."""
    why: str = ""
    ready: bool = False
    known: str | None = None
    """What it knew of orders when it answered last."""

    @property
    def state(self) -> tuple[State, str]:
        """Whether it may be asked, and why not."""
        if self.row is not None and not self.fits:
            other = self.row.protocol != PROTOCOL
            return "unlike", "it has another version of the protocol" if other else "its upstreams differ"
        if self.failures >= _FAILURES:
            return "unreachable", self.why
        if self.answered_at is None or not self.fits:
            return "unknown", "not known yet"
        return ("ready", "") if self.ready else ("not-ready", "it starts or stops")

    @property
    def askable(self) -> bool:
        return self.state[0] == "ready"


class Membership:
    """The list. `known` are the members of an earlier run, and `most` how many there were."""

    def __init__(
        self,
        name: str,
        fingerprint: str,
        timeout_seconds: float,
        now: float,
        known: Iterable[Member] = (),
        most: int = 0,
    ) -> None:
        self.name, self.fingerprint = name, fingerprint
        self._timeout_seconds = timeout_seconds
        self._peers = {
            member.name: Peer(member.name, member.address, now, member.askable) for member in known
        }
        self._counts: dict[int, int] = {int(now // _MINUTE): most} if most else {}
        self.gone: dict[str, Gone] = {}

    # --- what happens

    def see(self, rows: Iterable[Row], now: float) -> None:
        """The rows in a beat's answer; this node's own may be among them."""
        rows = [row for row in rows if row.name != self.name]
        for peer in self._peers.values():
            peer.fresh = False
        for row in rows:
            if row.leaving:
                self._peers.pop(row.name, None)
                self._note_gone(Gone(row.name, row.address, row, now, left=True))
                continue
            peer = self._peers.setdefault(row.name, Peer(row.name, row.address, now, fits=False))
            if peer.address != row.address:
                peer = self._peers[row.name] = Peer(row.name, row.address, now, fits=False)
            elif peer.row is not None and peer.row.start != row.start:  # a successor: it may do better
                peer.failures, peer.probed_at = 0, float("-inf")
            peer.row, peer.fresh, peer.seen_at = row, True, now
            peer.fits = row.protocol == PROTOCOL and row.fingerprint == self.fingerprint
        here = self._peers.keys() | {peer.address for peer in self._peers.values()}
        for gone in [gone for gone in self.gone.values() if not here.isdisjoint({gone.name, gone.address})]:
            del self.gone[gone.name]  # it is back, perhaps with another name
        self._count(len({row.name for row in rows} | self._peers.keys()) + 1, now)

    def engine_is_away(self) -> None:
        """A beat got no answer."""
        for peer in self._peers.values():
            peer.fresh = False

    def answered(self, name: str, now: float, *, ready: bool, known: str = "") -> None:
        """A probe was answered; `ready`: it may be asked. `known`: what it knows of orders."""
        if (peer := self._peers.get(name)) is not None:
            peer.known = known
            peer.answered_at, peer.failures, peer.ready = now, 0, ready
            peer.refused, peer.why = False, ""

    def failed(self, name: str, why: str, *, refused: bool = False) -> None:
        """A probe was not answered; `refused`: nobody listens there."""
        if (peer := self._peers.get(name)) is not None:
            peer.failures = _FAILURES if refused else peer.failures + 1
            peer.refused, peer.why = refused, why

    def due(self, now: float) -> list[Member]:
        """The members to probe now; each is probed once in PROBE_SECONDS."""
        found = [peer for peer in self._peers.values() if now - peer.probed_at >= PROBE_SECONDS]
        for peer in found:
            peer.probed_at = now
        return [Member(peer.name, peer.address, peer.askable) for peer in found]

    def look(self, now: float) -> None:
        """Take those off the list that have been silent for too long."""
        for peer in list(self._peers.values()):
            heard_at = max(peer.seen_at, peer.answered_at or 0.0)
            if now - heard_at >= self._timeout_seconds:
                del self._peers[peer.name]
                self._note_gone(Gone(peer.name, peer.address, peer.row, heard_at, left=False))
        for gone in [gone for gone in self.gone.values() if now - gone.at >= GONE_SECONDS]:
            del self.gone[gone.name]

    def _note_gone(self, gone: Gone) -> None:
        """The latest ones only: names may come from anywhere."""
        self.gone = {**{name: one for name, one in self.gone.items() if name != gone.name}, gone.name: gone}
        if len(self.gone) > _MOST_GONE:
            del self.gone[next(iter(self.gone))]

    def _count(self, members: int, now: float) -> None:
        minute = int(now // _MINUTE)
        kept = {at: most for at, most in self._counts.items() if minute - at <= MOST_SECONDS / _MINUTE}
        self._counts = kept | {minute: max(members, kept.get(minute, 0))}

    # --- what follows from it

    def members(self) -> tuple[Member, ...]:
        return tuple(Member(peer.name, peer.address, peer.askable) for peer in self.peers())

    def peers(self) -> list[Peer]:
        return sorted(self._peers.values(), key=lambda peer: peer.name)

    @property
    def is_complete(self) -> bool:
        """Whether each member was probed."""
        return all(peer.answered_at is not None or peer.failures for peer in self._peers.values())

    def most(self, now: float) -> int:
        """The most members of the last ten minutes, this node among them; 0 while nothing is known."""
        oldest = int(now // _MINUTE) - MOST_SECONDS / _MINUTE
        return max((count for minute, count in self._counts.items() if minute >= oldest), default=0)

    def without_grant(self) -> int:
        """How many members may use the WAN though the engine knows nothing of it."""
        return sum(
            1
            for peer in self._peers.values()
            if not peer.refused and not (peer.fresh and peer.row is not None and not peer.row.apart)
        )

    def unreachable(self) -> Iterator[tuple[str, str]]:
        """Members that the engine knows and this node can't reach: names, and why."""
        for peer in self._peers.values():
            if peer.fresh and peer.failures >= _FAILURES:
                yield peer.name, f"{peer.address}: {peer.why}"

    def unlike(self) -> Iterator[tuple[str, str]]:
        """Members that are not asked since they speak or fetch otherwise: names, and in what they differ."""
        for peer in self._peers.values():
            if peer.fresh and peer.state[0] == "unlike":
                yield peer.name, peer.state[1]
