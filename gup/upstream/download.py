"""Downloads: one body from the upstreams, with retries, failover and resume; and a manager's catalogue.

After a break the download resumes: it requests an overlap again and compares it with the bytes received. If
the upstream's validators have changed, all bytes received are compared. So parts of different bodies are
never joined.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from gup.content.catalog import CATALOG_PATH, MAX_CATALOG_BYTES
from gup.errors import GupError
from gup.metrics import MAX_STREAMS, Counters
from gup.upstream.exchange import RemoteHead, UpstreamFailure, Validators, rejected, unconfirmed
from gup.upstream.members import COMING, Member, Members
from gup.upstream.pool import Answer, Pool
from gup.upstream.session import Ask, Upstream

OVERLAP_BYTES = 64 * 1024
"""Requested again at a resume, and compared with the bytes received."""
TRIES = 3
"""Tries of one upstream in a row without a new byte."""
_NEVER = 1 << 62
_REJOIN_SECONDS = 5.0
_REJOIN_PAUSE_SECONDS, _MOST_RELOOKS = 0.03, 50
"""After a break the node that ranks highest of those with a part goes on over the WAN. The others ask for so
long whether it does, so that the rest is not fetched by each.
"""
_FIRST_BACKOFF_SECONDS = 0.2
_LONGEST_BACKOFF_SECONDS = 5.0


class BodyChanged(GupError):  # noqa: N818 - an observation, not our error
    """An upstream has another body under this name than the one begun.

    `offset` is the first differing byte; 0 when the head alone tells that the body is another.
    """

    def __init__(self, detail: str, offset: int = 0) -> None:
        super().__init__(detail)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Begun:
    """A part of a body on disk: the first response's head, its bytes, and how many of them are verified.

    The rest is compared with the upstream's bytes. `source_validators`: of each upstream that has sent some.
    """

    head: RemoteHead
    received: int
    verified: int
    source_validators: Mapping[str, Validators] = field(default_factory=dict)


@dataclass(slots=True)
class _Source:
    """An upstream's validators, and up to where the bytes received are known to agree with its body.

    `furthest` is the end of the longest comparison so far, under any validators.
    """

    validators: Validators
    compared_to: int = _NEVER
    furthest: int = 0


Choice = tuple[Sequence[Upstream], Sequence[Upstream]]
"""Upstreams to ask, and the reserve."""


class Remembered(Protocol):
    """Remembers upstreams' responses that were rejected (gup.cache.negative_cache)."""

    def note(self, upstream: str, failure: UpstreamFailure, head: RemoteHead | None) -> None:
        """A response was rejected; `head` is its head if a part of the body was read."""

    def is_wrong(self, head: RemoteHead) -> bool:
        """Whether the body with this head was rejected before."""


class Download:
    """The bytes of one body in order, from `received` on; `received` grows with each piece returned.

    `reread(offset, length)` returns bytes received earlier, to compare an overlap with. `wan` is awaited
    before each request that crosses the WAN: it returns the upstreams to ask, and a reserve of others that a
    new request would not be sent to; those are asked, after the others, once some bytes are received.
    `is_read` tells whether clients have some of the bytes: for them the download waits for an upstream that
    is unreachable. `holds` remembers rejected responses.

    Members of the cluster come first: those that rank above this node, then one that holds the body. In
    mid-body they are asked for what they hold only (gup.cluster.ownership).
    """

    def __init__(  # noqa: PLR0913 - one body, its upstreams and its fill
        self,
        pool: Pool,
        members: Members,
        wan: Callable[[], Awaitable[Choice]],
        ask: Ask,
        counters: Counters,
        *,
        immutable: bool,
        reread: Callable[[int, int], Awaitable[bytes]],
        begun: Begun | None = None,
        is_read: Callable[[], bool] = lambda: True,
        holds: Remembered | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._template, self._counters, self._clock = pool, ask, counters, clock
        self._members, self._wan, self._holds = members, wan, holds
        self._upstreams: Sequence[Upstream] = ()
        self._reserve: Sequence[Upstream] = ()
        self._on_wan = False
        self.is_on_wan = False
        """Whether it waits for the WAN alone, or its bytes come from there: then others may join it."""
        self._above = members.above(ask.key) if begun is None else []
        self._holder: Member | None = None
        self._looked = not immutable  # for a member that holds it; copies of changing content may be old
        self._passed_over: set[str] = set()
        """Members that are not asked again."""
        self._immutable, self._reread, self._is_read = immutable, reread, is_read
        self._brought = False  # whether this download has received a byte
        self._answer: Answer | None = None
        self.confirmed = True
        """Whether the end that `read` has reported is known to be the body's."""
        self._ready = b""  # read beyond an overlap, not yet returned
        self._fruitless: Counter[str] = Counter()  # tries since the last new byte, by upstream
        self._spent: set[str] = set()
        self._asked: set[str] = set()  # since the last new byte
        self._last_new_byte = clock()
        self.head: RemoteHead | None = None
        self.received = 0
        self.from_members = 0
        """So many of the bytes that `read` has returned did not cross the WAN."""
        self._unsure_from = _NEVER
        self._resumed = ""
        self.resumes = 0
        """How often it went on after a break."""
        self._last_upstream: str | None = None
        self._source: Upstream | None = None
        self._first = Validators()
        self.source_validators: Mapping[str, Validators] = {}
        """Validators of each upstream whose bytes are in the body; a new mapping at each change."""
        if begun is not None:
            head = self.head = begun.head
            self.received, self._unsure_from = begun.received, begun.verified
            self._resumed, self._last_upstream = "takeover", head.upstream
            own = Validators(head.etag, head.last_modified)
            self.source_validators = begun.source_validators or {head.upstream: own}
            self._first = self.source_validators.get(head.upstream, own)
        self._sources = {name: _Source(validators) for name, validators in self.source_validators.items()}

    async def begin(self) -> RemoteHead:
        """The head: 200 or 206, or 304, 404, 410 when no body follows. Call it once, before `read`.

        UpstreamFailure when all upstreams have failed.
        """
        if (times := self._template.times) is not None:
            times.enter("head")
        while True:
            self._source = upstream = self._member() or await self._holding() or await self._upstream()
            if self._last_upstream not in (None, upstream.name) and self.received:
                self._resumed = "failover"
            self._last_upstream = upstream.name
            self._asked.add(upstream.name)
            try:
                return await self._try(upstream)
            except UpstreamFailure as failure:
                self.close()
                await self._after(upstream, failure)

    async def read(self) -> bytes:
        """The next piece; empty at the end of the body.

        UpstreamFailure when all upstreams have failed; BodyChanged when only the rest of another body can be
        had. A cancelled read loses nothing.
        """
        if self._answer is None:
            await self._reconnect()
        while True:
            try:
                piece = self._ready or await self._read_answer()
            except UpstreamFailure as failure:
                self.close()
                self._resumed = "timeout" if failure.outcome == "timeout" else "cut"
                await self._after(self._current(), failure)
                await self._reconnect()
                continue
            self._ready = b""
            if piece:
                self.received += len(piece)
                if not self.is_on_wan:
                    self.from_members += len(piece)
                self._note_gain()
            return piece

    async def gather(self, most: int) -> None:
        """Wait until all of the body is here, if it has no more than that many bytes."""
        if self._answer is not None and self.head is not None and (self.head.length or _NEVER) <= most:
            await self._answer.gather()

    @property
    def slow(self) -> bool:
        return self._answer is not None and self._answer.steadiness.slow

    async def promote(self) -> None:
        """Tell the member that sends it that a client waits; one that has not begun is asked again anyway."""
        if isinstance(source := self._source, Member) and self._answer is not None:
            await self._members.promote(source, self._template)

    def close(self) -> None:
        self._ready = b""
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    # --- the body

    async def _read_answer(self) -> bytes:
        answer, head = self._answer, self.head
        assert answer is not None
        assert head is not None
        piece, name = await answer.read(), answer.head.upstream
        length = head.length if head.length is not None else answer.head.length
        if piece:
            if length is not None and self.received + len(piece) > length:
                answer.waste("rejected", len(piece))
                raise rejected(f"{name} sent more than the {length} bytes it announced")
            return piece
        if not self.received:
            raise rejected(f"{name} sent an empty body")
        if length is None and not answer.head.delimited:
            length = await self._ask_length(answer)
        if length is not None and self.received < length:
            detail = f"{name} sent {self.received} bytes of {length}"
            raise UpstreamFailure("error", "upstream-bad-body", detail, again=True)
        return b""

    async def _ask_length(self, answer: Answer) -> int | None:
        """The length by a HEAD: a body that ended with its connection may have been cut. None if unknown."""
        answer.close()  # so that the HEAD does not need a second connection
        length = await self._pool.length_of(self._current(), self._template, answer.head)
        self.confirmed = length is not None
        if length is not None and length < self.received:
            raise rejected(f"{answer.head.upstream} sent {self.received} bytes but reports {length} to HEAD")
        return length

    def _note_gain(self) -> None:
        self._brought = True
        self._last_new_byte = self._clock()
        self._asked.clear()
        self._fruitless[self._current().name] = 0

    # --- tries

    def _current(self) -> Upstream:
        assert self._source is not None
        return self._source

    async def _reconnect(self) -> None:
        try:
            await self.begin()
        except asyncio.CancelledError:
            self.close()  # its position in the overlap is unknown
            raise

    def _member(self) -> Member | None:
        """The next member to ask, if any."""
        known = (*self._above, self._holder) if self._holder is not None else self._above
        return next((member for member in known if member.name not in self._passed_over), None)

    async def _holding(self) -> Member | None:
        """A member that holds the body, looked for once before the first byte and once after each break."""
        if self._looked:
            return None
        self._looked = True
        patience, begun = self._clock() + _REJOIN_SECONDS, self.received > 0
        while True:
            self._holder, coming = await self._members.holding(self._template, self._passed_over, begun=begun)
            if self._holder is not None or not coming or self._clock() >= patience:
                return self._holder
            await asyncio.sleep(_REJOIN_PAUSE_SECONDS)

    async def _upstream(self) -> Upstream:
        self.is_on_wan = True
        if not self._on_wan:
            self._upstreams, self._reserve = await self._wan()
            self._on_wan = True
        return self._choose()

    def _choose(self) -> Upstream:
        return next(upstream for upstream in self._upstreams if upstream.name not in self._spent)

    def _after_member(self, member: Member, failure: UpstreamFailure) -> None:
        """In mid-body it is asked once more, then what others hold; a failure of its own is nobody's."""
        again = self.received > 0 and failure.status is None and not self._fruitless[member.name]
        self._fruitless[member.name] += 1
        if again:
            self._holder, self._above = member, []
        else:
            self._passed_over.add(member.name)
        if self.received and self._immutable:
            self._above, self._looked = [], again

    async def _after(self, upstream: Upstream, failure: UpstreamFailure) -> None:
        """After a failed try: return to try again, perhaps after a pause, or raise the failure.

        An upstream that responds without a new byte is given up after TRIES. One that is unreachable is given
        up at once before the first byte, and after `give_up` in mid-body.
        """
        if isinstance(upstream, Member):
            if failure.status == COMING and self._fruitless[upstream.name] < _MOST_RELOOKS:
                # Another of its workers, which does not know yet that it comes over the WAN.
                self._fruitless[upstream.name] += 1
                self._holder, self._looked = None, False
                await asyncio.sleep(_REJOIN_PAUSE_SECONDS)
                return
            self._after_member(upstream, failure)
            return
        name, self.is_on_wan = upstream.name, False
        if self.received and self._immutable:
            self._looked, self._passed_over = False, set()
        if self._holds and (failure.outcome == "rejected" or failure.retry_after_seconds is not None):
            own = self.head is not None and self.head.upstream == name
            self._holds.note(name, failure, self.head if own else None)
        if self.received:
            self._upstreams, self._reserve = [*self._upstreams, *self._reserve], ()
        self._fruitless[name] += 1
        in_mid_body = self.received > 0 and (self._brought or self._is_read())
        away = failure.outcome in ("unreachable", "timeout") and in_mid_body
        hopeless = not failure.again or failure.outcome == "unreachable"
        if not away and (hopeless or self._fruitless[name] >= TRIES):
            self._spent.add(name)
        elif away and (failure.outcome == "timeout" or self._fruitless[name] >= TRIES):
            # Each try of a hanging one costs read_timeout.
            self._upstreams = [*(other for other in self._upstreams if other is not upstream), upstream]
        # All must have been tried since the last new byte: a hanging one must not take the others' chance.
        all_asked = all(one.name in self._asked | self._spent for one in self._upstreams)
        silent = self._clock() - self._last_new_byte > upstream.settings.give_up and all_asked
        if len(self._spent) == len(self._upstreams) or silent:
            raise failure
        if self._choose() is upstream:
            wait_seconds = _FIRST_BACKOFF_SECONDS * 2 ** (self._fruitless[name] - 1)
            await asyncio.sleep(min(wait_seconds, _LONGEST_BACKOFF_SECONDS))

    async def _try(self, upstream: Upstream) -> RemoteHead:
        if self.head is None:
            answer = await self._ask(upstream, self._template)
            if isinstance(answer, RemoteHead):
                return answer
            self._answer = answer
            if self._holds and self._holds.is_wrong(answer.head):
                raise rejected(f"{upstream.name} still has the body that was found wrong")
            self.head, self._first = answer.head, answer.head.validators
            self._note_source(answer.head)
            return self.head
        answer = await self._ask_for_rest(upstream)
        if self._resumed:
            self.resumes += 1
            self._counters.add("gup_fill_resumes_total", reason=self._resumed)
        await self._align(answer)
        return answer.head

    async def _ask(self, source: Upstream, ask: Ask) -> Answer | RemoteHead:
        if isinstance(source, Member):
            held = self.received > 0 or source is self._holder
            return await self._members.ask(source, replace(ask, held=held))
        return await self._pool.ask(source, ask)

    # --- resuming

    async def _ask_for_rest(self, upstream: Upstream) -> Answer:
        """A response that `_align` can read up to the current position.

        It starts at byte 0 if the upstream's validators have changed or it refuses the range: its body may be
        another one, which an overlap would not show.
        """
        while True:
            ask = self._next_ask(upstream)
            try:
                answer = await self._ask(upstream, ask)
            except UpstreamFailure as failure:
                if failure.status == 416 and ask.start and upstream.name in self._sources:
                    self._doubt(upstream.name, Validators())
                    continue
                raise
            if isinstance(answer, RemoteHead):
                detail = f"{upstream.name} answered {answer.status} in mid-body"
                raise UpstreamFailure("not_found", "upstream-error", detail)
            self._answer = answer
            self._check_length(answer.head)
            if self._may_join(answer.head, vouched=answer.head.status == 206 and bool(ask.if_range)):
                return answer
            if not self.received:
                raise BodyChanged(f"{upstream.name} sends other validators than before")
            self._doubt(upstream.name, answer.head.validators)
            if answer.head.start == 0:
                return answer
            self.close()

    def _doubt(self, name: str, now: Validators) -> None:
        """The upstream may have another body now: no byte received is known to agree with it."""
        before = self._sources.get(name)
        self._sources[name] = _Source(now, 0, before.furthest if before else 0)

    def _next_ask(self, upstream: Upstream) -> Ask:
        source = self._sources.get(upstream.name)
        sure_to = min(self.received, self._unsure_from, source.compared_to if source else _NEVER)
        # Other upstreams may have other tags for the same bytes: for immutable content the overlap decides.
        validators = source.validators if source else Validators() if self._immutable else self._first
        plain = replace(self._template, if_none_match=None, if_modified_since=None, own_etag=None)
        return replace(plain, start=max(0, sure_to - OVERLAP_BYTES), if_range=validators.if_range)

    def _check_length(self, remote: RemoteHead) -> None:
        """UpstreamFailure or BodyChanged when `remote` has another length than this body."""
        assert self.head is not None
        if remote.length is None or self.head.length is None or remote.length == self.head.length:
            return
        detail = f"{remote.upstream} now announces {remote.length} bytes, not {self.head.length}"
        if self._immutable and remote.upstream not in self._sources:
            raise rejected(detail)  # another upstream may have the right body
        raise BodyChanged(detail)

    def _may_join(self, remote: RemoteHead, *, vouched: bool) -> bool:
        """Whether an equal overlap is enough to continue with `remote`."""
        assert self.head is not None
        source = self._sources.get(remote.upstream)
        if source is not None:
            return source.validators.same_as(remote.validators, vouched=vouched)
        if self._immutable and self.head.length is not None and remote.length is not None:
            return True
        return self._first.same_as(remote.validators, vouched=vouched)

    async def _align(self, answer: Answer) -> None:
        """Read a new response up to the current position, comparing its bytes with those received."""
        head, source = answer.head, self._sources.get(answer.head.upstream)
        position = head.start
        if position > self.received:
            raise rejected(f"{head.upstream} answered from byte {position}, not from the requested one")
        while position < self.received:
            piece = await answer.read()
            if not piece:
                detail = f"{head.upstream} broke off again"
                raise UpstreamFailure("error", "upstream-error", detail, again=True)
            known = piece[: self.received - position]
            answer.waste("overlap", len(known))
            here = await self._reread(position, len(known))
            if known != here:
                answer.waste("mismatch", len(piece) - len(known))
                detail = f"{head.upstream} has other bytes than those received before"
                unequal = (
                    at for at, (one, other) in enumerate(zip(known, here, strict=False)) if one != other
                )
                raise BodyChanged(detail, position + next(unequal, len(here)))
            position += len(known)
            self._note_compared(source, position)
            self._ready = piece[len(known) :]
        self._unsure_from = _NEVER
        self._note_source(head)
        if head.length is not None and self.received + len(self._ready) > head.length:
            raise rejected(f"{head.upstream} sent more than the {head.length} bytes it announced")

    def _note_compared(self, source: _Source | None, position: int) -> None:
        """Bytes that were compared are not requested again after another break."""
        further = position > self._unsure_from
        if further:
            self._unsure_from = position
        if source is not None and position > source.compared_to:
            source.compared_to = position
            further = further or position > source.furthest
            source.furthest = max(source.furthest, position)
        if further:
            self._note_gain()

    def _note_source(self, remote: RemoteHead) -> None:
        """All bytes received agree with this upstream's body under these validators."""
        source = self._sources.get(remote.upstream)
        if source is None or source.compared_to != _NEVER:
            self._sources[remote.upstream] = _Source(remote.validators, furthest=self.received)
            self.source_validators = {**self.source_validators, remote.upstream: remote.validators}
        if (given := remote.given) is not None:  # where the member has it from sends the same bytes
            self._sources.setdefault(given.upstream, _Source(given.validators, furthest=self.received))
            self.source_validators = {given.upstream: given.validators, **self.source_validators}


@dataclass(frozen=True, slots=True)
class Fetched:
    """A catalogue as received, with its validators. `text` is None when it has not changed."""

    text: bytes | None
    etag: str | None = None
    last_modified: str | None = None


async def fetch_catalogue(pool: Pool, name: str, etag: str | None, last_modified: str | None) -> Fetched:
    """Request the catalogue of one upstream, conditionally; UpstreamFailure when it can't be had.

    It bypasses the store, whose copy may be `cache.index_ttl` old: a client may just have asked for content
    that no known catalogue lists.
    """
    upstream = next((upstream for upstream in pool.upstreams if upstream.name == name), None)
    if upstream is None:
        raise UpstreamFailure("error", "no-upstream", f"there is no upstream {name}")
    stream = (MAX_STREAMS, "index")
    ask = Ask(CATALOG_PATH, "catalog", stream, if_none_match=etag, if_modified_since=last_modified)
    answer, url = await pool.ask(upstream, ask), upstream.url(CATALOG_PATH)
    if isinstance(answer, RemoteHead):
        if answer.status == 304:
            return Fetched(None, etag, last_modified)
        detail = f"{url}: {name} answered {answer.status}"
        raise UpstreamFailure("not_found", "upstream-not-found", detail, status=answer.status)
    text = bytearray()
    try:
        while len(text) <= MAX_CATALOG_BYTES and (piece := await answer.read()):
            text += piece
    finally:
        answer.close()
    if len(text) > MAX_CATALOG_BYTES:
        raise rejected(f"{url} is over {MAX_CATALOG_BYTES} bytes long, the limit for a catalogue")
    if not answer.head.delimited and await pool.length_of(upstream, ask, answer.head) != len(text):
        raise unconfirmed(name, len(text))
    return Fetched(bytes(text), answer.head.etag, answer.head.last_modified)
