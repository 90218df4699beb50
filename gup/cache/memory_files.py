"""Bodies that can't be stored, in anonymous memory files, and the table by which every process finds them.

The table stands in shared memory: one word that changes with it (`epoch`), then one row a body. A row names
the process that owns the memory file and the file's descriptor there: others open `/proc/<pid>/fd/<n>`. The
file is named after key and generation, so a process number or a descriptor that was given anew is noticed.
When the owner dies the kernel frees the memory, and whoever sees such a row removes it.
"""

import asyncio
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from gup.cache.growing_body import GrowingBody
from gup.cache.records import MAX_STATE_BYTES, FillState
from gup.cache.store import OpenFile
from gup.content.key import ContentKey
from gup.errors import GupError, is_exhausted

STEP_BYTES = 4 << 20
"""Memory is reserved in steps of this size while a body's length is unknown."""
ROW_WORDS = 10
_LOOK_SECONDS = 0.25
"""How late a process lets go of memory that another one needs."""
_SEALS = 0x000F
"""F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_WRITE: fcntl(2)."""
_ADD_SEALS = 1033
_NS = 1_000_000_000


class _Word(IntEnum):
    """The words of a row. Times are monotonic nanoseconds."""

    KEY_HIGH = 0
    KEY_LOW = 1
    PID = 2
    """0: the row is free."""
    GENERATION = 3
    DESCRIPTORS = 4
    """The body's in the upper half; the state's in the lower one, 0 until readers may have the body."""
    BYTES = 5
    """Reserved of `fill.memory`."""
    FINISHED = 6
    USED_AT = 7
    EXPIRES_AT = 8
    """0: never."""
    STORE_AT = 9
    """When somebody may try to store it again."""


class MemoryFull(GupError):  # noqa: N818 - an outcome, not our error
    """`fill.memory` has no room for a body, or for more of it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it was when the table last changed."""

    slot: int
    id: str
    pid: int
    generation: int
    body_fd: int
    state_fd: int
    finished: bool
    expires_at_ns: int

    @property
    def announced(self) -> bool:
        """Whether readers may have it."""
        return self.state_fd > 0

    @property
    def link(self) -> str:
        """What the body's descriptor is a link to."""
        return f"/memfd:{_name(self.id, self.generation)} (deleted)"

    @property
    def expired(self) -> bool:
        return 0 < self.expires_at_ns <= time.monotonic_ns()


@dataclass(slots=True)
class _Held:
    """A body that this process reads. `gone_at`: since when it has no row any more."""

    body: GrowingBody
    gone_at: float | None = None


class MemoryFile:
    """One body's memory file, of the leader that writes it. No other process removes its row before it is
    finished.
    """

    def __init__(self, files: "MemoryFiles", slot: int, file: OpenFile, generation: int) -> None:
        self.file = file
        self.slot = slot
        self.generation = generation
        self.finished = False
        self._files = files
        self._state_file: OpenFile | None = None
        """Open for as long as this is: others open it by its number."""

    @property
    def is_listed(self) -> bool:
        """Whether it has its row still."""
        words = self._files.row(self.slot)
        own = (os.getpid(), self.generation, self.file.fd)
        return own == (words[_Word.PID], words[_Word.GENERATION], words[_Word.DESCRIPTORS] >> 32)

    def keep(self, received: int) -> None:
        """Have memory for so many bytes. MemoryFull when there is none."""
        assert self.is_listed
        words = self._files.row(self.slot)
        if received > words[_Word.BYTES]:
            with self._files.changing():
                self._files.make_room(STEP_BYTES, for_new=False)
                words[_Word.BYTES] += STEP_BYTES

    def announce(self, state: FillState) -> None:
        """Readers in all processes may have it from now on; `state` tells them its head."""
        if self._state_file is None:
            self._state_file = _sealed(f"{_name(state.key.id, self.generation)}-state", state.encode())
            with self._files.changing():
                words = self._files.row(self.slot)
                words[_Word.DESCRIPTORS] = self.file.fd << 32 | self._state_file.fd

    def finish(self, size: int, *, expires_seconds: float | None, store_seconds: float) -> None:
        """All of it is there. It stays until memory is needed, or until it expires."""
        self.finished = True
        now = time.monotonic_ns()
        with self._files.changing():
            words = self._files.row(self.slot)
            words[_Word.BYTES] = size
            words[_Word.EXPIRES_AT] = 0 if expires_seconds is None else now + int(expires_seconds * _NS)
            words[_Word.STORE_AT] = now + int(store_seconds * _NS)
            words[_Word.USED_AT] = now
            words[_Word.FINISHED] = 1

    def drop(self) -> None:
        """It is of no use any more."""
        if self._files.own.pop(self.slot, None) is self and self.is_listed:
            with self._files.changing():
                self._files.row(self.slot)[_Word.PID] = 0


class MemoryFiles:
    """The memory files of all processes, as one of them sees them; used on its event loop alone.

    `words` are shared, and change while `locked` is held. `limit_bytes` is for all processes together; a body
    that has lost its row to another one may be read for `grace_seconds` more.
    """

    def __init__(
        self,
        words: "memoryview[int]",
        locked: Callable[[], AbstractContextManager[None]],
        limit_bytes: Callable[[], int],
        grace_seconds: Callable[[], float],
    ) -> None:
        self._words = words
        self._locked = locked
        self._limit_bytes = limit_bytes
        self._grace_seconds = grace_seconds
        self._slots = range((len(words) - 1) // ROW_WORDS)
        self._seen: int | None = None
        self._rows: dict[str, Row] = {}
        self.own: dict[int, MemoryFile] = {}
        self._held: dict[tuple[str, int], _Held] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def epoch(self) -> int:
        """Changes with every row that comes, goes or may be read differently."""
        return self._words[0]

    # --- what there is

    def find(self, key: ContentKey) -> Row | None:
        """The key's row; None when there is none, or its owner is gone, or it has expired."""
        row = self._now().get(key.id)
        if row is not None and (row.expired or not _is_there(row)):
            self._free(row)
            return None
        return row

    def open(self, row: Row) -> tuple[OpenFile, FillState]:
        """The body's file, and what is told of it. OSError or ValueError when it is gone meanwhile."""
        file = OpenFile(f"/proc/{row.pid}/fd/{row.body_fd}")
        if _link(f"/proc/self/fd/{file.fd}") != row.link:
            raise FileNotFoundError(f"{row.link} is gone")
        state_file = OpenFile(f"/proc/{row.pid}/fd/{row.state_fd}")
        state = FillState.decode(os.pread(state_file.fd, MAX_STATE_BYTES, 0))
        if (state.key.id, state.generation) != (row.id, row.generation) or state.head is None:
            raise FileNotFoundError(f"{row.link} is gone")
        return file, state

    def finished(self, key: ContentKey) -> GrowingBody | None:
        """A body that is there whole, for whoever comes late; None when there is none."""
        row = self.find(key)
        if row is None or not row.finished:
            return None
        self._use(row)
        held = self._held.get((row.id, row.generation))
        if held is not None:
            return held.body
        try:
            file, state = self.open(row)
        except (OSError, ValueError):
            return None
        assert state.head is not None
        body = GrowingBody(state.head, row.generation, None, time.monotonic())
        body.go_on_in(file)
        body.complete(os.fstat(file.fd).st_size)
        self.hold(key, body)
        return body

    def hold(self, key: ContentKey, body: GrowingBody) -> None:
        """Look after a body that is read here, until its row and its readers are gone."""
        self._held[key.id, body.generation] = _Held(body)
        self._look_later()

    def store_is_due(self, key: ContentKey, again_seconds: float) -> bool:
        """Whether to try to store a finished body now: True once in `again_seconds`, over all processes."""
        row, now = self.find(key), time.monotonic_ns()
        if row is None or not row.finished:
            return False
        with self._locked():
            words = self.row(row.slot)
            due = _is(words, row) and words[_Word.STORE_AT] <= now
            if due:
                words[_Word.STORE_AT] = now + int(again_seconds * _NS)
        return due

    def drop(self, key: ContentKey) -> int:
        """Remove a finished body, whoever owns it: it is stored by now, or was purged. Bytes freed."""
        row = self._now().get(key.id)
        return self._free(row) if row is not None and row.finished else 0

    # --- the leader's

    def begin(self, key: ContentKey, generation: int, amount: int) -> MemoryFile:
        """A memory file with so much of `fill.memory` reserved. The caller holds the key's claim.

        Finished bodies make room, the least recently used first. MemoryFull when that is not enough, and
        OSError when the system is short of memory or descriptors.
        """
        if amount > self._limit_bytes():
            raise MemoryFull(f"{amount} bytes are more than fill.memory")
        try:
            file = _anonymous(_name(key.id, generation))
        except OSError as error:
            if is_exhausted(error):
                raise
            raise MemoryFull(f"the system gives no memory file: {error.strerror}") from error
        with self.changing():
            for slot in self._slots:
                row = _row(slot, self.row(slot))
                if row is not None and (row.id == key.id or row.expired or not _is_there(row)):
                    self.row(slot)[_Word.PID] = 0
            slot = self.make_room(amount)
            words = self.row(slot)
            words[_Word.KEY_HIGH], words[_Word.KEY_LOW] = int(key.id[:16], 16), int(key.id[16:], 16)
            words[_Word.GENERATION] = generation
            words[_Word.DESCRIPTORS] = file.fd << 32
            words[_Word.BYTES] = amount
            words[_Word.FINISHED] = words[_Word.EXPIRES_AT] = words[_Word.STORE_AT] = 0
            words[_Word.USED_AT] = time.monotonic_ns()
            words[_Word.PID] = os.getpid()
        own = self.own[slot] = MemoryFile(self, slot, file, generation)
        self._look_later()
        return own

    def row(self, slot: int) -> "memoryview[int]":
        first = 1 + slot * ROW_WORDS
        return self._words[first : first + ROW_WORDS]

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change of the table; an exception counts as none."""
        with self._locked():
            yield
            self._words[0] += 1

    def make_room(self, amount: int, *, for_new: bool = True) -> int:
        """Remove finished rows until `amount` fits; a free row's number. MemoryFull changes nothing.

        The caller is `changing` the table. With `for_new` a free row is needed, too.
        """
        used = {slot: self.row(slot)[_Word.BYTES] for slot in self._slots if self.row(slot)[_Word.PID]}
        idle = [slot for slot in used if self.row(slot)[_Word.FINISHED]]
        idle.sort(key=lambda slot: self.row(slot)[_Word.USED_AT], reverse=True)
        gone: list[int] = []
        while sum(used.values()) + amount > self._limit_bytes() or (
            for_new and len(used) == len(self._slots)
        ):
            if not idle:
                raise MemoryFull("fill.memory is used up by bodies that are arriving")
            gone.append(idle.pop())
            del used[gone[-1]]
        for slot in gone:
            self.row(slot)[_Word.PID] = 0
        return next((slot for slot in self._slots if not self.row(slot)[_Word.PID]), -1)

    def close(self) -> None:
        """The process ends: its memory is nobody's any more."""
        for own in list(self.own.values()):
            own.drop()
        self._held.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- looking after them

    def _look_later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """Let go of what lost its row; cut who still reads that after the time of grace."""
        self._timer = None
        now = time.monotonic()
        for row in [row for row in self._now().values() if row.expired]:
            self._free(row)
        rows = self._now()
        self.own = {slot: own for slot, own in self.own.items() if own.is_listed}
        for (id_, generation), held in list(self._held.items()):
            present = rows.get(id_)
            if present is not None and present.generation == generation:
                if held.body.readers:
                    self._use(present)
                continue
            held.gone_at = held.gone_at if held.gone_at is not None else now
            if not held.body.readers or now - held.gone_at > self._grace_seconds():
                held.body.revoke()
                del self._held[id_, generation]
        if self.own or self._held:
            self._look_later()

    def _use(self, row: Row) -> None:
        words = self.row(row.slot)
        if _is(words, row):
            words[_Word.USED_AT] = time.monotonic_ns()

    def _now(self) -> dict[str, Row]:
        """The rows by key; read anew when the table has changed."""
        if self._seen != self._words[0]:
            with self._locked():
                self._seen = self._words[0]
                rows = [_row(slot, self.row(slot)) for slot in self._slots]
            self._rows = {row.id: row for row in rows if row is not None}
        return self._rows

    def _free(self, row: Row) -> int:
        """Remove a row if it is still the same; the bytes that were reserved."""
        with self.changing():
            words = self.row(row.slot)
            if not _is(words, row):
                return 0
            words[_Word.PID] = 0
            return words[_Word.BYTES]


def _row(slot: int, words: "memoryview[int]") -> Row | None:
    if not words[_Word.PID]:
        return None
    descriptors = words[_Word.DESCRIPTORS]
    return Row(
        slot,
        f"{words[_Word.KEY_HIGH]:016x}{words[_Word.KEY_LOW]:016x}",
        words[_Word.PID],
        words[_Word.GENERATION],
        descriptors >> 32,
        descriptors & 0xFFFF_FFFF,
        bool(words[_Word.FINISHED]),
        words[_Word.EXPIRES_AT],
    )


def _is(words: "memoryview[int]", row: Row) -> bool:
    """Whether a row still tells of the same memory file."""
    found = (words[_Word.PID], words[_Word.GENERATION], words[_Word.DESCRIPTORS] >> 32)
    return found == (row.pid, row.generation, row.body_fd)


def _name(id_: str, generation: int) -> str:
    return f"gup-{id_}-{generation}"


def _link(path: str) -> str | None:
    """What a descriptor is a link to; "" when that is not to be seen from here, None when it is closed."""
    try:
        return str(Path(path).readlink())
    except PermissionError:
        return ""
    except OSError:
        return None


def _is_there(row: Row) -> bool:
    """Whether the row's process lives and has the file open."""
    return _link(f"/proc/{row.pid}/fd/{row.body_fd}") in (row.link, "")


def _anonymous(name: str, flags: int = 0) -> OpenFile:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | flags)
    try:
        return OpenFile(f"/proc/self/fd/{fd}", os.O_RDWR)
    finally:
        os.close(fd)


def _sealed(name: str, content: bytes) -> OpenFile:
    """A memory file that nobody can change any more."""
    file = _anonymous(name, os.MFD_ALLOW_SEALING)
    os.pwrite(file.fd, content, 0)
    fcntl.fcntl(file.fd, _ADD_SEALS, _SEALS)
    return file
