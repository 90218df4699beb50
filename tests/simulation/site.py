"""Nodes that find content by gup.cluster.ownership, over links and a WAN that have rates."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from gup.cluster.ownership import Source, steps
from simulation.day import Day

STEP_SECONDS = 10
SILENCE_SECONDS = 3.0
"""After which a member that does not answer is passed over."""
OFF_LIST_SECONDS = 5.0
HOP_SECONDS = 0.001
_STEPS = 24 * 3600 // STEP_SECONDS


class Loss(NamedTuple):
    """One node's machine vanishes, and comes back with an empty disk."""

    node: str
    second: int
    back: int


@dataclass
class Node:
    name: str
    held: dict[int, float] = field(default_factory=dict)
    """When each key's body is here whole; from when it begins to arrive on it counts as held."""
    offered: list[int] = field(default_factory=lambda: [0] * _STEPS)
    """Bytes to clients and members, by step."""
    sending_until: float = 0.0
    """To members."""


class Site:
    """What a day costs. `rate` is of the WAN, `link` of each node, in bytes a second."""

    def __init__(self, day: Day, nodes: int, *, rate: int, link: int, loss: Loss | None = None) -> None:
        self._day, self._rate, self._link, self._loss = day, rate, link, loss
        self.nodes = {name: Node(name) for name in names(nodes)}
        self.wan_bytes = self.lan_bytes = self.client_bytes = 0
        self.alone_bytes = 0
        """What these nodes would fetch over the WAN if each were alone."""
        self.wan_fetches = Counter[int]()
        self.slowest_copy_seconds = 0.0
        """From when a key is whole on the node that it came from until a member has it too."""
        self._wan_free = 0.0
        self.step_bytes = link * STEP_SECONDS

    def run(self) -> "Site":
        every, loss, sizes = list(self.nodes), self._loss, self._day.sizes
        left = [name for name in every if loss is None or name != loss.node]
        asked: dict[str, set[int]] = {name: set() for name in every}
        lost = False
        for second, client, key in self._day.requests():
            if loss is not None and second >= loss.second and not lost:
                self.nodes[loss.node].held.clear()
                asked[loss.node].clear()
                lost = True
            name = every[subnet(client) % len(every)]
            if not self._is_alive(name, second):
                name = left[client % len(left)]
            node = self.nodes[name]
            if key not in asked[name]:
                asked[name].add(key)
                self.alone_bytes += sizes[key]
                self._find(node, key, second)
            node.offered[second // STEP_SECONDS] += sizes[key]
            self.client_bytes += sizes[key]
        return self

    def _is_alive(self, name: str, now: float) -> bool:
        loss = self._loss
        return loss is None or name != loss.node or not loss.second <= now < loss.back

    def _members(self, now: float) -> list[str]:
        loss = self._loss
        return [
            name
            for name in self.nodes
            if self._is_alive(name, now) or (loss is not None and now < loss.second + OFF_LIST_SECONDS)
        ]

    def _find(self, node: Node, key: int, now: float) -> float:
        """When the node has the whole body."""
        if key in node.held:
            return node.held[key]
        for step in steps(self._day.keys[key], node.name, self._members(now), immutable=True):
            if step.source is Source.WAN:
                return self._fetch(node, key, now)
            alive = [self.nodes[name] for name in step.members if self._is_alive(name, now)]
            if step.source is Source.HELD:
                alive = [member for member in alive if key in member.held]
            elif not alive:
                now += SILENCE_SECONDS
            if alive:
                return self._copy(alive[0], node, key, now)
        raise AssertionError("the last step is the WAN")

    def _fetch(self, node: Node, key: int, now: float) -> float:
        size = self._day.sizes[key]
        self._wan_free = max(self._wan_free, now) + size / self._rate
        self.wan_bytes += size
        self.wan_fetches[key] += 1
        node.held[key] = self._wan_free
        return self._wan_free

    def _copy(self, source: Node, node: Node, key: int, now: float) -> float:
        whole, size = self._find(source, key, now + HOP_SECONDS), self._day.sizes[key]
        source.sending_until = max(source.sending_until, now) + size / self._link
        source.offered[int(now) // STEP_SECONDS] += size
        self.lan_bytes += size
        node.held[key] = max(whole, source.sending_until)
        self.slowest_copy_seconds = max(self.slowest_copy_seconds, node.held[key] - max(whole, now))
        return node.held[key]

    # --- what came of it

    def sent(self) -> dict[str, int]:
        return {name: sum(node.offered) for name, node in self.nodes.items()}

    def busiest(self) -> float:
        """The bytes that the busiest node sent, by the mean."""
        sent = self.sent().values()
        return max(sent) / (sum(sent) / len(sent))

    def peak(self, seconds: int = 300) -> float:
        """Of a link, what was asked for in the busiest minutes of the busiest node."""
        width = seconds // STEP_SECONDS
        most = max(
            sum(node.offered[at : at + width])
            for node in self.nodes.values()
            for at in range(0, _STEPS, width)
        )
        return most / seconds / self._link

    def waiting(self) -> list[float]:
        """Bytes that clients wait for at the end of each step. A dead node's are asked of the others."""
        waiting, found = dict.fromkeys(self.nodes, 0.0), []
        for at in range(_STEPS):
            alive = [name for name in self.nodes if self._is_alive(name, at * STEP_SECONDS)]
            for name in self.nodes:
                if name not in alive:
                    for other in alive:
                        waiting[other] += waiting[name] / len(alive)
                    waiting[name] = 0.0
            for name in alive:
                waiting[name] = max(0.0, waiting[name] + self.nodes[name].offered[at] - self.step_bytes)
            found.append(sum(waiting.values()))
        return found


def subnet(client: int) -> int:
    """Subnets of 250 clients: each has its node by the lists of the policy."""
    return client // 250


def names(count: int) -> list[str]:
    return [f"gup-{number}" for number in range(1, count + 1)]


def catch_up_seconds(undisturbed: Site, disturbed: Site, loss: Loss) -> int:
    """From the loss until clients wait for no more than they do without it, but for a step of one link."""
    pairs = list(zip(undisturbed.waiting(), disturbed.waiting(), strict=True))
    behind = [at for at, (without, with_) in enumerate(pairs) if with_ > without + disturbed.step_bytes]
    after = [at for at in behind if (at + 1) * STEP_SECONDS > loss.second]
    return (after[-1] + 1) * STEP_SECONDS - loss.second if after else 0
