"""The cluster's control: beats at the engine, probes of members, the list and the share for the workers.

Every 0.2 s one beat tells the engine of this node, and brings the others' rows, its share of the WAN's rate
and new orders. Nothing here is waited for: when the engine is away, the list holds and each node takes its
part.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

from gup.cluster.beat import Beat, EngineError
from gup.cluster.member_list import ALONE, Member, Members
from gup.cluster.membership import PROBE_SECONDS, PROTOCOL, Membership, Row, read_row, write_row
from gup.cluster.orders import covers, read_order, write_order
from gup.cluster.share import GRANT_NS, Classes, Demand, floor, granted
from gup.cluster.signing import Signer
from gup.config import Cluster, Upstream
from gup.metrics import MAX_MEMBERS
from gup.upstream.probe import Alive, Answered, Failed, Prober

if TYPE_CHECKING:
    from gup.cluster.engine import Engine
    from gup.control.order_book import OrderBook

_log = logging.getLogger("gup.control.cluster")
BEAT_SECONDS = 0.2
_WATCH_SECONDS = 0.025
"""Between two looks at who waits for the WAN."""
_SETTLE_SECONDS = 1.5
"""At the start: the longest wait for the first beat and the members' answers."""
_LEAST_SECONDS = 0.02
"""Between two beats."""
_JUMP_MS = 1000
_SEEN_SECONDS = 2.0
"""After a jump of the engine's clock: by then every node that reaches the engine accepts the new time."""
_AWAY_SECONDS = 2.0
_FORGED_SECONDS = 60.0
_CATCH_UP_SECONDS = 1.6
"""Content waits so long at the start for the orders, and a little more for this to be told."""
_ORDERS_SECONDS = 10.0
"""Between two looks at whether the engine has all orders."""
_MOST_ORDERS_BYTES = 64 << 20
_BUDGET_SECONDS = 0.5
"""Between two exchanges of what was used of the WAN's budget."""
_NAME_TAKEN = "another node with this name belongs to the cluster"
_ALONE_AFTER_SECONDS = 1.5
"""A controller that was started again finds the row of the one before."""


def fingerprint(upstreams: Iterable[Upstream]) -> str:
    """Of what nodes must have in common to fetch for each other: where which content comes from."""
    rows = sorted([each.name, each.url, each.kind, each.version, each.language] for each in upstreams)
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class ClusterDependencies:
    """What the cluster's control reads, and where it writes for the workers."""

    settings: Cluster
    upstreams: Callable[[], Iterable[Upstream]]
    signer: Callable[[], Signer]
    """As the secret file is now."""
    rate: Callable[[], int]
    """The site's WAN rate at this hour, bytes/s; 0: unlimited."""
    paid: Callable[[], Classes]
    """Bytes of the WAN since the start, by class."""
    waiting: Callable[[], frozenset[int]]
    """Classes that wait for the WAN now."""
    received_rate: Callable[[], int]
    """What is read from the WAN, bytes/s."""
    totals: Callable[[], Mapping[str, int]]
    publish: Callable[[Members], Awaitable[None]]
    """Writes the list and tells the workers; OSError."""
    set_share: Callable[[int, int], None]
    """Bytes/s, and until which monotonic ns."""
    set_most: Callable[[int], None]
    time_offset: Callable[[], int]
    set_time_offset: Callable[[int], None]
    """What to add to the monotonic ms to have the engine's time; 0: unknown. That of before is accepted."""
    accept_time_offset: Callable[[int], None]
    """Another one that is accepted of members that ask."""
    book: "OrderBook | None" = None
    set_ordered: Callable[[], None] = lambda: None
    """Called when the orders have been caught up after the start, or could not be."""
    known: Members = field(default_factory=lambda: ALONE)
    """The list of an earlier run."""


class BudgetRows(Protocol):
    """What a node knows of the use of the WAN's budget: a row for each node, by ids."""

    def rows(self) -> Mapping[str, tuple[int, Callable[[], str]]]:
        """Each row's number, which grows with each change, and what gives it as text."""

    def hear(self, texts: Iterable[str | None]) -> Mapping[str, int]:
        """Take others' rows; the numbers of those that can be read."""

    @property
    def most(self) -> int:
        """How many rows are kept."""


class ClusterControl:
    """One node's part in the cluster. `run` goes on until it is cancelled; `leave` says goodbye."""

    def __init__(
        self,
        dependencies: ClusterDependencies,
        engine: "Engine",
        prober: Prober,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deps, self._engine, self._prober, self._clock = dependencies, engine, prober, clock
        settings, known = dependencies.settings, dependencies.known
        self.node = settings.node
        self.membership = Membership(
            self.node,
            fingerprint(dependencies.upstreams()),
            settings.member_timeout,
            clock(),
            known.others,
            known.most if known.node == self.node else 0,
        )
        self.slots = known.slots
        self._demand, self._wanted = Demand(), (0, 0, 0)
        self._start, self._grant, self.share = 0, 0, 0
        self._granted_until_ns = 0
        self._answered_at, self._error = clock(), ""
        self._ever_answered = self._fell_back = False
        self._taken_since: float | None = None
        self._jump: tuple[int, float] | None = None
        """The offset after a jump of the engine's clock, and when it is used."""
        self._leaving = self._left = False
        self._wake, self._changed = asyncio.Event(), asyncio.Event()
        self._published: Members | None = None
        self.forged, self._forged_at = 0, 0.0
        """Rows and orders in the engine that no member signed."""
        self.beats = 0
        self.budget: BudgetRows | None = None
        self._budget_told: Mapping[str, int] = {}
        """The numbers of the rows that the engine had."""
        self.book = dependencies.book
        if self.book is not None:
            self.book.tell = self._tell_orders
        self._ordered = asyncio.Event()
        self._behind: set[str] = set()
        """Members that know orders which this node does not."""
        self._last_order, self._from_engine = "0", list[str]()
        self._caught_up = self.book is None
        self._own: Row | None = None

    # --- life

    async def run(self) -> None:
        self._deps.set_most(self.membership.most(self._clock()))
        jobs = (
            self._keep_beating(),
            self._keep_probing(),
            self._watch(),
            self._keep_publishing(),
            self._keep_ordering(),
            self._keep_budget(),
        )
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(job)

    def apply(self) -> None:
        """The settings were read again: the upstreams may be others."""
        self.membership.fingerprint = fingerprint(self._deps.upstreams())

    def leave(self) -> None:
        """Say goodbye: the others ask this node no more. It goes on beating, as its fills go on."""
        self._leaving = True
        self._wake.set()

    async def close(self, *, stays: bool = False) -> None:
        """Call it when `run` has ended; says goodbye if there was no time for it, unless the node `stays`."""
        if not self._left and not stays:
            self._leaving = True
            await self._beat()
        await self._engine.close()
        await self._prober.close()

    # --- beats

    async def _keep_beating(self) -> None:
        while True:
            began = self._clock()
            self._wake.clear()
            shrank = await self._beat()
            if not shrank:  # else what it gave up is told at once
                rest = BEAT_SECONDS - (self._clock() - began)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(rest, _LEAST_SECONDS)):
                        await self._wake.wait()
            await asyncio.sleep(_LEAST_SECONDS)

    async def _beat(self) -> bool:
        """One beat; whether the share has become smaller."""
        deps, before = self._deps, self.share
        asked_ns, rate = time.monotonic_ns(), deps.rate()
        self._own = self._row(asked_ns)
        try:
            if not self._start:  # in the engine's time, as nodes' clocks differ
                self._start = await self._engine.time_ms() * 1000 + random.randrange(1000)  # noqa: S311
                asked_ns = time.monotonic_ns()
                self._own = self._row(asked_ns)
            beat = await self._engine.beat(
                self.node,
                deps.signer().seal(self._sealed_as(self.node), write_row(self._own)),
                start=self._start,
                rate=rate,
                demand=self._wanted,
                grant=self._grant,
                last_order=self._last_order,
            )
        except EngineError as error:
            self._lost(str(error))
            return False
        self._take(beat, asked_ns, rate)
        return self.share < before

    def _sealed_as(self, name: str) -> str:
        return f"row of {name}"

    def _row(self, now_ns: int) -> Row:
        deps = self._deps
        return Row(
            self.node,
            self._start,
            deps.settings.address or "",
            PROTOCOL,
            self.membership.fingerprint,
            apart=now_ns >= self._granted_until_ns and self._ever_answered,
            leaving=self._leaving,
            share=self.share if now_ns < self._granted_until_ns else 0,
            received_rate=deps.received_rate(),
            totals=deps.totals(),
        )

    def _lost(self, why: str) -> None:
        self._error = why  # the alarm tells it, when it lasts
        self.membership.engine_is_away()
        if not self._ever_answered and not self._fell_back:
            self._fell_back = True
            most = self.membership.most(self._clock())
            self._deps.set_share(floor(self._deps.rate(), most), time.monotonic_ns())
        self._look()

    def _take(self, beat: Beat, asked_ns: int, rate: int) -> None:
        """What the engine has answered to the beat of `asked_ns`."""
        now, now_ns = self._clock(), time.monotonic_ns()
        self._error, self._answered_at, self.beats = "", now, self.beats + 1
        self._left = self._own is not None and self._own.leaving
        self._note_time(beat.time_ms, (asked_ns + now_ns) // 2)
        if beat.orders and self.book is not None:
            self._last_order = beat.orders[-1][0]
            self._from_engine += (fields.get("order", "") for _, fields in beat.orders)
            self._ordered.set()
        if beat.grant is None:
            self._taken_since = self._taken_since or now
            self.share, self._granted_until_ns = 0, 0
            self._look()
            return
        self._taken_since, self._ever_answered = None, True
        self.membership.see(self._rows(beat), now)
        most = self.membership.most(now)
        self._deps.set_most(most)
        self._grant = beat.grant
        if rate > 0:
            self.share = granted(beat.share, self.membership.without_grant(), most)
            self._granted_until_ns = asked_ns + GRANT_NS
            self._deps.set_share(max(1, self.share), self._granted_until_ns)
        self._look()

    def _rows(self, beat: Beat) -> Iterator[Row]:
        signer = self._deps.signer()
        for name, sealed in beat.rows.items():
            row = read_row(signer.unseal(self._sealed_as(name), sealed))
            if row is None or row.name != name:
                self.forged, self._forged_at = self.forged + 1, self._clock()
            else:
                yield row

    def _note_time(self, engine_ms: int, at_ns: int) -> None:
        """The engine's time for questions to members. After a jump the new one is accepted at once, and used
        only when the others must have seen it too: they would refuse a question with a time unknown to them.
        """
        offset, known, jump = engine_ms - at_ns // 1_000_000, self._deps.time_offset(), self._jump
        if not known:
            self._deps.set_time_offset(offset)
        elif abs(offset - known) < _JUMP_MS:
            self._jump = None
        elif jump is None or abs(offset - jump[0]) >= _JUMP_MS:
            _log.warning("the engine's clock jumped by %d s", (offset - known) // 1000)
            self._deps.accept_time_offset(offset)
            self._jump = offset, self._clock() + _SEEN_SECONDS
        elif self._clock() >= jump[1]:
            self._deps.set_time_offset(offset)
            self._jump = None

    # --- demand

    async def _watch(self) -> None:
        """Follow how much of the WAN is wanted; where demand begins or ends, a beat tells it at once."""
        while True:
            deps, before = self._deps, self._wanted
            self._wanted = self._demand.look(
                self._clock(), deps.paid(), deps.waiting(), self.share, deps.rate()
            )
            if any(bool(now) != bool(then) for now, then in zip(self._wanted, before, strict=True)):
                self._wake.set()
            await asyncio.sleep(_WATCH_SECONDS)

    # --- probes

    async def _keep_probing(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                for member in self.membership.due(self._clock()):
                    group.create_task(self._probe(member.name, member.address))
                await asyncio.sleep(PROBE_SECONDS / 10)
                self._look()

    async def _probe(self, name: str, address: str) -> None:
        deps, now_ms = self._deps, time.monotonic_ns() // 1_000_000
        offset = deps.time_offset()
        time_ms = now_ms + offset if offset else int(time.time() * 1000)
        answer = await self._prober.probe(name, address, deps.signer(), time_ms, PROBE_SECONDS)
        if isinstance(answer, Alive):
            self.membership.answered(name, self._clock(), ready=answer.ready, known=answer.known)
            if self.book is not None and not covers(self.book.known, answer.known):
                self.hear_of_orders(name)
            if not deps.time_offset() and answer.time_ms:  # without the engine, a member knows its time
                deps.set_time_offset(answer.time_ms - time.monotonic_ns() // 1_000_000)
        else:
            self.membership.failed(name, answer.why, refused=answer.refused)

    # --- orders

    def hear_of_orders(self, name: str) -> None:
        """A member knows orders that this node does not."""
        self._behind.add(name)
        self._ordered.set()

    async def _keep_ordering(self) -> None:
        """Catch up at the start, then whenever there is news; and see to it that the engine has all."""
        if self.book is None:
            return
        await self.book.open()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CATCH_UP_SECONDS):
                while not (self._knows_whom_to_ask and await self._catch_up()):  # noqa: ASYNC110
                    await asyncio.sleep(_CATCH_UP_SECONDS / 10)
        self._deps.set_ordered()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ORDERS_SECONDS):
                    await self._ordered.wait()
            self._ordered.clear()
            texts, self._from_engine = self._from_engine, []
            await self._take_orders(texts)
            behind, self._behind = self._behind, set()
            members = [member for member in self.membership.members() if member.name in behind]
            await asyncio.gather(*map(self._fetch_orders, members))
            if not self._caught_up:
                await self._catch_up()
            await self._agree_with_engine()

    @property
    def _knows_whom_to_ask(self) -> bool:
        """Whether the engine has told of the members, or can't: one that came while this node was off may
        know what the engine has lost.
        """
        return bool(self._error) or (self._ever_answered and self.membership.is_complete)

    async def _catch_up(self) -> bool:
        """Whether the engine or a member has told its orders."""
        asked = [self._fetch_orders(member) for member in self.membership.members()]
        self._caught_up = any(await asyncio.gather(self._agree_with_engine(), *asked))
        return self._caught_up

    async def _fetch_orders(self, member: Member) -> bool:
        answer = await self._ask_of_orders(member, "/orders")
        if not isinstance(answer, Answered) or answer.status != HTTPStatus.OK:
            return False
        await self._take_orders(answer.body.decode(errors="replace").splitlines())
        return True

    async def _ask_of_orders(self, member: Member, path: str) -> Answered | Failed:
        deps, now_ms = self._deps, time.monotonic_ns() // 1_000_000
        time_ms = now_ms + deps.time_offset() if deps.time_offset() else int(time.time() * 1000)
        assert self.book is not None
        fields, most = {"GUP-Known": self.book.known}, _MOST_ORDERS_BYTES
        signer, address = deps.signer(), member.address
        return await self._prober.ask(member.name, address, signer, time_ms, 1.0, path, fields, most)

    async def _take_orders(self, sealed: Iterable[str]) -> None:
        signer, orders, known = self._deps.signer(), [], dict[str, None]()
        for text in sealed:
            unsealed = signer.unseal("order", text)
            if unsealed is None:
                known = known or self._known_texts()
                if text.partition(" ")[2] in known:
                    continue  # signed with the secret of before
                self.forged, self._forged_at = self.forged + 1, self._clock()
            elif (order := read_order(unsealed)) is not None:
                orders.append(order)
        assert self.book is not None
        await self.book.take(orders)

    async def _agree_with_engine(self) -> bool:
        """Take what the engine has, and put back what it has lost; False without an answer.

        Orders that are known here, and no longer signed since the secret was changed, are replaced.
        """
        assert self.book is not None
        signer = self._deps.signer()
        try:
            found = await self._engine.orders()
            texts = {signer.unseal("order", text) for _, text in found}
            await self._take_orders(text for _, text in found)
            own = self._known_texts()
            lost = [signer.seal("order", text) for text in own if text not in texts]
            unsigned = [
                id_
                for id_, text in found
                if text.partition(" ")[2] in own and signer.unseal("order", text) is None
            ]
            await self._engine.put_orders(lost, in_place_of=unsigned)
        except EngineError:
            return False
        self._last_order = found[-1][0] if found else "0"
        return True

    def _known_texts(self) -> dict[str, None]:
        """The orders that this node knows, in their order."""
        assert self.book is not None
        return dict.fromkeys(write_order(order) for order in self.book.log.orders)

    async def _tell_orders(self) -> tuple[str, ...]:
        """Tell all members what is known here; those that do not know it within a second."""
        self._ordered.set()
        members = self.membership.members()
        answers = await asyncio.gather(*(self._ask_of_orders(member, "/orders/known") for member in members))
        return tuple(
            member.name
            for member, answer in zip(members, answers, strict=True)
            if not isinstance(answer, Answered) or answer.status != HTTPStatus.OK
        )

    # --- the WAN's budget

    async def _keep_budget(self) -> None:
        while True:
            if self.budget is not None:
                try:
                    await self._exchange_budget(self.budget)
                except EngineError:
                    self._budget_told = {}  # it may have lost everything
            await asyncio.sleep(_BUDGET_SECONDS)

    async def _exchange_budget(self, budget: BudgetRows) -> None:
        """Tell what is news, and what the engine has lost; take what others have told.

        A row that two nodes put at once may become older for a moment: its node puts it again.
        """
        signer, told = self._deps.signer(), self._budget_told
        news = {id_: text() for id_, (seq, text) in budget.rows().items() if told.get(id_, -1) < seq}
        found = await self._engine.budget(
            {id_: signer.seal(f"budget of {id_}", text) for id_, text in news.items()}
        )
        texts = (signer.unseal(f"budget of {id_}", sealed) for id_, sealed in found.items())
        self._budget_told = budget.hear(texts)
        if len(found) > 2 * budget.most:
            await self._engine.drop_budget([id_ for id_ in found if id_ not in budget.rows()])

    # --- what follows

    @property
    def is_alone(self) -> bool:
        """Whether another node has this one's name."""
        since = self._taken_since
        return since is not None and self._clock() - since >= _ALONE_AFTER_SECONDS

    def members(self) -> Members:
        """The list as it is for the workers."""
        others = () if self.is_alone else self.membership.members()
        new = [member.name for member in others if member.name not in self.slots]
        self.slots = (*self.slots, *new)[:MAX_MEMBERS]
        return Members(self.node, others, most=self.membership.most(self._clock()), slots=self.slots)

    def _look(self) -> None:
        """Publish the list when it has changed, and keep a node alone to its floor of the rate."""
        self.membership.look(self._clock())
        if self._taken_since is not None and (rate := self._deps.rate()) > 0:
            most = self.membership.most(self._clock())
            self._deps.set_share(floor(rate, most), time.monotonic_ns() + GRANT_NS)
        if self.members() != self._published:
            self._changed.set()

    async def _keep_publishing(self) -> None:
        """The first list is published when it is complete: without a member its content would be fetched."""
        began = self._clock()
        while self._clock() - began < _SETTLE_SECONDS and not (
            self._ever_answered and self.membership.is_complete
        ):
            await self._changed.wait()
            self._changed.clear()
        self._changed.set()
        while True:
            await self._changed.wait()
            self._changed.clear()
            members = self.members()
            self._deps.set_most(members.most)
            try:
                await self._deps.publish(members)
            except OSError as error:
                _log.warning("the list of members can't be written: %s", error.strerror)
                await asyncio.sleep(PROBE_SECONDS)
                continue
            names = ", ".join(
                f"{other.name}{'' if other.askable else ' (not asked)'}" for other in members.others
            )
            _log.info("members besides %s: %s", self.node, names or "none")
            self._published = members

    @property
    def published(self) -> Members:
        """The list that the workers have."""
        return self._published or Members(self.node)

    def findings(self) -> Iterator[tuple[str, str, str]]:
        """Alarms: name, subject and text of each."""
        now = self._clock()
        if self._error and now - self._answered_at >= _AWAY_SECONDS:
            others = len(self.membership.members())
            text = f"the cluster's engine does not answer ({self._error}): the list of members holds"
            yield "engine-away", "", f"{text}, {others} besides this one" if others else text
        if not self._caught_up and now - self._answered_at >= _AWAY_SECONDS:
            text = "neither the engine nor a member has told since the start what was purged meanwhile"
            yield "orders-unknown", "", text
        if self.is_alone:
            text = f"{_NAME_TAKEN}, {self.node!r}: this one stays alone until that one is gone"
            yield "name-taken", self.node, text
        for name, why in self.membership.unreachable():
            yield "member-unreachable", name, f"{self.node} can't reach {name} at {why}; it is passed over"
        for name, why in self.membership.unlike():
            yield "member-unlike", name, f"{self.node} does not ask {name}: {why}"
        if self.forged and now - self._forged_at < _FORGED_SECONDS:
            text = (
                f"{self.forged} rows in the engine were not signed with this site's secret; they are ignored"
            )
            yield "row-forged", "", text

    @property
    def own(self) -> Row | None:
        """The row that this node has told last; None before the first."""
        return self._own

    def age_seconds(self, at: float) -> float:
        """Of what the list of members dates."""
        return max(0.0, self._clock() - at)

    def unconfirmed(self, known: str) -> int:
        """How many orders a member does not know that this node knows."""
        return self.book.unknown_to(known) if self.book is not None else 0

    @property
    def engine_error(self) -> str | None:
        return self._error or None
