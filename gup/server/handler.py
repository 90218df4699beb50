"""From a parsed request to its answer: route, cache, and the one place that makes a problem a response."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from gup import config
from gup.cache.body import Body
from gup.cache.cache import Cache, Opened, Result
from gup.cache.flight import Means
from gup.cache.record import Head
from gup.content.key import Kind, Variant
from gup.content.routes import Route, Routes, parse_target
from gup.content.variant_choice import Choice
from gup.errors import Problem, exhausted, is_exhausted
from gup.metrics import CODES_OF_RESULT
from gup.server import problem as problems
from gup.server.accounts import Account, Accounts, of_problem
from gup.server.deliveries import Deliveries
from gup.server.downloads import Downloads, Turn
from gup.server.hot import HotRow, HotTable
from gup.server.outgoing import Outgoing
from gup.server.ranges import Span
from gup.server.request import Request, check_method, closes
from gup.server.response import HeadTemplate, PartTemplate, Plan, Representation, Served, plan
from gup.server.tally import LARGE_BODY_BYTES, Tally
from gup.units import format_http_date

log = logging.getLogger("gup.request")

_STATUS_OF_RESULT = {
    Result.HIT: "gup; hit",
    Result.MISS: "gup; fwd=uri-miss; stored",
    Result.COLLAPSED: "gup; fwd=uri-miss; collapsed",
    Result.REVALIDATED: "gup; fwd=stale; fwd-status=304",
    Result.STALE: "gup; hit; fwd=stale",
    Result.BYPASS: "gup; fwd=bypass",
}
"""Values of Cache-Status (RFC 9211)."""
_STATUS_OF_HEAD_MISS = "gup; fwd=uri-miss"
_TRIES = 3
"""Bodies that a request may find to be replaced before it has begun to read them."""
_OUR_MISTAKE = Problem("internal-error", "a mistake of gup's own; its log tells more")
_REFUSALS = frozenset(int(code) for code in CODES_OF_RESULT["refused"])


@dataclass(slots=True)
class Reply:
    """An answer ready to leave: literal bytes, and spans of `body`. Words count what is sent of it."""

    head: bytes
    segments: tuple[bytes | Span, ...] = ()
    body: Body | None = None
    chunked: bool = False
    close: bool = False
    sent_at: int = 0
    stream_at: int = 0
    turn: Turn | None = None
    """The download's turn, which must have come before anything is sent."""
    result: Result | None = None
    """Counted when the answer begins to leave, as `status`; None: it is counted already."""
    status: int = 0
    began: float = 0.0
    account: Account | None = None
    """What is told of it when it has left."""
    full: str = ""
    """The key's text when bytes of a full are sent: who takes it is told."""

    def outgoing(self, words: "memoryview[int]") -> Outgoing:
        """The answer on its way; counts its body bytes in two of `words`."""
        places = self.sent_at, self.stream_at
        return Outgoing(words, self.head, self.segments, self.body, *places, chunked=self.chunked)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request whose target is content."""

    request: Request
    route: Route
    """With the key that was chosen for this client."""
    choice: Choice
    head: bytes

    @property
    def variant(self) -> Variant:
        """Whose upstreams are asked."""
        return self.choice.asked


class Handler:
    """Decides every request of one worker. `draining` is set by the listener when the service stops."""

    def __init__(
        self,
        means: Means,
        cache: Cache,
        deliveries: Deliveries,
        tally: Tally,
        hot: HotTable,
        downloads: Downloads,
        *,
        node: str,
        wall_clock: Callable[[], float],
        accounts: Accounts,
    ) -> None:
        self.draining = False
        self._means = means
        self._cache = cache
        self._deliveries = deliveries
        self._routes = _routes(means.settings)
        self._tally = tally
        self._hot = hot
        self._downloads = downloads
        self._node = node
        self._via = f"1.1 {node} (gup)"
        self._wall_clock = wall_clock
        self.accounts = accounts
        self._authorities = _authorities(means.settings)

    def apply(self, settings: config.Settings) -> None:
        """Reloaded settings."""
        self._authorities = _authorities(settings)
        self._routes = _routes(settings)
        self._deliveries.apply(settings)

    # --- entry points

    def answer_now(self, request: Request, head: bytes) -> Reply | None:
        """The answer if it needs neither disk nor upstream; None: call `answer`."""
        if not self._deliveries.ready:
            return None
        began = self._means.clock()
        epochs = self._hot.epochs
        asked = None
        try:
            asked = self._ask(request, head)
            opened = self._cache.open_now(asked.route, asked.variant)
            if opened is None:
                return None
            self._deliveries.passed(asked.choice, asked.route)
            reply = self._reply(asked, opened, began)
        except Problem as problem:
            return self.refusal(problem, request=request, asked=asked)
        except Exception:
            log.exception("a request failed: %r", head[:200])
            return self.refusal(_OUR_MISTAKE.again(), request=request, close=True)
        self._learn(asked, opened, epochs)
        return reply

    async def answer(self, request: Request, head: bytes, client: str) -> Reply:
        """The answer, whatever it takes; never raises but when it is cancelled."""
        began = self._means.clock()
        asked = None
        try:
            await self._deliveries.until_ready()
            epochs = self._hot.epochs
            asked = self._ask(request, head)
            self._deliveries.passed(asked.choice, asked.route)
            if request.method == "HEAD":
                return await self._answer_head(asked, client)
            opened = await self._open(asked, client)
            reply = self._reply(asked, opened, began)
        except Problem as problem:
            return self.refusal(problem, request=request, asked=asked)
        except Exception as error:
            if isinstance(error, OSError) and is_exhausted(error):
                return self.refusal(exhausted(error), request=request)
            log.exception("a request failed: %r", head[:200])
            return self.refusal(_OUR_MISTAKE.again(), request=request, close=True)
        self._learn(asked, opened, epochs)
        return reply

    def refusal(
        self,
        problem: Problem,
        *,
        request: Request | None = None,
        asked: Asked | None = None,
        keep_alive: bool = False,
        close: bool = False,
    ) -> Reply:
        """The response that tells a problem: the only place where one is translated.

        `asked` is what of the request was understood. `keep_alive` is what the client asked for where there
        is no parsed `request` to tell.
        """
        status = problem.status
        upstream = problem.slug.startswith("upstream-") or problem.slug in ("no-upstream", "internal-error")
        result = "error" if upstream or status not in _REFUSALS else "refused"
        self._tally.request(result, status)
        close = close or closes(problem.slug) or self.draining
        keep = (request.keep_alive if request is not None else keep_alive) and not close
        text = problems.render(
            problem,
            date=format_http_date(self._wall_clock()),
            via=self._via,
            instance=None,
            head_only=request is not None and request.method == "HEAD",
            keep_alive=keep,
        )
        key = asked.route.key(asked.variant).text if asked is not None else None
        account = of_problem(request, problem.slug, result, status, key)
        return Reply(text, close=not keep, account=self._stated(account, request))

    # --- what is asked

    def _ask(self, request: Request, head: bytes) -> Asked:
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
        choice = self._deliveries.choose(request, route)
        return Asked(request, choice.of(route), choice, head)

    async def _open(self, asked: Asked, client: str) -> Opened:
        """The body, with the bytes that its answer begins with at hand: until then an error can be told."""
        for _ in range(_TRIES):
            opened = await self._cache.open(asked.route, asked.variant, asked.request.header("via"), client)
            if opened.entry is None:
                return await self._span_alone(asked, opened)
            planned = self._plan(asked, opened)
            spans = [segment for segment in planned.segments if isinstance(segment, Span)]
            if not spans or await self._cache.is_sound_at(opened, spans[0].start):
                return opened
        raise Problem("internal-error", "the stored body changes at every look", retry_after_seconds=1.0)

    async def _span_alone(self, asked: Asked, opened: Opened) -> Opened:
        """Swap a growing body for the span asked for, when the fill will not reach that soon."""
        if asked.request.header("range") is None or opened.body.end() is None:
            return opened
        planned = self._plan(asked, opened)
        spans = [segment for segment in planned.segments if isinstance(segment, Span)]
        if planned.status != 206 or len(spans) != 1:
            return opened
        via = asked.request.header("via")
        body = await self._cache.alone.span(
            opened, asked.route, asked.variant, spans[0].start, spans[0].stop, via
        )
        if body is None:
            return opened
        opened.body.leave()
        return replace(opened, body=body, result=Result.BYPASS)

    # --- answers

    def _reply(self, asked: Asked, opened: Opened, began: float) -> Reply:
        planned = self._plan(asked, opened)
        body: Body | None = opened.body
        if not planned.segments and body is not None:
            body.leave()
            body = None
        if opened.entry is not None:
            self._tally.used(opened.key.text)
        elif asked.route.immutable:
            self._tally.asked(opened.key.text)
        slot = self._means.streams.number(opened.key)
        turn = self._turn(opened, planned)
        return Reply(
            planned.head,
            planned.segments,
            body,
            planned.chunked,
            planned.close,
            self._tally.sent[opened.body.source],
            self._tally.stream[slot, str(opened.kind)],
            turn,
            opened.result,
            planned.status,
            began,
            self._stated(of_body(asked.request, opened, planned), asked.request),
            opened.key.text if opened.kind is Kind.FULL and body is not None else "",
        )

    def _stated(self, account: Account, request: Request | None) -> Account:
        """The account with what the client states of itself."""
        if request is not None:
            account.stated = self.accounts.declarations.of(request.headers)
        return account

    def _turn(self, opened: Opened, planned: Plan) -> Turn | None:
        """The turn that an answer needs whose body is a download. Problem when too many wait for theirs."""
        if not any(isinstance(segment, Span) for segment in planned.segments):
            return None
        if not is_download(opened.kind, opened.body.end()):
            return None
        try:
            return self._downloads.ask()
        except Problem:
            opened.body.leave()
            raise

    def begin(self, reply: Reply, peer: str) -> None:
        """An answer begins to leave: count it."""
        if reply.full:
            self._tally.took_full(peer, reply.full)
        if reply.account is not None:
            reply.account.first_byte = self.accounts.clock()
        if reply.result is not None:
            self._tally.request(reply.result, reply.status)
            self._means.counters.observe(
                "gup_time_to_first_byte_seconds",
                self._means.clock() - reply.began,
                result=str(reply.result),
            )

    def _plan(self, asked: Asked, opened: Opened) -> Plan:
        request = asked.request
        if not opened.ranges:
            request = _without_range(request)
        if self.draining:
            request = replace(request, keep_alive=False)
        representation = self._representation(asked, opened.body.head)
        return plan(request, representation, self._served(opened.result, opened.age_seconds))

    def _representation(self, asked: Asked, head: Head) -> Representation:
        vary = None if asked.choice.for_everybody else self._deliveries.choices.book.identities.vary
        return Representation(head.length, head.etag, head.last_modified, head.content_type, vary)

    def _served(self, result: Result, age_seconds: int) -> Served:
        return Served(
            date=format_http_date(self._wall_clock()),
            via=self._via,
            age_seconds=age_seconds,
            cache_status=_STATUS_OF_RESULT[result],
        )

    async def _answer_head(self, asked: Asked, client: str) -> Reply:
        head, result, age_seconds = await self._cache.look(
            asked.route, asked.variant, asked.request.header("via"), client
        )
        served = self._served(result, age_seconds)
        if result is Result.MISS:
            served = replace(served, cache_status=_STATUS_OF_HEAD_MISS)
        planned = plan(asked.request, self._representation(asked, head), served)
        self._tally.request(result, planned.status)
        key = asked.route.key(asked.variant).text
        account = Account("HEAD", result, planned.status, key)
        return Reply(planned.head, close=planned.close, account=self._stated(account, asked.request))

    # --- the hot lane

    def _learn(self, asked: Asked, opened: Opened, epochs: tuple[int, int, int]) -> None:
        """Make the next answer to the same head ready, and to all that ask plainly for the same target."""
        entry, request = opened.entry, asked.request
        if entry is None or opened.body is not entry or self.draining:
            return
        stays = request.plain and request.keep_alive
        if not stays and self._hot.find_target(request.target) is not None:
            return
        if not entry.all_verified or opened.result is not Result.HIT:
            return
        if not asked.choice.decision.allowed:  # each one is counted
            return
        if request.minor_version != 1 or request.method != "GET":
            return
        if not request.target.startswith(b"/") or request.header("via") is not None:
            return
        record = entry.record
        age = self._wall_clock() - record.validated_at
        left = self._means.settings.cache.index_ttl - age
        representation, status = self._representation(asked, entry.head), _STATUS_OF_RESULT[Result.HIT]
        slot = self._means.streams.number(opened.key)
        row = HotRow(
            entry=entry,
            template=HeadTemplate(representation, self._via, status, keep_alive=True, minor_version=1),
            part_template=PartTemplate(representation, self._via, status),
            length=record.length,
            download=is_download(opened.kind, record.length),
            key_text=opened.key.text,
            sent_at=self._tally.sent["cache"],
            stream_at=self._tally.stream[slot, str(opened.kind)],
            hit_at=self._tally.requests["hit", 200],
            part_hit_at=self._tally.requests["hit", 206],
            fresh_until=None if asked.route.immutable else self._means.clock() + left,
            validated_at=record.validated_at,
            stated=self.accounts.declarations.of(request.headers),
            full=opened.kind is Kind.FULL,
        )
        # Where it depends on the client, only these same bytes have the same answer.
        target = request.target if asked.choice.for_everybody else None
        self._hot.learn(asked.head if stays else None, target, row, epochs)


def of_body(request: Request, opened: Opened, planned: Plan) -> Account:
    """The account of an answer with content: which part of the body it is, one span of it at most."""
    account = Account(request.method, opened.result, planned.status, opened.key.text)
    spans = [segment for segment in planned.segments if isinstance(segment, Span)]
    if len(spans) == 1:
        account.start, account.stop = spans[0].start, spans[0].stop
        account.length = opened.body.end()
    return account


def is_download(kind: Kind, length: int | None) -> bool:
    """Whether a body takes a download slot: a large one, or one that may become so, and no index file."""
    return kind is not Kind.INDEX and (length is None or length > LARGE_BODY_BYTES)


def _without_range(request: Request) -> Request:
    kept = tuple((name, value) for name, value in request.headers if name not in ("range", "if-range"))
    return replace(request, headers=kept)


def _routes(settings: config.Settings) -> Routes:
    """LiveUpdate's files at the root are served where there is an upstream to have them from."""
    return Routes(liveupdate=any(upstream.kind == "liveupdate" for upstream in settings.upstream))


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
