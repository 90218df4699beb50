"""Orders that hold at every node of a cluster, and what a node knows of them. Pure.

Each node numbers its own orders, and each names the one before it (`after`), so that a gap is seen. What a
node knows is for each writer the number up to which it knows all, and the spans beyond gaps: a version
vector. A body carries what its node knew when its fetch began, and when that was; an order names it that is
not in there. So it does not matter in which order orders come, over which way, or how often.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, StringConstraints, TypeAdapter

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


def _text_of_number(given: object) -> object:
    """Before there was a cluster it was the number of the last purge."""
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return f"{LONE}={given}" if given else ""
    return given


Action = Literal["purge", "pin", "unpin", "hold", "release", "prefetch", "new", "outbreak", "outbreak-end"]
Subject = tuple[str, ...]
Writer = Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\s=+]+$")]
KnownText = Annotated[
    str,
    BeforeValidator(_text_of_number),
    StringConstraints(max_length=MAX_KNOWN, pattern=r"^[\x21-\x7e ]*$"),
]
_STANDING = ("pin", "hold", "release")
_LATER_SECONDS = 0.001
_ONE = re.compile(r"([^\s=+]+)=(\d{1,19})((?:\+\d{1,19}(?:-\d{1,19})?)*)")
_STAMP = " @"
_STAMP_CHARACTERS, _MOST_SPAN_CHARACTERS = 24, 40


@dataclass(frozen=True, slots=True)
class Order:
    """`at` is in Unix seconds. `what` is what gup.cache.purges selects; a pin has a `key`, a hold what
    gup.cache.revision_holds has, a prefetch what is `wanted`: rows of `key` and `path`; an outbreak what
    gup.control.outbreak has. A new revision of a stream is told with the time `since` which it is known.
    """

    node: Writer
    number: Count
    after: Count
    at: Time
    action: Action
    what: Mapping[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> "Subject | None":
        """What it is about, where it stands until there is a later one about the same."""
        if self.action in ("pin", "unpin"):
            return ("pin", str(self.what.get("key")))
        if self.action in ("hold", "release"):
            return ("hold", str(self.what.get("stream")), str(self.what.get("revision")))
        if self.action in ("outbreak", "outbreak-end"):
            return ("outbreak",)
        return None


_ORDER = TypeAdapter(Order)


def write_order(order: Order) -> str:
    return _ORDER.dump_json(order).decode()


def read_order(text: str) -> Order | None:
    """None for what is no order, such as one of a later version."""
    try:
        return read(_ORDER, parse(text.encode(), "order", MAX_BYTES), "order")
    except (InvalidError, UnicodeEncodeError):
        return None


# --- what is known, as text: "a=17 b=5+9-12": of a all up to 17, of b all up to 5, and all from 9 to 12; of a
# body " @" and the ms of its fetch's beginning follow


_Spans = tuple[tuple[int, int], ...]


@lru_cache(maxsize=1024)
def _known(text: str) -> Mapping[str, tuple[int, _Spans]]:
    def spans(texts: str) -> _Spans:
        ends = (one.partition("-") for one in texts.split("+")[1:])
        return tuple((int(first), int(last or first)) for first, _, last in ends)

    found = filter(None, map(_ONE.fullmatch, text.split(" ")))
    return {one[1]: (int(one[2]), spans(one[3])) for one in found}


def knows(text: str, node: str, number: int) -> bool:
    """Whether this order is among what is known."""
    upto, spans = _known(text).get(node, (0, ()))
    return number <= upto or any(first <= number <= last for first, last in spans)


def covers(text: str, other: str) -> bool:
    """Whether all that `other` knows is among what is known."""
    known = _known(text)
    for node, (upto, spans) in _known(other).items():
        own, own_spans = known.get(node, (0, ()))
        if own < upto:
            return False
        for first, last in spans:
            if own < last and not any(one <= first and last <= end for one, end in own_spans):
                return False
    return True


def stamped(known: str, at: float) -> str:
    """With the time (Unix seconds) at which the fetch of a body began."""
    return f"{known}{_STAMP}{max(0, int(at * 1000))}"


def unstamped(text: str) -> tuple[str, float | None]:
    """What was known, and when the fetch began; None where that was not kept."""
    known, _, at = text.rpartition(_STAMP)
    return (known, int(at) / 1000) if at.isascii() and at.isdigit() and _STAMP in text else (text, None)


def _age(order: Order) -> tuple[float, str, int]:
    return order.at, order.node, order.number


def _text(spans: Mapping[str, Sequence[Sequence[int]]]) -> str:
    def beyond(first: int, last: int) -> str:
        return f"+{first}" if first == last else f"+{first}-{last}"

    return " ".join(
        f"{node}={own[0][1]}{''.join(beyond(*span) for span in own[1:])}" for node, own in spans.items()
    )


class OrderLog:
    """The orders that a node knows."""

    def __init__(self, node: str, orders: Iterable[Order] = ()) -> None:
        self._node = node
        self._orders = {(order.node, order.number): order for order in orders}

    @property
    def orders(self) -> list[Order]:
        return sorted(self._orders.values(), key=_age)

    def known(self, now: float) -> str:
        """What is known. Numbers follow the time: what came before those that are kept is no gap.

        An order says which one was before it, so the orders behind a gap are one span, however many. Where
        there are more gaps than fit into a head, each of an order that every node has lost, the oldest count
        as closed: a body that could not say all that its node knows would never be served.
        """
        spans = defaultdict[str, list[list[int]]](list)  # the first of each begins at 0
        too_old = (now - KEPT_SECONDS) * 1000
        for node, number in sorted(self._orders):
            own, after = spans[node], self._orders[node, number].after
            own[:] = own or [[0, 0]]
            if after <= own[-1][1] or after < too_old:
                own[-1][1] = number
            else:
                own.append([number, number])
        while len(text := _text(spans)) > MAX_KNOWN - _STAMP_CHARACTERS:
            most = max(spans.values(), key=len)
            if len(most) == 1:
                break
            del most[: max(1, (len(text) - MAX_KNOWN) // _MOST_SPAN_CHARACTERS)]
        return text

    def unknown_to(self, known: str, now: float) -> int:
        """How many of the orders that hold are not among what another node knows."""
        orders = self._orders.values()
        return sum(not knows(known, o.node, o.number) and not self._is_over(o, now) for o in orders)

    def has_gap(self, now: float) -> bool:
        return "+" in self.known(now)

    def write(self, now: float, action: Action, what: Mapping[str, Any]) -> Order:
        """A new order of this node. It is later than all about the same, whatever the clock says."""
        last = max((number for node, number in self._orders if node == self._node), default=0)
        order = Order(self._node, max(last + 1, int(now * 1000)), last, now, action, what)
        if (before := self.standing(order.subject)) is not None and before.at >= now:
            order = replace(order, at=before.at + _LATER_SECONDS)
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

    def standing(self, subject: Subject | None) -> Order | None:
        """The latest order about this."""
        about = (order for order in self._orders.values() if order.subject == subject)
        return max(about, key=_age, default=None) if subject is not None else None

    def is_pinned(self, key: str) -> bool:
        latest = self.standing(("pin", key))
        return latest is not None and latest.action == "pin"

    def holds(self) -> list[Order]:
        """The holds that stand."""
        latest = {order.subject: order for order in self.orders if order.action in ("hold", "release")}
        return [order for order in latest.values() if order.action == "hold"]

    def forget(self, now: float) -> None:
        """Drop what is too old. The latest order about a pin or a hold stands, and the release of a hold:
        a node that was off for long would bring the hold back.
        """
        self._orders = {id_: order for id_, order in self._orders.items() if not self._is_over(order, now)}

    def _is_over(self, order: Order, now: float) -> bool:
        if order.at >= now - KEPT_SECONDS:
            return False
        if order.action not in _STANDING:
            return True
        standing = self.standing(order.subject)
        return standing is not None and _age(standing) > _age(order)
