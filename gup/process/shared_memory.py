"""The shared file, mapped by all processes: counters that survive restarts, and the page of shared words.

Layout: prefix, description (JSON: names of series, sizes, leftovers), then from a page boundary on 64-bit
words: the shared page, two copies of the past counts, the past counts at this start, and one block for each
process. The past (block PAST) is what exited processes and earlier runs counted. Each other block is written
by one process only.
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
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import xxhash

from gup.errors import StoreError
from gup.fsutil import lock_range, replaced_file, unlock_range
from gup.metrics import BY_NAME, STREAM_WASTED, Counters, layout, series

_LOG = logging.getLogger(__name__)

# --- words of the page

FOLD = 0
"""Which copy of the past counts, and which block is excluded: see SharedFile.fold."""
POLICY_EPOCH = 1
STORE_EPOCH = 2
CONFIG_OK = 3
"""1 when the last reload succeeded, else 0."""
CONFIG_RELOADED_AT = 4
"""Unix seconds of the last successful reload, or of the start."""
STORE_BYTES = 7
UPSTREAM_HEALTH = 16
"""First of one word per upstream, in the format of gup.upstream.health."""
MOST_UPSTREAMS = 16
WAN_CLOCK = UPSTREAM_HEALTH + MOST_UPSTREAMS
"""Two words: the WAN's time clock and virtual clock, see gup.upstream.bandwidth."""
FILL_HELD = WAN_CLOCK + 2
"""First of one word per class of fill slots: see gup.cache.scheduler."""
MEMORY = 64
"""First of the words of the table of memory files: see gup.cache.memory_files."""
MEMORY_ROWS = 64
MEMORY_WORDS = 1 + 10 * MEMORY_ROWS
FAILURES = MEMORY + MEMORY_WORDS
"""First of the words of the table of failures: see gup.cache.negative_cache."""
FAILURES_WORDS = 32 * 1024
_NAMED = FAILURES + FAILURES_WORDS
"""Number of words before the rows."""


class Row(IntEnum):
    """Rows of the page: one word for each block, side by side."""

    BEAT = 0
    """Monotonic nanoseconds of the last heartbeat; 0 before the first."""
    DOWNLOAD_WAITING_SINCE = 1
    """Monotonic nanoseconds since when the first client waits for a download slot."""
    PROMISES = 2
    """Bytes of disk space that the process has reserved for fills."""
    WAN_TURNS = 3
    """Rank of the first waiter for WAN bytes: see gup.upstream.bandwidth."""
    FILL_TURNS = 4
    """Rank of the first waiter for a fill slot."""
    FILL_BACKLOG = 5
    """Number of waiting fills: see gup.cache.scheduler."""


def page_words(blocks: int) -> int:
    """Size of the page in words."""
    return _NAMED + len(Row) * blocks


# --- blocks

PAST = 0
SUPERVISOR = 1
CONTROLLER = 2
FIRST_WORKER = 3
"""Worker n has block FIRST_WORKER + n."""

_MAGIC = b"gupwords"
_FORMAT = 1
_PREFIX = struct.Struct("<8sQQQ")  # magic, format, bytes of the description, its xxh3-64
_ALIGN_BYTES = 4096
_FIRST_PAGE_WORDS = 320
"""Size of the page, plus one word a block, in files whose description has no page_words."""
_WORD_MASK = (1 << 64) - 1


class SharedFile:
    """One mapping of the file. The supervisor creates the file; children inherit its descriptor."""

    def __init__(self, fd: int) -> None:
        """Map the file and own `fd`. ValueError, with `fd` closed, when the file is damaged."""
        self._fd = fd
        self.page: SharedPage
        try:
            self._map = mmap.mmap(fd, 0)
            try:
                self._lay_out()
            except BaseException:
                self._map.close()
                raise
        except BaseException:
            os.close(fd)
            raise

    def _lay_out(self) -> None:
        self._description, start = _read_head(self._map)
        names, blocks = self._description.series, self._description.blocks
        self._positions = {name: position for position, name in enumerate(names)}
        page = self._description.page_words
        if len(self._map) != start + 8 * (page + len(names) * (blocks + 2)):
            raise ValueError("the file's length does not match its description")
        self._root = memoryview(self._map)[start:].cast("Q")
        self._views = [self._root[at : at + len(names)] for at in range(page, len(self._root), len(names))]
        self._copies, self._baseline, self._blocks = self._views[:2], self._views[2], self._views[3:]
        self.page = SharedPage(self._root[:page], blocks, self._fd, start)

    @classmethod
    def create(cls, path: Path, upstreams: Sequence[str], workers: int) -> "SharedFile":
        """Replace the file of the previous run by a new one that continues its counts.

        Call it only while no process of the previous run exists. A damaged file is moved aside. If the disk
        is full or read-only, this run counts in memory and the old file is kept for the next start.
        """
        old = _read_old(path)
        content = _first_content(old, upstreams, workers)
        try:
            # Zeros are written too: storing into a hole of a mapped file on a full disk kills the process.
            fd = replaced_file(path, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                raise StoreError(f"the counters can't be kept: {path}: {error.strerror}") from error
            _LOG.warning("counters of this run will be lost at its end: %s: %s", path, error.strerror)
            fd = os.memfd_create("gup-shared", os.MFD_CLOEXEC)
            os.write(fd, content)
        shared = cls(fd)
        shared.page.words[CONFIG_OK] = 1
        shared.page.words[CONFIG_RELOADED_AT] = int(shared.started_at)
        return shared

    @property
    def fd(self) -> int:
        return self._fd

    @property
    def installed_at(self) -> float:
        """Unix seconds since which the totals count."""
        return self._description.installed_at

    @property
    def started_at(self) -> float:
        """Unix seconds of this start of the service."""
        return self._description.started_at

    def counters(self, block: int) -> Counters:
        """The block of one process. Not for PAST, whose words move at each fold."""
        assert block != PAST
        return Counters(self._blocks[block - 1], self._positions)

    def sum_of(self, name: str, /, **labels: str) -> Callable[[], int]:
        """A function that sums one series over the running processes, cheap enough for each request.

        An exited process is included until the supervisor has folded its block.
        """
        position, blocks = self._positions[series(name, labels)], tuple(self._blocks)
        return lambda: sum([block[position] for block in blocks])

    def totals(self) -> dict[str, int]:
        """Every series since `installed_at`, including those of upstreams that are no longer configured.

        Gauges are summed over the running processes.
        """
        sums = dict(zip(self._description.series, self._stable_sums(), strict=True))
        return {**self._description.leftover, **sums}

    def since_start(self) -> dict[str, int]:
        """Every series since `started_at`."""
        rows = zip(self._description.series, self._stable_sums(), self._baseline.tolist(), strict=True)
        return {name: now - then & _WORD_MASK for name, now, then in rows}

    def fold(self, block: int) -> None:
        """Add an exited process's counters to the past and clear its block. For the supervisor only."""
        for _ in self._fold_steps(block):
            pass

    def _fold_steps(self, block: int) -> Iterator[None]:
        """The steps of a fold. A kill between two of them neither loses nor doubles a count.

        1. Write the new past into the inactive copy. 2. Make that copy active and exclude the block, by one
        store: this moves the counts. 3. Clear the block. 4. Exclude no block.
        Readers compare the FOLD word before and after (`_stable_sums`). x86 makes stores visible in order; on
        other processors a reader may see the counts of a fold a moment early or late.
        """
        assert block != PAST
        step, active, _ = self._fold_state()
        words = self._blocks[block - 1]
        past = zip(self._description.series, self._copies[active], words, strict=True)
        for position, (name, before, counted) in enumerate(past):
            added = counted if _kind(name) != "gauge" else 0
            self._copies[1 - active][position] = (before + added) & _WORD_MASK
        yield
        self._set_fold_state(step + 1, 1 - active, block)
        yield
        for position in range(len(words)):
            words[position] = 0
        yield
        self._set_fold_state(step + 2, 1 - active, PAST)
        yield

    def _fold_state(self) -> tuple[int, int, int]:
        """Number of steps so far, the active copy of the past, the excluded block (PAST: none)."""
        word = self.page.words[FOLD]
        return word >> 32, word >> 31 & 1, word & 0x7FFF_FFFF

    def _set_fold_state(self, step: int, active: int, block: int) -> None:
        self.page.words[FOLD] = (step & 0xFFFF_FFFF) << 32 | active << 31 | block

    def _stable_sums(self) -> list[int]:
        """Every series summed over the past and all processes; read again if a fold came in between."""
        while True:
            before = self.page.words[FOLD]
            _, active, excluded = self._fold_state()
            columns = [self._copies[active].tolist()]
            columns += [view.tolist() for block, view in enumerate(self._blocks, 1) if block != excluded]
            if self.page.words[FOLD] == before:
                return [sum(row) & _WORD_MASK for row in zip(*columns, strict=True)]

    def close(self) -> None:
        """Unmap and close the file. Counters handed out before must not be used any more."""
        self.page.close()
        for view in (*self._views, self._root):
            view.release()
        os.close(self._fd)
        with contextlib.suppress(BufferError):  # a caller still has a slice: unmapped together with it
            self._map.close()


class SharedPage:
    """Words that all processes of the service read and write. Single words need no lock: a store is atomic.

    Writers: the two epochs, the WAN clock and the table of memory files, whoever holds `locked`; a word of a
    row, the process of its block; CONFIG_*, the supervisor; all other words, the controller.
    """

    def __init__(self, words: "memoryview[int]", blocks: int, fd: int, offset_bytes: int) -> None:
        self.words = words
        self._blocks = blocks
        self._offset_bytes = offset_bytes
        self._beats = self.row(Row.BEAT)
        # An OFD lock belongs to the open file description, which children share with the supervisor: two
        # processes would hold it at once. So each opens the file anew; the link works after a rename too.
        self._lock_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._threads = threading.Lock()

    def row(self, row: Row) -> "memoryview[int]":
        """The words of a row, by block."""
        first = _NAMED + row * self._blocks
        return self.words[first : first + self._blocks]

    @property
    def policy_epoch(self) -> int:
        """Raised when settings or rules have changed."""
        return self.words[POLICY_EPOCH]

    @property
    def store_epoch(self) -> int:
        """Raised when a body was unlinked or replaced."""
        return self.words[STORE_EPOCH]

    def raise_policy(self) -> None:
        with self.locked(POLICY_EPOCH):
            self.words[POLICY_EPOCH] += 1

    def raise_store(self) -> None:
        with self.locked(STORE_EPOCH):
            self.words[STORE_EPOCH] += 1

    @contextmanager
    def locked(self, word: int) -> Iterator[None]:
        """Lock a word against all other threads and processes, for a few instructions; must not be nested.

        The kernel unlocks it when its holder dies.
        """
        start = self._offset_bytes + 8 * word
        with self._threads:
            lock_range(self._lock_fd, start, 8, wait=True)
            try:
                yield
            finally:
                unlock_range(self._lock_fd, start, 8)

    def beat(self, block: int) -> None:
        """Record a heartbeat of the block's process."""
        self._beats[block] = time.monotonic_ns()

    def last_beat(self, block: int) -> int:
        """Monotonic nanoseconds of the last heartbeat; 0 before the first."""
        return self._beats[block]

    def forget_beat(self, block: int) -> None:
        """The block gets a new process."""
        self._beats[block] = 0

    def close(self) -> None:
        os.close(self._lock_fd)
        self._beats.release()
        self.words.release()


# --- the file


@dataclass(frozen=True, slots=True)
class _Description:
    """The part of the file that does not change while it is in use."""

    series: tuple[str, ...]
    blocks: int  # including PAST
    page_words: int
    leftover: Mapping[str, int]
    installed_at: float
    started_at: float

    def encode(self) -> bytes:
        fields = {name: getattr(self, name) for name in self.__slots__}
        text = json.dumps(fields, separators=(",", ":")).encode()
        return _PREFIX.pack(_MAGIC, _FORMAT, len(text), xxhash.xxh3_64_intdigest(text)) + text

    @classmethod
    def decode(cls, text: bytes) -> "_Description":
        """ValueError, KeyError or TypeError when it is incomplete."""
        fields: dict[str, Any] = json.loads(text)
        return cls(
            tuple(fields["series"]),
            fields["blocks"],
            fields.get("page_words", _FIRST_PAGE_WORDS + fields["blocks"]),
            fields["leftover"],
            fields["installed_at"],
            fields["started_at"],
        )


@dataclass(frozen=True, slots=True)
class _Past:
    """Counts of earlier runs, by series, of metrics that this version knows; and since when they count."""

    counted: Mapping[str, int]
    installed_at: float


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
    return _Description.decode(description), _aligned(_PREFIX.size + length)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def _kind(name: str) -> str | None:
    """The kind of a series' metric; None when this version has no such metric."""
    metric = name.split("{", 1)[0]
    if metric == STREAM_WASTED.name:
        return STREAM_WASTED.kind
    for candidate in (metric, metric.removesuffix("_bucket"), metric.removesuffix("_sum")):
        if candidate in BY_NAME:
            return BY_NAME[candidate].kind
    return None


def _read_old(path: Path) -> _Past | None:
    """The previous run's counts; None when there is no file, or it was damaged and has been moved aside."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"the counters can't be read: {path}: {error.strerror}") from error
    try:
        old = SharedFile(fd)
    except (ValueError, KeyError, TypeError) as error:
        aside = path.with_name(path.name + ".damaged")
        path.rename(aside)
        _LOG.warning("the counters start at 0: their file was damaged (%s) and is now %s", error, aside)
        return None
    try:
        counted = {name: n for name, n in old.totals().items() if _kind(name) in ("counter", "histogram")}
        return _Past(counted, old.installed_at)
    finally:
        old.close()


def _first_content(old: _Past | None, upstreams: Sequence[str], workers: int) -> bytes:
    """The bytes of a new file: the old counts as past and baseline, all else 0."""
    now = time.time()
    counted = old.counted if old else {}
    names = tuple(layout(list(dict.fromkeys(upstreams))))
    known = frozenset(names)
    leftover = {name: count for name, count in counted.items() if count and name not in known}
    installed_at = old.installed_at if old else now
    blocks = FIRST_WORKER + workers
    description = _Description(names, blocks, page_words(blocks), leftover, installed_at, now)
    head = description.encode()
    past = struct.pack(f"={len(names)}Q", *(counted.get(name, 0) for name in names))
    return b"".join(
        (
            head.ljust(_aligned(len(head)), b"\0"),
            bytes(8 * description.page_words),
            past,
            bytes(len(past)),
            past,  # the baseline of since_start
            bytes(len(past) * (blocks - 1)),
        )
    )
