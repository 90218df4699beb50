"""The upstreams: which ones are asked for a key, in which order; sends single requests, without retries.

Order: upstreams that are up before doubtful ones, then by priority, then by weight and key, so that a key
prefers the same upstream. An upstream that is down gets one trial at a time; between trials, requests that
have no other upstream fail at once.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import xxhash

from gup import config
from gup.content.catalog import CATALOG_PATH
from gup.content.key import Variant
from gup.content.routes import LIVEUPDATE_STREAM
from gup.metrics import Counters
from gup.units import parse_http_date
from gup.upstream.bandwidth import ReceiveWindow, Wan
from gup.upstream.exchange import (
    RemoteHead,
    UpstreamFailure,
    answered_by_proxy,
    failed_for_all,
    gup_names,
    proxy_in_words,
    proxy_refused,
    read_age,
    refusal,
    rejected,
)
from gup.upstream.health import (
    EVERY_MARK,
    RARE_TRIAL_SECONDS,
    TRIAL_SECONDS,
    Board,
    Sign,
    State,
    mark,
    sign_of,
)
from gup.upstream.session import Ask, Fields, Upstream

if TYPE_CHECKING:
    import aiohttp

_SLOW_READS = 4
"""`min_rate` must be reached over this many times `read_timeout`: a minute by default."""
_ERROR_BODY_BYTES = 64 * 1024
"""Limit for reading the body of an error response, so that its connection can be used again."""
_LEARN_SECONDS = 1.0
"""Time limit for learning another gup's name."""
_LEARN_AGAIN_SECONDS = 2.0
"""After a failure, requests do not wait again for this long."""
_TICK_SECONDS = 0.2
_DOUBT_INTERVAL_SECONDS = 1.0
CHECK_PATHS = {"manager": CATALOG_PATH, "liveupdate": "/minitri.flg", "gup": "/"}
"""Paths of health checks by kind. Another gup is asked for a path that it answers without its upstream: a gup
whose upstream is down can still serve.
"""
_LOG = logging.getLogger("gup.upstream")
_OUTCOMES = {304: "not_modified", 404: "not_found", 410: "not_found"}


class Pool:
    def __init__(
        self,
        upstreams: Sequence[config.Upstream],
        counters: Counters,
        wan: Wan,
        *,
        user_agent: str,
        via: str,
        board: Board | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._user_agent, self._via = user_agent, via
        self.upstreams: list[Upstream] = []
        self.board = board or Board.private([settings.name for settings in upstreams])
        self.wan, self._counters, self._clock = wan, counters, clock
        self._last_detail = ""
        self._asked: set[Upstream] = set()
        """Upstreams with open connections, including retired ones."""
        self._closing: set[asyncio.Task[None]] = set()
        self.lists: Callable[[str, str], bool] = lambda _name, _stream: True
        """Whether an upstream's catalogue lists a stream; set by the reader of catalogues."""
        self._learning = asyncio.Lock()
        self._learned_at: dict[str, float] = {}
        self.apply(upstreams)

    def apply(self, upstreams: Sequence[config.Upstream]) -> None:
        """Take over settings. Unchanged upstreams keep their connections; requests in progress at a changed
        one finish with the old settings.
        """
        old = {upstream.name: upstream for upstream in self.upstreams}
        self.upstreams = [
            old.pop(settings.name)
            if settings.name in old and old[settings.name].stays(settings)
            else Upstream(settings, self._user_agent, self._via)
            for settings in sorted(upstreams, key=lambda settings: settings.priority)
        ]
        for upstream in old.values():
            upstream.retired = True
            self.board.forget(upstream.name)  # the new settings may have fixed it
            self._close_if_idle(upstream)

    # --- choice

    def candidates(self, variant: Variant, key: str = "", passed: Collection[str] = ()) -> list[Upstream]:
        """The upstreams of `variant` in the order to ask them, those that are down at the end.

        For a wide variant these are all that it covers; if some of them list the stream, only those. A
        variant that no upstream is configured for is widened: a takeover or a repair knows only the key.
        LiveUpdate's files are at LiveUpdate, whatever the variant. Gups that the request has `passed` are
        left out: asking them would close a loop; UpstreamFailure when it has passed through all.
        """
        stream = next(iter(key.split("/")[2:]), "")
        from_liveupdate = stream == LIVEUPDATE_STREAM
        found = [one for one in self.upstreams if (one.settings.kind == "liveupdate") is from_liveupdate]
        if not from_liveupdate:
            managers, found = found, [one for one in found if variant.covers(one.variant)]
            wide = variant if variant.is_wide else variant.widened()
            if wide.is_wide and (variant.is_wide or not found):
                found = [one for one in managers if wide.covers(one.variant)]
                found = [one for one in found if self.lists(one.name, stream)] or found
        left = [upstream for upstream in found if upstream.node not in passed]
        if found and not left:
            raise UpstreamFailure("error", "loop", "the request came from the upstream itself")

        def rank(upstream: Upstream) -> tuple[int, int, float]:
            settings, name = upstream.settings, upstream.name
            doubt = 2 if self.board.is_down(name) else int(self.board.doubted(name))
            return doubt, settings.priority, -rendezvous(key, name, settings.weight)

        return sorted(left, key=rank)

    def asks_gups(self, variant: Variant, key: str) -> bool:
        """Whether some of the candidates are gups, or may be: a loop may go through them."""
        candidates = self.candidates(variant, key)
        return any(upstream.settings.kind == "gup" or upstream.node != "" for upstream in candidates)

    def admitted(self, candidates: Sequence[Upstream]) -> list[Upstream]:
        usable = [u for u in candidates if not self.board.is_down(u.name)]
        away, longest = candidates, TRIAL_SECONDS
        if usable:
            # Upstreams without health checks are known to be up again only by a request.
            unchecked = (u for u in candidates if u not in usable and u.settings.health_interval <= 0)
            away = [u for u in unchecked if u.settings.priority <= usable[0].settings.priority]
            longest = RARE_TRIAL_SECONDS
        may_try = self.board.may_try
        trials = [u for u in away if may_try(u.name, u.settings.connect_timeout, longest)]
        if candidates and not trials and not usable:
            raise self._away(candidates)
        return trials + usable

    def refuse_while_away(self, variant: Variant, key: str) -> None:
        """Raise what `admitted` would raise, without beginning a trial."""
        if not any(self.board.is_down(upstream.name) for upstream in self.upstreams):
            return
        candidates = self.candidates(variant, key)
        if candidates and all(self._seconds_away(upstream) for upstream in candidates):
            raise self._away(candidates)

    def _seconds_away(self, upstream: Upstream) -> float:
        return self.board.seconds_to_trial(upstream.name, upstream.settings.connect_timeout)

    def _away(self, candidates: Sequence[Upstream]) -> UpstreamFailure:
        last = f"; the last error was: {self._last_detail}" if self._last_detail else ""
        detail = f"no upstream is up ({', '.join(upstream.name for upstream in candidates)}){last}"
        wait_seconds = max(1.0, min(map(self._seconds_away, candidates)))
        return UpstreamFailure(
            "unreachable", "upstream-unreachable", detail, retry_after_seconds=wait_seconds
        )

    async def learn_names(self, variant: Variant, key: str) -> None:
        """Learn the Via names of candidates that have not responded yet; loops are detected by them.

        Each is sent a HEAD for `/`, which a gup answers without its upstream. Without a response in time the
        name stays unknown.
        """

        async def learn(upstream: Upstream) -> None:
            with contextlib.suppress(UpstreamFailure, TimeoutError):
                async with asyncio.timeout(_LEARN_SECONDS):
                    await self.ask(upstream, Ask("/", "index", method="HEAD", check=True))

        async with self._learning:
            latest = self._clock() - _LEARN_AGAIN_SECONDS
            due = [
                upstream
                for upstream in self.candidates(variant, key)
                if upstream.node is None
                and not self.board.is_down(upstream.name)
                and self._learned_at.get(upstream.name, -math.inf) <= latest
            ]
            await asyncio.gather(*map(learn, due))
            self._learned_at |= {upstream.name: self._clock() for upstream in due}

    # --- asking

    async def ask(self, upstream: Upstream, ask: Ask) -> "Answer | RemoteHead":
        """Send one request. An Answer for 200 and 206; a RemoteHead for 304, 404, 410 and for HEAD.

        UpstreamFailure for everything else. The outcome is counted and recorded in the upstream's health.
        """
        await upstream.take_connection()
        upstream.in_use += 1
        self._asked.add(upstream)
        answer, outcome = None, ""
        try:
            response = await upstream.request(ask, limited=self.wan.rate() > 0)
            try:
                answer = await self._judge(upstream, ask, response)
            except BaseException:
                response.close()
                raise
            outcome = _OUTCOMES.get(response.status, "ok")
        except UpstreamFailure as failure:
            outcome = failure.outcome
            self.note_failure(upstream, ask, failure)
            raise
        finally:
            if outcome:
                self._counters.add("gup_upstream_requests_total", upstream=upstream.name, outcome=outcome)
            if not isinstance(answer, Answer):
                self.done(upstream)
        self.board.note(upstream.name, Sign.ANSWERED)
        return answer

    async def length_of(self, upstream: Upstream, ask: Ask, head: RemoteHead) -> int | None:
        """A HEAD for the length of a body whose end is not confirmed; None when the HEAD states none."""
        plain = Ask(ask.path, ask.purpose, ask.stream, method="HEAD", passed=ask.passed, client=ask.client)
        try:
            answer_head = await self.ask(upstream, plain)
        except UpstreamFailure:
            return None
        assert isinstance(answer_head, RemoteHead)
        same = (answer_head.status, answer_head.etag, answer_head.last_modified) == (
            200,
            head.etag,
            head.last_modified,
        )
        return answer_head.length if same else None

    def count_received(self, upstream: Upstream, ask: Ask, stream: tuple[int, str], amount: int) -> None:
        labels = {"upstream": upstream.name, "purpose": ask.purpose}
        self._counters.add("gup_upstream_received_bytes_total", amount, **labels)
        self._counters.add_stream("received", *stream, amount)

    def count_wasted(self, reason: str, stream: tuple[int, str], amount: int) -> None:
        self._counters.waste(reason, stream, amount)

    def note_failure(self, upstream: Upstream, ask: Ask, failure: UpstreamFailure) -> None:
        sign = sign_of(failure, upstream.settings.kind, check=ask.check)
        if sign is Sign.AWAY:
            self._last_detail = failure.detail
        if sign is not None:
            failed = EVERY_MARK if ask.check else mark(ask.path, ask.client)
            self.board.note(upstream.name, sign, failure.detail, failed)

    def done(self, upstream: Upstream) -> None:
        """A request, including the reading of its response, is over."""
        upstream.in_use -= 1
        upstream.free.release()
        self._close_if_idle(upstream)

    def _close_if_idle(self, upstream: Upstream) -> None:
        if upstream.retired and not upstream.in_use and upstream in self._asked:
            self._asked.remove(upstream)
            task = asyncio.get_running_loop().create_task(upstream.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _judge(
        self, upstream: Upstream, ask: Ask, response: "aiohttp.ClientResponse"
    ) -> "Answer | RemoteHead":
        status, name, proxy = response.status, upstream.name, upstream.settings.proxy
        fields = Fields(response, name)
        upstream.node = (["", *gup_names(response.headers.get("Via"))])[-1]
        sent_at = parse_http_date(response.headers.get("Date", "").strip())
        if sent_at is not None and "Age" not in response.headers:  # else a cache may have answered
            upstream.ahead_seconds = time.time() - sent_at
        if proxy is not None and answered_by_proxy(status, response.headers):
            await self._drain(fields, ask, upstream)
            for_all = failed_for_all(status, response.headers)
            raise proxy_refused(name, proxy, status, for_all=for_all)
        # How long another gup has stored it (RFC 9111 section 5.1).
        age = read_age(response.headers.get("Age")) if upstream.settings.kind == "gup" else 0
        if status in (304, 404, 410):
            await self._drain(fields, ask, upstream)
            return RemoteHead(status, 0, None, None, None, "", name, age)
        if status not in (200, 206) or (status == 206 and not ask.ranged):
            await self._drain(fields, ask, upstream)
            failure = refusal(name, status, response.headers, time.time())
            if proxy is not None:
                failure.detail += f", through {proxy_in_words(proxy)}, which may have sent this answer"
            raise failure
        head = RemoteHead(status, 0, None, None, None, "", name) if ask.check else fields.head(age)
        if ask.method == "HEAD":
            response.release()
            return head
        stream = ask.stream if ask.stream_of_body is None else ask.stream_of_body()
        return Answer(self, upstream, ask, stream, head, response)

    async def _drain(self, fields: Fields, ask: Ask, upstream: Upstream) -> None:
        from gup.upstream.connector import translated  # noqa: PLC0415 - imports aiohttp

        left, response = _ERROR_BODY_BYTES, fields.response
        # The body may break off, hang, or have no certain end; the status is all that counts.
        with contextlib.suppress(UpstreamFailure, TimeoutError):
            fields.framing()
            async with asyncio.timeout(upstream.settings.read_timeout):
                while left > 0 and (piece := await translated(response.content.read(left), upstream.name)):
                    self.count_received(upstream, ask, ask.stream, len(piece))
                    self._counters.waste("rejected", ask.stream, len(piece))
                    left -= len(piece)
        response.release() if response.content.at_eof() else response.close()

    async def close(self) -> None:
        for upstream in self._asked:
            await upstream.close()
        await asyncio.gather(*self._closing)

    # --- health checks

    async def run_checks(self) -> None:
        """Check all upstreams by HEAD, each in a task of its own, until cancelled; in one process, for all.

        Any response means that the upstream is up.
        """
        began, last, running = self._clock(), dict[str, float](), set[str]()

        async def check(upstream: Upstream) -> None:
            name, path = upstream.name, upstream.settings.health_path or CHECK_PATHS[upstream.settings.kind]
            try:
                await self.ask(upstream, Ask(path, "index", method="HEAD", check=True))
            except UpstreamFailure as failure:
                _LOG.debug("check of %s: %s", name, failure.detail)
            except Exception:  # noqa: BLE001 - the other checks go on
                _LOG.exception("internal error in a check of %s", name)
            finally:
                running.discard(name)

        async with asyncio.TaskGroup() as group:
            while True:
                for upstream in self.upstreams:
                    name = upstream.name
                    if name not in running and self._is_check_due(upstream, last.get(name, began)):
                        last[name] = self._clock()
                        running.add(name)
                        group.create_task(check(upstream))
                await asyncio.sleep(_TICK_SECONDS)

    def _is_check_due(self, upstream: Upstream, last: float) -> bool:
        wait, state = upstream.settings.health_interval, self.board.get(upstream.name).state
        if wait <= 0:
            return False
        if state is State.DOWN:
            return self.board.may_try(upstream.name, upstream.settings.connect_timeout)
        return self._clock() - last >= (
            min(wait, _DOUBT_INTERVAL_SECONDS) if state is State.DOUBTFUL else wait
        )


def rendezvous(key: str, name: str, weight: int) -> float:
    """The score of an upstream for `key`; the largest wins.

    Weighted rendezvous hashing: each upstream gets keys in proportion to its weight, the same in every
    process. Removing one moves only its own keys.
    """
    chance = (xxhash.xxh3_64_intdigest(f"{name}\n{key}".encode()) + 0.5) / 2**64
    return -weight / math.log(chance)


# --- a body


class Charged(Protocol):
    """Whom the bytes of an Answer are counted with, and the rate that they are charged to."""

    @property
    def wan(self) -> Wan: ...

    def count_received(self, upstream: Upstream, ask: Ask, stream: tuple[int, str], amount: int) -> None: ...

    def count_wasted(self, reason: str, stream: tuple[int, str], amount: int) -> None: ...

    def note_failure(self, upstream: Upstream, ask: Ask, failure: UpstreamFailure) -> None: ...

    def done(self, upstream: Upstream) -> None: ...


class Answer:
    """A response whose body is still to be read. Counts every byte that it returns."""

    def __init__(
        self,
        pool: Charged,
        upstream: Upstream,
        ask: Ask,
        stream: tuple[int, str],
        head: RemoteHead,
        response: "aiohttp.ClientResponse",
    ) -> None:
        self.head, self._stream = head, stream
        self._pool, self._upstream, self._ask, self._response = pool, upstream, ask, response
        self._unpaid = 0
        """Bytes returned that the WAN's rate has not been charged for."""
        self._position = head.start
        self._ended = False
        self._closed = False
        settings = upstream.settings
        self.steadiness = Steadiness(settings.min_rate, _SLOW_READS * settings.read_timeout)
        connection = response.connection
        transport, self._protocol = (
            (connection.transport, connection.protocol) if connection else (None, None)
        )
        self._window = ReceiveWindow(pool.wan, transport.get_extra_info("socket") if transport else None)
        self._connection_end = self._protocol.closed if self._protocol is not None else None
        if self._connection_end is not None:
            self._connection_end.remove_done_callback(_take_exception)  # an earlier response's
            self._connection_end.add_done_callback(_take_exception)
            self._connection_end.add_done_callback(self._lost)

    def _lost(self, _end: object) -> None:
        """The connection has ended. After invalid HTTP aiohttp does not wake the reader, which would wait
        forever.
        """
        content = self._response.content
        if content.exception() is None and not content.is_eof():
            content.set_exception(ConnectionResetError("the connection ended in mid-body"))

    async def gather(self) -> None:
        """Wait until all of a small body is here, or something went wrong: `read` has it at once then.

        Without a rate only: with one, aiohttp stops at a few KB.
        """
        if self._pool.wan.slice_bytes:
            return
        with contextlib.suppress(Exception):  # `read` finds it, after what has come
            await self._response.content.wait_eof()

    def waste(self, reason: str, amount: int) -> None:
        """Count bytes of this body that are not used."""
        self._pool.count_wasted(reason, self._ask.stream, amount)

    async def read(self) -> bytes:
        """The next piece, once the one before is paid for; empty at the end.

        UpstreamFailure when the body breaks off. `read_timeout` limits only the wait for the upstream: pauses
        between two reads don't count. A cancelled read loses nothing.
        """
        times = self._ask.times
        if self._unpaid:
            if times is not None and self._pool.wan.slice_bytes:
                times.enter("wan")
            await self._pool.wan.pay(self._unpaid, self._ask.share)
            self._unpaid = 0
        if self._ended:
            return b""
        if self.steadiness.slow and self._upstream.waiting:  # all of max_connections are in use
            detail = (
                f"{self.head.upstream} is below upstream.min_rate, and other requests wait for a connection"
            )
            raise UpstreamFailure("timeout", "upstream-timeout", detail, again=True)
        if times is not None:
            times.enter("receiving")
        self._window.follow()
        from gup.upstream.connector import translated  # noqa: PLC0415 - imports aiohttp

        try:
            piece = await translated(self._take(), self.head.upstream, "upstream.read_timeout")
            self._advance(len(piece))
        except UpstreamFailure as failure:
            self._pool.note_failure(self._upstream, self._ask, failure)
            raise
        return piece

    async def _take(self) -> bytes:
        content, slice_bytes = self._response.content, self._pool.wan.slice_bytes
        piece = _received(content, slice_bytes or -1)
        waited_seconds = 0.0
        if not piece and not content.at_eof():
            began = time.monotonic()
            async with asyncio.timeout(self._upstream.settings.read_timeout):
                # Without a rate not read(n): aiohttp would buffer n bytes.
                piece = await (content.read(slice_bytes) if slice_bytes else content.readany())
            waited_seconds = time.monotonic() - began
        self.steadiness.note(waited_seconds, len(piece))
        return piece

    def _advance(self, amount: int) -> None:
        """Count a piece. UpstreamFailure when fewer or more bytes come than the head announced."""
        from gup.upstream.connector import HttpProcessingError  # noqa: PLC0415 - imports aiohttp

        self._pool.count_received(self._upstream, self._ask, self._stream, amount)
        self._unpaid = amount
        self._position += amount
        self._ended = not amount
        stop, name = self.head.stop, self.head.upstream
        if stop is not None and self._ended and self._position < stop:
            detail = f"{name} ended at byte {self._position}, not at {stop} as announced"
            raise UpstreamFailure("error", "upstream-bad-body", detail, again=True)
        # Invalid HTTP behind the body: the announced length was not the body's.
        end = self._protocol.exception() if self._ended and self._protocol is not None else None
        if stop is not None and (self._position > stop or isinstance(end, HttpProcessingError)):
            raise rejected(f"{name} sent more bytes than it announced")

    def close(self) -> None:
        """Return the connection to the pool if the body was read to its end, else close it."""
        if self._connection_end is not None:  # the connection may be used again
            self._connection_end.remove_done_callback(self._lost)
            self._connection_end = None
        self._response.close() if not self._response.content.at_eof() else self._response.release()
        if not self._closed:
            self._closed = True
            self._pool.done(self._upstream)


def _received(content: "aiohttp.StreamReader", most: int) -> bytes:
    """What has come already. Before a break it is good, but aiohttp hands none of it out after one."""
    broken = content.exception()
    if broken is None:
        return content.read_nowait(most)
    content.set_exception(None)  # type: ignore[arg-type]  # none, for a moment
    try:
        return content.read_nowait(most)
    finally:
        content.set_exception(broken)


def _take_exception(end: asyncio.Future[None]) -> None:
    """Retrieve the exception of an ended connection: asyncio logs exceptions that are never retrieved."""
    if not end.cancelled():
        end.exception()


@dataclass(slots=True)
class Steadiness:
    least_rate_bytes_per_second: int
    window_seconds: float
    slow: bool = False
    _waited_seconds: float = 0.0
    _amount: int = 0

    def note(self, waited_seconds: float, amount: int) -> None:
        self._waited_seconds += waited_seconds
        self._amount += amount
        if self._waited_seconds >= self.window_seconds:
            self.slow = self._amount < self.least_rate_bytes_per_second * self._waited_seconds
            self._waited_seconds, self._amount = 0.0, 0
