"""The record of demand: which bodies clients asked for, in order, kept on disk for a replay.

It is made from the events that the controller takes anyway. Uses of one body within some seconds are one row.
No client is named in it.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from gup.content.catalog import normal_moniker
from gup.content.key import FULL, ContentKey, Kind, delta_step
from gup.control.dependencies import ControlDependencies
from gup.control.entry_table import EntryTable, Row
from gup.control.events import Committed, Group, Refused, Take
from gup.control.stats.demand_files import (
    GROUPS,
    KEYS,
    ROWS,
    Line,
    Op,
    append,
    begun_at,
    files,
    mend,
    number_of,
)

_T = TypeVar("_T")
MOST_BYTES = 256 << 20
"""Limit of all files together; beyond it the oldest go."""
_FILE_BYTES = 16 << 20
_FILE_SECONDS = 86400.0
_MOST_KEYS = 200_000
"""Of one file."""
_MOST_ROWS = 20_000
"""Of one line."""
_MOST_LINES = 2000
"""That wait while the disk refuses; then the oldest are lost."""
_MOST_GROUPS = 5000
_GROUPS_SECONDS = 3600.0
_MOST_PENDING = 20_000
_PENDING_SECONDS = 3600.0
_FETCHED_SECONDS = 5.0
"""Requests that a fill has served are reported within some seconds of its end."""
_CUT = 64
"""A line has bodies of at most this part of the store: within it their order does not matter."""


def _kind(key: ContentKey) -> Kind:
    if delta_step(key.file):
        return Kind.DELTA
    return Kind.FULL if FULL.fullmatch(key.file) else Kind.OTHER


class _Fetched(NamedTuple):
    """When a body was stored, and whether a request for it is in a row."""

    at: float
    counted: bool


class DemandRecord:
    """Gathers the demand on the event loop, and writes it in a thread every some seconds."""

    def __init__(
        self,
        dependencies: ControlDependencies,
        entries: EntryTable,
        clock: Callable[[], float],
        on_written: Callable[[str, str | None], None],
    ) -> None:
        """`clock` is the time that ages are measured from; `on_written` is told the disk's error or None."""
        self.folder = dependencies.store.root / "reports" / "demand"
        self._settings, self._totals = dependencies.settings, dependencies.totals
        self._entries, self._clock, self._on_written = entries, clock, on_written
        self._numbers: dict[str, int] = {}
        self._lengths: list[int] = []
        self._keys: list[tuple[int, str, str, int, int]] = []
        """Keys that are new in this file, or whose length is."""
        self._rows: dict[tuple[int, Op], int] = {}
        self._rows_bytes = 0
        self._lines: deque[Line] = deque(maxlen=_MOST_LINES)
        self._groups: Counter[tuple[str, str, str]] = Counter()
        self._refused: Counter[tuple[str, str, str]] = Counter()
        self._groups_at = clock()
        self._asking: OrderedDict[str, float] = OrderedDict()
        """Requested and not stored: they are being fetched, since then."""
        self._fetched: OrderedDict[str, _Fetched] = OrderedDict()
        """Fetched just now; the requests, whose order counts, are still to be reported."""
        self._passed: OrderedDict[str, None] = OrderedDict()
        """Bodies that can't be stored: each request fetches them."""
        self._at = self._since = clock()
        self._looked = False
        """Whether files of an earlier time were removed."""
        self._moved = self._sums()
        """Bytes sent and received, as counted at the last write."""
        self._most = (0, 0, 0)
        self._file: Path | None = None
        self._file_at = 0.0
        self._file_bytes = 0
        self._writing = asyncio.Lock()
        self.bytes = 0
        """Size of all files at the last write."""
        self.version = 0
        """Changes with what is written."""

    @property
    def on(self) -> bool:
        return self._settings().reports.demand > 0

    # --- news, on the event loop

    def used(self, key: ContentKey, times: int, row: Row | None) -> None:
        """A stored body was requested."""
        if self.on:
            self._add(self._number(key, row), Op.USE, times)

    def asked(self, key: ContentKey, times: int) -> None:
        """A body that was not stored was requested: it is, or was, being fetched."""
        if not self.on:
            return
        now, text = self._clock(), key.text
        number = self._number(key, self._entries.get(text))
        fetched, asking = self._fetched.get(text), self._asking.get(text)
        if fetched is not None and abs(now - fetched.at) < _FETCHED_SECONDS:
            self._add(number, Op.MORE if fetched.counted else Op.USE, times)
            self._fetched[text] = _Fetched(fetched.at, True)
        elif asking is not None and abs(now - asking) < _PENDING_SECONDS and text not in self._passed:
            self._add(number, Op.MORE, times)
        else:
            _remember(self._asking, text, now)
            self._add(number, Op.USE, times)

    def committed(self, event: Committed, known: Row | None) -> None:
        """A body was stored; `known` is the row of the one before."""
        if not self.on:
            return
        text, was = event.key.text, self._numbers.get(event.key.text)
        before = self._lengths[was] if was is not None else known.length_bytes if known is not None else -1
        local = event.received == 0 and self._settings().cluster.url is not None
        number = self._number(event.key, None, event.length, event.kind, local=local)
        counted = self._asking.pop(text, None) is not None
        self._passed.pop(text, None)
        self._count_fetched(text)
        if event.replaced or before not in (-1, event.length):
            self._cut()
            self._lengths[number] = event.length
            self._add(number, Op.CHANGED, event.length)
            counted = True
        elif not event.path and not counted:
            self._add(number, Op.PREFETCH, 0)
            return
        elif event.kind is Kind.INDEX:
            self._add(number, Op.FILL, 1)  # only uses of stored ones are reported
            return
        _remember(self._fetched, text, _Fetched(self._clock(), counted))

    def _count_fetched(self, text: str) -> None:
        """It was fetched for a client who did not wait for it: nobody will report the request."""
        fetched = self._fetched.pop(text, None)
        if fetched is not None and not fetched.counted and text in self._numbers:
            self._add(self._numbers[text], Op.FILL, 0)

    def unstorable(self, key: ContentKey, length: int | None) -> None:
        """A body can't be stored: from now on each request fetches it."""
        if self.on:
            self._number(key, None, -1 if length is None else length)
            self._asking.pop(key.text, None)
            self._passed[key.text] = None
            if len(self._passed) > _MOST_PENDING:
                self._passed.popitem(last=False)

    def failed(self, key: ContentKey) -> None:
        if self.on:
            self._asking.pop(key.text, None)
            self._add(self._number(key, None), Op.FAILED, 1)

    def removed(self, key: str) -> None:
        """An operator purged it."""
        self._note(key, Op.PURGED)

    def pinned(self, key: str, *, pinned: bool) -> None:
        self._note(key, Op.PIN if pinned else Op.UNPIN)

    def placed(self, row: Row) -> None:
        """An entry came in without the WAN."""
        if self.on:
            self._add(self._number(ContentKey.parse(row.key), row), Op.PLACED, int(row.pinned))

    def taken(self, rows: Iterable[Take]) -> None:
        """What clients were sent, with what they state."""
        if self.on:
            self.grouped(Group(take.key.stream, take.version, take.language, 1) for take in rows)

    def grouped(self, rows: Iterable[Group]) -> None:
        for stream, version, language, times in rows if self.on else ():
            group = version, language, stream
            if group in self._groups or len(self._groups) < _MOST_GROUPS:
                self._groups[group] += times

    def refused(self, rows: Iterable[Refused]) -> None:
        """Requests that a rule refused."""
        for row in rows if self.on else ():
            group = row.version, row.language, normal_moniker(unquote(row.stream)) or row.stream
            if group in self._refused or len(self._refused) < _MOST_GROUPS:
                self._refused[group] += row.times

    def meter(self, downloads: int, queued: int) -> None:
        """To be called once a second."""
        most = self._most
        self._most = max(most[0], downloads), max(most[1], queued), most[2]

    def fulls(self, times: int) -> None:
        """One address began so many full packages within a second."""
        self._most = (*self._most[:2], max(self._most[2], times))

    def _note(self, key: str, op: Op) -> None:
        if self.on:
            self._count_fetched(key)
            self._add(self._number(ContentKey.parse(key), self._entries.get(key)), op, 1)

    def _number(
        self,
        key: ContentKey,
        row: Row | None,
        length: int = -1,
        kind: Kind | None = None,
        *,
        local: bool = False,
    ) -> int:
        text = key.text
        number = self._numbers.get(text)
        if row is not None:
            length, kind = row.length_bytes, row.kind
        if number is None:
            number = self._numbers[text] = len(self._lengths)
            self._lengths.append(length)
        elif length < 0 or self._lengths[number] >= 0:
            return number
        else:
            self._lengths[number] = length
        self._keys.append((number, text, str(kind or _kind(key)), length, int(local)))
        return number

    def _add(self, number: int, op: Op, count: int) -> None:
        at, rows = (number, op), self._rows
        if op > Op.MORE:
            rows.pop(at, None)
            rows[at] = count
            self._cut()  # what follows is not the same
            return
        if at in rows:
            count += rows.pop(at)
        else:
            self._rows_bytes += max(0, self._lengths[number])
        rows[at] = count  # in the order of the last uses
        if self._rows_bytes > self._settings().cache.max_size // _CUT or len(rows) >= _MOST_ROWS:
            self._cut()

    def _cut(self) -> None:
        """End the present line."""
        if not self._rows:
            return
        rows = [number for (key, op), count in self._rows.items() for number in (key, int(op), count)]
        self._rows, self._rows_bytes = {}, 0
        self._lines.append(Line(round(self._clock(), 1), 0.0, 0, 0, 0, 0, 0, rows))

    # --- writing

    async def write(self, *, everything: bool = False) -> None:
        """Write what is new; with `everything` also what clients stated in this hour."""
        async with self._writing:
            try:
                if self.on:
                    await self._write(everything=everything)
                elif self._file is not None or not self._looked:
                    await asyncio.to_thread(self._forget)
            except OSError as error:
                self._on_written("demand", error.strerror or str(error))
                return
        self._on_written("demand", None)

    async def _write(self, *, everything: bool) -> None:
        now = self._clock()
        if self._file is None and (found := await asyncio.to_thread(self._continue)) is not None:
            self._file, self._file_at, self._file_bytes = found
        old = abs(now - self._file_at) > _FILE_SECONDS or len(self._lengths) > _MOST_KEYS
        if self._file is None or old or self._file_bytes > _FILE_BYTES:
            await self._begin(now)
        assert self._file is not None
        self._end_line(now)
        if frames := list(self._frames(now, everything=everything)):
            try:
                self._file_bytes = await asyncio.to_thread(append, self._file, frames, self._file_bytes)
            except OSError:
                self._put_back(frames)
                raise
            self.version += 1

    def _end_line(self, now: float) -> None:
        """A last line, with what moved since the last write."""
        for text, fetched in list(self._fetched.items()):
            if abs(now - fetched.at) < _FETCHED_SECONDS:
                break  # in their order
            self._count_fetched(text)
        self._cut()
        sums = self._sums()
        sent, received = (max(0, new - old) for new, old in zip(sums, self._moved, strict=True))
        self._moved = sums
        most, self._most = self._most, (0, 0, 0)
        seconds = max(0.0, min(now - self._at, _FILE_SECONDS))
        self._at = now
        if self._lines or sent or received or any(most):
            self._lines.append(Line(round(now, 1), round(seconds, 1), sent, received, *most, []))

    def _sums(self) -> tuple[int, int]:
        sent = received = 0
        for name, count in self._totals().items():
            if name.startswith("gup_client_sent_bytes_total"):
                sent += count
            elif name.startswith("gup_upstream_received_bytes_total"):
                received += count
        return sent, received

    def _frames(self, now: float, *, everything: bool) -> Iterator[tuple[bytes, Any]]:
        if self._keys:
            yield KEYS, self._keys
            self._keys = []
        if self._lines:
            yield ROWS, list(self._lines)
            self._lines.clear()
        due = everything or abs(now - self._groups_at) > _GROUPS_SECONDS
        if due and (self._groups or self._refused):
            names = self._groups.keys() | self._refused.keys()
            rows = [(*name, self._groups[name], self._refused[name]) for name in names]
            yield GROUPS, [round(now, 1), rows]
            self._groups, self._refused, self._groups_at = Counter(), Counter(), now

    def _put_back(self, frames: Iterable[tuple[bytes, Any]]) -> None:
        """The disk refuses them for now."""
        for kind, value in frames:
            if kind == KEYS:
                self._keys[:0] = value
            elif kind == ROWS:
                self._lines.extendleft(reversed(value[-(_MOST_LINES - len(self._lines)) :]))

    def _start_numbers(self) -> None:
        self._numbers, self._lengths, self._keys = {}, [], []
        self._rows, self._rows_bytes = {}, 0
        self._lines.clear()

    async def _begin(self, now: float) -> None:
        """Begin a file, with what was stored before, and remove what is too old."""
        since = self._since
        if self._file is not None:
            self._end_line(now)
            frames = list(self._frames(now, everything=True))
            await asyncio.to_thread(append, self._file, frames, self._file_bytes)
            self._start_numbers()
            since = now
        path = await asyncio.to_thread(self._new_file, now)
        held = [row async for part in self._entries.every() for row in part if row.stored_at < since]
        held.sort(key=lambda row: row.used_at)
        rows: list[int] = []
        for row in held:
            rows += (self._number(ContentKey.parse(row.key), row), int(Op.PLACED), int(row.pinned))
        self._lines.appendleft(Line(round(since, 1), 0.0, 0, 0, 0, 0, 0, rows))
        self._file, self._file_at, self._file_bytes = path, now, 0

    def _forget(self) -> None:
        """Remove all files: nothing is to be recorded any more."""
        for path in files(self.folder):
            path.unlink()
        self._file, self._looked, self.bytes = None, True, 0
        self.version += 1

    def _new_file(self, now: float) -> Path:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = files(self.folder)
        number = number_of(known[-1]) + 1 if known else 1
        path = self.folder / f"{number:08d}-{now:.0f}.demand"
        path.touch(mode=0o600)
        self._prune(now)
        return path

    def _prune(self, now: float) -> None:
        known = files(self.folder)
        sizes = {path: path.stat().st_size for path in known}
        kept_seconds = self._settings().reports.demand
        for path, following in pairwise(known):  # the last one is being written
            too_old = now - begun_at(following) > kept_seconds
            if not too_old and sum(sizes.values()) <= MOST_BYTES - _FILE_BYTES:
                break
            path.unlink()
            del sizes[path]
        self.bytes = sum(sizes.values())

    def _continue(self) -> tuple[Path, float, int] | None:
        """After a start: the last file, when it was begun, and its size."""
        known, self._looked = files(self.folder), False
        if not known:
            return None
        path = known[-1]
        size_bytes = mend(path)
        self._prune(self._clock())
        return path, begun_at(path), size_bytes


def _remember(known: OrderedDict[str, _T], text: str, value: _T) -> None:
    known[text] = value
    known.move_to_end(text)
    if len(known) > _MOST_PENDING:
        known.popitem(last=False)
