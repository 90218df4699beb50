"""Asks upstream for one client alone: a head, a span far ahead of a fill, a body that can't be stored."""

import asyncio
import contextlib
from dataclasses import replace

from gup.cache.bypass import BypassBody
from gup.cache.failures import Failures
from gup.cache.flight import Means
from gup.cache.growing import GrowingBody, Reader
from gup.cache.heads import head_of
from gup.cache.opened import Opened, Result
from gup.cache.part import zip_end_is_right
from gup.cache.record import Head
from gup.cache.slots import Slots
from gup.content.key import Variant
from gup.content.routes import Route
from gup.errors import Problem
from gup.upstream.exchange import RemoteHead, UpstreamFailure, Validators
from gup.upstream.session import Answer, Ask

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
