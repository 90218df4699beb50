"""The alarms that stand, and since when: begins, ends and logs them. Finds none itself."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gup.control.alarms import ALARMS, AlarmType, Snapshot

_log = logging.getLogger("gup.control.alarms")
MAX_OF_A_TYPE = 50
"""More subjects of one alarm are not told apart."""


@dataclass(slots=True)
class _Alarm:
    """One alarm about one subject. `since` is None until it has begun; the board alone changes it."""

    text: str
    found_since: float
    found_last: float
    since: float | None = None


class AlarmBoard:
    """`look` is called once a second or so, with a clock that only goes forward; `now` of the snapshot is
    what people are told.
    """

    def __init__(self, types: Sequence[AlarmType] = ALARMS) -> None:
        self._types = types
        self._rows: dict[tuple[str, str], _Alarm] = {}
        self._begun_at: dict[tuple[str, str], float] = {}

    def look(self, snapshot: Snapshot, clock: float) -> None:
        """Take in what is the case now."""
        for type_ in self._types:
            for subject, text in list(type_.find(snapshot))[:MAX_OF_A_TYPE]:
                self._found(type_, subject, text, snapshot.now, clock)
        by_name = {type_.name: type_ for type_ in self._types}
        for (name, subject), alarm in list(self._rows.items()):
            if alarm.found_last < clock:
                self._not_found(by_name[name], subject, alarm, clock)

    def _found(self, type_: AlarmType, subject: str, text: str, now: float, clock: float) -> None:
        alarm = self._rows.setdefault((type_.name, subject), _Alarm(text, clock, clock))
        alarm.text, alarm.found_last = text, clock
        if alarm.since is None and clock - alarm.found_since >= type_.after_seconds:
            alarm.since = clock
            self._begun_at[type_.name, subject] = now
            _log.warning("alarm %s: %s", type_.name, text)

    def _not_found(self, type_: AlarmType, subject: str, alarm: _Alarm, clock: float) -> None:
        if alarm.since is not None and clock - alarm.found_last < type_.calm_seconds:
            return
        del self._rows[type_.name, subject]
        if alarm.since is not None:
            del self._begun_at[type_.name, subject]
            _log.warning("alarm %s is over, after %d s: %s", type_.name, clock - alarm.since, alarm.text)

    def standing(self) -> list[dict[str, Any]]:
        """Those that have begun and not ended, the critical ones first, for the API."""
        found = [
            {
                "name": type_.name,
                "severity": type_.severity,
                "since": self._begun_at[type_.name, subject],
                "subject": subject,
                "text": alarm.text,
                "what_to_do": type_.what_to_do,
            }
            for type_ in self._types
            for (name, subject), alarm in self._rows.items()
            if name == type_.name and alarm.since is not None
        ]
        return sorted(found, key=lambda alarm: alarm["severity"] != "critical")
