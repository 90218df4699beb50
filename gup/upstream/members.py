"""The other gups of a cluster as sources: who is asked for a key, and how. Without a cluster there are none.

A member is asked like an upstream, and sends its own head whole, so that a body has one ETag in all of the
site. Its bytes cross no WAN: they are not charged, and are counted apart.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from gup import config
from gup.cluster.member_list import ALONE
from gup.cluster.member_list import Members as Listed
from gup.cluster.ownership import above, ranked
from gup.cluster.signing import Question, Signer
from gup.errors import Problem
from gup.jsonmodel import InvalidError
from gup.metrics import Counters
from gup.upstream.bandwidth import Wan
from gup.upstream.exchange import (
    GivenHead,
    GivenProblem,
    RemoteHead,
    UpstreamFailure,
    read_age,
    refusal,
    rejected,
)
from gup.upstream.pool import Answer
from gup.upstream.session import Ask, Fields, Upstream

if TYPE_CHECKING:
    import aiohttp

_SILENT_SECONDS = 3.0
"""A member answers within a second, if only that it is not ready; it is gone after so long without."""
_CONNECT_SECONDS = 1.0
_MOST_ASKS = 64
"""Questions to members at a time, in this process; those that read a body do not count."""
_MOST_LOOKS = 256
"""The same for questions about what members hold, which are answered at once: they must not wait behind those
that wait for a fill."""
_HELD_SECONDS = 1.0
"""Members answer in some milliseconds what they hold. One that is busy gets so long, since without its answer
the WAN would carry what it holds a second time.
"""
_GRACE_SECONDS = 0.02
"""And so long those whose answer may have come while this process was busy."""
_SETTLE_SECONDS, _SETTLE_POLL_SECONDS = 10.0, 0.02
"""The controller writes a list within 2 s of its start; this is for one that can't."""
_ERROR_BODY_BYTES = 64 * 1024
NOT_READY, NOT_HELD, COMING = 202, 409, 425
"""What a member answers when the body has not begun within a second, when it does not hold it, and when it
has a part of it that does not come over the WAN.
"""


_MARK = "member "
"""Begins the name that a member has as a source, which no configured upstream can have."""


def is_member(source: str) -> bool:
    return source.startswith(_MARK)


class Member(Upstream):
    """One member and its connections."""

    def __init__(self, name: str, url: str, user_agent: str, via: str) -> None:
        settings = config.Upstream(
            name=_MARK + name,
            url=url,
            kind="gup",
            max_connections=10_000,
            connect_timeout=_CONNECT_SECONDS,
            first_byte_timeout=_SILENT_SECONDS,
            min_rate=0,
            health_interval=0.0,
        )
        super().__init__(settings, user_agent, via)
        self.member = name
        """Its own name, as the cluster has it."""


class Members:
    """The members that this process may ask."""

    def __init__(
        self,
        counters: Counters,
        *,
        user_agent: str = "",
        via: str = "",
        node: str = "",
        signer: Callable[[], Signer] | None = None,
        time_ms: Callable[[], int] = lambda: 0,
        listed: Callable[[], Listed] = lambda: ALONE,
        settled: Callable[[], bool] = lambda: True,
        is_purged: Callable[[str, str, str], bool] = lambda _key, _kind, _order: False,
    ) -> None:
        """Without more than the counters: of a gup that is alone. `time_ms` is the engine's time, `listed`
        the list as the controller has written it; `settled`: it is of this run.
        `is_purged` tells of a copy's key, kind and order whether a purge names it that its member did not
        know.
        """
        self._is_purged = is_purged
        self._settled, self._settle_by = settled, time.monotonic() + _SETTLE_SECONDS
        self.wan = Wan.free()
        self._counters, self._user_agent, self._via, self._node = counters, user_agent, via, node
        self._signer, self._time_ms, self._listed = signer, time_ms, listed
        self._addresses: Mapping[str, str] = {}
        self._retired: list[Member] = []
        self._members: dict[str, Member] = {}
        self._asks = asyncio.Semaphore(_MOST_ASKS)
        self._looks = asyncio.Semaphore(_MOST_LOOKS)

    def _refresh(self) -> None:
        """Requests in progress go on when a member is no longer listed."""
        addresses = self._listed().askable
        if addresses != self._addresses:
            self._addresses, old = dict(addresses), self._members
            self._members = {
                name: old.pop(name)
                if name in old and old[name].settings.url == url
                else Member(name, url, self._user_agent, self._via)
                for name, url in addresses.items()
            }
            self._retired += old.values()

    async def close_retired(self) -> None:
        """Call it from time to time."""
        idle = [member for member in self._retired if not member.in_use]
        self._retired = [member for member in self._retired if member.in_use]
        for member in idle:
            await member.close()

    # --- choice

    @property
    def settled(self) -> bool:
        """Whether the members are known. At the start of a node they are not, for a moment."""
        return self._settled() or time.monotonic() >= self._settle_by

    async def settle(self) -> None:
        """Wait for that: nothing should be fetched that a member may hold."""
        while not self.settled:  # noqa: ASYNC110 - another process sets it
            await asyncio.sleep(_SETTLE_POLL_SECONDS)

    def above(self, key: str) -> list[Member]:
        """Those that rank higher than this node, the highest first: they may fetch for it."""
        self._refresh()
        return [self._members[name] for name in above(key, self._node, self._members)]

    async def holding(self, ask: Ask, without: Collection[str], *, begun: bool) -> tuple[Member | None, bool]:
        """A member that holds the body of `ask.key`, if any; asks all but `without` at once.

        And whether one should be asked again since it has a part, which it may go on with: of a body that is
        `begun` here, only one that ranks higher, so that two nodes don't wait for each other.
        """
        self._refresh()
        others = [self._members[name] for name in ranked(ask.key, self._members)]
        others = [member for member in others if member.name not in without]
        rivals = self.above(ask.key) if begun else others
        question = _look(ask)
        coming = {member for member in rivals if begun and member in others}  # until they have answered

        async def holds(member: Member) -> Member | None:
            try:
                answer = await self.ask(member, question)
            except UpstreamFailure as failure:
                if member in rivals and failure.status == COMING:
                    coming.add(member)
                else:
                    coming.discard(member)
                return None
            return member if isinstance(answer, RemoteHead) and answer.status == 200 else None

        from gup.upstream import connector  # noqa: F401, PLC0415 - imports aiohttp: not while the time runs

        tasks = [asyncio.ensure_future(holds(member)) for member in others]
        waiting, until = set(tasks), time.monotonic() + _HELD_SECONDS
        try:
            while waiting:
                left = until - time.monotonic()
                done, waiting = await asyncio.wait(
                    waiting, timeout=max(left, _GRACE_SECONDS), return_when=asyncio.FIRST_COMPLETED
                )
                found = next(filter(None, (task.result() for task in done)), None)
                if found is not None:
                    return found, False
                if not done and left <= _GRACE_SECONDS:
                    break
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return None, bool(coming)

    # --- asking

    async def ask(self, member: Member, ask: Ask) -> "Answer | RemoteHead":
        """One question, repeated while the member is not ready. As Pool.ask; UpstreamFailure with status
        NOT_HELD when it does not hold the body; Problem when it has one that is this node's, too.
        """
        ask = replace(ask, if_none_match=ask.own_etag, if_modified_since=None)
        async with self._looks if ask.held else self._asks:
            while True:
                question = self._question(member, ask)
                response = await member.request(replace(ask, signed=question.fields))
                try:
                    answer = await self._judge(member, ask, question, response)
                except BaseException:
                    response.close()
                    raise
                if answer is not None:
                    return answer

    async def promote(self, member: Member, ask: Ask) -> None:
        """Tell it that a client waits for the body that it sends."""
        with contextlib.suppress(UpstreamFailure, Problem):
            await self.ask(member, replace(_look(ask), promotes=True))

    def _question(self, member: Member, ask: Ask) -> Question:
        assert self._signer is not None
        own = {
            "GUP-Key": ask.key,
            "GUP-Class": str(ask.share.priority),
            "GUP-Client": blake2b(ask.client.encode(), digest_size=8).hexdigest() if ask.client else "",
            "GUP-Held": "1" if ask.held else "0",
        } | ({"GUP-Promote": "1"} if ask.promotes else {})
        signer, now = self._signer(), self._time_ms()
        return signer.ask(self._node, member.member, ask.method, ask.path, now, own.items())

    async def _judge(
        self, member: Member, ask: Ask, question: Question, response: "aiohttp.ClientResponse"
    ) -> "Answer | RemoteHead | None":
        status, name = response.status, member.name
        assert self._signer is not None
        if not self._signer().verify_answer(question, status, response.headers.items()):
            raise rejected(f"{name} did not sign its answer as a member of this cluster")
        if (passed_on := response.headers.get("GUP-Problem")) is not None:
            await _drain(response)
            try:
                raise GivenProblem.parse(passed_on).problem()
            except InvalidError as error:
                raise rejected(f"{name} sent a problem that can't be read: {error}") from error
        if status in (404, 410, 304):
            await _drain(response)
            return RemoteHead(status, 0, None, None, None, "", name, read_age(response.headers.get("Age")))
        if status == NOT_READY:
            await _drain(response)
            return None
        if status not in (200, 206) or (status == 206 and not ask.ranged):
            await _drain(response)
            raise refusal(name, status, response.headers, time.time())
        fields = Fields(response, name)
        try:
            given = GivenHead.parse(response.headers.get("GUP-Head", ""))
        except InvalidError as error:
            raise rejected(f"{name} sent a head that can't be read: {error}") from error
        if self._is_purged(ask.key, ask.stream[1], given.order):
            detail = f"{name} has it from before a purge"
            raise UpstreamFailure("error", "upstream-error", detail, again=False, status=NOT_HELD)
        head = replace(fields.head(given.age_seconds), given=given)
        if ask.method == "HEAD":
            response.release()
            return head
        member.in_use += 1
        await member.free.acquire()
        return Answer(self, member, ask, ask.stream, head, response)

    # --- what Answer needs

    def count_received(self, upstream: Upstream, ask: Ask, stream: tuple[int, str], amount: int) -> None:
        del ask, stream
        assert isinstance(upstream, Member)
        self._counters.words[self.position("received", upstream.member)] += amount

    def position(self, way: Literal["sent", "received"], name: str) -> int:
        """Of the counter of bytes to or from this member."""
        return self._counters.position(f"gup_peer_{way}_bytes_total", slot=str(self._listed().slot(name)))

    def count_wasted(self, reason: str, stream: tuple[int, str], amount: int) -> None:
        """Nothing: it is no waste of the WAN."""

    def note_failure(self, upstream: Upstream, ask: Ask, failure: UpstreamFailure) -> None:
        """Nothing: the controller finds out itself who is away."""

    def done(self, upstream: Upstream) -> None:
        upstream.in_use -= 1
        upstream.free.release()

    async def close(self) -> None:
        for member in (*self._members.values(), *self._retired):
            await member.close()
        self.wan.close()


def _look(ask: Ask) -> Ask:
    """The question whether a member holds the body."""
    return replace(ask, method="HEAD", held=True, start=0, stop=None, if_range=None, own_etag=None)


async def _drain(response: "aiohttp.ClientResponse") -> None:
    with contextlib.suppress(Exception):
        await response.content.read(_ERROR_BODY_BYTES)
    response.release() if response.content.at_eof() else response.close()
