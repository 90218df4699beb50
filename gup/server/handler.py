"""From a request to its response: route, policy, cache. The only place that turns problems into responses."""

import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from gup import config
from gup.cache.cache import Cache, Opened, Result
from gup.cache.inflight import FillDependencies
from gup.content.routes import Route, Routes, parse_target
from gup.content.variant_choice import Choice
from gup.errors import Problem, exhausted, is_exhausted
from gup.metrics import CODES_OF_RESULT
from gup.phases import RequestClock
from gup.server.access_log import AccessLog
from gup.server.downloads import Downloads, is_download
from gup.server.hot_cache import Epochs, HotCache, HotRow
from gup.server.policy import Policy
from gup.server.ranges import Span
from gup.server.request import Request
from gup.server.response import Response, Serving, plan, refuse
from gup.units import format_http_date
from gup.upstream.exchange import MOST_HOPS, gup_names

log = logging.getLogger("gup.request")

_CACHE_STATUS = {
    Result.HIT: "gup; hit",
    Result.MISS: "gup; fwd=uri-miss; stored",
    Result.COLLAPSED: "gup; fwd=uri-miss; collapsed",
    Result.REVALIDATED: "gup; fwd=stale; fwd-status=304",
    Result.STALE: "gup; hit; fwd=stale",
    Result.BYPASS: "gup; fwd=bypass",
}
"""Values of Cache-Status (RFC 9211)."""
_CACHE_STATUS_OF_HEAD_MISS = "gup; fwd=uri-miss"
_TRIES = 3  # a request whose body is replaced before it is read is retried this often
_REFUSALS = frozenset(int(code) for code in CODES_OF_RESULT["refused"])
# The connection ends after these: it is unknown where the next request begins. The body of a request with
# another method is not read.
_CLOSING = {"bad-request", "method-not-allowed", "request-timeout", "uri-too-long", "head-too-large"}
_CLOSING |= {"http-version", "draining"}

Later = Callable[[RequestClock], Coroutine[Any, Any, Response]]
"""Makes the response when it is awaited, and gives the clock the time that it waits for."""


class Handler:
    """Answers every parsed request of one worker. The listener sets `draining` when the service stops."""

    def __init__(
        self,
        dependencies: FillDependencies,
        cache: Cache,
        policy: Policy,
        hot_cache: HotCache,
        downloads: Downloads,
        access_log: AccessLog,
        node: str,
    ) -> None:
        self.hot_cache = hot_cache
        self.downloads = downloads
        self.access_log = access_log
        self.draining = False
        self._dependencies = dependencies
        self._cache = cache
        self._policy = policy
        self._node = node
        self._via = f"1.1 {node} (gup)"
        self._use(dependencies.settings)

    def apply(self, settings: config.Settings) -> None:
        self._use(settings)
        self._policy.apply()
        self.access_log.apply(settings)
        self.hot_cache.drop()

    def _use(self, settings: config.Settings) -> None:
        self._authorities = frozenset(_authority(upstream.url) for upstream in settings.upstream)
        self._routes = Routes.of(settings.upstream)

    # --- from request to response

    async def _respond_when_ready(self, request: Request, route: Route, times: RequestClock) -> Response:
        times.enter("head")  # of the upstreams' catalogues
        try:
            await self._policy.until_ready(route)
        except Exception as error:  # noqa: BLE001 - `_failed` turns it into a response
            return self._failed(error, request)
        times.enter("disk")
        response = self.respond(request, waited=True)
        return response if isinstance(response, Response) else await response(times)

    def respond(self, request: Request, *, waited: bool = False) -> Response | Later:
        """The response, or, if that takes disk or upstream, what returns it.

        Neither raises anything; the latter may be cancelled. `waited`: the request has already waited for
        the policy.
        """
        epochs, route, choice = self.hot_cache.epochs, None, None
        try:
            route = self._route(request)
            if not waited and not self._policy.is_ready(route):
                return partial(self._respond_when_ready, request, route)
            choice = self._policy.choose(request, route)
            route = choice.of(route)
            opened = self._cache.open_now(route, choice.asked)
            if opened is None:
                return partial(self._respond_later, request, route, choice)
            response = self._complete(request, opened, self._plan(request, choice, opened))
            self._learn(request, route, choice, opened, response, epochs)
        except Exception as error:  # noqa: BLE001 - as above
            return self._failed(error, request, route, choice)
        return response

    def _route(self, request: Request) -> Route:
        request.check_method()
        passed = gup_names(request.header("via"))
        if self._node in passed:
            raise Problem("loop", f"the request's Via names this node, {self._node}")
        if len(passed) > MOST_HOPS:
            raise Problem("loop", f"the request's Via names more than {MOST_HOPS} gups")
        target = parse_target(request.target)
        if target.authority is not None and target.authority not in self._authorities:
            detail = f"{target.authority} is not an upstream of this service, which is not an open proxy"
            raise Problem("forbidden-host", detail)
        route = self._routes.route(target.path)
        if not self._dependencies.settings.upstream:
            raise Problem("no-upstream", "no upstream is configured")
        return route

    async def _respond_later(
        self, request: Request, route: Route, choice: Choice, times: RequestClock
    ) -> Response:
        passed, client = gup_names(request.header("via")), request.client
        try:
            times.key = route.key(choice.asked).text
            if request.method == "HEAD":
                times.enter("head")
                head, result, age = await self._cache.head(route, choice.asked, passed, client)
                cache_status = _CACHE_STATUS_OF_HEAD_MISS if result is Result.MISS else _CACHE_STATUS[result]
                response = plan(request, head, self._serving(choice, age, cache_status))
                response.result, response.key = result, route.key(choice.asked).text
                return response
            for _ in range(_TRIES):
                opened = await self._cache.open(route, choice.asked, passed, client, waits=times)
                response = self._plan(request, choice, opened)
                span = next((segment for segment in response.segments if isinstance(segment, Span)), None)
                if opened.entry is None:
                    if span is not None and response.status == 206 and len(response.segments) == 1:
                        times.enter("head")
                        alone = await self._cache.span_alone(
                            opened, route, choice.asked, span.start, span.stop, passed
                        )
                        if alone is not opened:
                            opened, response = alone, self._plan(request, choice, alone)
                    return self._complete(request, opened, response)
                # The first bytes must be readable: until then an error can still be answered.
                if span is None or await self._cache.is_sound_at(opened, span.start):
                    return self._complete(request, opened, response)
            problem = Problem(
                "internal-error", "the entry was replaced during each try; try again", retry_after_seconds=1
            )
            return self.refuse(problem, request, keep_alive=False)
        except Exception as error:  # noqa: BLE001 - as above
            return self._failed(error, request, route, choice)

    def _plan(self, request: Request, choice: Choice, opened: Opened) -> Response:
        if self.draining:
            request = replace(request, keep_alive=False)
        serving = self._serving(choice, opened.age_seconds, _CACHE_STATUS[opened.result], opened.ranges)
        return plan(request, opened.body.head, serving)

    def _serving(self, choice: Choice, age: int, cache_status: str, ranges: bool = True) -> Serving:
        vary = None if choice.for_everybody else self._policy.choices.book.identities.vary
        return Serving(self._date(), self._via, age, cache_status, vary, ranges)

    def _date(self) -> str:
        return format_http_date(self._dependencies.wall_clock())

    def _complete(self, request: Request, opened: Opened, response: Response) -> Response:
        body = opened.body
        if any(isinstance(segment, Span) for segment in response.segments):
            if is_download(opened.kind, body.end()):
                try:
                    response.ticket = self.downloads.take_ticket(request.client)
                except Problem:
                    body.leave()
                    raise
            number = self._dependencies.streams.number(opened.key)
            response.body = body
            response.sent_at = self.access_log.sent[body.source]
            response.stream_at = self.access_log.stream[number, str(opened.kind)]
        else:
            body.leave()
        response.result, response.key, response.kind = opened.result, opened.key.text, opened.kind
        response.stored = opened.entry is not None
        return response

    def _learn(
        self,
        request: Request,
        route: Route,
        choice: Choice,
        opened: Opened,
        response: Response,
        epochs: Epochs,
    ) -> None:
        """Store the response for the same head, and for plain requests of the same target."""
        entry = opened.entry
        if (
            entry is None
            or response.body is not entry
            or not choice.decision.allowed  # each refusal is counted
            or self._policy.is_kept_back(route, choice)
            or request.minor_version != 1
            or not request.target.startswith(b"/")
            or request.header("via") is not None
            or self.draining
        ):
            return
        stays = request.plain and request.keep_alive
        if not stays and self.hot_cache.find_target(request.target) is not None:
            return
        age = self._dependencies.wall_clock() - entry.record.validated_at
        left = self._dependencies.settings.cache.index_ttl - age
        plain = Request("GET", request.target, 1, (), keep_alive=True)
        row = HotRow(
            entry=entry,
            kind=opened.kind,
            planned=plan(plain, entry.head, self._serving(choice, 0, _CACHE_STATUS[Result.HIT])).head,
            fresh_until=None if route.immutable else self._dependencies.clock() + left,
            sent_at=response.sent_at,
            stream_at=response.stream_at,
            client=self.access_log.declarations.of(request.headers),
        )
        # Where it depends on the client, only an identical head has the same answer.
        target = request.target if choice.for_everybody else None
        self.hot_cache.learn(request.head if stays else None, target, row, epochs)

    # --- problems

    def _failed(
        self, error: Exception, request: Request, route: Route | None = None, choice: Choice | None = None
    ) -> Response:
        key = route.key(choice.asked).text if route is not None and choice is not None else None
        if isinstance(error, OSError) and is_exhausted(error):
            error = exhausted(error)
        if isinstance(error, Problem):
            return self.refuse(error, request, key, keep_alive=request.keep_alive)
        log.error("a request failed: %r", request.head[:200], exc_info=error)
        problem = Problem("internal-error", "an error in gup itself; its log has the details")
        return self.refuse(problem, request, key, keep_alive=False)

    def refuse(
        self, problem: Problem, request: Request | None = None, key: str | None = None, *, keep_alive: bool
    ) -> Response:
        """`keep_alive`: the connection may stay open unless the problem forbids it."""
        keep_alive = keep_alive and problem.slug not in _CLOSING and not self.draining
        response = refuse(problem, self._date(), self._via, keep_alive=keep_alive)
        failed = problem.slug.startswith("upstream-") or problem.slug in ("no-upstream", "internal-error")
        response.result = "error" if failed or problem.status not in _REFUSALS else "refused"
        response.key, response.problem, response.request = key, problem.slug, request
        if problem.slug == "rule-refused":
            response.rule = str(problem.extensions.get("rule", ""))
        if request is not None and request.method == "HEAD":
            response.segments = ()
        return response


def _authority(url: str) -> str:
    """The authority by which an absolute-form target names this upstream."""
    parts = urlsplit(url.lower())
    return parts.netloc if parts.port else f"{parts.netloc}:{443 if parts.scheme == 'https' else 80}"
