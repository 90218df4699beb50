"""The shared file: every process's counters and the page, kept over restarts; names and sums nothing itself.

Layout: prefix, description (JSON: names, sizes, leftovers), then from a page boundary on 64-bit words: the
page, two halves of the past, the past at this start, and a block for each process. Block PAST is what dead
processes and earlier lives counted; each other block has one writer, its process.
"""

import contextlib
import errno
import json
import logging
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from gup.errors import StoreError
from gup.fsutil import replaced_file
from gup.metrics import BY_NAME, STREAM_WASTED, Counters, layout, series
from gup.process.page import CONFIG_OK, CONFIG_RELOADED_AT, FOLD, SharedPage, page_words

_LOG = logging.getLogger(__name__)

PAST = 0
SUPERVISOR = 1
CONTROLLER = 2
FIRST_WORKER = 3

_MAGIC = b"gupwords"
_FORMAT = 1
_PREFIX = struct.Struct("<8sQQQ")  # magic, format, bytes of the description, its xxh3-64
_ALIGN_BYTES = 4096
_FIRST_PAGE_WORDS = 320
"""Of a page whose description does not tell: so many, and one a block."""
_WORD_MASK = (1 << 64) - 1


def worker_block(slot: int) -> int:
    """The block of worker number `slot`."""
    return FIRST_WORKER + slot


def _kind(name: str) -> str | None:
    """The kind of a series' metric, None when this version knows no such metric."""
    metric = name.split("{", 1)[0]
    if metric == STREAM_WASTED.name:
        return STREAM_WASTED.kind
    for candidate in (metric, metric.removesuffix("_bucket"), metric.removesuffix("_sum")):
        if candidate in BY_NAME:
            return BY_NAME[candidate].kind
    return None


@dataclass(frozen=True, slots=True)
class _Description:
    """The part of the file that never changes while it is in use."""

    series: tuple[str, ...]
    blocks: int  # PAST among them
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
        """ValueError when it is not a whole description."""
        fields: dict[str, Any] = json.loads(text)
        return cls(
            tuple(fields["series"]),
            fields["blocks"],
            fields.get("page_words", _FIRST_PAGE_WORDS + fields["blocks"]),
            fields["leftover"],
            fields["installed_at"],
            fields["started_at"],
        )


class SharedFile:
    """One mapping of the file. The supervisor creates it; children attach to the descriptor they inherit."""

    def __init__(self, fd: int) -> None:
        """Takes over `fd`. ValueError when the file is damaged; the descriptor is closed then."""
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
            raise ValueError("the file's length does not fit its description")
        self._root = memoryview(self._map)[start:].cast("Q")
        self._views = [self._root[at : at + len(names)] for at in range(page, len(self._root), len(names))]
        self._halves, self._baseline, self._blocks = self._views[:2], self._views[2], self._views[3:]
        self.page = SharedPage(self._root[:page], blocks, self._fd, start)

    @classmethod
    def create(cls, path: Path, upstreams: Sequence[str], workers: int) -> "SharedFile":
        """The file for a new life of the service, with all that was ever counted; replaces the old one.

        Call it only while no process of an earlier life runs. A damaged file is moved aside. If the disk
        takes no new file, counting goes on in memory, and the old file is kept for the next start.
        """
        old = _read_old(path)
        text = _first_content(old, upstreams, workers)
        try:
            # Zeros are written too: storing into a hole of a mapped file on a full disk kills the process.
            fd = replaced_file(path, text)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                raise StoreError(f"the counters can't be kept: {path}: {error.strerror}") from error
            _LOG.warning("counters of this run will be lost at its end: %s: %s", path, error.strerror)
            fd = os.memfd_create("gup-shared", os.MFD_CLOEXEC)
            os.write(fd, text)
        shared = cls(fd)
        shared.page.words[CONFIG_OK] = 1
        shared.page.words[CONFIG_RELOADED_AT] = int(shared.started_at)
        return shared

    @classmethod
    def attach(cls, fd: int) -> "SharedFile":
        """The file behind an inherited descriptor, which this takes over."""
        return cls(fd)

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
        """A process's own block. PAST is no process's: its words move at every fold."""
        assert block != PAST
        return Counters(self._blocks[block - 1], self._positions)

    def sum_of(self, name: str, /, **labels: str) -> Callable[[], int]:
        """A function that adds a series up over the processes that run: cheap enough for each decision.

        What a killed process counted is in it until the supervisor has folded its block.
        """
        position, blocks = self._positions[series(name, labels)], tuple(self._blocks)
        return lambda: sum([block[position] for block in blocks])

    def fold(self, block: int) -> None:
        """Move a dead process's counts into the past, its gauges to 0. Only the supervisor does this."""
        for _ in self._fold_steps(block):
            pass

    def _fold_steps(self, block: int) -> Iterator[None]:
        """The stores of a fold, a pause after each; being killed in any pause loses and doubles nothing.

        1. The new past goes into the half that does not count. 2. One word names that half, and the block as
        left out: this store moves the counts. 3. The block is emptied. 4. The word names no block.
        A reader takes the word before and after (`_stable_sums`). x86 shows stores in their order; where a
        processor does not, a reader may see a fold's counts an instant early or late.
        """
        assert block != PAST
        turn, active, _ = self._fold_state()
        words = self._blocks[block - 1]
        past = zip(self._description.series, self._halves[active], words, strict=True)
        for position, (name, before, counted) in enumerate(past):
            gone = counted if _kind(name) != "gauge" else 0
            self._halves[1 - active][position] = (before + gone) & _WORD_MASK
        yield
        self._set_fold_state(turn + 1, 1 - active, block)
        yield
        for position in range(len(words)):
            words[position] = 0
        yield
        self._set_fold_state(turn + 2, 1 - active, PAST)
        yield

    def _fold_state(self) -> tuple[int, int, int]:
        """Folds' steps so far, the half that counts, the block left out (PAST: none)."""
        word = self.page.words[FOLD]
        return word >> 32, word >> 31 & 1, word & 0x7FFF_FFFF

    def _set_fold_state(self, turn: int, active: int, block: int) -> None:
        self.page.words[FOLD] = (turn & 0xFFFF_FFFF) << 32 | active << 31 | block

    def _stable_sums(self) -> list[int]:
        """Every series summed over past and processes, from between two folds' stores."""
        while True:
            before = self.page.words[FOLD]
            _, active, left_out = self._fold_state()
            columns = [self._halves[active].tolist()]
            columns += [view.tolist() for block, view in enumerate(self._blocks, 1) if block != left_out]
            if self.page.words[FOLD] == before:
                return [sum(row) & _WORD_MASK for row in zip(*columns, strict=True)]

    def totals(self) -> dict[str, int]:
        """Every series since `installed_at`, those of upstreams no longer configured among them.

        Gauges are summed over the processes that run.
        """
        sums = dict(zip(self._description.series, self._stable_sums(), strict=True))
        return {**self._description.leftover, **sums}

    def since_start(self) -> dict[str, int]:
        """The same since `started_at`."""
        rows = zip(self._description.series, self._stable_sums(), self._baseline.tolist(), strict=True)
        return {name: now - then & _WORD_MASK for name, now, then in rows}

    def close(self) -> None:
        """Let go of mapping and descriptors; Counters handed out before can't be used any more."""
        self.page.close()
        for view in (*self._views, self._root):
            view.release()
        os.close(self._fd)
        with contextlib.suppress(BufferError):  # somebody has a slice of a view: goes with that
            self._map.close()


def _read_head(text: "mmap.mmap | bytes") -> tuple[_Description, int]:
    """A file's description, and where its words begin; ValueError when it is damaged."""
    if len(text) < _PREFIX.size:
        raise ValueError("the file is too short")
    magic, form, length, checksum = _PREFIX.unpack(text[: _PREFIX.size])
    if magic != _MAGIC or form != _FORMAT:
        raise ValueError("the file is of another format")
    description = text[_PREFIX.size : _PREFIX.size + length]
    if len(description) != length or xxhash.xxh3_64_intdigest(description) != checksum:
        raise ValueError("the description is damaged")
    return _Description.decode(description), _aligned(_PREFIX.size + length)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class _Ledger:
    """What an earlier life left: counters that a metric of this version still means, and since when."""

    counted: Mapping[str, int]
    installed_at: float


def _read_old(path: Path) -> _Ledger | None:
    """The old file's counters; None when there is none or it was damaged (and is now aside)."""
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
        _LOG.warning("counting starts anew, the counters were damaged (%s) and lie in %s", error, aside)
        return None
    try:
        totals = old.totals()
        return _Ledger(
            {name: n for name, n in totals.items() if _kind(name) in ("counter", "histogram")},
            old.installed_at,
        )
    finally:
        old.close()


def _first_content(old: _Ledger | None, upstreams: Sequence[str], workers: int) -> bytes:
    """A new file's bytes: the old counts by name as past and baseline, all else 0."""
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
