"""A node's part of the site's WAN rate: what it uses of a grant, what without one, and how much it asks for.

A grant ends 0.6 s after the node asked for it, and so does its row at the engine. Without a grant a node
uses a hundredth of its equal part until the others must have noticed, then its equal part. The others leave
that to it: so the sum is never above the rate, whoever of them has lost the engine.
"""

from collections import deque
from typing import NamedTuple

GRANT_NS = 600_000_000
NOTICED_NS = 1_200_000_000
"""After a grant's end: a beat of before may have reached the engine late, and the others beat every 0.2 s."""
_UNKNOWN = 4
"""Members that a node assumes which has never heard of any."""
CLASSES = 3
"""Urgent, other, background."""
Classes = tuple[int, int, int]


def floor(rate: int, most: int) -> int:
    return max(1, rate // 100 // (most or _UNKNOWN))


def without_grant(rate: int, since_ns: int, most: int) -> int:
    """Bytes/s for a node whose grant ended `since_ns` ago; `most` is 0 while no member was ever seen."""
    return max(1, rate // (most or _UNKNOWN)) if since_ns >= NOTICED_NS else floor(rate, most)


def granted(share: int, without_grant: int, most: int) -> int:
    """What to use of a grant while so many others may use the WAN without one."""
    return share * max(0, most - without_grant) // max(1, most)


class _Sample(NamedTuple):
    at: float
    paid: Classes
    waiting: frozenset[int]


_WINDOW_SECONDS = 0.5
_ENDED_SECONDS = 0.1
"""What neither waits for the WAN nor reads from it for so long has ended: others get its share."""
_LIMITED = 0.9
_HEADROOM = 1.25


class Demand:
    """How much of the WAN this node wants, by class: from what it has read, and from who waits to read."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()

    def look(self, now: float, paid: Classes, waiting: frozenset[int], share: int, rate: int) -> Classes:
        """`paid` are bytes since the start by class, `waiting` the classes that wait for the WAN now.

        A node that its share limits wants all that there is, another one a little more than it gets.
        """
        samples = self._samples
        samples.append(_Sample(now, paid, waiting))
        while len(samples) > 2 and samples[1].at <= now - _WINDOW_SECONDS:
            samples.popleft()
        first, seconds = samples[0], max(now - samples[0].at, 0.001)
        used = [(paid[each] - first.paid[each]) / seconds for each in range(CLASSES)]
        waits = [sum(each in sample.waiting for sample in samples) for each in range(CLASSES)]
        limited = sum(used) >= _LIMITED * share or max(waits) * 2 >= len(samples)

        recent = [sample for sample in samples if sample.at > now - _ENDED_SECONDS]
        before = next((sample for sample in reversed(samples) if sample.at <= now - _ENDED_SECONDS), None)

        def wants(each: int) -> int:
            if (
                before is not None
                and before.paid[each] == paid[each]
                and not any(each in sample.waiting for sample in recent)
            ):
                return 0
            begins = each in waiting and not used[each]
            if begins or (limited and (waits[each] or used[each])):
                return rate
            return int(used[each] * _HEADROOM)

        return wants(0), wants(1), wants(2)
