"""Holds: revisions that an operator keeps from clients, and which clients may have them all the same.

The lines of run/holds. Only the controller writes it, and raises the policy epoch: workers read it with the
policy, so that no decision from before a hold is used after it. Pure but for the file.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, StringConstraints, TypeAdapter

from gup.cluster.orders import LONE, Order, Writer
from gup.content.catalog import normal_moniker
from gup.content.key import FULL, Kind, delta_step
from gup.content.routes import Route
from gup.errors import Problem
from gup.files import FileError, read_file, replace_file
from gup.jsonmodel import InvalidError, Time, parse, read

log = logging.getLogger("gup.holds")

FILE = "holds"
_MAX_LINE_BYTES = 256 << 10
_MAX_BYTES = 64 << 20
REVISION = "^[0-9]{1,20}$"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_HEX = "[0-9A-Fa-f]{1,4}"
SUBNET = (
    rf"^(({_OCTET}\.){{3}}{_OCTET}(/(3[0-2]|[12]?[0-9]))?|{_HEX}(:{_HEX}){{0,3}}::/(6[0-4]|[1-5]?[0-9]))$"
)
"""The clients of one IPv6 /64 count as one, so that there are no smaller subnets."""


def _moniker(text: str) -> str:
    if (moniker := normal_moniker(text)) is None:
        raise ValueError("must be a moniker: a GUID")
    return moniker


def _subnet(text: str) -> str:
    if not re.fullmatch(SUBNET, text):
        raise ValueError("must be a subnet such as 10.1.0.0/16 or 2001:db8::/32 (at most /64)")
    return str(ip_network(text, strict=False))


def _revision(text: str) -> str:
    if not re.fullmatch(REVISION, text):
        raise ValueError("must be a revision: 1 to 20 digits, such as 260801002")
    return text


Moniker = Annotated[str, AfterValidator(_moniker)]
Revision = Annotated[str, AfterValidator(_revision)]
Words = Annotated[str, StringConstraints(max_length=500)]
Subnet = Annotated[str, AfterValidator(_subnet)]


def revision_of(route: Route) -> str | None:
    """The revision that a body brings a client to; None for a full package that may be of any.

    Of a delta its file name decides: one that leads away from the revision of its folder is of another. A
    full in a folder that is no number, such as "latest", may be of any revision.
    """
    if (step := delta_step(route.file)) is not None:
        return step.to_revision
    any_ = route.kind is Kind.INDEX and FULL.fullmatch(route.file) is not None
    return None if any_ else route.revision


def is_within(client: str, subnets: Iterable[str]) -> bool:
    """`client` is who counts as one: an IPv4 address or an IPv6 /64, with a port where many share it."""
    network: Any = ip_network(client.partition(" ")[0])
    found: Iterable[Any] = map(ip_network, subnets)
    return any(network.version == one.version and network.subnet_of(one) for one in found)


def kept_back(
    slug: str,
    detail: str,
    route: Route,
    newest: str,
    stated: Mapping[str, object],
    *,
    retry_after_seconds: float | None = None,
) -> Problem:
    """The problem of a client that may not have a revision: what it may have in its place, and for a full
    package where that is.
    """
    headers: tuple[tuple[str, str], ...] = ()
    if newest:
        detail += f" The newest revision here that all clients may have is {newest}."
        if FULL.fullmatch(route.file):
            folder, _, file = route.upstream_path.rpartition("/")
            path = f"{folder.rpartition('/')[0]}/{newest}/{file}"
            headers = (("Link", f'<{path}>; rel="alternate"'),)  # RFC 8288
    return Problem(
        slug,
        detail,
        headers=headers,
        extensions={**stated, "newest": newest},
        retry_after_seconds=retry_after_seconds,
    )


def in_its_place(problem: Problem) -> Problem | None:
    """The redirection that takes the place of such a problem; None where there is nothing to be had.

    It says the same: who keeps the revision back, and why.
    """
    path = next((text.partition(">")[0][1:] for name, text in problem.headers if name == "Link"), "")
    detail = f"{problem.detail} Its full package is given in place of the one that was asked for."
    headers = (("Location", path),)
    return (
        Problem("newest-in-place", detail, headers=headers, extensions=problem.extensions) if path else None
    )


@dataclass(frozen=True, slots=True)
class RevisionHold:
    """`at` is in Unix seconds, `node` where it was ordered, `by` whose order it was as they stated it.

    `newest` is the newest revision of the stream in this node's store that is not on hold, "" without one.
    """

    stream: Moniker
    revision: Revision
    at: Time
    by: Words = ""
    reason: Words = ""
    except_subnets: tuple[Subnet, ...] = ()
    node: Writer = LONE
    newest: str = ""

    def given(self) -> dict[str, object]:
        """What an order says of it, as JSON values."""
        stated = {"stream": self.stream, "revision": self.revision, "by": self.by, "reason": self.reason}
        return stated | {"except_subnets": list(self.except_subnets)}

    @classmethod
    def of(cls, order: Order) -> "RevisionHold":
        """InvalidError when this is no order to hold."""
        own = {"at": order.at, "node": order.node}
        given = {**order.what, "except_subnets": tuple(order.what.get("except_subnets", ()))}
        return read(_model(), given | own, "hold")

    @property
    def is_for(self) -> tuple[str, str]:
        return self.stream, self.revision

    def names(self, route: Route) -> bool:
        """Whether a body brings a client to the revision, or may.

        Of a delta its file name decides: one that leads away from the revision is served. A full in a folder
        that is no number, such as "latest", may be of any revision.
        """
        return route.stream == self.stream and revision_of(route) in (self.revision, None)

    def excepts(self, client: str) -> bool:
        return is_within(client, self.except_subnets)

    def problem(self, route: Route) -> Problem:
        """The 403 for a client that may not have it."""
        since = datetime.fromtimestamp(self.at, UTC)
        who, why = self.by or "an operator", self.reason or "no reason was given"
        detail = f"Revision {self.revision} was put on hold by {who}, {since:%Y-%m-%d %H:%M} UTC: {why}."
        if revision_of(route) is None:
            detail += " Which revision this file is of can't be told from its name."
        stated = {"stream": self.stream, "revision": self.revision, "held_by": who, "reason": self.reason}
        stated |= {"held_at": since.isoformat(timespec="seconds")}
        return kept_back("on-hold", detail, route, self.newest, stated)


@cache
def _model() -> TypeAdapter[RevisionHold]:
    return TypeAdapter(RevisionHold)


class RevisionHolds:
    """The holds as one process knows them. Without any, it is false."""

    def __init__(self, holds: Iterable[RevisionHold] = ()) -> None:
        self._of_stream: Mapping[str, list[RevisionHold]] = defaultdict(list)
        for hold in holds:
            self._of_stream[hold.stream].append(hold)

    def __bool__(self) -> bool:
        return bool(self._of_stream)

    def on(self, route: Route) -> RevisionHold | None:
        """The hold that names a body, whoever asks."""
        return next((hold for hold in self._of_stream.get(route.stream, ()) if hold.names(route)), None)

    def refusal(self, route: Route, client: str) -> Problem | None:
        """For a client that may not have it."""
        holds = (hold for hold in self._of_stream.get(route.stream, ()) if hold.names(route))
        return next((hold.problem(route) for hold in holds if not hold.excepts(client)), None)


def read_holds(run: Path) -> list[RevisionHold]:
    """The holds in the file, without lines that are none. Blocks."""
    try:
        lines = read_file(run / FILE, _MAX_BYTES).splitlines()
    except FileError:
        return []
    found = list[RevisionHold]()
    for line in lines:
        try:
            given = parse(line, "hold", _MAX_LINE_BYTES)
            found.append(read(_model(), {**given, "except_subnets": tuple(given["except_subnets"])}, "hold"))
        except (InvalidError, KeyError, TypeError) as error:
            log.warning("a line of run/%s is no hold, and is ignored: %s", FILE, error)
    return found


def keep_holds(run: Path, holds: Iterable[RevisionHold]) -> None:
    """Replace the file; OSError. Blocks."""
    replace_file(run / FILE, b"".join(_model().dump_json(hold) + b"\n" for hold in holds))


def with_newest(holds: Iterable[RevisionHold], newest: Mapping[str, str]) -> list[RevisionHold]:
    return [replace(hold, newest=newest.get(hold.stream, "")) for hold in holds]
