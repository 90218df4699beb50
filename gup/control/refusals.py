"""What the disk refuses at present, for the operator: told when it begins and when it ends; tries nothing."""

import logging
from dataclasses import dataclass, replace

_log = logging.getLogger("gup.control.disk")


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that can't be written. Times are Unix seconds."""

    detail: str
    since: float
    last: float


class Refusals:
    """Those that stand, by what they are about: one line in the log for each, however often it is tried."""

    def __init__(self) -> None:
        self.rows: dict[str, Refusal] = {}

    def note(self, what: str, refusal: str | None, now: float) -> None:
        """What came of a try: None is that it was written."""
        if refusal is None:
            self.clear(what)
        else:
            self.tell(what, refusal, now)

    def tell(self, what: str, detail: str, now: float) -> None:
        """It was refused again, or for the first time."""
        known = self.rows.get(what)
        if known is None:
            _log.warning("not written: %s: %s", what, detail)
        self.rows[what] = (
            Refusal(detail, now, now) if known is None else replace(known, detail=detail, last=now)
        )

    def clear(self, what: str) -> None:
        """It could be written."""
        if self.rows.pop(what, None) is not None:
            _log.warning("written again: %s", what)
