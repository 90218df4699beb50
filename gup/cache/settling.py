"""Whole bodies of this process that are not durable yet: whose turn it is, and how many; does no I/O."""

import asyncio

_AT_ONCE = 4
"""Bodies that one process makes durable at the same time: a slow disk must leave threads to its readers."""
_MOST_UNSETTLED = 64
"""Bodies of one process that are whole and not durable yet; more, and fills wait for the disk."""


class Commits:
    """Who makes a body durable in this process, and how many wait to: the link goes on meanwhile."""

    def __init__(self) -> None:
        self.turn = asyncio.Semaphore(_AT_ONCE)
        self.unsettled = 0
        """Changed by fills alone, as they come and go."""

    @property
    def far_behind(self) -> bool:
        """Whether the disk is so slow that nothing more should be fetched for it."""
        return self.unsettled > _MOST_UNSETTLED
