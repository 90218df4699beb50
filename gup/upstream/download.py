"""One body from upstream, over as many tries and upstreams as it takes; never writes it anywhere.

A try that breaks off is resumed where the body stands: an overlap is asked for again and compared. Where an
upstream's validators have changed meanwhile, that is not enough: then all that was received is compared. So
two halves of different bodies are never joined.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from gup.errors import GupError
from gup.metrics import Counters
from gup.upstream.connection import Answer, Ask, Upstream
from gup.upstream.exchange import RemoteHead, UpstreamFailure, rejected
from gup.upstream.pool import Pool
from gup.upstream.validators import Validators

OVERLAP_BYTES = 64 * 1024
"""Asked for again at a resume and compared with what is there."""
TRIES = 3
"""Tries of one upstream without a new byte."""
_NEVER = 1 << 62
_FIRST_BACKOFF_SECONDS = 0.2
_LONGEST_BACKOFF_SECONDS = 5.0


class BodyChanged(GupError):  # noqa: N818 - an observation, not our error
    """An upstream has another body under this name than the one begun; `offset` is where they differ, 0 when
    that is known without a look at the bytes.
    """

    def __init__(self, detail: str, offset: int = 0) -> None:
        super().__init__(detail)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Begun:
    """A body that is partly here: its head as first told, how many of its bytes are here, and how many of
    these are known to be good; the rest is compared with the upstream's. `told` are the validators of each
    upstream that has given a part of it.
    """

    head: RemoteHead
    received: int
    verified: int
    told: Mapping[str, Validators] = field(default_factory=dict)


@dataclass(slots=True)
class _Source:
    """What one upstream told of the body, and up to where what is here is known to agree with that.

    `furthest` is where an earlier comparison got to, under whatever validators.
    """

    validators: Validators
    compared_to: int = _NEVER
    furthest: int = 0


class Remembered(Protocol):
    """What is known of upstreams' answers that were of no use."""

    def note(self, upstream: str, failure: UpstreamFailure, head: RemoteHead | None) -> None:
        """An upstream's answer was; `head` is that of its body if some of it was read."""

    def is_wrong(self, head: RemoteHead) -> bool:
        """Whether the body that `head` tells was found wrong before."""


class _Nothing:
    def note(self, upstream: str, failure: UpstreamFailure, head: RemoteHead | None) -> None:
        pass

    def is_wrong(self, head: RemoteHead) -> bool:  # noqa: ARG002 - as the protocol has it
        return False


_NOTHING = _Nothing()


class Download:
    """The bytes of one body in order, from `received` on.

    `reread(offset, length)` gives back bytes that were received, to compare an overlap with. `reserve` are
    upstreams that a new request would not be sent to; for a body that clients have a part of they are asked
    too, after the others. `is_read` tells whether clients have a part: for them an upstream that is away is
    waited for. `holds` takes in what was of no use, and knows such again. `received` changes here alone, at
    each piece handed out.
    """

    def __init__(  # noqa: PLR0913 - one body, its ways to upstream and to its fill
        self,
        pool: Pool,
        upstreams: Sequence[Upstream],
        ask: Ask,
        counters: Counters,
        *,
        immutable: bool,
        reread: Callable[[int, int], Awaitable[bytes]],
        begun: Begun | None = None,
        reserve: Sequence[Upstream] = (),
        is_read: Callable[[], bool] = lambda: True,
        holds: Remembered = _NOTHING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.head = begun.head if begun else None
        self.received = begun.received if begun else 0
        self._unsure_from = begun.verified if begun else _NEVER
        self._resumed = "takeover" if begun else ""
        self._pool = pool
        self._upstreams = upstreams
        self._reserve = reserve
        self._is_read = is_read
        self._holds = holds
        self._brought = False  # whether any byte came by this download
        self._template = ask
        self._counters = counters
        self._immutable = immutable
        self._reread = reread
        self._clock = clock
        self._answer: Answer | None = None
        self.confirmed = True
        """Whether the end that `read` has told is known to be the body's."""
        self._ready = b""  # read beyond an overlap, not yet handed out
        self._fruitless = {upstream.name: 0 for upstream in upstreams}  # tries since the last new byte
        self._spent: set[str] = set()
        self._asked: set[str] = set()  # since the last new byte
        self._sources: dict[str, _Source] = {}
        self.told: Mapping[str, Validators] = {}
        """The validators of each upstream whose bytes are in the body; replaced when there is another one."""
        self._first = Validators()
        if begun is not None:
            head = begun.head
            self.told = begun.told or {head.upstream: Validators(head.etag, head.last_modified)}
            self._sources = {name: _Source(validators) for name, validators in self.told.items()}
            self._first = self.told.get(head.upstream) or Validators(head.etag, head.last_modified)
        self._last_upstream: str | None = begun.head.upstream if begun else None
        self._last_new_byte = clock()

    async def begin(self) -> RemoteHead:
        """The head: 200 or 206, or 304, 404, 410 when there is no body to come. Call once, before `read`.

        UpstreamFailure when no upstream could be brought to answer.
        """
        return await self._connect()

    async def read(self) -> bytes:
        """The next piece, empty at the body's end.

        UpstreamFailure when nobody could be brought to go on; BodyChanged when the rest is that of another.
        Cancelled, it loses nothing: who reads on gets what comes next.
        """
        if self._answer is None:
            await self._reconnect()
        while True:
            try:
                piece = self._ready or await self._read_answer()
            except UpstreamFailure as failure:
                self._drop_answer()
                self._resumed = "timeout" if failure.outcome == "timeout" else "cut"
                await self._after(self._current(), failure)
                await self._reconnect()
                continue
            self._ready = b""
            self._note_progress(len(piece))
            return piece

    @property
    def slow(self) -> bool:
        """Whether it comes slower than `upstream.min_rate`."""
        return self._answer is not None and self._answer.slow

    def close(self) -> None:
        """Leave the upstream; what comes afterwards is not read."""
        self._drop_answer()

    # --- the body

    async def _read_answer(self) -> bytes:
        assert self._answer is not None
        assert self.head is not None
        piece = await self._answer.read()
        length = self.head.length if self.head.length is not None else self._answer.head.length
        if not piece and length is None and not self._answer.confirmed and self.received:
            length = await self._ask_length(self._answer)
        if not piece:
            if self.received == 0:
                raise rejected(f"{self._answer.head.upstream} sent an empty body")
            if length is not None and self.received < length:
                raise UpstreamFailure(
                    "error",
                    "upstream-bad-body",
                    f"{self._answer.head.upstream} sent {self.received} bytes of {length}",
                    again=True,
                )
        elif length is not None and self.received + len(piece) > length:
            self._waste("rejected", len(piece))
            raise rejected(f"{self._answer.head.upstream} sent more than the {length} bytes it announced")
        return piece

    async def _ask_length(self, answer: Answer) -> int | None:
        """What a HEAD tells of a body that ended with its connection: it may have been cut."""
        answer.close()  # a request more must not need a second connection
        length = await self._pool.length_of(self._current(), self._template, answer.head)
        self.confirmed = length is not None
        if length is not None and length < self.received:
            raise rejected(f"{answer.head.upstream} sent {self.received} bytes and tells {length} by HEAD")
        return length

    def _note_progress(self, amount: int) -> None:
        if amount:
            self.received += amount
            self._note_gain()

    def _note_gain(self) -> None:
        self._brought = True
        self._last_new_byte = self._clock()
        self._asked.clear()
        self._fruitless[self._current().name] = 0

    # --- tries

    def _current(self) -> Upstream:
        return next(upstream for upstream in self._upstreams if upstream.name == self._last_upstream)

    async def _reconnect(self) -> None:
        try:
            await self._connect()
        except asyncio.CancelledError:
            self._drop_answer()  # it may stand anywhere in the overlap
            raise

    async def _connect(self) -> RemoteHead:
        while True:
            upstream = self._choose()
            if self._last_upstream not in (None, upstream.name) and self.received:
                self._resumed = "failover"
            self._last_upstream = upstream.name
            self._asked.add(upstream.name)
            try:
                return await self._try(upstream)
            except UpstreamFailure as failure:
                self._drop_answer()
                await self._after(upstream, failure)

    def _choose(self) -> Upstream:
        return next(upstream for upstream in self._upstreams if upstream.name not in self._spent)

    async def _after(self, upstream: Upstream, failure: UpstreamFailure) -> None:
        """Decide what a failed try means: wait and go on, or raise it.

        An upstream that answers without bringing the body on is spent after TRIES. One that is away in
        mid-body is asked until `give_up`; before that nobody waits for it.
        """
        if failure.outcome == "rejected" or failure.retry_after_seconds is not None:
            own = self.head is not None and self.head.upstream == upstream.name
            self._holds.note(upstream.name, failure, self.head if own else None)
        self._call_reserve()
        self._fruitless[upstream.name] += 1
        in_mid_body = self.received > 0 and (self._brought or self._is_read())
        away = failure.outcome in ("unreachable", "timeout") and in_mid_body
        hopeless = not failure.again or failure.outcome == "unreachable"
        if not away and (hopeless or self._fruitless[upstream.name] >= TRIES):
            self._spent.add(upstream.name)
        elif away and (failure.outcome == "timeout" or self._fruitless[upstream.name] >= TRIES):
            self._rotate(upstream)  # one that hung costs its read_timeout at each try: another may not
        silent = self._clock() - self._last_new_byte > upstream.settings.give_up and self._all_were_asked()
        if len(self._spent) == len(self._upstreams) or silent:
            raise failure
        if self._choose() is upstream:
            tries = self._fruitless[upstream.name]
            await asyncio.sleep(min(_FIRST_BACKOFF_SECONDS * 2 ** (tries - 1), _LONGEST_BACKOFF_SECONDS))

    def _all_were_asked(self) -> bool:
        """Since the last new byte: that one hung for long is no reason not to ask the others, or it."""
        return all(one.name in self._asked or one.name in self._spent for one in self._upstreams)

    def _call_reserve(self) -> None:
        if self.received and self._reserve:
            self._upstreams = [*self._upstreams, *self._reserve]
            self._fruitless |= {upstream.name: 0 for upstream in self._reserve}
            self._reserve = ()

    def _rotate(self, upstream: Upstream) -> None:
        self._upstreams = [*(other for other in self._upstreams if other is not upstream), upstream]

    async def _try(self, upstream: Upstream) -> RemoteHead:
        if self.head is None:
            answer = await self._pool.ask(upstream, self._template)
            if isinstance(answer, RemoteHead):
                return answer
            self._answer = answer
            self._refuse_known(answer.head)
            self.head, self._first = answer.head, answer.head.validators
            self._tell_source(answer.head)
            return self.head
        answer = await self._ask_for_rest(upstream)
        if self._resumed:
            self._counters.add("gup_fill_resumes_total", reason=self._resumed)
        await self._align(answer)
        return answer.head

    def _refuse_known(self, head: RemoteHead) -> None:
        if self._holds.is_wrong(head):
            raise rejected(f"{head.upstream} still has the body that was found wrong")

    # --- resuming

    async def _ask_for_rest(self, upstream: Upstream) -> Answer:
        """An answer that `_align` brings to where the body stands.

        From the upstream's first byte when its validators are others than before, or when it has no such
        range any more: its body may be another one, and an overlap does not tell.
        """
        while True:
            ask = self._next_ask(upstream)
            try:
                answer = await self._pool.ask(upstream, ask)
            except UpstreamFailure as failure:
                if failure.status == 416 and ask.start and upstream.name in self._sources:
                    self._doubt(upstream.name, Validators())
                    continue
                raise
            if isinstance(answer, RemoteHead):
                detail = f"{upstream.name} answered {answer.status} in mid-body"
                raise UpstreamFailure("not_found", "upstream-error", detail, again=False)
            self._answer = answer
            self._check_length(answer.head)
            if self._may_join(answer.head, vouched=answer.head.status == 206 and bool(ask.if_range)):
                return answer
            if not self.received:
                raise BodyChanged(f"{upstream.name} tells other validators than before")
            self._doubt(upstream.name, answer.head.validators)
            if answer.head.start == 0:
                return answer
            self._drop_answer()

    def _doubt(self, name: str, now: Validators) -> None:
        """The upstream may have another body by now: nothing that is here is known to agree with it."""
        before = self._sources.get(name)
        self._sources[name] = _Source(now, 0, before.furthest if before else 0)

    def _next_ask(self, upstream: Upstream) -> Ask:
        source = self._sources.get(upstream.name)
        sure_to = min(self.received, self._unsure_from, source.compared_to if source else _NEVER)
        # Another upstream may tag the same bytes otherwise: of immutable content the overlap decides.
        validators = source.validators if source else Validators() if self._immutable else self._first
        return replace(
            self._template,
            start=max(0, sure_to - OVERLAP_BYTES),
            if_range=validators.if_range,
            if_none_match=None,
            if_modified_since=None,
        )

    def _check_length(self, remote: RemoteHead) -> None:
        """UpstreamFailure or BodyChanged when `remote` is of another length than this body."""
        assert self.head is not None
        if remote.length is None or self.head.length is None or remote.length == self.head.length:
            return
        detail = f"{remote.upstream} now tells {remote.length} bytes, not {self.head.length}"
        if self._immutable and remote.upstream not in self._sources:
            raise rejected(detail)  # another upstream may have the body that was begun
        raise BodyChanged(detail)

    def _may_join(self, remote: RemoteHead, *, vouched: bool) -> bool:
        """Whether an equal overlap is enough to go on with `remote`."""
        assert self.head is not None
        source = self._sources.get(remote.upstream)
        if source is not None:
            return source.validators.same_as(remote.validators, vouched=vouched)
        if self._immutable and self.head.length is not None and remote.length is not None:
            return True
        return self._first.same_as(remote.validators, vouched=vouched)

    async def _align(self, answer: Answer) -> None:
        """Bring a new answer to where the body stands, comparing all it sends until there."""
        head, source = answer.head, self._sources.get(answer.head.upstream)
        position = head.start
        if position > self.received:
            raise rejected(f"{head.upstream} answered from byte {position}, not from where asked")
        while position < self.received:
            piece = await answer.read()
            if not piece:
                raise UpstreamFailure(
                    "error", "upstream-error", f"{head.upstream} broke off again", again=True
                )
            known = piece[: self.received - position]
            self._waste("overlap", len(known))
            here = await self._reread(position, len(known))
            if known != here:
                self._waste("mismatch", len(piece) - len(known))
                detail = f"{head.upstream} has other bytes than those received before"
                raise BodyChanged(detail, position + _first_difference(known, here))
            position += len(known)
            self._note_compared(source, position)
            self._ready = piece[len(known) :]
        self._unsure_from = _NEVER
        self._tell_source(head)
        if head.length is not None and self.received + len(self._ready) > head.length:
            raise rejected(f"{head.upstream} sent more than the {head.length} bytes it announced")

    def _note_compared(self, source: _Source | None, position: int) -> None:
        """What was compared is not asked for again after another break."""
        further = position > self._unsure_from
        if further:
            self._unsure_from = position
        if source is not None and position > source.compared_to:
            source.compared_to = position
            further = further or position > source.furthest
            source.furthest = max(source.furthest, position)
        if further:
            self._note_gain()

    def _tell_source(self, remote: RemoteHead) -> None:
        """All that is here agrees with what this upstream has under these validators."""
        source = self._sources.get(remote.upstream)
        if source is None or source.compared_to != _NEVER:
            self._sources[remote.upstream] = _Source(remote.validators, furthest=self.received)
            self.told = {**self.told, remote.upstream: remote.validators}

    def _waste(self, reason: str, amount: int) -> None:
        if amount:
            self._counters.waste(reason, self._template.stream, amount)

    def _drop_answer(self) -> None:
        self._ready = b""
        if self._answer is not None:
            self._answer.close()
            self._answer = None


def _first_difference(one: bytes, other: bytes) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
