"""Whom a node asks for a key it does not have. Pure: lists in, steps out.

Two rules keep nodes from waiting for each other. Every key ranks the nodes by a hash of key and node name
(rendezvous), whatever lists the nodes have. *Up:* a node makes another one fetch, and waits for it, only when
that one ranks higher than itself. *Held:* of all others it takes only what they hold: bodies that are
committed, or arrive there from the WAN at that moment. So every chain of waiting nodes leads upwards, or to
one that waits for the WAN alone.
"""

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import NamedTuple

import xxhash


class Source(Enum):
    """Where a body may come from."""

    ASK = "ask"
    """A member that may fetch it for this."""
    HELD = "held"
    """Members that hold it; none of them fetches for this. All are asked at once, the first that holds it
    serves."""
    WAN = "wan"


class Step(NamedTuple):
    """One try; the next step follows when it fails."""

    source: Source
    members: tuple[str, ...] = ()


def rank(key: str, name: str) -> tuple[int, str]:
    """The rank of a node for a key; the higher one is asked first. Two nodes never rank alike."""
    return xxhash.xxh3_64_intdigest(f"{name}\n{key}".encode()), name


def ranked(key: str, names: Iterable[str]) -> list[str]:
    """The nodes, the highest first. Without one of them the order of the others stays."""
    return sorted(set(names), key=lambda name: rank(key, name), reverse=True)


def above(key: str, node: str, members: Iterable[str]) -> list[str]:
    """The members that rank higher than `node`, the highest first."""
    own = rank(key, node)
    return [name for name in ranked(key, members) if rank(key, name) > own]


def steps(key: str, node: str, members: Iterable[str], *, immutable: bool) -> Iterator[Step]:
    """How `node` comes by the key. `members` may have `node` or not; without others there is one step, WAN.

    A new owner, and one with an emptied disk, finds what it should have at those who rank lower. Content that
    changes is not taken from them: their copies may be older than upstream's.
    """
    higher = above(key, node, members)
    for name in higher:
        yield Step(Source.ASK, (name,))
    lower = tuple(name for name in ranked(key, members) if name not in higher and name != node)
    if immutable and lower:
        yield Step(Source.HELD, lower)
    yield Step(Source.WAN)


def further_steps(key: str, node: str, members: Iterable[str], broken_off: str | None) -> Iterator[Step]:
    """How `node` comes by the rest of a body that broke off in the middle.

    `broken_off` is the member that it came from, None for the WAN. Nobody is asked to fetch: the node has a
    part, and readers of it who may be waited for by those above.
    """
    if broken_off is not None:
        yield Step(Source.HELD, (broken_off,))
    others = tuple(name for name in ranked(key, members) if name not in (node, broken_off))
    if others:
        yield Step(Source.HELD, others)
    yield Step(Source.WAN)
