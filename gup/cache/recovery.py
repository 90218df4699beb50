"""Fills and commits that nobody works on: finishes, takes over or clears them; blocks in threads only."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from gup.cache.commit import committed
from gup.cache.locks import Claims
from gup.cache.records import FillState, Phase
from gup.cache.store import Part, Store
from gup.content.key import Kind
from gup.content.routes import Route
from gup.metrics import Counters

log = logging.getLogger("gup.recovery")

_ORPHANED_SECONDS = 2.0
"""A fill without a leader for this long is taken over even if no client waits for it."""
_LONGEST_ORPHANED_SECONDS = 300.0
_MOST_AT_ONCE = 4
"""Fills that are gone on with at a time, whole bodies aside: each holds its key's claim while it waits."""
_TEMPORARY_SECONDS = 3600.0
"""Where a temporary file's name does not tell that its writer is dead."""


def route_of(state: FillState) -> Route:
    """The route that led to a fill, from its state file."""
    key = state.key
    return Route(
        kind=state.kind,
        immutable=state.kind is not Kind.INDEX,
        stream=key.stream,
        revision=key.revision,
        file=key.file,
        upstream_path=state.path,
        variant=key.variant,
    )


def _has_all(part: Part, state: FillState) -> bool:
    """Whether the part has as many bytes as its body: then it needs no upstream, if they are right."""
    head = state.head
    return head is not None and part.generation == state.generation and part.size_bytes == head.length


class Recovery:
    """One pass at a time, in the controller.

    `take_over` goes on with a fill; told whether its leader was seen to be at it, it has that one's place.
    What it returns is set when the fill has ended, None when it is under way already.
    """

    def __init__(
        self,
        store: Store,
        claims: Claims,
        counters: Counters,
        take_over: Callable[[Route, bool], asyncio.Event | None],
        tell: Callable[[Mapping[str, object]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._claims = claims
        self._counters = counters
        self._take_over = take_over
        self._tell = tell
        self._clock = clock
        self._orphans: dict[str, float] = {}
        """When a streaming part is to be taken over, by id."""
        self._tries: dict[str, int] = {}
        self._led: set[str] = set()
        """Streaming parts that had a leader at the last look."""
        self._going_on: list[asyncio.Event] = []
        self._refused: set[str] = set()
        """What the disk did not let be tidied: told once."""

    async def run(self) -> None:
        """Look at everything in `partial/` once."""
        parts = await asyncio.to_thread(self._store.parts, self._claims)
        orphans = [part for part in parts if not part.claimed]
        here = {part.id for part in orphans}
        self._orphans = {id_: at for id_, at in self._orphans.items() if id_ in here}
        present = {part.id for part in parts}
        self._tries = {id_: tries for id_, tries in self._tries.items() if id_ in present}
        self._refused &= present
        self._going_on = [ended for ended in self._going_on if not ended.is_set()]
        for part in orphans:
            state = part.state
            if state is None or not part.generation or not state.path:
                await self._tidy_or_tell(part)
            elif _has_all(part, state):
                self._watch(part, state, first_seconds=0.0)
            elif state.phase is not Phase.STREAMING:
                await self._tidy_or_tell(part)
            elif not state.ahead and len(self._going_on) < _MOST_AT_ONCE:
                self._watch(part, state, first_seconds=_ORPHANED_SECONDS)
        led = {part.id for part in parts if part.claimed and part.generation}
        self._led = led | (self._led & set(self._orphans))
        await asyncio.to_thread(self._drop_leftovers)

    def _watch(self, part: Part, state: FillState, *, first_seconds: float) -> None:
        """Take it over when nobody else does; ever more rarely, where that comes to nothing."""
        tries = self._tries.get(part.id, 0)
        patience = min(first_seconds + _ORPHANED_SECONDS * (2**tries - 1), _LONGEST_ORPHANED_SECONDS)
        now = self._clock()
        if now >= self._orphans.setdefault(part.id, now + patience):
            del self._orphans[part.id]
            self._tries[part.id] = min(tries + 1, 16)
            log.info("nobody goes on with %s: taking it over", state.key.text)
            ended = self._take_over(route_of(state), part.id in self._led)
            if ended is not None:
                self._going_on.append(ended)

    async def _tidy_or_tell(self, part: Part) -> None:
        try:
            await self._tidy(part)
        except OSError as error:
            if part.id not in self._refused:
                log.warning("what a fill left can't be cleared: %s: %s", part.id, error)
            self._refused.add(part.id)
        else:
            self._refused.discard(part.id)

    async def _tidy(self, part: Part) -> None:
        """Finish or clear what needs no upstream. Under the claim: a new leader may come at any moment."""
        offset = int(part.id[:16], 16) >> 2
        if not self._claims.try_claim(offset):
            return
        try:
            await asyncio.to_thread(self._tidy_claimed, part)
        finally:
            self._claims.release(offset)

    def _tidy_claimed(self, part: Part) -> None:
        store = self._store
        try:
            state = store.load_state(part.id)
        except ValueError as error:
            log.warning("damaged state of %s: %s", part.id, error)
            self._counters.add("gup_integrity_failures_total", where="state")
            store.drop_state(part.id)
            state = None
        if state is not None and self._finish(state):
            return
        resumable = False
        if state is not None and state.head is not None:
            resumable = store.part_path(part.id, state.generation).exists()
        if state is None and part.generation and time.time() - part.modified_at < _TEMPORARY_SECONDS:
            return  # a small body's, whose record may be written: whoever claims the key finishes it
        if part.generation and (state is None or state.head is None or part.generation != state.generation):
            log.info("dropped a part that nobody can go on with: %s.%d", part.id, part.generation)
            store.drop_part(part.id, part.generation)
        stands = state is not None and state.stands(self._clock())
        if not resumable and not stands:
            store.drop_state(part.id)

    def _finish(self, state: FillState) -> bool:
        """Finish a commit that was interrupted after its record; whether there was one."""
        store, record = self._store, None
        done = store.finish_journal(state)
        with contextlib.suppress(ValueError):
            record = store.load(state.key)
        if record is None:
            return done
        if not done and record.generation == state.generation and store.finish_commit(record):
            store.drop_journal(record.key.id, record.generation)
            done = True
        if done:
            self._tell(committed(record, replaced=True))
            log.info("finished the commit of %s", record.key.text)
        return done

    def _drop_leftovers(self) -> None:
        """Temporary files of writers that died, and sums without their part."""
        now = time.time()
        sums = [p for p in self._store.partial.glob("*.sums") if not p.with_suffix(".part").exists()]
        for path in (*self._store.partial.glob("*.tmp"), *sums):
            with contextlib.suppress(OSError):  # its writer has renamed it, or the disk lets nothing go
                if writer_is_dead(path) or now - path.stat().st_mtime > _TEMPORARY_SECONDS:
                    path.unlink()


def writer_is_dead(path: Path) -> bool:
    """Whether a temporary file's name begins with the number of a process that is no more."""
    pid, _, rest = path.name.partition(".")
    return rest.endswith(".tmp") and pid.isdecimal() and int(pid) > 0 and not Path("/proc", pid).exists()
