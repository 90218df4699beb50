"""What all processes map: the page of shared words, and the file of counters, which survive restarts.

The page is memory of this run. It stays the same when the processes are replaced by others, of this version
or of another one.

The file's layout: prefix, description (JSON: names of series, sizes, leftovers), then from a page boundary on
64-bit words: one that tells which copy of the past is valid, two copies of the past counts, the past counts
at this start, and one block for each process. The past (block PAST) is what earlier runs counted. Each other
block is written by one process at a time; its successor goes on counting where it ended. Processes that
replace others get a new file: its series may be others, and its blocks more.
"""

import contextlib
import errno
import json
import logging
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from itertools import product
from pathlib import Path
from typing import get_args

import xxhash
from pydantic import BaseModel

from gup.errors import StoreError
from gup.files import lock_range, replaced_file, unlock_range
from gup.metrics import (
    BY_NAME,
    KINDS,
    MAX_STREAMS,
    STREAM_WASTED,
    Counters,
    Direction,
    layout,
    series,
    stream_series,
)

_LOG = logging.getLogger(__name__)

# --- the page: where each field begins. Single words need no lock: a store is atomic. The two epochs, the WAN
# clock and the table of memory files are written by whoever holds `locked`, CONFIG_* by the supervisor, a
# word of a row by the process of its block, all else by the controller.

PAGE_FORMAT = 5
"""Of the page's layout and of what its words mean. Raise it with every change of these: `gup upgrade` refuses
to replace a service whose page has another one."""
POLICY_EPOCH = 1  # raised when settings or rules have changed
STORE_EPOCH = 2  # raised when a body was unlinked or replaced
CONFIG_OK = 3  # 1 when the last reload succeeded, else 0
CONFIG_RELOADED_AT = 4  # Unix seconds of the last successful reload, or of the start
STORE_BYTES = 7
CLUSTER_EPOCH = 8  # raised when the list of members has changed: see gup.cluster.member_list
WAN_SHARE = 9  # this node's part of the site's WAN rate, bytes/s
WAN_SHARE_UNTIL = 10  # monotonic nanoseconds at which it ends
WAN_MEMBERS = 13  # the most members of the last ten minutes; 0: not known yet
ENGINE_TIME = 11  # what to add to monotonic ms to have the cluster engine's time; 0: unknown
ENGINE_TIME_BEFORE = 12  # another one that is accepted: before the engine's clock last jumped, or after
PURGES = 14  # raised when run/purges has changed: see gup.cache.purges
ORDERED = 15  # 1 when the orders of the cluster have been caught up, or could not be
UPSTREAM_HEALTH = 16  # one word per upstream, in the format of gup.upstream.health
MOST_UPSTREAMS = 16
WAN_CLOCK = UPSTREAM_HEALTH + MOST_UPSTREAMS
"""CLOCK_WORDS of gup.upstream.bandwidth."""
FILL_HELD = WAN_CLOCK + 3  # one word per group of fill slots: see gup.cache.scheduler
BUDGET_STATE = 56  # what the WAN's budget is now: see gup.cache.budget_gate
BUDGET_BASE = 57  # add to `SharedFile.received` to have what of it is used, modulo 2**64
BUDGET_OPENS_AT = 58  # Unix seconds at which what is held back may be had; 0: not known
OUTBREAK_UNTIL = 59  # Unix seconds at which the outbreak ends; 0: there is none
MEMORY = 64  # the table of memory files: see gup.cache.memory_files
MEMORY_ROWS = 64
MEMORY_WORDS = 1 + 10 * MEMORY_ROWS
FAILURES = MEMORY + MEMORY_WORDS  # the table of failures: see gup.cache.negative_cache
FAILURES_WORDS = 32 * 1024
OCCUPIED = FAILURES + FAILURES_WORDS  # bytes: see gup.cache.locks.Occupied
OCCUPIED_WORDS = 128 * 1024
_ROWS_AT = OCCUPIED + OCCUPIED_WORDS


class Row(IntEnum):
    """Rows of the page: one word for each block, side by side."""

    BEAT = 0  # monotonic nanoseconds of the last heartbeat; 0 before the first
    DOWNLOAD_TURNS = 1  # the first waiter for a download slot: see gup.upstream.bandwidth.Turns
    PROMISES = 2  # bytes of disk space that the process has reserved for fills
    WAN_TURNS = 3  # the first waiter for WAN bytes
    URGENT_TURNS = 4  # the first waiter for a fill slot, of the urgent classes
    BULK_TURNS = 5  # and of the others
    FILL_BACKLOG = 6  # number of waiting fills: see gup.cache.scheduler
    WAN_URGENT = 7  # bytes of the WAN that the process has paid for: of deltas and index files
    WAN_OTHER = 8  # of fulls and unknown names
    WAN_BACKGROUND = 9  # of background fills


# --- blocks

PAST = 0
SUPERVISOR = 1
CONTROLLER = 2
FIRST_WORKER = 3  # worker n has block FIRST_WORKER + n

_MAGIC = b"gupwords"
_FORMAT = 1
_PREFIX = struct.Struct("<8sQQQ")  # magic, format, bytes of the description, its xxh3-64
_ALIGN_BYTES = 4096
_FIRST_PAGE_WORDS = 320  # plus one a block, in files whose description has no page_words
_PAGE_WORDS = 1  # the files of earlier versions held the page too
_PAST_COPY_BIT = 31  # of the file's first word: 0, but in files of earlier versions
_WORD_MASK = (1 << 64) - 1
_METRICS = {**BY_NAME, STREAM_WASTED.name: STREAM_WASTED}


class _Description(BaseModel, frozen=True):
    """What does not change while the file is in use. `blocks` includes PAST."""

    series: tuple[str, ...]
    blocks: int
    page_words: int = 0
    leftover: dict[str, int]
    installed_at: float
    started_at: float


class Page:
    """One mapping of the page. The supervisor makes it; children inherit its descriptor `fd`.

    Rows have a word for each of `blocks` processes, as many as there were when this process began.
    """

    def __init__(self, fd: int, blocks: int | None = None) -> None:
        """Map the page and own `fd`."""
        self.fd = fd
        self._map = mmap.mmap(fd, 0)
        self.words = memoryview(self._map).cast("Q")
        self.capacity = (len(self.words) - _ROWS_AT) // len(Row)
        """The most processes at a time, and one."""
        self._blocks = self.capacity if blocks is None else blocks
        # An OFD lock belongs to the open file description, which children share with the supervisor: two
        # processes would hold it at once. So each opens the page anew.
        self._lock_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._threads = threading.Lock()

    @classmethod
    def create(cls, capacity: int) -> "Page":
        fd = os.memfd_create("gup-page", os.MFD_CLOEXEC)
        os.ftruncate(fd, 8 * (_ROWS_AT + len(Row) * capacity))
        page = cls(fd)
        page.words[CONFIG_OK] = 1
        page.words[CONFIG_RELOADED_AT] = int(time.time())
        return page

    def close(self) -> None:
        self.words.release()
        os.close(self._lock_fd)
        os.close(self.fd)
        with contextlib.suppress(BufferError):  # a caller still has a slice: unmapped together with it
            self._map.close()

    def row(self, row: Row) -> "memoryview[int]":
        first = _ROWS_AT + row * self.capacity
        return self.words[first : first + self._blocks]

    def clear(self, block: int) -> None:
        """The block's process has exited: what it waited for or reserved ended with it."""
        for row in Row:
            self.row(row)[block] = 0

    def raise_epoch(self, word: int) -> None:
        with self.locked(word):
            self.words[word] += 1

    @contextmanager
    def locked(self, word: int) -> Iterator[None]:
        """Lock a word against all other threads and processes, for a few instructions; must not be nested.

        The kernel unlocks it when its holder dies.
        """
        with self._threads:
            lock_range(self._lock_fd, 8 * word, 8, wait=True)
            try:
                yield
            finally:
                unlock_range(self._lock_fd, 8 * word, 8)


class SharedFile:
    """One mapping of the file of counters. The supervisor makes it; children inherit its descriptor `fd`.

    Totals count since `installed_at`; the service started at `started_at` (both Unix seconds).
    """

    def __init__(self, fd: int) -> None:
        """Map the file and own `fd`. ValueError, with `fd` closed, when the file is damaged."""
        self.fd = fd
        with contextlib.ExitStack() as failed:
            failed.callback(os.close, fd)
            self._map = failed.enter_context(mmap.mmap(fd, 0))
            self._about, start = about, _ = _read_head(self._map)
            self.installed_at, self.started_at = about.installed_at, about.started_at
            page = about.page_words or _FIRST_PAGE_WORDS + about.blocks
            length = len(about.series)
            if len(self._map) != start + 8 * (page + length * (about.blocks + 2)):
                raise ValueError("the file's length does not match its description")
            failed.pop_all()
        self._positions = {name: position for position, name in enumerate(about.series)}
        self._root = memoryview(self._map)[start:].cast("Q")
        self._views = [self._root[at : at + length] for at in range(page, len(self._root), length)]
        self._copies, self._baseline, self._blocks = self._views[:2], self._views[2], self._views[3:]

    @classmethod
    def create(
        cls, path: Path, upstreams: Sequence[str], workers: int, idle_streams: Sequence[int] = ()
    ) -> "SharedFile":
        """Replace the file of the previous run by a new one that continues its counts.

        Call it only while no process of the previous run exists. A damaged file is moved aside. If the disk
        is full or read-only, this run counts in memory and the old file is kept for the next start.
        """
        now = time.time()
        known, installed_at = _read_old(path, now)
        counts = dict(known)
        for slot, kind, direction in product(idle_streams, KINDS, get_args(Direction)):
            shared = stream_series(direction, MAX_STREAMS, kind)
            counts[shared] = counts.get(shared, 0) + counts.pop(stream_series(direction, slot, kind), 0)
        blocks = FIRST_WORKER + workers
        return cls(_replaced(path, _content(upstreams, blocks, counts, counts, installed_at, now)))

    @classmethod
    def succeed(
        cls, path: Path, old: "SharedFile", upstreams: Sequence[str], blocks: int
    ) -> tuple["SharedFile", "Earlier"]:
        """Replace `old` by a new file for the processes that replace its own, which still count into it."""
        counts = old.counts()
        baseline = dict(zip(old._about.series, old._baseline, strict=True))  # noqa: SLF001 - of its own class
        new = _content(upstreams, blocks, counts, baseline, old.installed_at, old.started_at)
        return cls(_replaced(path, new)), Earlier(old, counts)

    def close(self) -> None:
        """Unmap and close the file. Counters handed out before must not be used any more."""
        for view in (*self._views, self._root):
            view.release()
        os.close(self.fd)
        with contextlib.suppress(BufferError):  # a caller still has a slice: unmapped together with it
            self._map.close()

    # --- counters

    def counters(self, block: int) -> Counters:
        """The block of one process; not for PAST."""
        assert block != PAST
        return Counters(self._blocks[block - 1], self._positions)

    def add(self, changes: Mapping[str, int]) -> None:
        """Add to the supervisor's block; series that this file does not have are left out."""
        words = self._blocks[SUPERVISOR - 1]
        for name, change in changes.items():
            if change and (at := self._positions.get(name)) is not None:
                words[at] = words[at] + change & _WORD_MASK

    def sum_of(self, name: str, /, **labels: str) -> Callable[[], int]:
        """A function that sums one series over the processes of this run, cheap enough for each request."""
        position, blocks = self._positions[series(name, labels)], tuple(self._blocks)
        return lambda: sum([block[position] for block in blocks])

    def received(self) -> Callable[[], int]:
        """A function that sums the bytes from upstreams since `installed_at`, cheap enough for each miss."""
        name = "gup_upstream_received_bytes_total"
        at = [position for series, position in self._positions.items() if series.partition("{")[0] == name]
        rest = sum(n for series, n in self._about.leftover.items() if series.partition("{")[0] == name)
        past = self._copies[self._root[0] >> _PAST_COPY_BIT & 1]
        rest += sum(past[position] for position in at)
        blocks = tuple(self._blocks)
        return lambda: rest + sum([block[position] for block in blocks for position in at])

    def totals(self) -> dict[str, int]:
        """Every series since `installed_at`, including those of upstreams that are no longer configured.

        Gauges are summed over the running processes.
        """
        return {**self._about.leftover, **dict(zip(self._about.series, self._sums(), strict=True))}

    def since_start(self) -> dict[str, int]:
        rows = zip(self._about.series, self._sums(), self._baseline.tolist(), strict=True)
        return {name: now - then & _WORD_MASK for name, now, then in rows}

    def counts(self) -> dict[str, int]:
        """The totals of what only grows, not the gauges."""
        return {name: n for name, n in self.totals().items() if _kind(name) in ("counter", "histogram")}

    def _sums(self) -> list[int]:
        past = self._copies[self._root[0] >> _PAST_COPY_BIT & 1]
        columns = [view.tolist() for view in (past, *self._blocks)]
        return [sum(row) & _WORD_MASK for row in zip(*columns, strict=True)]

    def clear_gauges(self, block: int) -> None:
        """The block's process has exited. Its counters stay: they are part of the totals, and only grow."""
        for position, name in enumerate(self._about.series):
            if _kind(name) == "gauge":
                self._blocks[block - 1][position] = 0


class Earlier:
    """A file of processes that are being replaced: what they still count belongs to the totals too.

    `moved` is what the present file has of it already.
    """

    def __init__(self, file: SharedFile, moved: Mapping[str, int]) -> None:
        self.file, self.moved = file, moved

    def move(self, to: SharedFile) -> None:
        """Add what has been counted since to the supervisor's block of the present file; gauges follow."""
        now = self.file.totals()
        to.add({name: count - self.moved.get(name, 0) for name, count in now.items()})
        self.moved = now


def _kind(name: str) -> str | None:
    metric = _METRICS.get(name.split("{", 1)[0].removesuffix("_bucket").removesuffix("_sum"))
    return metric.kind if metric is not None else None


# --- the file


def _read_head(text: "mmap.mmap | bytes") -> tuple[_Description, int]:
    """The description, and the offset of the words. ValueError when the file is damaged."""
    if len(text) < _PREFIX.size:
        raise ValueError("the file is too short")
    magic, form, length, checksum = _PREFIX.unpack(text[: _PREFIX.size])
    if magic != _MAGIC or form != _FORMAT:
        raise ValueError("the file has another format")
    description = text[_PREFIX.size : _PREFIX.size + length]
    if len(description) != length or xxhash.xxh3_64_intdigest(description) != checksum:
        raise ValueError("the description is damaged")
    end = _PREFIX.size + length
    return _Description.model_validate_json(description), end + -end % _ALIGN_BYTES


def _read_old(path: Path, now: float) -> tuple[Mapping[str, int], float]:
    """The counts of earlier runs, of metrics that this version knows, and since when they count.

    Nothing when there is no file, or it was damaged and has been moved aside.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}, now
    except OSError as error:
        raise StoreError(f"the counters can't be read: {path}: {error.strerror}") from error
    try:
        old = SharedFile(fd)
    except ValueError as error:
        aside = path.with_name(path.name + ".damaged")
        path.rename(aside)
        _LOG.warning("the counters start at 0: their file was damaged (%s) and is now %s", error, aside)
        return {}, now
    with contextlib.closing(old):
        return old.counts(), old.installed_at


def _replaced(path: Path, content: bytes) -> int:
    """A descriptor of the new file at `path`, or of one in memory that no later run will find."""
    try:
        # Zeros are written too: storing into a hole of a mapped file on a full disk kills the process.
        return replaced_file(path, content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise StoreError(f"the counters can't be kept: {path}: {error.strerror}") from error
        _LOG.warning("counters of this run will be lost at its end: %s: %s", path, error.strerror)
        fd = os.memfd_create("gup-shared", os.MFD_CLOEXEC)
        os.write(fd, content)
        return fd


def _content(
    upstreams: Sequence[str],
    blocks: int,
    past: Mapping[str, int],
    baseline: Mapping[str, int],
    installed_at: float,
    started_at: float,
) -> bytes:
    """The bytes of a new file with these counts; all else is 0."""
    names = dict.fromkeys(layout(list(dict.fromkeys(upstreams))))
    leftover = {name: count for name, count in past.items() if count and name not in names}
    about = {"series": [*names], "blocks": blocks, "page_words": _PAGE_WORDS, "leftover": leftover}
    text = json.dumps(about | {"installed_at": installed_at, "started_at": started_at}).encode()
    head = _PREFIX.pack(_MAGIC, _FORMAT, len(text), xxhash.xxh3_64_intdigest(text)) + text
    then, before = (
        struct.pack(f"={len(names)}Q", *(counts.get(name, 0) for name in names))
        for counts in (past, baseline)
    )
    words = bytes(8 * _PAGE_WORDS) + then + bytes(len(then)) + before + bytes(len(then) * (blocks - 1))
    return head + bytes(-len(head) % _ALIGN_BYTES) + words
