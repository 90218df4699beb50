"""Bodies that can't be stored, in anonymous memory files, and the table by which every process finds them.

The table is in shared memory: one word that changes with it (`epoch`), then one row a body. A row names the
process that owns the memory file and the file's descriptor there: others open `/proc/<pid>/fd/<n>`. The file
is named after key and generation, so a reused process number or descriptor is noticed. When the owner dies
the kernel frees the memory, and any process that sees such a row removes it.
"""

import asyncio
import ctypes
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gup.cache.body import GrowingBody
from gup.cache.records import MAX_STATE_BYTES, FillState
from gup.cache.store import OpenFile
from gup.content.key import ContentKey
from gup.errors import GupError, is_exhausted

STEP_BYTES = 4 << 20
"""Memory is reserved in steps of this size while a body's length is unknown."""
_LOOK_SECONDS = 0.25
"""Readers of a memory file check this often whether it is still listed."""
_SEALS = 0x000F
"""F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_WRITE: fcntl(2)."""
_ADD_SEALS = 1033
_NS = 1_000_000_000


class Row(ctypes.Structure):
    """A row of the table, or a copy of one. Times are monotonic nanoseconds."""

    key: "ctypes.Array[ctypes.c_ubyte]"
    pid: int
    """0: the row is free."""
    generation: int
    body_fd: int
    state_fd: int
    """0 until readers may have the body."""
    reserved_bytes: int
    finished: int
    used_at_ns: int
    expires_at_ns: int
    store_at_ns: int
    """When storing it may be retried."""
    _fields_ = (
        ("key", ctypes.c_ubyte * 16),
        ("pid", ctypes.c_uint64),
        ("generation", ctypes.c_uint64),
        ("body_fd", ctypes.c_uint32),
        ("state_fd", ctypes.c_uint32),
        ("reserved_bytes", ctypes.c_uint64),
        ("finished", ctypes.c_uint64),
        ("used_at_ns", ctypes.c_uint64),
        ("expires_at_ns", ctypes.c_uint64),
        ("store_at_ns", ctypes.c_uint64),
    )

    @property
    def id(self) -> str:
        return bytes(self.key).hex()

    @property
    def link(self) -> str:
        """The link target of the body's descriptor."""
        return f"/memfd:{_name(self.id, self.generation)} (deleted)"

    @property
    def usable(self) -> bool:
        if 0 < self.expires_at_ns <= time.monotonic_ns():
            return False
        link = _link(f"/proc/{self.pid}/fd/{self.body_fd}")
        return link == self.link or (link == "" and _lives(self.pid))

    def is_of(self, other: "Row") -> bool:
        return (self.pid, self.generation, self.body_fd) == (other.pid, other.generation, other.body_fd)


ROW_WORDS = ctypes.sizeof(Row) // 8


class MemoryFull(GupError):  # noqa: N818 - an outcome, not our error
    """`fill.memory` has no room for a body, or for more of it."""


@dataclass(slots=True)
class _Held:
    """A body that this process reads. `gone_at`: since when it has no row."""

    body: GrowingBody
    gone_at: float | None = None


class MemoryFile:
    """One body's memory file, of the leader that writes it. No other process removes its row before it is
    finished.
    """

    def __init__(self, files: "MemoryFiles", row: Row, file: OpenFile) -> None:
        self.file = file
        self.finished = False
        self._files = files
        self._row = row
        self._copy = Row.from_buffer_copy(row)
        self._state_file: OpenFile | None = None
        """Other processes open it by its number, so it stays open as long as this."""

    @property
    def is_listed(self) -> bool:
        return self._row.is_of(self._copy)

    def keep(self, received: int) -> None:
        """Reserve memory for this many bytes. MemoryFull when there is none."""
        assert self.is_listed
        if received > self._row.reserved_bytes:
            with self._files.changing():
                self._files.make_room(STEP_BYTES)
                self._row.reserved_bytes += STEP_BYTES

    def announce(self, state: FillState) -> None:
        """Readers in all processes may have it from now on; `state` has its head."""
        if self._state_file is None:
            self._state_file = _sealed(f"{_name(state.key.id, state.generation)}-state", state.encode())
            with self._files.changing():
                self._row.state_fd = self._state_file.fd

    def finish(self, size: int, *, expires_seconds: float | None, store_seconds: float) -> None:
        """The body is complete. It stays until memory is needed, or until it expires."""
        self.finished = True
        row, now = self._row, time.monotonic_ns()
        with self._files.changing():
            row.reserved_bytes = size
            row.expires_at_ns = 0 if expires_seconds is None else now + int(expires_seconds * _NS)
            row.store_at_ns = now + int(store_seconds * _NS)
            row.used_at_ns = now
            row.finished = 1

    def drop(self) -> None:
        if self in self._files.own:
            self._files.own.remove(self)
            if self.is_listed:
                with self._files.changing():
                    self._row.pid = 0


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
        self._table = [
            Row.from_buffer(words, 8 + at) for at in range(0, 8 * (len(words) - 1), ctypes.sizeof(Row))
        ]
        self._locked = locked
        self._limit_bytes = limit_bytes
        self._grace_seconds = grace_seconds
        self._seen: int | None = None
        self._rows: dict[str, Row] = {}
        self.own: set[MemoryFile] = set()
        self._held: dict[tuple[str, int], _Held] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def epoch(self) -> int:
        """Changes with every row that comes, goes or may be read differently."""
        return self._words[0]

    # --- reading

    def find(self, key: ContentKey) -> Row | None:
        """A copy of the key's row; None when there is none, or its owner is gone, or it has expired."""
        row = self._now().get(key.id)
        if row is not None and not row.usable:
            self._free(row)
            return None
        return row

    def open(self, row: Row) -> tuple[OpenFile, FillState]:
        """The body's file and state. OSError or ValueError when it has gone."""
        try:
            file = OpenFile(f"/proc/{row.pid}/fd/{row.body_fd}")
        except PermissionError as error:
            if row.usable:
                raise
            raise FileNotFoundError(f"{row.link} is gone") from error  # its owner has just died
        if _link(f"/proc/self/fd/{file.fd}") != row.link:
            raise FileNotFoundError(f"{row.link} is gone")
        state_file = OpenFile(f"/proc/{row.pid}/fd/{row.state_fd}")
        state = FillState.decode(os.pread(state_file.fd, MAX_STATE_BYTES, 0))
        if (state.key.id, state.generation) != (row.id, row.generation) or state.head is None:
            raise FileNotFoundError(f"{row.link} is gone")
        return file, state

    def finished(self, key: ContentKey) -> GrowingBody | None:
        """A complete body, for clients that come after the fill; None when there is none."""
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
        """Keep track of a body that is read here, until its row and its readers are gone."""
        self._held[key.id, body.generation] = _Held(body)
        self._look_later()

    def store_is_due(self, key: ContentKey, again_seconds: float) -> bool:
        """Whether to try to store a finished body now: True once in `again_seconds`, over all processes."""
        row, now = self.find(key), time.monotonic_ns()
        if row is None or not row.finished:
            return False
        with self._locked():
            live = self._live(row)
            if live is None or live.store_at_ns > now:
                return False
            live.store_at_ns = now + int(again_seconds * _NS)
        return True

    def drop(self, key: ContentKey) -> int:
        """Remove a finished body of any owner: it is stored, or was purged. Bytes freed."""
        row = self._now().get(key.id)
        return self._free(row) if row is not None and row.finished else 0

    # --- writing

    def begin(self, key: ContentKey, generation: int, amount: int) -> MemoryFile:
        """A memory file with `amount` of `fill.memory` reserved. The caller holds the key's claim.

        Finished bodies make room, the least recently used first. MemoryFull when that is not enough, and
        OSError when the system is short of memory or descriptors.
        """
        if amount > self._limit_bytes():
            raise MemoryFull(f"it needs {amount} bytes, more than fill.memory")
        try:
            file = _anonymous(_name(key.id, generation))
        except OSError as error:
            if is_exhausted(error):
                raise
            raise MemoryFull(f"the system refused a memory file: {error.strerror}") from error
        with self.changing():
            for row in self._taken():
                if row.id == key.id or not row.usable:
                    row.pid = 0
            row = self.make_room(amount, rows=1)
            row.key[:] = list(bytes.fromhex(key.id))
            row.generation, row.body_fd, row.state_fd, row.reserved_bytes = generation, file.fd, 0, amount
            row.finished = row.expires_at_ns = row.store_at_ns = 0
            row.used_at_ns = time.monotonic_ns()
            row.pid = os.getpid()
        own = MemoryFile(self, row, file)
        self.own.add(own)
        self._look_later()
        return own

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change of the table; an exception means no change."""
        with self._locked():
            yield
            self._words[0] += 1

    def make_room(self, amount: int, *, rows: int = 0) -> Row:
        """Remove finished bodies until `amount` and `rows` new rows fit; the first free row.

        MemoryFull changes nothing. The caller is `changing` the table.
        """
        taken = self._taken()
        finished = sorted((row for row in taken if row.finished), key=lambda row: row.used_at_ns)
        excess = sum(row.reserved_bytes for row in taken) + amount - self._limit_bytes()
        excess_rows = len(taken) + rows - len(self._table)
        gone = 0
        while excess > 0 or excess_rows > gone:
            if gone == len(finished):
                raise MemoryFull("fill.memory is in use by other fills")
            excess -= finished[gone].reserved_bytes
            gone += 1
        for row in finished[:gone]:
            row.pid = 0
        return next((row for row in self._table if not row.pid), self._table[0])

    def _taken(self) -> list[Row]:
        return [row for row in self._table if row.pid]

    def close(self) -> None:
        """The process ends: remove its rows."""
        for own in list(self.own):
            own.drop()
        self._held.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- supervision

    def _look_later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """Release bodies that lost their row; cut their readers after the grace period."""
        self._timer = None
        now = time.monotonic()
        for row in [row for row in self._now().values() if not row.usable]:
            self._free(row)
        rows = self._now()
        self.own = {own for own in self.own if own.is_listed}
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
        if (live := self._live(row)) is not None:
            live.used_at_ns = time.monotonic_ns()

    def _now(self) -> dict[str, Row]:
        if self._seen != self._words[0]:
            with self._locked():
                self._seen = self._words[0]
                self._rows = {row.id: Row.from_buffer_copy(row) for row in self._taken()}
        return self._rows

    def _live(self, row: Row) -> Row | None:
        """The row of which `row` is a copy, if it is unchanged."""
        return next((live for live in self._table if live.is_of(row)), None)

    def _free(self, row: Row) -> int:
        """Remove a row if it is unchanged; the bytes that were reserved."""
        with self.changing():
            if (live := self._live(row)) is None:
                return 0
            live.pid = 0
            return live.reserved_bytes


def _name(id_: str, generation: int) -> str:
    return f"gup-{id_}-{generation}"


def _link(path: str) -> str | None:
    """What a descriptor is a link to; "" when it can't be read from here, None when it is closed."""
    try:
        return str(Path(path).readlink())
    except PermissionError:
        return ""
    except OSError:
        return None


def _lives(pid: int) -> bool:
    """Whether the process has memory. One that has died has none, and its descriptors are root's: proc(5)."""
    try:
        return not Path(f"/proc/{pid}/statm").read_bytes().startswith(b"0 ")
    except OSError:
        return False


def _anonymous(name: str, flags: int = 0) -> OpenFile:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | flags)
    try:
        return OpenFile(f"/proc/self/fd/{fd}", os.O_RDWR)
    finally:
        os.close(fd)


def _sealed(name: str, content: bytes) -> OpenFile:
    """A memory file that no process can change any more."""
    file = _anonymous(name, os.MFD_ALLOW_SEALING)
    os.pwrite(file.fd, content, 0)
    fcntl.fcntl(file.fd, _ADD_SEALS, _SEALS)
    return file
