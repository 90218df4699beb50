"""Bodies that upstreams sent and that can't be what was asked for: which stand, for the operator."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from gup.control.events import Rejected

_MOST = 1000
STANDS_SECONDS = 1800.0
"""Twice the longest time after which it is looked at again when clients ask: then nobody does any more."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A file of one upstream that was found wrong."""

    key: str
    upstream: str
    detail: str
    at: float


class Rejections:
    """The last ones, a thousand at most. One ends when the file has been stored, or is not asked for."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[str, str], Rejection] = OrderedDict()

    def note(self, event: Rejected, now: float) -> None:
        """It was found wrong, or is so still."""
        at = event.key, event.upstream
        self._rows[at] = Rejection(event.key, event.upstream, event.detail, now)
        self._rows.move_to_end(at)
        while len(self._rows) > _MOST:
            self._rows.popitem(last=False)

    def clear(self, key: str) -> None:
        """The file is stored."""
        for at in [at for at in self._rows if at[0] == key]:
            del self._rows[at]

    def standing(self, now: float) -> Iterator[Rejection]:
        """Those found wrong lately, the last one first."""
        return (row for row in reversed(self._rows.values()) if abs(now - row.at) < STANDS_SECONDS)
