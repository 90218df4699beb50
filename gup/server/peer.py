"""The peer port: what other members of the cluster ask this node, and its answers.

Rules, limits and reports are the asking node's business, which chose the key. Every question and the head of
every answer are signed (gup.cluster.signing).
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from http import HTTPStatus

from gup import config
from gup.cache.cache import Cache, Result
from gup.cache.inflight import OF_MEMBER, FillDependencies
from gup.cache.records import Head
from gup.cache.scheduler import Class
from gup.cluster.orders import FILE, covers, knows, read_order
from gup.cluster.signing import Question, Refused, Signer
from gup.content.key import BadKeyError, ContentKey
from gup.content.routes import Route, Routes, parse_target
from gup.errors import Problem, exhausted, is_exhausted
from gup.phases import RequestClock
from gup.server.access_log import AccessLog
from gup.server.downloads import Downloads
from gup.server.handler import Later
from gup.server.hot_cache import HotCache
from gup.server.ranges import Span
from gup.server.request import Request
from gup.server.response import Response, Serving, field_lines, plan, refuse
from gup.units import format_http_date
from gup.upstream.exchange import PASSED_ON, GivenHead, GivenProblem, Validators, gup_names
from gup.upstream.members import COMING, NOT_HELD, NOT_READY

log = logging.getLogger("gup.peer")

_MOST_CONNECTIONS = 4096
"""Of members to one worker. Beyond it idle ones are closed first, such as those of who is no member."""
_ORDERS_SECONDS, _LOOK_SECONDS = 0.9, 0.01
_READY_SECONDS = 1.0
"""A question that can't be answered by then is answered with NOT_READY, and asked again."""
_PROMOTED_SECONDS = 0.3
"""Longer than it takes a process to see that another one's client waits."""
_TRIES = 3
_BACKGROUND = str(int(Class.BACKGROUND))


class PeerLog(AccessLog):
    """In place of the access log: members are no clients, so that only their bytes are counted."""

    def begin(self, peer: str, response: Response) -> None:  # noqa: ARG002 - as in AccessLog
        self.connected.clear()

    def end(
        self, peer: str, response: Response, sent: int, *, complete: bool, times: RequestClock | None = None
    ) -> None:
        """Nothing."""


class PeerOrders:
    """The cluster's orders as a worker tells them: those in the controller's file, and what is known."""

    def __init__(
        self,
        dependencies: FillDependencies,
        signer: Callable[[], Signer],
        is_ready: Callable[[], bool] = lambda: True,
    ) -> None:
        """`is_ready`: the orders were caught up since the start."""
        self._deps, self._signer, self._is_ready = dependencies, signer, is_ready

    @property
    def known(self) -> str:
        return self._deps.purges.known

    @property
    def ready(self) -> bool:
        return self._is_ready()

    async def lacked(self, known: str) -> bytes:
        """What this node knows and is not `known`, and all that stands, each signed, a line each.

        What stands may be older than all that who asks has; then it is no gap there.
        """
        signer, path = self._signer(), self._deps.store.run / FILE

        def is_lacked(line: str) -> bool:
            order = read_order(line)
            return order is None or order.subject is not None or not knows(known, order.node, order.number)

        def read() -> bytes:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except OSError:
                return b""
            return "".join(signer.seal("order", line) + "\n" for line in filter(is_lacked, lines)).encode()

        return await asyncio.get_running_loop().run_in_executor(self._deps.executor, read)

    async def told(self, member: str, known: str) -> bool:
        """A member says what it knows: have the controller ask it, and wait until that is known here."""
        if not covers(self.known, known):
            self._deps.tell({"type": "ordered", "member": member})
            give_up_at = self._deps.clock() + _ORDERS_SECONDS
            # The controller is another process.
            while not covers(self.known, known) and self._deps.clock() < give_up_at:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_SECONDS)
        return covers(self.known, known)


class PeerHandler:
    """In the handler's place on the peer port."""

    def __init__(
        self,
        dependencies: FillDependencies,
        cache: Cache,
        downloads: Downloads,
        log: PeerLog,
        node: str,
        name: str,
        signer: Callable[[], Signer],
        times_ms: Callable[[], Sequence[int]],
        orders: "PeerOrders | None" = None,
    ) -> None:
        """`node` is the name in Via, that of all members; `name` this one's own. `times_ms` are the engine's
        times that count as now, the likeliest first.
        """
        self.access_log = log
        self.hot_cache = HotCache(lambda: (0, 0), lambda: None)  # of nothing: it never learns
        self.downloads = downloads
        self.draining = False
        self._dependencies, self._cache = dependencies, cache
        self._name, self._signer, self._times_ms = name, signer, times_ms
        self._orders = orders or PeerOrders(dependencies, signer)
        self._node, self._via = node, f"1.1 {node} (gup)"
        self._use(dependencies.settings)

    def apply(self, settings: config.Settings) -> None:
        self._use(settings)

    def _use(self, settings: config.Settings) -> None:
        self._routes = Routes.of(settings.upstream)

    def respond(self, request: Request) -> Later:
        return lambda _times: self._respond(request)

    async def _respond(self, request: Request) -> Response:
        signer, times, target = self._signer(), self._times_ms(), request.target.decode("latin-1")
        question = signer.verify_question(self._name, request.method, target, request.headers, times)
        if isinstance(question, Refused):
            problem = Problem("forbidden-host", "only members of this gup's cluster are answered here")
            response = self.refuse(problem, keep_alive=False)
            if question.question is not None:  # a member whose clock is wrong learns the time
                self._sign(signer, question.question, response, times[0], {})
            return response
        fields: dict[str, str] = {}
        try:
            response = await self._answer(request, fields)
            if response.body is not None:
                response.sent_at = self._dependencies.members.position("sent", question.asker)
        except Exception as error:
            if isinstance(error, OSError) and is_exhausted(error):
                error = exhausted(error)
            if not isinstance(error, Problem):
                log.exception("a member's request failed: %r", request.head[:200])
                error = Problem("internal-error", "an error in gup itself; its log has the details")
            response = self.refuse(error, keep_alive=request.keep_alive)
            if request.method == "HEAD":
                response.segments = ()
        self._sign(signer, question, response, self._times_ms()[0], fields)
        return response

    def _sign(
        self, signer: Signer, question: Question, response: Response, time_ms: int, fields: dict[str, str]
    ) -> None:
        """Add `fields` and the signature to the response's head."""
        lines = response.head.decode("latin-1").split("\r\n")[1:-2]
        sent = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        fields |= signer.answer(question, response.status, time_ms, [*sent, *fields.items()])
        response.head = response.head[:-2] + field_lines(list(fields.items())) + b"\r\n"

    async def _answer(self, request: Request, fields: dict[str, str]) -> Response:
        request.check_method()
        if request.target in (b"/readyz", b"/orders", b"/orders/known"):
            return await self._tell(request, fields)
        if not self._orders.ready:
            return self._plain(503, request)
        route = self._routes.route(parse_target(request.target).path)
        try:
            key = ContentKey.parse(request.header("gup-key") or "")
        except BadKeyError as error:
            raise Problem("bad-request", str(error)) from error
        if key not in route.keys(key.variant):
            raise Problem("bad-request", f"{key.text} is not a key of this path")
        passed = tuple(name for name in gup_names(request.header("via")) if name != self._node)
        try:
            async with asyncio.timeout(_READY_SECONDS):
                return await self._answer_for(request, route, key, passed, fields)
        except TimeoutError:
            return self._plain(NOT_READY, request)
        except Problem as problem:
            if problem.slug in PASSED_ON:
                known = self._dependencies.failures.get(key, route.upstream_path)
                left = (known.stands_seconds if known is not None else None) or 0.0
                retry = problem.retry_after_seconds
                fields["GUP-Problem"] = GivenProblem(problem.slug, problem.detail, retry, left).text()
            raise

    async def _answer_for(
        self,
        request: Request,
        route: Route,
        key: ContentKey,
        passed: tuple[str, ...],
        fields: dict[str, str],
    ) -> Response:
        asker = request.header("gup-client")
        client, held = OF_MEMBER + asker if asker else "", request.header("gup-held") == "1"
        background = request.header("gup-class") == _BACKGROUND
        if request.method == "HEAD" and not held:
            head, _, age = await self._cache.head(route, key.variant, passed, client)
            return self._plan(request, head, age, fields)
        for _ in range(_TRIES):
            opened = await (
                self._cache.held(key, route, background=background)
                if held
                else self._cache.open(route, key.variant, passed, client, background=background)
            )
            if opened is None:
                return self._plain(COMING if await self._cache.has_part(key) else NOT_HELD, request)
            response = self._plan(request, opened.body.head, opened.age_seconds, fields, ranges=opened.ranges)
            span = next((segment for segment in response.segments if isinstance(segment, Span)), None)
            if span is None:
                try:
                    if request.header("gup-promote") == "1":  # a reader tells the process that leads the fill
                        await asyncio.sleep(_PROMOTED_SECONDS)
                finally:
                    opened.body.leave()
                return response
            if opened.entry is None and response.status == 206 and not held:
                opened = await self._cache.span_alone(
                    opened, route, key.variant, span.start, span.stop, passed
                )
            # The first bytes must be readable: until then the asking node can be told.
            if opened.entry is None or await self._cache.is_sound_at(opened, span.start):
                response.body = opened.body
                return response
        raise Problem("internal-error", "the entry was replaced during each try", retry_after_seconds=1)

    def _plan(
        self, request: Request, head: Head, age: int, fields: dict[str, str], *, ranges: bool = True
    ) -> Response:
        validators = Validators(head.upstream_etag, head.last_modified)
        given = GivenHead(
            head.etag,
            head.upstream,
            head.upstream_etag,
            head.last_modified,
            validators,
            age,
            head.order,
        )
        fields["GUP-Head"] = given.text()
        response = plan(request, head, Serving(self._date(), self._via, age, "gup", None, ranges))
        response.result = Result.HIT
        return response

    async def _tell(self, request: Request, fields: dict[str, str]) -> Response:
        """What is not about content."""
        status, body = 200, b""
        member, known = (request.header(name) or "" for name in ("gup-from", "gup-known"))
        if request.target == b"/readyz":
            ready = self._orders.ready and self._dependencies.members.settled and not self.draining
            status = 200 if ready else 503
        elif request.target == b"/orders":
            body = await self._orders.lacked(known)
        else:
            status = 200 if await self._orders.told(member, known) else NOT_READY
        fields["GUP-Known"] = self._orders.known
        return self._plain(status, request, body)

    def _plain(self, status: int, request: Request, body: bytes = b"") -> Response:
        lines = [("Date", self._date()), ("Content-Length", str(len(body)))]
        lines += [] if request.keep_alive else [("Connection", "close")]
        phrase = HTTPStatus(status).phrase.encode()
        head = b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, phrase, field_lines(lines))
        segments = (body,) if body and request.method != "HEAD" else ()
        return Response(status, head, segments, close=not request.keep_alive)

    def _date(self) -> str:
        return format_http_date(self._dependencies.wall_clock())

    def refuse(self, problem: Problem, request: Request | None = None, *, keep_alive: bool) -> Response:
        del request
        return refuse(problem, self._date(), self._via, keep_alive=keep_alive and not self.draining)


class PeerAdmission:
    """In place of Admission: who asks is known by the signature; the number of connections is bounded."""

    is_proxy: Callable[[str], bool] | None = None

    def __init__(self) -> None:
        self._open = 0

    def apply(self, settings: config.Settings) -> None:
        """Nothing."""

    def is_allowed(self, address: str) -> bool:
        del address
        return True

    def admit(self, address: str, make_room: Callable[[], bool]) -> bool:
        del address
        return self.reserve(make_room)

    def reserve(self, make_room: Callable[[], bool]) -> bool:
        self._open += 1
        if self._open > _MOST_CONNECTIONS and not make_room():
            self._open -= 1
            return False
        return True

    def release(self) -> None:
        self._open -= 1

    def leave(self, address: str) -> None:
        del address
        self.release()

    def count(self, address: str) -> None:
        del address
        self._open += 1

    def refuse(self, reason: str) -> bool:
        del reason
        return False

    def among(self, client: str) -> float:
        del client
        return 1.0
