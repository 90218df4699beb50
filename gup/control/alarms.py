"""Alarms: what an operator must know. Their types, and the board of the present ones."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gup.control.api.schemas import Alarm

_log = logging.getLogger("gup.control.alarms")
MAX_OF_A_TYPE = 50
"""Subjects of one alarm that are shown apart."""


class Rejection(NamedTuple):
    """A body that an upstream sent and that can't be the content asked for."""

    key: str
    upstream: str
    detail: str
    at: float


class AlarmType(NamedTuple):
    """It begins when found for `after` seconds and ends when not found for `calm` seconds: nothing flaps."""

    name: str
    what_to_do: str
    severity: Literal["warning", "critical"] = "warning"
    after: float = 0.0
    calm: float = 15.0


ALARMS = (
    AlarmType(
        "no-upstream",
        "Look whether the WAN stands and the management server runs: curl it from this machine.",
        "critical",
    ),
    AlarmType(
        "upstream-down",
        "Look at that server and the way to it; is it gone for good, take it off the settings.",
    ),
    AlarmType(
        "upstream-doubtful",
        "Look at that server's own log, and ask it for a file with curl from this machine.",
        after=60.0,
        calm=60.0,
    ),
    AlarmType(
        "bad-content",
        "Look at that file on that server, and at proxies on the way. It is looked at again at the latest 15 "
        "minutes after the last time, when a client asks for it.",
    ),
    AlarmType(
        "disk-refuses",
        "Look at the disk of cache.directory: full, read-only, out of inodes, over a quota, or broken.",
        "critical",
    ),
    AlarmType(
        "not-stored",
        "Raise cache.max_size, or make room below cache.min_free: until then each client's download of it "
        "crosses the WAN.",
    ),
    AlarmType("disk-short", "Something else fills the disk: make room, or lower cache.max_size.", after=30.0),
    AlarmType(
        "cache-short", "Raise cache.max_size, or lower cache.keep_revisions or cache.max_unused.", calm=60.0
    ),
    AlarmType(
        "damage",
        "It was mended where an upstream has the content; `gup cache verify` looks at everything. If it goes "
        "on, look at the disk and its cable (smartctl, dmesg).",
    ),
    AlarmType(
        "full-storm",
        "Look why these clients do not take deltas: away for long, a damaged installation, deltas that the "
        "management server does not keep for long enough, or 0-byte deltas there.",
        calm=60.0,
    ),
    AlarmType(
        "reload-failed", "`gup config check` tells what is wrong; put it right and `gup reload`.", calm=0.0
    ),
    AlarmType(
        "workers-restarting", "Look into the log for why they ended; if nobody killed them, report it."
    ),
    AlarmType(
        "stale-stream", "Look whether the management server has that revision and has published it whole."
    ),
    AlarmType(
        "stale-catalogue",
        "Look whether the management server has /content/ContentInfo.txt, or name a copy in catalog.file.",
        after=60.0,
    ),
    AlarmType(
        "unsure-end",
        "Have that server, or the web proxy before it, send Content-Length or chunks (HTTP/1.1): without "
        "them a body that was cut looks like a whole one, so nothing of it is stored.",
        calm=60.0,
    ),
    AlarmType(
        "wan-full", "Raise wan.rate if the link carries more; see `gup status`.", after=60.0, calm=30.0
    ),
    AlarmType(
        "clients-silent",
        "Over a holiday that is right. Else look whether clients reach this machine's port, and whether "
        "their policy still names it.",
    ),
    AlarmType(
        "events-lost",
        "The machine is too busy; look what else runs on it. The figures are put right within ten minutes.",
    ),
)
"""All alarms, in the order in which they are shown."""


@dataclass(slots=True)
class _Found:
    """An alarm about one subject. `since` (monotonic) and `began_at` (shown) are None until it begins."""

    type: AlarmType
    text: str
    found_since: float
    found_last: float
    since: float | None = None
    began_at: float = 0.0


class AlarmBoard:
    """The present alarms."""

    def __init__(self, types: Sequence[AlarmType] = ALARMS) -> None:
        self._types = {type_.name: type_ for type_ in types}
        self._rows: dict[tuple[str, str], _Found] = {}

    def look(self, found: Iterable[tuple[str, str, str]], now: float, clock: float) -> None:
        """Begin and end alarms: `found` are name, subject and text of those that are due.

        Called about once a second; `now` is shown, the monotonic `clock` measures.
        """
        subjects: Counter[str] = Counter()
        for name, subject, text in found:
            subjects[name] += 1
            if subjects[name] > MAX_OF_A_TYPE:
                continue
            type_ = self._types[name]
            row = self._rows.setdefault((name, subject), _Found(type_, text, clock, clock))
            row.text, row.found_last = text, clock
            if row.since is None and clock - row.found_since >= type_.after:
                row.since, row.began_at = clock, now
                _log.warning("alarm %s: %s", name, text)
        for at, row in list(self._rows.items()):
            if row.found_last < clock and (row.since is None or clock - row.found_last >= row.type.calm):
                del self._rows[at]
                if row.since is not None:
                    seconds = clock - row.since
                    _log.warning("alarm %s is over, after %d s: %s", row.type.name, seconds, row.text)

    def standing(self) -> list[Alarm]:
        """The present alarms, the critical ones first."""
        order = list(self._types)
        found = [
            Alarm(
                name=name,
                severity=row.type.severity,
                since=row.began_at,
                subject=subject,
                text=row.text,
                what_to_do=row.type.what_to_do,
            )
            for (name, subject), row in self._rows.items()
            if row.since is not None
        ]
        return sorted(found, key=lambda alarm: (alarm.severity != "critical", order.index(alarm.name)))
