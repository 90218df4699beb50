"""A node's book of the cluster's orders: kept on disk, told to the others, and carried out."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from gup.cache.canary import FirstSeen, ordered
from gup.cache.purges import FILE as PURGES_FILE
from gup.cache.purges import Purge, Selection, keep_purges, read_purges
from gup.cache.revision_holds import RevisionHold, read_holds
from gup.cluster.orders import FILE, LONE, Action, Order, OrderLog, read_order, write_order
from gup.control.threads import to_its_end
from gup.errors import GupError
from gup.files import FileError, read_file, replace_file
from gup.jsonmodel import InvalidError

_log = logging.getLogger("gup.control.order_book")
_MAX_BYTES = 64 << 20
_Read = TypeVar("_Read")


class OrderBook:
    """The orders that this node knows, in run/orders, and what workers read of them, in run/purges."""

    def __init__(self, run: Path, node: str, now: Callable[[], float], share: Callable[[], None]) -> None:
        """`now` is the cluster's time in Unix seconds; `share` tells the workers that the purges changed."""
        self._run, self._now, self._share = run, now, share
        self._changing = asyncio.Lock()
        self._carry_out: Callable[[Order], Awaitable[None]] | None = None
        self._news = list[Order]()
        """Noted, and not carried out yet."""
        self.tell: Callable[[], Awaitable[tuple[str, ...]]] | None = None
        """Tells the other members, and returns the names of those that did not confirm it."""
        self.keep_holds: Callable[[list[RevisionHold], list[FirstSeen]], Awaitable[None]] | None = None
        """Keeps the holds that stand and the new revisions, and tells the workers; OSError."""
        self.log = OrderLog(node, _read(run / FILE))

    @property
    def now(self) -> float:
        """The cluster's time, Unix seconds."""
        return self._now()

    @property
    def known(self) -> str:
        return self.log.known(self._now())

    def unknown_to(self, known: str) -> int:
        """How many orders that hold are not among what another node knows."""
        return self.log.unknown_to(known, self._now())

    async def open(self) -> None:
        """Take over what was purged and put on hold while this gup had no cluster, and what else the workers
        know, should run/orders have been lost. Call it once.
        """
        log, ids = self.log, {(order.node, order.number) for order in self.log.orders}
        purges, _ = await asyncio.to_thread(read_purges, self._run / PURGES_FILE)
        for purge in purges:
            if (purge.node, purge.number) not in ids:
                log.write(max(purge.at, 0.0), "purge", purge.selection.given())
        for hold in await asyncio.to_thread(read_holds, self._run):
            if hold.node == LONE or log.standing(("hold", hold.stream, hold.revision)) is None:
                log.write(max(hold.at, 0.0), "hold", hold.given())
        async with self._changing:
            await self._save()

    async def begin(self, carry_out: Callable[[Order], Awaitable[None]]) -> None:
        """From now on orders of others can be carried out; those that came before are."""
        self._carry_out = carry_out
        await self._carry_out_news()

    async def issue(self, action: Action, what: Mapping[str, object]) -> tuple[str, ...]:
        """A new order: noted here, then told to the others. The members that have not confirmed it in time.

        OSError when it can't be noted.
        """
        async with self._changing:
            order = self.log.write(self._now(), action, what)
            try:
                await self._save()
            except OSError:
                self.log.drop(order)
                raise
        return await self.tell() if self.tell is not None else ()

    async def take(self, orders: Iterable[Order]) -> bool:
        """Orders of others: noted, then carried out; whether any was news."""
        async with self._changing:
            news = [order for order in orders if self.log.take(order, self._now())]
            if not news:
                return False
            try:
                await self._save()
            except OSError as error:  # they hold in this run, and are told again after a restart
                _log.warning("orders of other members can't be noted: %s", error.strerror)
        for order in news:
            _log.info("%s ordered: %s %s", order.node, order.action, dict(order.what))
        self._news += news
        await self._carry_out_news()
        return True

    async def _carry_out_news(self) -> None:
        while self._carry_out is not None and self._news:
            order = self._news.pop(0)
            if order.subject is not None and order != self.log.standing(order.subject):
                continue
            try:
                await self._carry_out(order)
            except (GupError, OSError, KeyError, TypeError) as error:  # of another version, perhaps
                _log.warning("an order of %s could not be carried out: %r", order.node, error)

    async def _save(self) -> None:
        self.log.forget(self._now())
        orders, known = self.log.orders, self.known
        purges = [
            Purge(each.number, each.at, Selection.of(each.what), each.node)
            for each in orders
            if each.action == "purge" and "unused_since" not in each.what  # that one has no further effect
        ]
        text = "".join(write_order(each) + "\n" for each in orders).encode()

        def write() -> None:
            replace_file(self._run / FILE, text)
            keep_purges(self._run, purges, known)

        await to_its_end(write)
        if self.keep_holds is not None:
            new = (order for order in orders if order.action == "new")
            await self.keep_holds(_readable(RevisionHold.of, self.log.holds()), _readable(ordered, new))
        self._share()  # last: it tells the members that all is known here


def _readable(read: Callable[[Order], _Read], orders: Iterable[Order]) -> list[_Read]:
    found = list[_Read]()
    for order in orders:
        try:
            found.append(read(order))
        except (InvalidError, TypeError) as error:  # of a later version
            _log.warning("%s ordered a %s that can't be read: %s", order.node, order.action, error)
    return found


def _read(path: Path) -> list[Order]:
    """Without lines that are no orders."""
    try:
        lines = read_file(path, _MAX_BYTES).decode(errors="replace").splitlines()
    except FileError as error:
        if path.exists():
            _log.warning("the orders of the cluster are taken from run/purges and run/holds: %s", error)
        return []
    return [order for line in lines if (order := read_order(line)) is not None]
