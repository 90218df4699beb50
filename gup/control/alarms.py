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
    severity: Literal["warning", "critical"]
    after: float
    calm: float
    what_to_do: str


# fmt: off
ALARMS = (
    AlarmType("no-upstream", "critical", 0.0, 15.0,
              "Look whether the WAN stands and the management server runs: curl it from this machine."),
    AlarmType("upstream-down", "warning", 0.0, 15.0,
              "Look at that server and the way to it; is it gone for good, take it off the settings."),
    AlarmType("upstream-doubtful", "warning", 60.0, 60.0,
              "Look at that server's own log, and ask it for a file with curl from this machine."),
    AlarmType("bad-content", "warning", 0.0, 15.0, (
              "Look at that file on that server, and at proxies on the way. It is looked at again at the "
              "latest 15 minutes after the last time, when a client asks for it.")),
    AlarmType("disk-refuses", "critical", 0.0, 15.0, (
              "Look at the disk of cache.directory: full, read-only, out of inodes, over a quota, or "
              "broken.")),
    AlarmType("not-stored", "warning", 0.0, 15.0, (
              "Raise cache.max_size, or make room below cache.min_free: until then each client's download "
              "of it crosses the WAN.")),
    AlarmType("disk-short", "warning", 30.0, 15.0,
              "Something else fills the disk: make room, or lower cache.max_size."),
    AlarmType("cache-short", "warning", 0.0, 60.0,
              "Raise cache.max_size, or lower cache.keep_revisions or cache.max_unused."),
    AlarmType("damage", "warning", 0.0, 15.0, (
              "It was mended where an upstream has the content; `gup cache verify` looks at everything. If "
              "it goes on, look at the disk and its cable (smartctl, dmesg).")),
    AlarmType("full-storm", "warning", 0.0, 60.0, (
              "Look why these clients do not take deltas: away for long, a damaged installation, deltas "
              "that the management server does not keep for long enough, or 0-byte deltas there.")),
    AlarmType("reload-failed", "warning", 0.0, 0.0,
              "`gup config check` tells what is wrong; put it right and `gup reload`."),
    AlarmType("workers-restarting", "warning", 0.0, 15.0,
              "Look into the log for why they ended; if nobody killed them, report it."),
    AlarmType("stale-stream", "warning", 0.0, 15.0,
              "Look whether the management server has that revision and has published it whole."),
    AlarmType("stale-catalogue", "warning", 60.0, 15.0, (
              "Look whether the management server has /content/ContentInfo.txt, or name a copy in "
              "catalog.file.")),
    AlarmType("unsure-end", "warning", 0.0, 60.0, (
              "Have that server, or the web proxy before it, send Content-Length or chunks (HTTP/1.1): "
              "without them a body that was cut looks like a whole one, so nothing of it is stored.")),
    AlarmType("wan-full", "warning", 60.0, 30.0,
              "Raise wan.rate if the link carries more; see `gup status`."),
    AlarmType("clients-silent", "warning", 0.0, 15.0, (
              "Over a holiday that is right. Else look whether clients reach this machine's port, and "
              "whether their policy still names it.")),
    AlarmType("events-lost", "warning", 0.0, 15.0, (
              "The machine is too busy; look what else runs on it. The figures are put right within ten "
              "minutes.")),
)
# fmt: on
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
        """Begin and end alarms by those due now: name, subject, text. `now` is shown, `clock` measures."""
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
