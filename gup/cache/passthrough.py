"""Passing through: a head, a range far ahead of a fill, or too large a body, fetched for one client."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from gup.cache.body import CUT, Callback, GrowingBody
from gup.cache.inflight import FillDependencies, is_shared
from gup.cache.locks import Slots
from gup.cache.open_entries import Opened, Result
from gup.cache.part_file import WITHHELD_BYTES, ZIP_TAIL_BYTES, zip_end_is_right
from gup.cache.records import Head, head_of
from gup.content.key import ContentKey, Variant
from gup.content.routes import Route
from gup.errors import Problem
from gup.phases import FillClock, RequestClock
from gup.upstream.exchange import RemoteHead, UpstreamFailure, Validators
from gup.upstream.pool import Answer
from gup.upstream.session import Ask

WINDOW_BYTES = 256 * 1024
"""Limit of the bytes held between upstream and the client."""
_RATE_KNOWN_SECONDS = 0.5
"""A fill's rate is unreliable before this time."""


class BypassBody:
    """The bytes of one response, read once and in order (a Body); `stop` is the offset after the last.

    `ends_right` checks the last 64 KiB of a whole body; until then its last 4 KiB are withheld, as those of a
    stored body are.

    Its own task reads upstream, and pauses while the window is full; the reader's `available` frees what lies
    before the offset it asks for.
    """

    source = "bypass"
    fd = -1

    def __init__(
        self,
        head: Head,
        answer: Answer,
        stop: int | None,
        done: Callable[[], None],
        ends_right: Callable[[bytes], bool] | None = None,
        times: FillClock | None = None,
    ) -> None:
        self.head = head
        self.times: FillClock | str = times or "receiving"
        self._answer = answer
        self._stop = stop if stop is not None else head.length
        self._done = done
        self._pieces: deque[bytes] = deque()
        self._base = self._position = answer.head.start
        """Offset of the first byte of `_pieces`, and the one requested last."""
        self._held = 0
        self._ends_right = ends_right
        self._withheld = 0 if ends_right is None else WITHHELD_BYTES
        self._ended = False
        self._failed = False
        self._room = asyncio.Event()
        self._waiting: Callback | None = None
        self._task = asyncio.get_running_loop().create_task(self._pump())

    def end(self) -> int | None:
        if self._stop is not None:
            return self._stop
        return self._base + self._held if self._ended else None

    def available(self, offset: int, want: int) -> int:
        while self._pieces and self._base + len(self._pieces[0]) <= offset:
            gone = len(self._pieces.popleft())
            self._base += gone
            self._held -= gone
        self._position = offset
        self._room.set()
        sure = self._base + self._held - self._withheld
        if self._pieces and offset < sure:
            return min(want, sure - offset, len(self._pieces[0]) - (offset - self._base))
        return CUT if self._failed else 0

    def view(self, offset: int, length: int) -> memoryview:
        at = offset - self._base
        return memoryview(self._pieces[0])[at : at + length]

    def wait(self, offset: int, callback: Callback) -> None:  # noqa: ARG002 - one reader, in order
        self._waiting = callback

    def forget(self, callback: Callback) -> None:  # noqa: ARG002 - there is one reader only
        self._waiting = None

    def leave(self) -> None:
        """The client has gone or is served: these bytes have no other use."""
        self._task.cancel()

    def unreadable(self) -> None:
        """It never touches the disk."""

    async def _pump(self) -> None:
        try:
            expected = None if self._stop is None else self._stop - self._answer.head.start
            received, tail = 0, bytearray()
            while piece := await self._answer.read():
                received += len(piece)
                if expected is not None and received > expected:
                    self._failed = True
                    return
                if self._ends_right is not None:
                    tail = (tail + piece)[-ZIP_TAIL_BYTES:]
                self._pieces.append(piece)
                self._held += len(piece)
                self._wake()
                while self._base + self._held - self._position >= WINDOW_BYTES + self._withheld:
                    self._room.clear()
                    await self._room.wait()
            right = received == (expected or received)
            if right and (self._ends_right is None or self._ends_right(bytes(tail))):
                self._withheld = 0  # including an unconfirmed end: the client gets all that came
                self._ended = expected is not None or self._answer.head.delimited
            self._failed = not self._ended
        except UpstreamFailure:
            self._failed = True
        finally:
            self._answer.close()
            self._done()
            self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting()


_OF_NO_KEY = frozenset({"overloaded", "queue-full", "no-upstream", "upstream-unreachable"})
"""Problems that are no single key's: they are not remembered for one."""


def too_many_misses(dependencies: FillDependencies) -> Problem:
    most = dependencies.settings.clients.max_misses_per_address
    detail = (
        f"more than {most} requests a second for content that is not stored (clients.max_misses_per_address)"
    )
    return Problem("overloaded", detail, retry_after_seconds=1.0)


class PassThrough:
    """`bodies` are slots for bodies that are passed through whole, `ranges` for ranges of growing ones."""

    def __init__(self, dependencies: FillDependencies, bodies: Slots, ranges: Slots) -> None:
        self._deps = dependencies
        self._bodies = bodies
        self._ranges = ranges
        self._heads: dict[tuple[ContentKey, str], asyncio.Task[Head]] = {}

    async def head(self, route: Route, variant: Variant, passed: tuple[str, ...], client: str = "") -> Head:
        """Problem when it can't be had.

        Concurrent HEADs share one upstream request. Those that came through other gups don't: such a gup may
        itself be waiting for this one.
        """
        key = route.key(variant)
        if (failure := self._deps.failures.get(key, route.upstream_path)) is not None:
            raise failure
        name = key, route.upstream_path
        asking = self._heads.get(name) if not passed else None
        if asking is None:
            if not self._deps.count_miss(client):
                raise too_many_misses(self._deps)
            asking = asyncio.get_running_loop().create_task(self._ask_head(route, variant, passed, client))
            if not passed:
                self._heads[name] = asking
                asking.add_done_callback(lambda done: self._forget_head(name, done))
        try:
            return await asyncio.shield(asking)
        except Problem as problem:
            raise problem.again() from problem

    def _forget_head(self, name: tuple[ContentKey, str], done: asyncio.Task[Head]) -> None:
        del self._heads[name]
        if not done.cancelled():
            done.exception()  # retrieved: those who asked may all have gone

    async def stop(self) -> None:
        for asking in list(self._heads.values()):
            asking.cancel()
        await asyncio.gather(*self._heads.values(), return_exceptions=True)

    async def _ask_head(self, route: Route, variant: Variant, passed: tuple[str, ...], client: str) -> Head:
        key = route.key(variant)
        try:
            ask = Ask(route.upstream_path, "bypass", method="HEAD", client=client)
            remote = await self._ask_members(route, variant, passed, ask)
            remote = remote or await self._ask(route, variant, passed, ask)
        except Problem as problem:
            known = self._deps.failures.get(key, route.upstream_path) is not None
            if not passed and not known and problem.slug not in _OF_NO_KEY:
                self._deps.failures.put(
                    key, route.upstream_path, problem, self._deps.settings.cache.error_ttl
                )
            raise
        assert isinstance(remote, RemoteHead)
        head = head_of(key, remote)
        if remote.etag is None and remote.last_modified is None:
            head = replace(head, etag=None)  # it would be random, and GET's another
        return head

    async def range(
        self,
        opened: Opened,
        route: Route,
        variant: Variant,
        start: int,
        stop: int,
        passed: tuple[str, ...] = (),
    ) -> BypassBody | None:
        """A range far ahead of the fill; None when waiting for the fill is as fast, or required.

        Far ahead is what the fill does not reach within `fill.range_wait` at its present rate; at most two
        are fetched at once. It is sent under the fill's ETag, and no overlap can be compared: so only the
        upstream that the fill began with is asked, and its validators must be unchanged; or a member of the
        cluster that has the body under this ETag.
        """
        body = opened.body
        if not isinstance(body, GrowingBody) or body.end() is None or not await self._is_far(body, start):
            return None
        if self._deps.budget.is_held(
            route, background=False
        ):  # the fill brings it, without fetching it twice
            return None
        slot = self._ranges.try_take()
        if slot is None:
            return None
        head, answer = body.head, None
        try:
            times = FillClock(self._deps.clock)
            ask = Ask(route.upstream_path, "bypass", start=start, stop=stop, times=times)
            ask = replace(ask, if_range=head.upstream_etag)
            answer = await self._ask_members(route, variant, passed, replace(ask, if_range=head.etag))
            if answer is not None:
                begun_with = Validators(head.etag, head.last_modified)
            else:
                answer = await self._ask(route, variant, passed, ask, only=head.upstream)
                begun_with = Validators(head.upstream_etag, head.last_modified)
            assert isinstance(answer, Answer)
            same = begun_with.same_as(answer.head.validators, vouched=bool(head.upstream_etag))
            if same and answer.head.start == start and answer.head.length == head.length:
                return BypassBody(head, answer, stop, lambda: self._ranges.give_back(slot), times=times)
        except Problem:
            pass
        except BaseException:
            self._ranges.give_back(slot)
            raise
        if isinstance(answer, Answer):
            answer.close()
        self._ranges.give_back(slot)
        return None

    async def _is_far(self, body: GrowingBody, offset: int) -> bool:
        """Whether the fill will take longer than `fill.range_wait`; waits for a young fill's rate."""
        clock = self._deps.clock
        left = _RATE_KNOWN_SECONDS - body.age_seconds(clock())
        if left > 0 and offset >= body.published:
            reached = asyncio.Event()
            body.wait(offset, reached.set)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await reached.wait()
            body.forget(reached.set)
        return body.seconds_to(offset, clock()) > self._deps.settings.fill.range_wait

    async def whole(
        self,
        route: Route,
        variant: Variant,
        passed: tuple[str, ...],
        client: str = "",
        waits: RequestClock | None = None,
    ) -> Opened:
        """A body that can't be stored. Problem when the limit of clients passed through is reached."""
        await self._deps.budget.refuse(route, background=False)
        slot = self._bodies.try_take()
        if slot is None:
            raise Problem(
                "overloaded",
                "this content can't be stored, and too many clients are passed through; try again later",
                retry_after_seconds=10.0,
            )
        order, times = self._deps.purges.stamp, FillClock(self._deps.clock)
        times.enter("head")
        if waits is not None:
            waits.wait_for("head")
        try:
            ask = Ask(route.upstream_path, "bypass", client=client, times=times)
            answer = await self._ask(route, variant, passed, ask)
        except BaseException:
            self._bodies.give_back(slot)
            raise
        assert isinstance(answer, Answer)
        key = route.key(variant)
        is_zip = key.file.lower().endswith(".zip")
        body = BypassBody(
            head_of(key, answer.head, order),
            answer,
            None,
            lambda: self._bodies.give_back(slot),
            lambda tail: not is_zip or zip_end_is_right(tail),
            times,
        )
        return Opened(body, Result.BYPASS, key, route.kind, ranges=False)

    async def _ask_members(
        self, route: Route, variant: Variant, passed: tuple[str, ...], ask: Ask
    ) -> Answer | RemoteHead | None:
        """The answer of a member of the cluster that may fetch for this node; None when there is none.

        Problem when it has one that is this node's, too.
        """
        deps, key = self._deps, route.key(variant)
        stream = deps.streams.number(key), str(route.kind)
        ask = replace(ask, stream=stream, passed=passed, key=key.text)
        await deps.members.settle()
        for member in deps.members.above(key.text):
            try:
                answer = await deps.members.ask(member, ask)
            except UpstreamFailure:
                continue
            except Problem as problem:
                if is_shared(problem, passed, asks_gups=True):
                    deps.failures.put(key, route.upstream_path, problem, problem.stands_seconds or 0.0)
                raise
            if isinstance(answer, Answer) or answer.status == 200:
                return answer
        return None

    async def _ask(
        self, route: Route, variant: Variant, passed: tuple[str, ...], ask: Ask, only: str | None = None
    ) -> Answer | RemoteHead:
        pool, key = self._deps.pool, route.key(variant)
        ask = replace(ask, stream=(self._deps.streams.number(key), str(route.kind)), passed=passed)
        asks_gups = bool(passed) and pool.asks_gups(variant, key.text)
        try:
            admitted = pool.admitted(pool.candidates(variant, key.text, passed))
        except UpstreamFailure as failure:
            retry = failure.retry_after_seconds or 2.0
            raise Problem(failure.slug, failure.detail, retry_after_seconds=retry) from failure
        problem = Problem("no-upstream", f"no upstream is configured for {variant}")
        waits: list[float] = []
        ttl_seconds = 0.0
        for upstream in admitted:
            if only not in (None, upstream.name):
                continue
            try:
                answer = await pool.ask(upstream, ask)
            except UpstreamFailure as failure:
                problem = Problem(failure.slug, failure.detail, retry_after_seconds=2.0)
                waits += [failure.retry_after_seconds] if failure.retry_after_seconds is not None else []
                continue
            if isinstance(answer, RemoteHead) and answer.status != 200:
                slug = "upstream-gone" if answer.status == 410 else "upstream-not-found"
                problem = Problem(slug, f"{answer.upstream} answered {answer.status}")
                ttl_seconds = self._deps.settings.cache.negative_ttl
                break
            return answer
        if waits and len(waits) == len(admitted):  # all of them are on hold
            problem.retry_after_seconds = ttl_seconds = min(waits)
        if is_shared(problem, passed, asks_gups=asks_gups):
            self._deps.failures.put(key, route.upstream_path, problem, ttl_seconds)
        raise problem
