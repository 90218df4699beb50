"""The follower of a fill: watches what a leader in another process writes."""

import asyncio
import contextlib
import logging
import os

from gup.cache.body import GrowingBody
from gup.cache.inflight import Fill, FillDependencies, FillEnd
from gup.cache.locks import aside_offset, waiters_offset
from gup.cache.memory_files import Row
from gup.cache.records import FillState, Phase
from gup.cache.store import OpenFile
from gup.errors import Problem, is_exhausted

log = logging.getLogger("gup.fill")

_POLL_SECONDS = 0.004
_LONGEST_POLL_SECONDS = 0.25
_LATE = 0.1
"""Upper limit of the polling delay, as a fraction of the time since the last change."""
_ASIDE_SECONDS = 5.0
"""A leader whose body was purged steps aside within this time."""
_IDLE_POLL_SECONDS = 0.1
"""Polling interval while no client of this process waits."""


class Follower:
    """One key's fill as seen from outside; a poll is a `stat` of the state, one of the part, one of the
    claim.

    These calls run on the loop and touch no disk (0.9 µs, 0.9 µs and 1.6 µs measured): a thread would cost
    more than it saves.
    """

    def __init__(self, dependencies: FillDependencies, fill: Fill) -> None:
        self._deps = dependencies
        self._fill = fill
        self._state_seen: tuple[int, int] | None = None
        self._memory_seen: int | None = None
        self._waiters = waiters_offset(fill.key.id)
        self._news_at = dependencies.clock()

    async def run(self) -> None:
        claims, waits = self._deps.claims, False
        try:
            # In this order: a leader that steps aside frees the claim after its purge is known.
            while claims.taken(self._fill.key.claim_offset) or self._fill.aside or self._reads_on:
                if self._reads_on:
                    await self._read_on()
                    return
                if not waits and self._fill.wanted and not self._fill.background:  # tell the leader so
                    with contextlib.suppress(OSError):  # without a lock the fill is only not promoted
                        waits = claims.try_claim(self._waiters)
                try:
                    if self._look():
                        return
                except OSError as error:
                    if not is_exhausted(error):
                        raise
                    self._state_seen = self._memory_seen = None  # look again when a descriptor is free
                await asyncio.sleep(self._pause())
        finally:
            if waits:
                claims.release(self._waiters)

    def ended_in_memory(self) -> bool:
        """Whether the leader has completed it in memory. A body that died with its leader is cut here."""
        self._memory_seen = None
        with contextlib.suppress(OSError):  # without a descriptor: the next leader gets the same error
            return self._look_into_memory()
        return False

    # --- a purge names the body that is followed

    @property
    def _reads_on(self) -> bool:
        body = self._fill.body
        return self._fill.is_purged(self._deps.purges) and (body is None or not body.in_memory)

    async def _read_on(self) -> None:
        """Go on with the body as long as its leader does, whoever has the key's claim."""
        fill, body, led = self._fill, self._fill.body, False
        claims, give_up_at = self._deps.claims, self._deps.clock() + _ASIDE_SECONDS
        while body is not None and not body.ended:
            leads = claims.taken(aside_offset(fill.key.id, body.generation))
            self._publish(body)  # after the look at the lock: what was written before is seen
            led = led or leads
            if not body.ended and not leads and (led or self._deps.clock() >= give_up_at):
                body.fail()
            await asyncio.sleep(self._pause())
        if body is not None and not body.failed:
            fill.finish(FillEnd.UNSTORABLE)
        else:
            fill.fail(Problem("overloaded", "it was purged while it was fetched", retry_after_seconds=1.0))

    def _pause(self) -> float:
        body = self._fill.body
        if body is not None and not self._fill.wanted and not body.ended:
            return _IDLE_POLL_SECONDS
        silent_seconds = self._deps.clock() - self._news_at
        return min(max(_POLL_SECONDS, _LATE * silent_seconds), _LONGEST_POLL_SECONDS)

    def _look(self) -> bool:
        """One poll; whether the fill is over."""
        if self._look_into_memory():
            return True
        state = self._changed_state()
        if state is not None:
            self._news_at = self._deps.clock()
            self._follow_state(state)
        body = self._fill.body
        if not self._fill.over and body is not None and not body.ended:
            self._publish(body)
        return self._fill.over

    # --- memory files

    def _look_into_memory(self) -> bool:
        """Continue in the leader's memory file when there is one; whether the fill is over."""
        memory, fill = self._deps.memory, self._fill
        if memory.epoch == self._memory_seen:
            return False
        self._memory_seen = memory.epoch
        row = memory.find(fill.key)
        if row is None:
            self._lose_memory()
        elif row.state_fd:
            self._news_at = self._deps.clock()
            body = self._body_in_memory(row)
            if body is not None:
                self._publish(body)
                if row.finished:
                    body.complete(body.published)
                    fill.finish(FillEnd.UNSTORABLE)
        return fill.over

    def _lose_memory(self) -> None:
        """The memory file has no row any more: the body read here is complete, or never will be."""
        body = self._fill.body
        if body is None or not body.in_memory:
            return
        self._publish(body)
        if body.ended:
            self._fill.finish(FillEnd.UNSTORABLE)
        else:
            self._fill.detach()

    def _body_in_memory(self, row: Row) -> GrowingBody | None:
        """The body in the row's memory file; None when it can't be opened, or is gone."""
        memory, fill = self._deps.memory, self._fill
        body = fill.body
        if body is not None and body.in_memory and body.generation == row.generation:
            return body
        try:
            file, state = memory.open(row)
        except PermissionError as error:
            log.warning("%s is in the memory of another process and can't be read: %s", fill.key.text, error)
            fill.detach()
            fill.finish(FillEnd.UNSTORABLE)
            return None
        except (FileNotFoundError, ValueError):
            self._memory_seen = None  # it is gone: the next poll shows why
            return None
        assert state.head is not None
        if self._is_purged(state):
            if row.finished:
                memory.drop(fill.key)
            else:  # its leader has the claim to its end
                fill.finish(FillEnd.UNSTORABLE)
            return None
        if body is None or body.generation != row.generation:
            body = GrowingBody(state.head, row.generation, None, self._deps.clock())
        body.go_on_in(file)
        memory.hold(fill.key, body)
        fill.attach(body)
        return body

    def _is_purged(self, state: FillState) -> bool:
        head, pinned = state.head, state.pinned
        return head is not None and self._deps.purges.name_head(state.key, state.kind, head, pinned=pinned)

    # --- parts

    def _publish(self, body: GrowingBody) -> None:
        if body.file is None:  # revoked
            return
        size = os.fstat(body.fd).st_size
        if size > body.published:
            self._news_at = self._deps.clock()
            body.publish(size)
        if size == body.head.length:
            body.complete(size)  # its last bytes are written only after all was verified

    def _follow_state(self, state: FillState) -> None:
        fill, now = self._fill, self._deps.clock()
        failing = state.failure is not None and state.failure.is_current(now)
        same = state.path == fill.route.upstream_path
        fill.from_wan = lambda: state.phase is Phase.STREAMING and state.from_wan
        if state.phase is Phase.STREAMING and (fill.body is None or fill.body.generation != state.generation):
            if state.service_start == self._deps.store.service_start and not self._is_purged(state):
                self._attach(state)
        elif state.phase is Phase.REQUESTED:
            fill.detach()  # the body was given up: upstream has another one now
        elif state.phase is Phase.UNSTORABLE and failing:
            if state.passed_through or self._deps.memory.find(fill.key) is None:  # else it continues there
                fill.detach()
                fill.finish(FillEnd.UNSTORABLE)
        elif state.phase is Phase.FAILED and state.failure is not None and failing and same:
            fill.fail(state.failure.problem(now))

    def _attach(self, state: FillState) -> None:
        assert state.head is not None
        self._fill.order, self._fill.pinned = state.head.order, state.pinned
        path = self._deps.store.part_path(self._fill.key.id, state.generation)
        with contextlib.suppress(FileNotFoundError):  # committed or given up since: the next poll shows which
            self._fill.attach(GrowingBody(state.head, state.generation, OpenFile(path), self._deps.clock()))

    def _changed_state(self) -> FillState | None:
        try:
            stat = self._deps.store.state_path(self._fill.key.id).stat()
        except FileNotFoundError:
            return None
        seen = (stat.st_ino, stat.st_mtime_ns)
        if seen == self._state_seen:
            return None
        self._state_seen = seen
        try:
            return self._deps.store.load_state(self._fill.key.id)
        except ValueError:
            return None  # the next process that claims the key examines it
