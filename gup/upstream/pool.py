"""The upstreams: which one is asked next, and how; never reads a body to its end, never retries.

Choice: those that are up before those in doubt, by priority; within one priority by weight and key, so that
the same key prefers the same upstream. What is down is asked only as a trial, one at a time: until the next
is due, all other requests are answered from the failure that took it down.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gup import config
from gup.content.key import Variant
from gup.content.routes import LIVEUPDATE_STREAM
from gup.metrics import Counters
from gup.upstream.bandwidth import Wan
from gup.upstream.connection import Answer, Ask, Upstream
from gup.upstream.exchange import (
    RemoteHead,
    UpstreamFailure,
    answered_by_proxy,
    gup_names,
    node_names,
    proxy_in_words,
    proxy_refused,
    read_age,
    read_framing,
    read_head,
    translated,
)
from gup.upstream.health import (
    RARE_TRIAL_SECONDS,
    Board,
    Sign,
    mark,
    rendezvous,
    retry_after_seconds,
    sign_of,
)

if TYPE_CHECKING:
    import aiohttp

_ERROR_BODY_BYTES = 64 * 1024
"""An error's body is read this far, so that its connection can be used again."""
_LEARN_SECONDS = 1.0
"""For another gup to tell its name: it answers that by itself."""
_LEARN_AGAIN_SECONDS = 10.0
"""Where it did not, those who come meanwhile are not kept waiting too."""


class Pool:
    """All upstreams of this process. A reload replaces those whose settings changed."""

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
        self._user_agent = user_agent
        self._via = via
        self.upstreams: list[Upstream] = []
        self.board = board or Board.private([settings.name for settings in upstreams])
        self.wan = wan
        self._counters = counters
        self._clock = clock
        self._last_detail = ""
        self._retired: list[Upstream] = []
        self._closing: set[asyncio.Task[None]] = set()
        self.lists: Callable[[str, str], bool] = lambda _name, _stream: True
        """Whether an upstream's catalogue lists a stream; set by whoever reads catalogues."""
        self._learning = asyncio.Lock()
        self._learned_at: dict[str, float] = {}
        """When an upstream was last asked for its name."""
        self.apply(upstreams)

    def apply(self, upstreams: Sequence[config.Upstream]) -> None:
        """Take over settings. Upstreams that stay the same keep their connections; fills under way at one
        that changed end with the old one.
        """
        known = {upstream.name: upstream for upstream in self.upstreams}
        kept = [
            known[settings.name]
            if settings.name in known and known[settings.name].stays(settings)
            else Upstream(settings, self._user_agent, self._via)
            for settings in sorted(upstreams, key=lambda settings: settings.priority)
        ]
        old, self.upstreams = self.upstreams, kept
        for upstream in old:
            if upstream not in kept:
                upstream.retired = True
                self.board.forget(upstream.name)  # what was wrong may be what was changed
                self._retired.append(upstream)
                self._close_if_idle(upstream)

    # --- choice

    def candidates(self, variant: Variant, key: str = "") -> list[Upstream]:
        """Upstreams of `variant`, the one to ask first at the head, those that are down at the end.

        A wide variant's are all that it covers, of these only such as list the stream if any does. So are
        those of a key that is for all and that no upstream is set for: a fill that goes on after its leader,
        or a repair, knows the key alone. LiveUpdate's files are at LiveUpdate, of whatever variant.
        """
        stream = _stream_of(key)
        if stream == LIVEUPDATE_STREAM:
            fitting = [upstream for upstream in self.upstreams if upstream.settings.kind == "liveupdate"]
        else:
            fitting = self._of_variant(variant, stream)
        return sorted(fitting, key=lambda upstream: self._rank(upstream, key))

    def _of_variant(self, variant: Variant, stream: str) -> list[Upstream]:
        managers = [upstream for upstream in self.upstreams if upstream.settings.kind != "liveupdate"]
        found = [upstream for upstream in managers if variant.covers(upstream.variant)]
        wide = variant if variant.is_wide else variant.widened()
        if wide.is_wide and (variant.is_wide or not found):
            found = [upstream for upstream in managers if wide.covers(upstream.variant)]
            found = [upstream for upstream in found if self.lists(upstream.name, stream)] or found
        return found

    def _rank(self, upstream: Upstream, key: str) -> tuple[int, int, float]:
        settings = upstream.settings
        doubt = 2 if self.board.is_down(upstream.name) else int(self.board.doubted(upstream.name))
        return doubt, settings.priority, -rendezvous(key, upstream.name, settings.weight)

    def admitted(self, variant: Variant, key: str, via: str | None = None) -> list[Upstream]:
        """The candidates that a new request may be sent to, those that are down as far as a trial is due.

        UpstreamFailure at once when there are upstreams and all are down, and no trial is due.
        """
        candidates = self.off_the_way(self.candidates(variant, key), via)
        usable = [u for u in candidates if not self.board.is_down(u.name)]
        if usable:
            return self._unchecked_trials(candidates, usable) + usable
        trials = [u for u in candidates if self.board.may_try(u.name, u.settings.connect_timeout)]
        if candidates and not trials:
            raise self._away(candidates)
        return trials

    def refuse_while_away(self, variant: Variant, key: str) -> None:
        """UpstreamFailure where `admitted` would raise it; without beginning a trial where one is due."""
        candidates = self.candidates(variant, key)
        if candidates and all(self._seconds_away(upstream) for upstream in candidates):
            raise self._away(candidates)

    def _seconds_away(self, upstream: Upstream) -> float:
        """Time until it may be asked; 0: now."""
        if not self.board.is_down(upstream.name):
            return 0.0
        return self.board.seconds_to_trial(upstream.name, upstream.settings.connect_timeout)

    def _away(self, candidates: Sequence[Upstream]) -> UpstreamFailure:
        last = f"; the last error was: {self._last_detail}" if self._last_detail else ""
        names = ", ".join(upstream.name for upstream in candidates)
        return UpstreamFailure(
            "unreachable",
            "upstream-unreachable",
            f"no upstream is up ({names}){last}",
            again=False,
            retry_after_seconds=max(1.0, min(map(self._seconds_away, candidates))),
        )

    def chosen(
        self, variant: Variant, key: str, via: str | None, *, resuming: bool
    ) -> tuple[list[Upstream], list[Upstream]]:
        """Whom to ask, and whom else once clients have a part of the body, which must not wait for a trial.

        Both are empty when no upstream has the variant. UpstreamFailure as in `admitted`.
        """
        candidates = self.off_the_way(self.candidates(variant, key), via)
        admitted = candidates if resuming else self.admitted(variant, key, via)
        return admitted, [upstream for upstream in candidates if upstream not in admitted]

    def off_the_way(self, candidates: Sequence[Upstream], via: str | None) -> list[Upstream]:
        """Those that a request with this Via has not passed through: asking them would close a loop.

        UpstreamFailure when it has passed through all.
        """
        passed = node_names(via)
        left = [upstream for upstream in candidates if upstream.node not in passed]
        if candidates and not left:
            raise UpstreamFailure("error", "loop", "the request came from the upstream itself", again=False)
        return left

    def _unchecked_trials(self, candidates: Sequence[Upstream], usable: Sequence[Upstream]) -> list[Upstream]:
        """Without active checks nobody but requests finds out that what was down is up again."""
        return [
            upstream
            for upstream in candidates
            if upstream not in usable
            and upstream.settings.health_interval <= 0
            and upstream.settings.priority <= usable[0].settings.priority
            and self.board.may_try(upstream.name, upstream.settings.connect_timeout, RARE_TRIAL_SECONDS)
        ]

    async def learn_names(self, variant: Variant, key: str) -> None:
        """Have those candidates tell their names in Via that have not answered yet.

        A circle is known by them. They are asked for the head of the root, which a gup answers by itself; who
        does not answer in time stays unknown.
        """
        async with self._learning:
            unknown = [upstream for upstream in self.candidates(variant, key) if upstream.node is None]
            now = self._clock()
            due = [
                u for u in unknown if now - self._learned_at.get(u.name, -math.inf) >= _LEARN_AGAIN_SECONDS
            ]
            self._learned_at |= {upstream.name: now for upstream in due}
            await asyncio.gather(*(self._learn_name(u) for u in due if not self.board.is_down(u.name)))

    async def _learn_name(self, upstream: Upstream) -> None:
        with contextlib.suppress(UpstreamFailure, TimeoutError):
            async with asyncio.timeout(_LEARN_SECONDS):
                await self.ask(upstream, Ask(path="/", purpose="index", method="HEAD", check=True))

    # --- asking

    async def ask(self, upstream: Upstream, ask: Ask) -> Answer | RemoteHead:
        """One request. An Answer for 200 and 206; a bare RemoteHead for 304, 404, 410 and for HEAD.

        UpstreamFailure for everything else. The outcome is counted and noted as the upstream's health.
        """
        await upstream.take_connection()
        upstream.in_use += 1
        if upstream.retired and upstream not in self._retired:
            self._retired.append(upstream)  # a fill that began with it tries once more
        answer = None
        try:
            answer = await self._ask(upstream, ask)
        except UpstreamFailure as failure:
            self._count(upstream, failure.outcome)
            self._note_failure(upstream, ask, failure)
            raise
        finally:
            if not isinstance(answer, Answer):
                self._done(upstream)
        status = answer.status if isinstance(answer, RemoteHead) else answer.head.status
        self._count(upstream, {304: "not_modified", 404: "not_found", 410: "not_found"}.get(status, "ok"))
        self.board.note(upstream.name, Sign.ANSWERED)
        return answer

    async def length_of(self, upstream: Upstream, ask: Ask, head: RemoteHead) -> int | None:
        """What a HEAD tells of the length of the body that came under `head`; None when it tells none.

        For a body whose end nothing has confirmed.
        """
        plain = replace(
            ask, method="HEAD", start=0, stop=None, if_range=None, if_none_match=None, if_modified_since=None
        )
        try:
            told = await self.ask(upstream, plain)
        except UpstreamFailure:
            return None
        same = isinstance(told, RemoteHead) and (told.etag, told.last_modified) == (
            head.etag,
            head.last_modified,
        )
        return told.length if same and isinstance(told, RemoteHead) and told.status == 200 else None

    def _count(self, upstream: Upstream, outcome: str) -> None:
        self._counters.add("gup_upstream_requests_total", upstream=upstream.name, outcome=outcome)

    def _note_failure(self, upstream: Upstream, ask: Ask, failure: UpstreamFailure) -> None:
        sign = sign_of(failure, upstream.settings.kind, check=ask.check)
        if sign is Sign.AWAY:
            self._last_detail = failure.detail
        if sign is not None and ask.check:
            self.board.note(upstream.name, sign, failure.detail)
        elif sign is not None:
            self.board.note(upstream.name, sign, failure.detail, mark(ask.path, ask.client))

    def _done(self, upstream: Upstream) -> None:
        upstream.in_use -= 1
        upstream.give_connection()
        self._close_if_idle(upstream)

    def _close_if_idle(self, upstream: Upstream) -> None:
        if not upstream.retired or upstream.in_use:
            return
        if upstream in self._retired:
            self._retired.remove(upstream)
        if upstream.is_open:
            task = asyncio.get_running_loop().create_task(upstream.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _ask(self, upstream: Upstream, ask: Ask) -> Answer | RemoteHead:
        response = await upstream.request(ask)
        try:
            return await self._judge(upstream, ask, response)
        except BaseException:
            response.close()
            raise

    async def _judge(
        self, upstream: Upstream, ask: Ask, response: "aiohttp.ClientResponse"
    ) -> Answer | RemoteHead:
        count = self._counter(upstream.name, ask)
        status = response.status
        upstream.node = (["", *gup_names(response.headers.get("Via"))])[-1]
        proxy = upstream.settings.proxy
        if proxy is not None and answered_by_proxy(status, response.headers):
            await self._drain(response, count, ask, upstream)
            raise proxy_refused(upstream.name, proxy, status)
        if status in (304, 404, 410):
            await self._drain(response, count, ask, upstream)
            return RemoteHead(status, 0, None, None, None, "", upstream.name, self._age(upstream, response))
        if status not in (200, 206) or (status == 206 and not ask.ranged):
            await self._drain(response, count, ask, upstream)
            failure = _refusal(upstream.name, status, response.headers)
            if proxy is not None:
                failure.detail += f", by way of {proxy_in_words(proxy)}, whose answer it may be"
            raise failure
        if ask.check:
            response.release()
            return RemoteHead(status, 0, None, None, None, "", upstream.name)
        head = replace(read_head(response, upstream.name), age_seconds=self._age(upstream, response))
        if ask.method == "HEAD":
            response.release()
            return head
        return Answer(
            head,
            response,
            upstream,
            count,
            self.wan,
            ask.share,
            broke=lambda failure: self._note_failure(upstream, ask, failure),
            closed=lambda: self._done(upstream),
        )

    @staticmethod
    def _age(upstream: Upstream, response: "aiohttp.ClientResponse") -> int:
        """How long a gup has held what it sends (RFC 9111 section 5.1); of others nothing is held."""
        return read_age(response.headers.get("Age")) if upstream.settings.kind == "gup" else 0

    async def _drain(
        self, response: "aiohttp.ClientResponse", count: Callable[[int], None], ask: Ask, upstream: Upstream
    ) -> None:
        """Read what is not wanted, so that the connection can be used again; if that is no use, close it."""
        left = _ERROR_BODY_BYTES
        # An error's body may break off, hang, or have no certain end: the status is known.
        with contextlib.suppress(UpstreamFailure, TimeoutError):
            read_framing(response, upstream.name)
            async with asyncio.timeout(upstream.settings.read_timeout):
                while left > 0 and (piece := await translated(response.content.read(left), upstream.name)):
                    count(len(piece))
                    self._counters.waste("rejected", ask.stream, len(piece))
                    left -= len(piece)
        response.release() if response.content.at_eof() else response.close()

    def _counter(self, name: str, ask: Ask) -> Callable[[int], None]:
        counters = self._counters
        at = counters.position("gup_upstream_received_bytes_total", upstream=name, purpose=ask.purpose)
        slot, kind = ask.stream

        def count(amount: int) -> None:
            counters.words[at] += amount
            counters.add_stream("received", slot, kind, amount)

        return count

    async def close(self) -> None:
        for upstream in (*self.upstreams, *self._retired):
            await upstream.close()
        await asyncio.gather(*self._closing)


def _stream_of(key: str) -> str:
    """The stream in a content key's text."""
    parts = key.split("/")
    return parts[2] if len(parts) > 2 else ""


def _refusal(name: str, status: int, headers: Mapping[str, str]) -> UpstreamFailure:
    if status == 508:
        detail = f"{name} answered 508: the request would go round in a circle"
        return UpstreamFailure("error", "loop", detail, again=False, status=status)
    later = None
    if status in (429, 503):
        later = retry_after_seconds(headers.get("Retry-After"), headers.get("Date"), time.time())
    return UpstreamFailure(
        "error",
        "upstream-error" if status >= 500 else "upstream-refused",
        f"{name} answered {status}",
        again=False,
        status=status,
        retry_after_seconds=later,
    )
