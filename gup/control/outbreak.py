"""An outbreak: for some hours everything is opened for definitions, then it ends by itself.

With a cluster it is an order, which the order book keeps and tells the others; the latest one counts. It is
kept in run/outbreak too, as the only place where this gup is alone.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from gup.cache.revision_holds import Words
from gup.cluster.orders import LONE, Writer
from gup.control.dependencies import ControlDependencies
from gup.control.threads import to_its_end
from gup.files import FileError, read_file, replace_file
from gup.jsonmodel import InvalidError, Time, parse, read

_log = logging.getLogger("gup.control.outbreak")
FILE = "outbreak"
LEAST_SECONDS, MOST_SECONDS = 1.0, 7 * 86400.0
SUBJECT = ("outbreak",)
_MOST_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Outbreak:
    """`at` is when it began, in Unix seconds; with a cluster in the engine's time. `by` as it was stated."""

    at: Time
    seconds: Annotated[float, Field(ge=LEAST_SECONDS, le=MOST_SECONDS)]
    by: Words = ""
    reason: Words = ""
    node: Writer = LONE

    @property
    def until(self) -> float:
        return self.at + self.seconds

    def given(self) -> dict[str, object]:
        """What an order says of it."""
        return {"seconds": self.seconds, "by": self.by, "reason": self.reason}


@cache
def _model() -> TypeAdapter[Outbreak]:
    return TypeAdapter(Outbreak)


def read_outbreak(run: Path) -> Outbreak | None:
    """None when there is none, or it can't be read. Blocks."""
    try:
        return read(_model(), parse(read_file(run / FILE, _MOST_BYTES), FILE, _MOST_BYTES), FILE)
    except FileError:
        return None
    except InvalidError as error:
        _log.warning("run/%s is ignored: %s", FILE, error)
        return None


class OutbreakKeeper:
    """The outbreak of now. Only `look` changes it, and `on_change` is called then."""

    def __init__(
        self,
        dependencies: ControlDependencies,
        clock: Callable[[], float],
        refusal: Callable[[str | None], None] = lambda _refusal: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Blocks. `refusal` is told how each write went: the disk's error, or None."""
        self._dependencies, self._clock, self._monotonic = dependencies, clock, monotonic
        self._refusal, self._keeping = refusal, asyncio.Lock()
        self._kept = read_outbreak(dependencies.store.run)
        self.now: Outbreak | None = None
        self._over: Outbreak | None = None
        """Has ended here, whatever the clock says now."""
        self._ends_at = 0.0
        """Of `now`, by the monotonic clock: one that is set back does not prolong it."""
        self.on_change: Callable[[], None] = lambda: None
        self.look()

    @property
    def _time(self) -> float:
        book = self._dependencies.book
        return self._clock() if book is None else book.now

    @property
    def until(self) -> float | None:
        """When it ends, by this machine's clock."""
        return None if self.now is None else self._clock() + self._ends_at - self._monotonic()

    async def begin(self, seconds: float, by: str, reason: str) -> tuple[str, ...]:
        """The members that have not confirmed it in time. OSError when it can't be noted."""
        book, outbreak = self._dependencies.book, Outbreak(self._time, seconds, by, reason)
        missing = await book.issue("outbreak", outbreak.given()) if book is not None else ()
        async with self._keeping:
            if book is None:
                await self._keep(outbreak)
        await self.keep()
        return missing

    async def end(self, by: str) -> tuple[str, ...]:
        book, missing = self._dependencies.book, tuple[str, ...]()
        _log.info("the outbreak is ended by %s", by or "an operator")
        if book is not None:
            missing = await book.issue("outbreak-end", {"by": by})
        async with self._keeping:
            await self._keep(None)
        await self.keep()
        return missing

    def look(self) -> None:
        """To be called twice a second, and when an order has come: begins and ends it."""
        found = self._ordered()
        left = 0.0 if found is None else min(found.until - self._time, found.seconds)
        if found is not None and found == self.now:
            left = min(left, self._ends_at - self._monotonic())
        if found is not None and (left <= 0 or found == self._over):
            found, self._over = None, found
        if found != self.now:
            self._say(found)
            self.now, self._ends_at = found, self._monotonic() + left
            self._dependencies.gate.set_outbreak(self.until or 0.0)
            self.on_change()

    def _say(self, found: Outbreak | None) -> None:
        if found is None:
            _log.warning("the outbreak is over: what the WAN's budget and schedule say holds again")
        else:
            words = "an outbreak opens everything for definitions for %d s, by %s: %s"
            _log.warning(
                words, found.seconds, found.by or "an operator", found.reason or "no reason was given"
            )

    def _ordered(self) -> Outbreak | None:
        book = self._dependencies.book
        order = book.log.standing(SUBJECT) if book is not None else None
        if order is None:
            return self._kept
        if order.action != "outbreak":
            return None
        try:
            return read(_model(), {**order.what, "at": order.at, "node": order.node}, "outbreak")
        except InvalidError as error:  # of another version
            _log.debug("%s ordered an outbreak that can't be read: %s", order.node, error)
            return None

    async def keep(self) -> None:
        """Look, and note on disk what holds now; what the disk refuses is tried again at the next look."""
        self.look()
        async with self._keeping:
            try:
                if self._kept != self.now:
                    await self._keep(self.now)
            except OSError as error:
                self._refusal(error.strerror or str(error))
            else:
                self._refusal(None)

    async def _keep(self, outbreak: Outbreak | None) -> None:
        path = self._dependencies.store.run / FILE
        if outbreak is None:
            await to_its_end(path.unlink, missing_ok=True)
        else:
            await to_its_end(replace_file, path, _model().dump_json(outbreak))
        self._kept = outbreak
