"""The shared page: named 64-bit words for epochs, clocks and heartbeats; it counts and decides nothing."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from gup.fsutil import lock_range, unlock_range

FOLD = 0
"""Which half of the past counts, and which block is left out (see SharedFile.fold)."""
POLICY_EPOCH = 1
STORE_EPOCH = 2
CONFIG_OK = 3
"""1 when the last reload took, else 0."""
CONFIG_RELOADED_AT = 4
"""Unix seconds of the last successful reload, or of the start."""
WAN_NEXT_NS = 5
WAN_RATE = 6
STORE_BYTES = 7
STORE_LIMIT = 8
DISK_FREE = 9
UPSTREAM_HEALTH = 16
"""First of one word an upstream; gup.upstream.health tells what stands in it."""
MOST_UPSTREAMS = 16
WAN_CLOCK = UPSTREAM_HEALTH + MOST_UPSTREAMS
"""Two words: the WAN's time clock and its virtual one."""
FILL_HELD = WAN_CLOCK + 2
"""First of one word a class of places to fill: see gup.cache.backlog."""
MEMORY = 64
"""First of the words that tell of memory files: see gup.cache.memory_files."""
MEMORY_ROWS = 64
MEMORY_WORDS = 1 + 10 * MEMORY_ROWS
_NAMED = MEMORY + MEMORY_WORDS
"""Words before those that every block has one of."""


class Row(IntEnum):
    """What every block has one word of. The words of one row stand side by side."""

    BEAT = 0
    """Monotonic nanoseconds of the last heartbeat; 0 before the first."""
    DOWNLOAD_WAITING_SINCE = 1
    """Monotonic nanoseconds since when its first client waits for a download slot."""
    PROMISES = 2
    """Bytes that its process has promised to fills."""
    WAN_TURNS = 3
    """Who waits for bytes of the WAN: see gup.upstream.turns."""
    FILL_TURNS = 4
    """Who waits for a place to fill."""
    FILL_BACKLOG = 5
    """How many fills wait: see gup.cache.backlog."""


def page_words(blocks: int) -> int:
    """Words of a page for so many blocks: the named ones, and one a block of each row."""
    return _NAMED + len(Row) * blocks


class SharedPage:
    """Words that all processes of one service see. Reading one takes no lock: a word is written whole.

    Who writes: the policy and store epochs, the WAN clock and the table of memory files, whoever holds
    `locked` of that word; a heartbeat its block's process; CONFIG_* the supervisor; the other words the
    controller.
    """

    def __init__(self, words: "memoryview[int]", blocks: int, fd: int, offset_bytes: int) -> None:
        self.words = words
        self._blocks = blocks
        self._offset_bytes = offset_bytes
        # Children inherit the file's open file description, and an OFD lock belongs to that: two processes
        # sharing it would both hold it. So each opens the same file anew; the link works after a rename too.
        self._lock_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._threads = threading.Lock()

    def row(self, row: Row) -> "memoryview[int]":
        """The words of a row by block."""
        first = _NAMED + row * self._blocks
        return self.words[first : first + self._blocks]

    def _beat_at(self, block: int) -> int:
        return _NAMED + Row.BEAT * self._blocks + block

    @property
    def policy_epoch(self) -> int:
        """Changes when rules or settings changed."""
        return self.words[POLICY_EPOCH]

    @property
    def store_epoch(self) -> int:
        """Changes when a body was unlinked or replaced."""
        return self.words[STORE_EPOCH]

    def raise_policy(self) -> None:
        with self.locked(POLICY_EPOCH):
            self.words[POLICY_EPOCH] += 1

    def raise_store(self) -> None:
        with self.locked(STORE_EPOCH):
            self.words[STORE_EPOCH] += 1

    @contextmanager
    def locked(self, word: int) -> Iterator[None]:
        """Hold a word against all other threads and processes; never nested, held for a few steps only.

        The kernel frees it when its holder dies.
        """
        with self._threads:
            start = self._offset_bytes + 8 * word
            lock_range(self._lock_fd, start, 8, wait=True)
            try:
                yield
            finally:
                unlock_range(self._lock_fd, start, 8)

    def beat(self, block: int) -> None:
        """Say that the block's process is alive."""
        self.words[self._beat_at(block)] = time.monotonic_ns()

    def last_beat(self, block: int) -> int:
        """Monotonic nanoseconds of the block's last beat; 0 before the first."""
        return self.words[self._beat_at(block)]

    def forget_beat(self, block: int) -> None:
        """The block gets a new process, which has not beaten yet."""
        self.words[self._beat_at(block)] = 0

    def close(self) -> None:
        os.close(self._lock_fd)
        self.words.release()
