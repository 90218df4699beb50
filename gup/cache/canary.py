"""Canary: the clients of `rules.canary` get a new revision first, all others after `rules.canary.wait`.

A revision is new when it is newer than all that the site has known of its stream. The lines of run/revisions
say since when each one is known. Only the controller writes it, and raises the policy epoch: workers read it
with the policy. Pure but for the file.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from gup import config
from gup.cache.revision_holds import Moniker, Revision, is_within, kept_back
from gup.cluster.orders import Order
from gup.content.routes import Route
from gup.errors import Problem
from gup.files import FileError, read_file, replace_file
from gup.jsonmodel import InvalidError, Time, parse, read
from gup.units import time_in_words

log = logging.getLogger("gup.rules")

FILE = "revisions"
MAX_STREAMS = 1000
KEPT_REVISIONS = 40
"""The newest of each stream."""
_NUMBER = re.compile("[0-9]{1,20}")
_MAX_LINE_BYTES = 64 << 10
_MAX_BYTES = 64 << 20


def age(revision: str) -> tuple[int, str]:
    """Revisions in the order of their numbers."""
    digits = revision.lstrip("0")
    return len(digits), digits


@dataclass(frozen=True, slots=True)
class KnownRevisions:
    """The newest known revisions of a stream, each with the time since which it is known (Unix seconds).

    0 is one that an operator has opened to all. `newest` is the newest revision in this node's store that is
    neither on hold nor waits, "" without one.
    """

    stream: Moniker
    since: Mapping[Revision, Time] = field(default_factory=dict)
    newest: str = ""

    def with_one(self, revision: str, at: float) -> "KnownRevisions":
        """The earlier time counts, so that it makes no difference who tells it first."""
        since = {**self.since, revision: min(at, self.since.get(revision, at))}
        newest = sorted(since, key=age)[-KEPT_REVISIONS:]
        return replace(self, since={name: since[name] for name in newest})

    def by_the_clock(self, now: float, ahead_seconds: float) -> "KnownRevisions":
        """Times that are further ahead are from a clock that has been put back since: now, then."""
        since = {name: at if at <= now + ahead_seconds else now for name, at in self.since.items()}
        return self if since == self.since else replace(self, since=since)

    def latest(self) -> str:
        """Empty when none is known."""
        return max(self.since, key=age, default="")

    def knows(self, revision: str) -> bool:
        """Whether it, or a newer one, is known."""
        return age(revision) <= age(self.latest())


FirstSeen = tuple[str, str, float]
"""A stream, a revision of it, and since when it is known; as KnownRevisions has it."""


def ordered(order: Order) -> FirstSeen:
    """What another member of the cluster has told; InvalidError when it is no new revision."""
    given = {name: order.what.get(name) for name in ("stream", "revision", "since")}
    since = {given["revision"]: given["since"]} if isinstance(given["revision"], str) else given["revision"]
    one = read(_model(), {"stream": given["stream"], "since": since}, "new revision")
    return one.stream, *next(iter(one.since.items()))


class Waiting(NamedTuple):
    """A new revision. All get it at `opens_at` (Unix seconds); None: the wait begins when upstream is known
    to have it.
    """

    revision: str
    opens_at: float | None


class Canary:
    """The setting and what is known, in one process. False when no client goes first."""

    def __init__(self, rules: config.Rules, known: Iterable[KnownRevisions] = ()) -> None:
        self._own, self._mode = rules.canary, rules.mode
        self._known = {one.stream: one for one in known}

    def __bool__(self) -> bool:
        return bool(self._own.subnets) and self._mode != "off"

    @property
    def by_type(self) -> bool:
        """Whether it depends on the type of content."""
        return bool(self) and bool(self._own.types)

    @property
    def is_enforced(self) -> bool:
        return self._mode == "enforce"

    def of(self, stream: str, revision: str | None, type_: str, now: float) -> Waiting | None:
        """What is new about it; None when it is open to all. A revision of None may be any."""
        if not self or (self._own.types and type_ not in self._own.types):
            return None
        known = self._known.get(stream, KnownRevisions(stream))
        revision = known.latest() if revision is None else revision
        if not _NUMBER.fullmatch(revision):
            return None
        if (since := known.since.get(revision)) is not None:
            opens_at = since + self._own.wait if since else 0.0
            return Waiting(revision, opens_at) if now < opens_at else None
        return None if known.knows(revision) else Waiting(revision, None)

    def waiting(self, type_of: Mapping[str, str], now: float) -> list[tuple[str, Waiting]]:
        """All known revisions that are not open to all yet, by stream."""
        return [
            (stream, found)
            for stream, known in self._known.items()
            for revision in sorted(known.since, key=age)
            if (found := self.of(stream, revision, type_of.get(stream, ""), now)) is not None
        ]

    def is_first(self, client: str) -> bool:
        return is_within(client, self._own.subnets)

    def problem(self, route: Route, waiting: Waiting, now: float) -> Problem:
        """The 403 for a client that is not among the first."""
        newest = known.newest if (known := self._known.get(route.stream)) is not None else ""
        first = ", ".join(self._own.subnets)
        at = None if waiting.opens_at is None else datetime.fromtimestamp(waiting.opens_at, UTC)
        for_ = time_in_words(self._own.wait)
        until = f"for {for_} once it is here" if at is None else f"until {at:%Y-%m-%d %H:%M} UTC"
        detail = f"Revision {waiting.revision} is new. Clients in {first} get it first, {until}."
        stated = {
            "stream": route.stream,
            "revision": waiting.revision,
            "first": list(self._own.subnets),
            "opens_at": None if at is None else at.isoformat(timespec="seconds"),
        }
        left = self._own.wait if waiting.opens_at is None else waiting.opens_at - now
        return kept_back("canary", detail, route, newest, stated, retry_after_seconds=max(1.0, left))


@cache
def _model() -> TypeAdapter[KnownRevisions]:
    return TypeAdapter(KnownRevisions)


def read_known(run: Path) -> list[KnownRevisions]:
    """Without lines that can't be read. Blocks."""
    try:
        lines = read_file(run / FILE, _MAX_BYTES).splitlines()
    except FileError:
        return []
    found = list[KnownRevisions]()
    for line in lines:
        try:
            found.append(read(_model(), parse(line, "revisions", _MAX_LINE_BYTES), "revisions"))
        except InvalidError as error:
            log.warning("a line of run/%s is ignored: %s", FILE, error)
    return found


def keep_known(run: Path, known: Iterable[KnownRevisions]) -> None:
    """Replace the file; OSError. Blocks."""
    replace_file(run / FILE, b"".join(_model().dump_json(one) + b"\n" for one in known))
