"""Sizing: what would have crossed the WAN with stores of other sizes, by a replay of the recorded demand."""

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal

from gup.control import dry_run, replay
from gup.control.api import schemas
from gup.control.dependencies import ControlDependencies
from gup.control.eviction_plan import DiskUsage
from gup.control.stats.demand import MOST_BYTES, DemandRecord
from gup.control.stats.demand_files import files
from gup.errors import GupError
from gup.units import bytes_in_words, time_in_words

_log = logging.getLogger("gup.control.size_curve")
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
"""Sizes of the curve, as multiples of the present one."""
DAYS = 30
_DAY_SECONDS = 86400.0
_SHORT_SECONDS = 7 * _DAY_SECONDS
"""A record of less than this says little about a month."""
_FRESH_SECONDS = 3600.0
_YOUNG_SECONDS = 60.0
"""For the page and the metrics; of a record of less than a day."""
_REST_FACTOR = 20
"""An answer is repeated for this multiple of the time that it took."""
_MOST_SECONDS = 600.0
_SMALL_BYTES = 16 * 1024
"""A smaller record is replayed in some tenths of a second."""
_LITTLE = 0.01
"""Less than this part of the present traffic is no saving to speak of."""


Work = Literal["replay", "dry_run"]
_ANSWERS: Mapping[Work, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "replay": replay.answer,
    "dry_run": dry_run.answer,
}


class ReplayError(GupError):
    """The replay could not be made; the text says why."""


async def run_replay(
    asked: Mapping[str, Any], work: Work = "replay", most_seconds: float = _MOST_SECONDS
) -> dict[str, Any]:
    """The answer of `gup.control.replay` or `dry_run` as a process, which ends when this is cancelled."""
    given = os.memfd_create("replay")
    os.set_blocking(given, False)  # it is memory
    try:
        os.write(given, json.dumps(asked).encode())
        os.lseek(given, 0, os.SEEK_SET)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"gup.control.{work}",
            stdin=given,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise ReplayError(f"the replay can't be started: {error.strerror or error}") from error
    finally:
        os.close(given)
    try:
        async with asyncio.timeout(most_seconds):
            answer, errors = await process.communicate()
    except TimeoutError:
        raise ReplayError(f"the replay did not end within {most_seconds:g} s; ask for fewer days") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if process.returncode:
        _log.warning("the replay failed: %s", errors.decode(errors="replace")[-2000:])
        raise ReplayError(f"the replay ended with status {process.returncode}; the log has the details")
    found: dict[str, Any] = json.loads(answer)
    return found


class Sizing:
    """Answers, one replay at a time; the last curve is kept."""

    def __init__(
        self,
        dependencies: ControlDependencies,
        demand: DemandRecord,
        measure: Callable[[], Any],
        clock: Callable[[], float],
    ) -> None:
        """`measure` measures the disk, as Evictor's; `clock` is the time that ages are measured from."""
        self._dependencies = dependencies
        self._demand = demand
        self._measure = measure
        self._clock = clock
        self._replaying = asyncio.Lock()
        self._kept: tuple[object, float, schemas.Sizing] | None = None
        """What was asked, until when the answer may be repeated, and the answer."""
        self._task: asyncio.Task[None] | None = None
        self._tried_at = -_FRESH_SECONDS
        self.last: schemas.Sizing | None = None
        """The last whole curve."""

    async def replay(self, asked: Mapping[str, Any], work: Work = "replay") -> dict[str, Any]:
        """One at a time; what takes no time to speak of needs no process."""
        async with self._replaying:
            await self._demand.write(everything=True)
            folder = self._demand.folder
            asked = {"folder": str(folder), **asked}
            known = await asyncio.to_thread(lambda: sum(path.stat().st_size for path in files(folder)))
            if known < _SMALL_BYTES:
                return await asyncio.to_thread(_ANSWERS[work], asked)
            return await run_replay(asked, work)

    async def curve(self, sizes: Sequence[int] = (), days: int = DAYS) -> schemas.Sizing:
        """Over the last days; of these sizes, else of FACTORS. ReplayError when it can't be made."""
        limits = self._dependencies.settings().cache
        asked = (tuple(sizes), days, limits, self._demand.on)
        kept, now = self._kept, time.monotonic()
        if kept is not None and kept[0] == asked and now < kept[1]:
            return kept[2]
        disk: DiskUsage = await self._measure()
        present = limits.max_size
        wanted = sorted({present, *(sizes or (round(present * factor) for factor in FACTORS))})
        since = self._clock() - days * _DAY_SECONDS
        names = {"max_size", "keep_revisions", "max_unused", "min_free", "max_part_age"}
        own = limits.model_dump(mode="json", include=names)
        keeps = sum(size >= present for size in wanted)
        found = await self.replay({"limits": own, "sizes": wanted, "since": since, "keeps": keeps})
        answer = _answer(found, wanted, present, disk, self._demand, self._clock())
        self._kept = asked, time.monotonic() + _REST_FACTOR * found["seconds"], answer
        if not sizes:
            self.last = answer
        return answer

    def shown(self) -> schemas.Sizing | None:
        """The last curve at once, None before the first; a new one is begun when it is old."""
        due = time.monotonic() - self._tried_at >= _FRESH_SECONDS or (
            self.last is None and self._demand.version
        )
        if due and (self._task is None or self._task.done()) and self._demand.on:
            self._tried_at = time.monotonic()
            self._task = asyncio.create_task(self._refresh(), name="control sizing")
        return self.last

    async def _refresh(self) -> None:
        try:
            await self.curve()
        except (ReplayError, OSError) as error:
            _log.warning("the sizes could not be compared: %s", error)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _answer(
    found: Mapping[str, Any],
    sizes: Sequence[int],
    present: int,
    disk: DiskUsage,
    demand: DemandRecord,
    now: float,
) -> schemas.Sizing:
    *stores, unlimited = found["stores"]
    rows = [row for row in zip(sizes, stores, strict=True) if not row[1]["left_out"]]
    left_out = [size for size, store in zip(sizes, stores, strict=True) if store["left_out"]]
    own = next(store for size, store in rows if size == present)
    everything = unlimited["peak_bytes"]
    if everything > present and everything not in sizes:
        rows = sorted([*rows, (everything, unlimited)], key=itemgetter(0))
    points = [
        schemas.SizingPoint(
            size_bytes=size,
            factor=round(size / present, 3),
            wan_bytes=store["wan_bytes"],
            fetches=store["fetches"],
            saved_more_bytes=own["wan_bytes"] - store["wan_bytes"],
        )
        for size, store in rows
    ]
    near = unlimited["wan_bytes"] + _LITTLE * own["wan_bytes"]
    enough = next((point.size_bytes for point in points if point.wan_bytes <= near), None)
    answer = schemas.Sizing(
        at=now,
        since=found["first_at"] or now,
        until=found["until"] or now,
        recorded=demand.on,
        record_bytes=demand.bytes,
        record_limit_bytes=MOST_BYTES,
        present_bytes=present,
        room_bytes=max(0, disk.size_bytes + disk.free_bytes),
        everything_bytes=everything,
        enough_bytes=enough,
        requests=found["requests"],
        requested_bytes=found["requested_bytes"],
        unknown_requests=found["unknown"],
        failed_fetches=found["failed"],
        sent_bytes=found["sent_bytes"],
        received_bytes=found["received_bytes"],
        left_out_bytes=max(left_out, default=None),
        points=points,
        saying=[],
    )
    return answer.model_copy(update={"saying": _saying(answer)})


def _saying(found: schemas.Sizing) -> list[str]:
    """In words, the most important first."""
    if not found.recorded and not found.requests:
        return ["Nothing is recorded: reports.demand is 0."]
    if not found.requests:
        return ["Nothing was requested yet."]
    covered = found.until - found.since
    said = _larger(found, f"in the last {time_in_words(covered)}")
    size = bytes_in_words
    if found.left_out_bytes is not None:
        said.append(f"Sizes up to {size(found.left_out_bytes)} are left out: the replay would take too long.")
    if covered < _SHORT_SECONDS:
        said.append(f"Only {time_in_words(covered)} are recorded yet: a month would say more.")
    if found.unknown_requests:
        said.append(f"The size is not known of the bodies of {found.unknown_requests:,} requests.")
    return said


def _larger(found: schemas.Sizing, when: str) -> list[str]:
    own = next(point for point in found.points if point.size_bytes == found.present_bytes)
    most = max(found.points, key=lambda point: point.saved_more_bytes)
    size, enough = bytes_in_words, found.enough_bytes
    if most.saved_more_bytes <= _LITTLE * own.wan_bytes:
        takes = f"all that was asked for takes {size(found.everything_bytes)}"
        may = f"the store may have {size(found.present_bytes)}"
        if found.everything_bytes > found.present_bytes:
            again = "what is evicted is hardly asked for again"
            return [f"A larger store would have saved hardly anything more {when}: {takes}, and {again}."]
        said = [f"A larger store would have saved nothing more {when}: {takes}, and {may}."]
        if enough is not None and enough < found.present_bytes:
            said.append(f"{size(enough)} would have been enough.")
        return said
    knee = next((point for point in found.points if point.size_bytes == enough), most)
    half = next(point for point in found.points if 2 * point.saved_more_bytes >= knee.saved_more_bytes > 0)
    said = [f"{size(knee.size_bytes)} would have saved {size(knee.saved_more_bytes)} more {when}."]
    if half.size_bytes < knee.size_bytes:
        said.append(f"{size(half.size_bytes)} alone would have saved {size(half.saved_more_bytes)} of it.")
    if enough is not None:
        said.append(f"Beyond {size(enough)} hardly anything more is saved.")
    if knee.size_bytes > found.room_bytes:
        said.append(f"The disk has room for {size(found.room_bytes)} in all.")
    return said
