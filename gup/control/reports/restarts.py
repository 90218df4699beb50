"""The report *Restart pending*: who took a client patch and still states the build of before. Pure.

Taken is not installed: gup sees that a patch was fetched, and which version a client states; never its disk.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gup.content.catalog import Label
from gup.content.releases import Releases, Version
from gup.control.reports.batch import StreamId
from gup.control.reports.content import LabelOf, labels
from gup.control.reports.queries import ClientState, Group

SHOWN = 10_000
"""Rows at most."""

SAYING = (
    "Taken is not installed: a client listed as pending was sent a client patch and still states the build "
    "of before. It may wait for a restart, or not have begun to install."
)


class State(StrEnum):
    """What is known of a client that took a patch."""

    PENDING = "pending"
    UNKNOWN = "unknown"
    """It states no build, so that nothing tells whether it runs the patch."""
    RESTARTED = "restarted"


@dataclass(frozen=True, slots=True)
class Restart:
    """One client and the patch that it took last."""

    client: ClientState
    state: State


def judge(clients: Iterable[ClientState], releases: Releases) -> list[Restart]:
    """How those who took a patch stand."""
    return [Restart(client, _state(client, releases)) for client in clients]


def _state(client: ClientState, releases: Releases) -> State:
    then, now = releases.version(client.version_then), releases.version(client.version)
    if then is None or now is None:
        return State.UNKNOWN
    if then.older_than(now) or (then.release == now.release and then.patch < now.patch):
        return State.RESTARTED
    return State.PENDING if _tells_builds(then) and _tells_builds(now) else State.UNKNOWN


def _tells_builds(version: Version) -> bool:
    """A release's name alone stays the same when a patch is installed."""
    return version.text.count(".") == 3 or bool(version.patch)


def shown(
    found: Iterable[Restart],
    groups: Iterable[Group],
    streams: Mapping[StreamId, Label | None],
    label_of: LabelOf,
) -> dict[str, Any]:
    """The report as the API shows it. Without any catalogue nobody knows which streams are client patches."""
    rows = [row for row in found if row.state is not State.RESTARTED]
    counts = Counter(row.state for row in rows)
    return {
        "clients": [
            {"version": group.version or None, "language": group.language or None, "clients": group.clients}
            for group in groups
        ],
        "catalogue_known": any(label is not None for label in streams.values()),
        "pending": counts[State.PENDING],
        "unknown": counts[State.UNKNOWN],
        "saying": SAYING,
        "restart_pending": [_row(row, label_of) for row in rows[:SHOWN]],
    }


def _row(restart: Restart, label_of: LabelOf) -> dict[str, Any]:
    client = restart.client
    return {
        "address": client.name,
        "state": str(restart.state),
        "version": client.version or None,
        "language": client.language or None,
        "version_then": client.version_then or None,
        "product": labels(client.stream, label_of)["product"],
        "moniker": client.stream[2],
        "revision": client.taken,
        "taken_at": client.taken_at,
        "seen_at": client.seen_at,
    }
