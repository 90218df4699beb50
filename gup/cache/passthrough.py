"""What is fetched for one client and not stored: a head, a span far ahead of a fill, too large a body."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from gup.cache.body import CUT, Callback
from gup.cache.growing_body import GrowingBody, Reader
from gup.cache.inflight import Means
from gup.cache.locks import Slots
from gup.cache.negative_cache import Failures
from gup.cache.open_entries import Opened, Result
from gup.cache.part_file import WITHHELD_BYTES, ZIP_TAIL_BYTES, zip_end_is_right
from gup.cache.records import Head, head_of
from gup.content.key import Variant
from gup.content.routes import Route
from gup.errors import Problem
from gup.upstream.exchange import RemoteHead, UpstreamFailure, Validators
from gup.upstream.pool import Answer
from gup.upstream.session import Ask

WINDOW_BYTES = 256 * 1024
"""The most that is held between upstream and the client."""


class BypassBody:
    """Bytes `start` to `stop` of a body, read once and in order.

    `ends_right` tells of a whole body's last 64 KiB whether it may be so; until then its last 4 KiB are
    withheld, as those of a body that is stored are.

    Its own task reads upstream, and pauses while the window is full; the reader's `available` frees what
    lies before the offset it asks for.
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
    ) -> None:
        self.head = head
        self._answer = answer
        self._stop = stop
        self._done = done
        self._pieces: deque[bytes] = deque()
        self._base = answer.head.start
        """Offset of the first byte of `_pieces`."""
        self._position = self._base
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
        if self.head.length is not None:
            return self.head.length
        return self._base + self._held if self._ended else None

    def available(self, offset: int, want: int) -> int:
        self._free_before(offset)
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
        """The client is gone or served: nobody else wants these bytes."""
        self._task.cancel()

    def unreadable(self) -> None:
        """Nothing: it never touches the disk."""

    def _free_before(self, offset: int) -> None:
        while self._pieces and self._base + len(self._pieces[0]) <= offset:
            gone = len(self._pieces.popleft())
            self._base += gone
            self._held -= gone

    async def _pump(self) -> None:
        try:
            expected = self._expected()
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
                self._withheld = 0  # of an end that nobody knows, too: all that came is for the client
                self._ended = expected is not None or self._answer.confirmed
            self._failed = not self._ended
        except UpstreamFailure:
            self._failed = True
        finally:
            self._answer.close()
            self._done()
            self._wake()

    def _expected(self) -> int | None:
        end = self._stop if self._stop is not None else self.head.length
        return None if end is None else end - self._answer.head.start

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting()


_RATE_KNOWN_SECONDS = 0.5
"""A fill's rate means nothing before it has gone on for so long."""


class Alone:
    """`places` are for bodies passed on whole, `spans` for spans of those that are being stored."""

    def __init__(self, means: Means, failures: Failures, places: Slots, spans: Slots) -> None:
        self._means = means
        self._failures = failures
        self._places = places
        self._spans = spans

    async def head(self, route: Route, variant: Variant, via: str | None, client: str = "") -> Head:
        """What GET would tell of a body that is not here. Problem when there is none to be had."""
        key = route.key(variant)
        failure = self._failures.get(key)
        if failure is not None:
            raise failure
        remote = await self._ask(route, variant, "HEAD", via, {}, client=client)
        assert isinstance(remote, RemoteHead)
        head = head_of(key, remote)
        if remote.etag is None and remote.last_modified is None:
            head = replace(head, etag=None)  # it would be one of chance, and GET's another
        return head

    async def span(
        self, opened: Opened, route: Route, variant: Variant, start: int, stop: int, via: str | None = None
    ) -> BypassBody | None:
        """A span far ahead of the fill; None when waiting for the fill is as good, or right.

        Decided as DESIGN says: further ahead than `fill.range_wait` at the present rate, at most two at once.
        It goes out under the fill's ETag, and no overlap can be compared: so only the upstream that the fill
        began with is asked, and its validators must be those of then.
        """
        reader = opened.body
        if not isinstance(reader, Reader) or reader.end() is None:
            return None
        body = reader.growing
        if not await self._is_far(body, start):
            return None
        place = self._spans.try_take()
        if place is None:
            return None
        head = body.head
        span: dict[str, object] = {"start": start, "stop": stop, "if_range": head.upstream_etag}
        try:
            answer = await self._ask(route, variant, "GET", via, span, only=head.upstream)
            assert isinstance(answer, Answer)
            told = Validators(head.upstream_etag, head.last_modified)
            same = told.same_as(answer.head.validators, vouched=bool(head.upstream_etag))
            if not same or answer.head.start != start or answer.head.length != head.length:
                answer.close()
                self._spans.give_back(place)
                return None
        except Problem:
            self._spans.give_back(place)
            return None
        except BaseException:
            self._spans.give_back(place)
            raise
        return BypassBody(head, answer, stop, lambda: self._spans.give_back(place))

    async def _is_far(self, body: GrowingBody, offset: int) -> bool:
        """Whether the fill will take longer than `fill.range_wait`; a young fill's rate is waited for."""
        clock = self._means.clock
        left = _RATE_KNOWN_SECONDS - body.age_seconds(clock())
        if left > 0 and offset >= body.published:
            reached = asyncio.Event()
            body.wait(offset, reached.set)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await reached.wait()
            body.forget(reached.set)
        return body.seconds_to(offset, clock()) > self._means.settings.fill.range_wait

    async def whole(self, route: Route, variant: Variant, via: str | None, client: str = "") -> Opened:
        """What can't be stored. Problem when as many clients as may be are being passed through."""
        place = self._places.try_take()
        if place is None:
            raise Problem(
                "overloaded",
                "this content can't be stored here, and as many clients as may be are being passed through",
                retry_after_seconds=10.0,
            )
        try:
            answer = await self._ask(route, variant, "GET", via, {}, client=client)
        except BaseException:
            self._places.give_back(place)
            raise
        assert isinstance(answer, Answer)
        key = route.key(variant)

        def ends_right(tail: bytes) -> bool:
            return not key.file.lower().endswith(".zip") or zip_end_is_right(tail)

        def done() -> None:
            self._places.give_back(place)

        body = BypassBody(head_of(key, answer.head), answer, None, done, ends_right)
        return Opened(body, Result.BYPASS, key, route.kind, ranges=False)

    async def _ask(
        self,
        route: Route,
        variant: Variant,
        method: str,
        via: str | None,
        span: dict[str, object],
        client: str = "",
        only: str | None = None,
    ) -> Answer | RemoteHead:
        """One request, at each upstream in turn until one answers, or at one `only`."""
        pool = self._means.pool
        problem, key = Problem("no-upstream", f"no upstream has {variant}"), route.key(variant)
        try:
            admitted = pool.admitted(variant, key.text, via)
        except UpstreamFailure as failure:
            retry = failure.retry_after_seconds or 2.0
            raise Problem(failure.slug, failure.detail, retry_after_seconds=retry) from failure
        waits: list[float] = []
        for upstream in admitted:
            if only not in (None, upstream.name):
                continue
            ask = Ask(
                path=route.upstream_path,
                purpose="bypass",
                stream=(self._means.streams.number(key), str(route.kind)),
                method=method,
                via=via,
                client=client,
                **span,  # type: ignore[arg-type]
            )
            try:
                answer = await pool.ask(upstream, ask)
            except UpstreamFailure as failure:
                problem = Problem(failure.slug, failure.detail, retry_after_seconds=2.0)
                waits += [failure.retry_after_seconds] if failure.retry_after_seconds is not None else []
                continue
            if isinstance(answer, RemoteHead) and answer.status != 200:
                slug = "upstream-gone" if answer.status == 410 else "upstream-not-found"
                problem = Problem(slug, f"{answer.upstream} answered {answer.status}")
                self._failures.put(key, problem, self._means.settings.cache.negative_ttl)
                break
            return answer
        if waits and len(waits) == len(admitted):  # all of them want to be left alone for a while
            problem.retry_after_seconds = min(waits)
            self._failures.put(key, problem, min(waits))
        raise problem
