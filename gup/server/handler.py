"""From a request to its response: route, policy, cache. The one place that turns a problem into one."""

import logging
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from gup import config
from gup.cache.cache import Cache, Opened, Result
from gup.cache.inflight import FillDependencies
from gup.content.routes import Route, Routes, parse_target
from gup.content.variant_choice import Choice
from gup.errors import Problem, exhausted, is_exhausted
from gup.metrics import CODES_OF_RESULT
from gup.server.access_log import AccessLog
from gup.server.downloads import Downloads, is_download
from gup.server.hot_cache import HotCache, HotRow
from gup.server.policy import Policy
from gup.server.ranges import Span
from gup.server.request import Request, check_method, closes
from gup.server.response import HeadTemplate, Response, Serving, plan, refuse
from gup.units import format_http_date

log = logging.getLogger("gup.request")

_CACHE_STATUS = {
    Result.HIT: "gup; hit",
    Result.MISS: "gup; fwd=uri-miss; stored",
    Result.COLLAPSED: "gup; fwd=uri-miss; collapsed",
    Result.REVALIDATED: "gup; fwd=stale; fwd-status=304",
    Result.STALE: "gup; hit; fwd=stale",
    Result.BYPASS: "gup; fwd=bypass",
}
"""RFC 9211."""
_CACHE_STATUS_OF_HEAD_MISS = "gup; fwd=uri-miss"
_TRIES = 3
"""How often a request may find that its body was replaced before it has begun to read it."""
_REFUSALS = frozenset(int(code) for code in CODES_OF_RESULT["refused"])


class Handler:
    """Answers every parsed request of one worker. The listener sets `draining` when the service stops."""

    def __init__(
        self,
        means: FillDependencies,
        cache: Cache,
        policy: Policy,
        hot_cache: HotCache,
        downloads: Downloads,
        access_log: AccessLog,
        *,
        node: str,
    ) -> None:
        self.draining = False
        self._means = means
        self._cache = cache
        self._policy = policy
        self._hot_cache = hot_cache
        self._downloads = downloads
        self._log = access_log
        self._node = node
        self._via = f"1.1 {node} (gup)"
        self._use(means.settings)

    def apply(self, settings: config.Settings) -> None:
        """Use reloaded settings."""
        self._use(settings)
        self._policy.apply(settings)

    def _use(self, settings: config.Settings) -> None:
        self._authorities = _authorities(settings)
        # LiveUpdate's files at the root are served if there is an upstream to have them from.
        self._routes = Routes(liveupdate=any(upstream.kind == "liveupdate" for upstream in settings.upstream))

    # --- the way of a request

    def respond(self, request: Request) -> Response | Coroutine[Any, Any, Response]:
        """The response, or, if that takes disk or upstream, a coroutine that returns it.

        Neither raises anything; the coroutine may be cancelled.
        """
        return self._respond(request) if self._policy.ready else self._respond_when_ready(request)

    async def _respond_when_ready(self, request: Request) -> Response:
        try:
            await self._policy.until_ready()
        except Exception as error:  # noqa: BLE001 - the one place that turns it into a response
            return self._failed(error, request)
        response = self._respond(request)
        return response if isinstance(response, Response) else await response

    def _respond(self, request: Request) -> Response | Coroutine[Any, Any, Response]:
        epochs = self._hot_cache.epochs
        route = choice = None
        try:
            route, choice = self._choose(request)
            opened = self._cache.open_now(route, choice.asked)
            if opened is None:
                return self._respond_later(request, route, choice, epochs)
            response = self._plan(request, choice, opened)
            return self._complete(request, route, choice, opened, response, epochs)
        except Exception as error:  # noqa: BLE001 - as above
            return self._failed(error, request, route, choice)

    def _choose(self, request: Request) -> tuple[Route, Choice]:
        """What the request asks for, with the key that was chosen for this client."""
        check_method(request)
        via = request.header("via")
        if via is not None and self._node in via:
            raise Problem("loop", f"the request's Via names this node, {self._node}")
        target = parse_target(request.target)
        if target.authority is not None and target.authority not in self._authorities:
            raise Problem(
                "forbidden-host",
                f"{target.authority} is no upstream of this service; it is not an open proxy",
            )
        route = self._routes.route(target.path)
        if not self._means.settings.upstream:
            raise Problem("no-upstream", "no upstream is configured")
        choice = self._policy.choose(request, route)
        return choice.of(route), choice

    async def _respond_later(
        self, request: Request, route: Route, choice: Choice, epochs: tuple[int, int, int]
    ) -> Response:
        try:
            if request.method == "HEAD":
                return await self._head(request, route, choice)
            opened, response = await self._open(request, route, choice)
            return self._complete(request, route, choice, opened, response, epochs)
        except Exception as error:  # noqa: BLE001 - as above
            return self._failed(error, request, route, choice)

    async def _open(self, request: Request, route: Route, choice: Choice) -> tuple[Opened, Response]:
        """Open the body, and wait until the bytes that the response begins with are at hand: until then an
        error can be told.
        """
        for _ in range(_TRIES):
            opened = await self._cache.open(route, choice.asked, request.header("via"), request.peer)
            response = self._plan(request, choice, opened)
            if opened.entry is None:
                return await self._span_alone(request, route, choice, opened, response)
            span = next((part for part in response.segments if isinstance(part, Span)), None)
            if span is None or await self._cache.is_sound_at(opened, span.start):
                return opened, response
        raise Problem("internal-error", "the stored body was replaced at every try", retry_after_seconds=1.0)

    async def _span_alone(
        self, request: Request, route: Route, choice: Choice, opened: Opened, response: Response
    ) -> tuple[Opened, Response]:
        """Of one range of a growing body: fetch it alone if the fill will not reach it soon."""
        if response.status != 206 or len(response.segments) != 1:
            return opened, response
        (span,) = response.segments
        assert isinstance(span, Span)
        via = request.header("via")
        body = await self._cache.pass_through.range(opened, route, choice.asked, span.start, span.stop, via)
        if body is None:
            return opened, response
        opened.body.leave()
        opened = replace(opened, body=body, result=Result.BYPASS)
        return opened, self._plan(request, choice, opened)

    async def _head(self, request: Request, route: Route, choice: Choice) -> Response:
        head, result, age = await self._cache.head(route, choice.asked, request.header("via"), request.peer)
        cache_status = _CACHE_STATUS_OF_HEAD_MISS if result is Result.MISS else _CACHE_STATUS[result]
        response = plan(request, head, self._serving(choice, age, cache_status))
        response.result, response.key = result, route.key(choice.asked).text
        return self._log.describe(request, response)

    def _plan(self, request: Request, choice: Choice, opened: Opened) -> Response:
        if self.draining:
            request = replace(request, keep_alive=False)
        serving = self._serving(choice, opened.age_seconds, _CACHE_STATUS[opened.result], opened.ranges)
        return plan(request, opened.body.head, serving)

    def _serving(self, choice: Choice, age: int, cache_status: str, ranges: bool = True) -> Serving:
        vary = None if choice.for_everybody else self._policy.vary
        return Serving(self._date(), self._via, age, cache_status, vary, ranges)

    def _date(self) -> str:
        return format_http_date(self._means.wall_clock())

    def _complete(
        self,
        request: Request,
        route: Route,
        choice: Choice,
        opened: Opened,
        response: Response,
        epochs: tuple[int, int, int],
    ) -> Response:
        """Add what the response needs to be sent, counted and logged; and learn it for the hot cache."""
        body = opened.body
        if any(isinstance(segment, Span) for segment in response.segments):
            if is_download(opened.kind, body.end()):
                try:
                    response.ticket = self._downloads.take_ticket()
                except Problem:
                    body.leave()
                    raise
            response.body = body
            response.sent_at = self._log.sent[body.source]
            response.stream_at = self._stream_at(opened)
        else:
            body.leave()
        response.result, response.key, response.kind = opened.result, opened.key.text, opened.kind
        response.stored = opened.entry is not None
        self._learn(request, route, choice, opened, epochs)
        return self._log.describe(request, response)

    def _stream_at(self, opened: Opened) -> int:
        return self._log.stream[self._means.streams.number(opened.key), str(opened.kind)]

    def _learn(
        self,
        request: Request,
        route: Route,
        choice: Choice,
        opened: Opened,
        epochs: tuple[int, int, int],
    ) -> None:
        """Make the next response to the same head ready, and to all that ask plainly for the same target."""
        entry = opened.entry
        if (
            entry is None
            or opened.body is not entry
            or not entry.all_verified
            or opened.result is not Result.HIT
            or not choice.decision.allowed  # each one is counted
            or request.minor_version != 1
            or request.method != "GET"
            or not request.target.startswith(b"/")
            or request.header("via") is not None
            or self.draining
        ):
            return
        stays = request.plain and request.keep_alive
        if not stays and self._hot_cache.find_target(request.target) is not None:
            return
        record = entry.record
        left = self._means.settings.cache.index_ttl - (self._means.wall_clock() - record.validated_at)
        vary = None if choice.for_everybody else self._policy.vary
        row = HotRow(
            entry=entry,
            kind=opened.kind,
            key_text=opened.key.text,
            template=HeadTemplate(entry.head, self._via, _CACHE_STATUS[Result.HIT], vary),
            download=is_download(opened.kind, record.length),
            fresh_until=None if route.immutable else self._means.clock() + left,
            validated_at=record.validated_at,
            sent_at=self._log.sent["cache"],
            stream_at=self._stream_at(opened),
            hit_at=self._log.requests["hit", 200],
            part_hit_at=self._log.requests["hit", 206],
            client=self._log.declarations.of(request.headers),
        )
        # Where it depends on the client, only these same bytes have the same answer.
        target = request.target if choice.for_everybody else None
        self._hot_cache.learn(request.head if stays else None, target, row, epochs)

    # --- problems

    def _failed(
        self, error: Exception, request: Request, route: Route | None = None, choice: Choice | None = None
    ) -> Response:
        """The response to a request that ended in `error`; route and choice as far as they were found."""
        key = route.key(choice.asked).text if route is not None and choice is not None else None
        if isinstance(error, Problem):
            return self.refuse(error, request, key)
        if isinstance(error, OSError) and is_exhausted(error):
            return self.refuse(exhausted(error), request)
        log.error("a request failed: %r", request.head[:200], exc_info=error)
        problem = Problem("internal-error", "an error in gup itself; its log has the details")
        return self.refuse(problem, request, close=True)

    def refuse(
        self,
        problem: Problem,
        request: Request | None = None,
        key: str | None = None,
        *,
        keep_alive: bool = False,
        close: bool = False,
    ) -> Response:
        """The response to a problem. `keep_alive` is what the client asked for if there is no `request`."""
        close = close or closes(problem.slug) or self.draining
        keep_alive = (request.keep_alive if request is not None else keep_alive) and not close
        response = refuse(problem, date=self._date(), via=self._via, keep_alive=keep_alive)
        ours = problem.slug.startswith("upstream-") or problem.slug in ("no-upstream", "internal-error")
        response.result = "error" if ours or problem.status not in _REFUSALS else "refused"
        response.key, response.problem = key, problem.slug
        if request is None:
            return response
        if request.method == "HEAD":
            response.segments = ()
        return self._log.describe(request, response)


def _authorities(settings: config.Settings) -> frozenset[str]:
    """Hosts with their ports that an absolute-form target may name: the upstreams'."""
    found = set()
    for upstream in settings.upstream:
        scheme, _, rest = upstream.url.partition("://")
        authority = rest.split("/")[0].lower()
        if ":" not in authority.rsplit("]", 1)[-1]:
            authority += ":443" if scheme == "https" else ":80"
        found.add(authority)
    return frozenset(found)
