"""Orders that hold at every node of a cluster, and what a node knows of them. Pure.

Each node numbers its own orders, and each names the one before it (`after`), so that a gap is seen. What a
node knows is for each writer the number up to which it knows all, and the single ones beyond a gap: a version
vector. A body carries what its node knew when its fetch began, and an order names it that is not in there. So
it does not matter in which order orders come, over which way, or how often.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import StringConstraints, TypeAdapter

from gup.jsonmodel import Count, InvalidError, Time, parse, read

FILE = "orders"
"""In run/: a line an order."""
KEPT_SECONDS = 30 * 86400.0
MAX_BYTES = 1 << 20
"""Of one order as text."""
MAX_KNOWN = 4096
"""Length of what is known, as text: it travels in a field of a head."""
LONE = "-"
"""The writer where there is no cluster."""
Action = Literal["purge", "pin", "unpin"]
Writer = Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\s=+]+$")]
KnownText = Annotated[str, StringConstraints(max_length=MAX_KNOWN, pattern=r"^[\x21-\x7e ]*$")]
_ONE = re.compile(r"([^\s=+]+)=(\d{1,19})((?:\+\d{1,19})*)")


@dataclass(frozen=True, slots=True)
class Order:
    """`at` is in Unix seconds. `what` is what gup.cache.purges selects; a pin has a `key`."""

    node: Writer
    number: Count
    after: Count
    at: Time
    action: Action
    what: Mapping[str, Any] = field(default_factory=dict)


_ORDER = TypeAdapter(Order)


def write_order(order: Order) -> str:
    return _ORDER.dump_json(order).decode()


def read_order(text: str) -> Order | None:
    """None for what is no order, such as one of a later version."""
    try:
        return read(_ORDER, parse(text.encode(), "order", MAX_BYTES), "order")
    except (InvalidError, UnicodeEncodeError):
        return None


# --- what is known, as text: "a=17 b=5+9": of a all up to 17, of b all up to 5, and 9


@lru_cache(maxsize=1024)
def _known(text: str) -> Mapping[str, tuple[int, frozenset[int]]]:
    found = filter(None, map(_ONE.fullmatch, text.split(" ")))
    return {one[1]: (int(one[2]), frozenset(map(int, one[3].split("+")[1:]))) for one in found}


def knows(text: str, node: str, number: int) -> bool:
    """Whether this order is among what is known."""
    upto, single = _known(text).get(node, (0, frozenset()))
    return number <= upto or number in single


def covers(text: str, other: str) -> bool:
    """Whether all that `other` knows is among what is known."""
    return all(
        knows(text, node, number)
        for node, (upto, single) in _known(other).items()
        for number in (upto, *single)
        if number
    )


class OrderLog:
    """The orders that a node knows."""

    def __init__(self, node: str, orders: Iterable[Order] = ()) -> None:
        self._node = node
        self._orders = {(order.node, order.number): order for order in orders}

    @property
    def orders(self) -> list[Order]:
        return sorted(self._orders.values(), key=lambda order: (order.at, order.node, order.number))

    def known(self, now: float) -> str:
        """What is known, for a fetch that begins now. Numbers follow the time: what came before those that
        are kept is no gap.
        """
        numbers = defaultdict(list)
        for node, number in sorted(self._orders):
            numbers[node].append(self._orders[node, number])
        texts = []
        for node, orders in numbers.items():
            upto, single = 0, list[str]()
            for order in orders:
                if not single and (order.after <= upto or order.after < (now - KEPT_SECONDS) * 1000):
                    upto = order.number
                else:
                    single.append(f"+{order.number}")
            texts.append(f"{node}={upto}{''.join(single)}")
        return " ".join(texts)

    def unknown_to(self, known: str, now: float) -> int:
        """How many of the orders that hold are not among what another node knows."""
        orders = self._orders.values()
        return sum(not knows(known, o.node, o.number) and not self._is_over(o, now) for o in orders)

    def has_gap(self, now: float) -> bool:
        return "+" in self.known(now)

    def write(self, now: float, action: Action, what: Mapping[str, Any]) -> Order:
        """A new order of this node."""
        last = max((number for node, number in self._orders if node == self._node), default=0)
        order = Order(self._node, max(last + 1, int(now * 1000)), last, now, action, what)
        self._orders[order.node, order.number] = order
        return order

    def drop(self, order: Order) -> None:
        """Take back an order of this node that was told to nobody."""
        del self._orders[order.node, order.number]

    def take(self, order: Order, now: float) -> bool:
        """An order that another node or the engine has told; whether it is news."""
        if (order.node, order.number) in self._orders or self._is_over(order, now):
            return False
        self._orders[order.node, order.number] = order
        return True

    def standing(self, key: str) -> Order | None:
        """The latest pin or unpin of a key."""
        of_key = (o for o in reversed(self.orders) if o.action != "purge" and o.what.get("key") == key)
        return next(of_key, None)

    def forget(self, now: float) -> None:
        """Drop what is too old. A pin stands until there is a later pin or unpin of its key."""
        self._orders = {id_: order for id_, order in self._orders.items() if not self._is_over(order, now)}

    def _is_over(self, order: Order, now: float) -> bool:
        if order.at >= now - KEPT_SECONDS:
            return False
        standing = self.standing(str(order.what.get("key"))) if order.action == "pin" else None
        return order.action != "pin" or (standing is not None and standing.at > order.at)
