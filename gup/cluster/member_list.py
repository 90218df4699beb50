"""The members as the controller has written them, for workers to read: run/members."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from gup.files import replace_file
from gup.metrics import MAX_MEMBERS

FILE = "members"


@dataclass(frozen=True, slots=True)
class Member:
    """Another node of the cluster. `address` is its URL, without a path."""

    name: str
    address: str
    askable: bool
    """Whether it may be asked: it answers, and has this node's protocol, upstreams and routes."""


@dataclass(frozen=True, slots=True)
class Members:
    """The cluster as this node sees it; `others` are in the order of their names."""

    node: str = ""
    """This node's name; "" while it is alone."""
    others: tuple[Member, ...] = ()
    most: int = 1
    """The most members of the last ten minutes, this one among them."""
    slots: tuple[str, ...] = ()
    """Whoever has been a member: each is counted at its place in here, so places never change."""

    def slot(self, name: str) -> int:
        return self.slots.index(name) if name in self.slots else MAX_MEMBERS

    @property
    def askable(self) -> dict[str, str]:
        """The addresses of those who may be asked, by name."""
        return {member.name: member.address for member in self.others if member.askable}

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.node, *(member.name for member in self.others)})


ALONE = Members()
_ADAPTER = TypeAdapter(Members)


def write_members(run: Path, members: Members) -> None:
    """Replace the file; OSError. Call it before the epoch is raised."""
    replace_file(run / FILE, _ADAPTER.dump_json(members), durable=False)


def read_members(run: Path) -> Members:
    """What the file says; alone without one, or when it is damaged."""
    try:
        return _ADAPTER.validate_json((run / FILE).read_bytes())
    except (OSError, ValidationError):
        return ALONE


class MembersReader:
    """The members now: the file is read again when the epoch has changed. Cheap enough for each request."""

    def __init__(self, run: Path, epoch: Callable[[], int]) -> None:
        self._run, self._epoch = run, epoch
        self._read_at: int | None = None
        self._members = ALONE

    def __call__(self) -> Members:
        epoch = self._epoch()
        if epoch != self._read_at:
            self._members, self._read_at = read_members(self._run), epoch
        return self._members
