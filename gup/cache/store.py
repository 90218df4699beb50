"""The cache directory: bodies, records, parts and state files. Never fetches, never decides what to evict.

Every method blocks on the disk: the event loop calls them in a thread. A published byte is never overwritten
or truncated: bodies are published by rename and removed by unlink.
"""

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gup.cache.locks import Claims, Occupied, claim_offset
from gup.cache.records import (
    CHUNK_BYTES,
    MAX_RECORD_BYTES,
    MAX_STATE_BYTES,
    FillState,
    Record,
    chunk_sum,
)
from gup.content.key import ContentKey
from gup.errors import GupError, StoreError
from gup.files import read_regular, sync_folder, write_all
from gup.jsonmodel import MAX_INTEGER, InvalidError

_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})
"""Errors of this process, not of the file."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One body found by a scan. `record` is None when it is missing, damaged or of another body.

    `mark` changes when one of its two files is replaced or changed, not when the time of last use is noted.
    """

    key: ContentKey
    record: Record | None
    size_bytes: int
    used_at: float
    mark: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """A body and its record, or one of them, as a walk sees them without reading; see `Stored`."""

    key: str
    body_bytes: int | None
    used_at: float
    mark: int


@dataclass(frozen=True, slots=True)
class Part:
    """The files of one key in `partial/`. `state` is None when missing or damaged."""

    id: str
    generation: int
    size_bytes: int
    modified_at: float
    claimed: bool
    state: FillState | None


class OpenFile:
    """A descriptor that stays open while this is referenced: no reader ever sees its number reused."""

    __slots__ = ("fd",)

    def __init__(self, path: str | Path, flags: int = os.O_RDONLY) -> None:
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o644)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # the open itself may have failed
            os.close(self.fd)


class Store:
    """The files below one cache directory. Whoever changes an entry holds its key's claim.

    That is asserted with `claims`, those of this process; without `claims` no other process uses the
    directory.
    """

    def __init__(self, root: Path, claims: Claims | None = None) -> None:
        self.root = root
        self.claims = claims
        self.occupied = Occupied(memoryview(bytearray(2)))
        self.service_start = 0.0
        self.content = root / "content"
        self.partial = root / "partial"
        self.index = root / "index"
        self.run = root / "run"
        self.demotions = Demotions(self.run / "demotions")

    def prepare(self) -> None:
        """Create the folders; StoreError says which one can't be used and why.

        All but the bodies is for gup's own user alone: whoever may read a lock file can lock it, and so hold
        up gup.
        """
        for folder in (self.content, self.partial, self.index, self.run):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if folder != self.content and folder.stat().st_mode & 0o077:
                    with contextlib.suppress(PermissionError):  # another's, or of a file system without modes
                        folder.chmod(0o700)
            except OSError as error:
                raise StoreError(f"the cache directory can't be used: {folder}: {error.strerror}") from error

    @contextlib.contextmanager
    def claimed(self, id_: str) -> Iterator[bool]:
        """Hold the claim of the key of this id for the block; False when another process has it."""
        offset = claim_offset(id_)
        if self.claims is None:
            yield True
        elif self.claims.try_claim(offset):
            try:
                yield True
            finally:
                self.claims.release(offset)
        else:
            yield False

    def _require_claim(self, key: ContentKey) -> None:
        assert self.claims is None or self.claims.held(key.claim_offset), f"{key.text} is not claimed"
        self.occupied.note(key.claim_offset)

    # --- committed bodies

    def body_path(self, key: ContentKey) -> Path:
        return self.content / key.path

    def record_path(self, key: ContentKey) -> Path:
        return self.content / key.path.with_name(f".{key.file}.gup")

    def load(self, key: ContentKey) -> Record | None:
        """None when there is none. InvalidError when it is damaged or can't be read."""
        text = _read(self.record_path(key), MAX_RECORD_BYTES)
        if text is None:
            return None
        record = Record.decode(text)
        if record.key != key:
            raise InvalidError(f"the record is that of {record.key.text}")
        return record

    def load_or_none(self, key: ContentKey) -> Record | None:
        try:
            return self.load(key)
        except ValueError:
            return None

    def open_body(self, record: Record) -> OpenFile | None:
        """None when the file is missing or is not the body that was recorded."""
        file = self.open_whatever(record.key)
        return file if file is not None and record.fits(os.fstat(file.fd)) else None

    def open_whatever(self, key: ContentKey) -> OpenFile | None:
        """The file in the body's place, whatever its content; None when there is no readable file.

        Links are not followed, and a pipe is not waited for: gup makes neither.
        """
        try:
            file = OpenFile(self.body_path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in _SHORTAGES:
                raise
            return None
        return file if stat.S_ISREG(os.fstat(file.fd).st_mode) else None

    def save(self, record: Record, *, durable: bool = False) -> None:
        """Put the record in place, atomically; `durable`: it survives a power cut.

        A replacement is synced first: after a power cut a file system may have the new name without the new
        bytes.
        """
        self._require_claim(record.key)
        path = self.record_path(record.key)
        self._put(path, record.encode(), sync=durable or path.exists())
        if durable:
            sync_folder(path.parent)

    def set_pinned(self, key: ContentKey, pinned: bool) -> bool:
        """False when there is no such entry."""
        self._require_claim(key)
        record = self.load_or_none(key)
        if record is None:
            return False
        if record.pinned != pinned:
            used_at = self.record_path(key).stat().st_mtime
            self.save(replace(record, pinned=pinned), durable=True)
            self.touch(key, used_at)
        return True

    def touch(self, key: ContentKey, used_at: float) -> None:
        """Store the last use (Unix seconds) as the record file's times, where it survives the loss of the
        index.
        """
        with contextlib.suppress(OSError):
            os.utime(self.record_path(key), (used_at, used_at))

    def set_time(self, path: str | Path, record: Record) -> None:
        os.utime(path, ns=(time.time_ns(), record.generation))

    def remove(self, key: ContentKey) -> int:
        """Unlink the record, then the body; bytes freed, 0 when it was gone. Open readers continue."""
        self._require_claim(key)
        path = self.body_path(key)
        unlink(self.record_path(key))
        try:
            size = path.lstat().st_size
        except (FileNotFoundError, NotADirectoryError):
            size = 0
        unlink(path)
        with contextlib.suppress(OSError):  # not empty, or gone
            for folder in path.relative_to(self.content).parents[:-1]:
                (self.content / folder).rmdir()
        return size

    def purge(self, key: ContentKey) -> int:
        """Remove the body and all that a fill left of the key. Bytes freed."""
        self._require_claim(key)
        freed = self.drop_parts(key.id) + self.remove(key)
        self.drop_state(key.id)
        for folder in self.body_path(key).parents:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # the lowest that is left
                sync_folder(folder)
                break
        return freed

    def scan(self) -> Iterator[Stored]:
        """Every body under `content/`, with its record; and every record without one, as of 0 bytes."""
        for seen in self.walk():
            if (stored := self.stored(ContentKey.parse(seen.key))) is not None:
                yield stored

    def walk(self) -> Iterator[Seen]:
        """What `scan` would read."""
        for folder, _, names in os.walk(self.content):
            parts = Path(folder).relative_to(self.content).parts
            files = {name[1:-4] if name.startswith(".") and name.endswith(".gup") else name for name in names}
            for file in sorted(files) if len(parts) == 4 else ():
                with contextlib.suppress(ValueError):  # no file of gup's
                    key = ContentKey.parse("/".join((*parts, file)))
                    body, record = (_stat(f"{folder}/{name}") for name in (file, f".{file}.gup"))
                    size_bytes, mark = body.st_size if body is not None else None, _mark(body, record)
                    yield Seen(key.text, size_bytes, record.st_mtime if record is not None else 0.0, mark)

    def stored(self, key: ContentKey) -> Stored | None:
        """The body as a scan finds it; None when there is none."""
        self.occupied.note(key.claim_offset)  # somebody may have put it there by hand
        with contextlib.suppress(OSError):
            try:
                found = self.body_path(key).stat()
            except FileNotFoundError:
                return Stored(key, None, 0, self.record_path(key).stat().st_mtime)
            about = _stat(self.record_path(key))  # before it is read: it may be replaced
            record = self.load_or_none(key)
            if about is None or record is None or not record.fits(found):
                return Stored(key, None, found.st_size, found.st_mtime)
            return Stored(key, record, found.st_size, about.st_mtime, _mark(found, about))
        return None

    def note_occupied(self) -> None:
        """Go through all names once, so that `occupied` is complete. Blocks; OSError when a folder can't be
        read: it stays incomplete.
        """

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):  # that one was removed meanwhile
                raise error

        for folder, _, names in os.walk(self.content, onerror=fail):
            parts = folder[len(str(self.content)) + 1 :]
            for name in names if parts.count("/") == 3 else ():
                file = name[1:-4] if name.startswith(".") and name.endswith(".gup") else name
                with contextlib.suppress(ValueError):  # no file of gup's
                    self.occupied.note(ContentKey.parse(f"{parts}/{file}").claim_offset)
        for name in os.listdir(self.partial):  # noqa: PTH208 - names are all that is needed
            with contextlib.suppress(ValueError):
                self.occupied.note(claim_offset(name.partition(".")[0]))
        self.occupied.complete()

    def prune(self) -> None:
        """Remove empty folders: a crash may come between a body and its folder."""
        for folder, _, names in os.walk(self.content, topdown=False):
            if folder != str(self.content) and not names:
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()

    # --- parts and states

    def part_path(self, id_: str, generation: int) -> Path:
        return Path(self.part_name(id_, generation))

    def part_name(self, id_: str, generation: int) -> str:
        """The path as text: parsing paths is a good part of what a small commit costs."""
        return f"{self.partial}/{id_}.{generation}.part"

    def sums_path(self, id_: str, generation: int) -> Path:
        """Sums of the part's whole chunks, 8 bytes each: a takeover verifies the part with them."""
        return self.partial / f"{id_}.{generation}.sums"

    def state_path(self, id_: str) -> Path:
        return self.partial / f"{id_}.state"

    def load_state(self, id_: str) -> FillState | None:
        """None when missing. InvalidError when it is damaged or can't be read."""
        text = _read(self.state_path(id_), MAX_STATE_BYTES)
        if text is None:
            return None
        state = FillState.decode(text)
        if state.key.id != id_:
            raise InvalidError(f"the state is that of {state.key.text}")
        return state

    def save_state(self, state: FillState) -> None:
        self.occupied.note(state.key.claim_offset)
        self._put(self.state_path(state.key.id), state.encode(), sync=False)

    def drop_state(self, id_: str) -> None:
        unlink(self.state_path(id_))

    def drop_part(self, id_: str, generation: int) -> int:
        """Bytes freed. The caller holds the claim."""
        part = self.part_path(id_, generation)
        freed = part.stat().st_size if part.is_file() else 0
        unlink(part)
        unlink(self.sums_path(id_, generation))
        return freed

    def drop_parts(self, id_: str) -> int:
        """Bytes freed."""
        return sum(self.drop_part(id_, generation) for generation in self.generations(id_))

    def drop_journal(self, id_: str, generation: int) -> None:
        unlink(self.sums_path(id_, generation))
        self.drop_state(id_)

    def generations(self, id_: str) -> list[int]:
        names = (name.split(".") for name in os.listdir(self.partial) if name.startswith(id_))  # noqa: PTH208 - at every miss
        return sorted(int(name[1]) for name in names if name[-1] == "part" and name[1].isdecimal())

    def commit(self, record: Record, *, new: bool = False) -> bool:
        """Publish the part of the record's generation as its key's body; whether it replaced another.

        `new`: the key is known to have neither record nor body.

        1. The part gets its generation as its time. If it replaces another body it is synced. 2. The record
        is written; from now on it vouches for the body. 3. The body is renamed. A reader that comes between
        finds no body of that generation and joins the fill; after a crash between, `finish_commit` does step
        3. A new entry is not synced: if a power cut tears it, its sums differ, and it is fetched again.
        """
        self._require_claim(record.key)
        key = record.key
        part, body = self.part_name(key.id, record.generation), f"{self.content}/{key.text}"
        replaced = not new and os.path.exists(body)  # noqa: PTH110 - see `part_name`
        self.set_time(part, record)
        if replaced:
            file = OpenFile(part)
            os.fdatasync(file.fd)
        if new:
            self._put(f"{body.removesuffix(key.file)}.{key.file}.gup", record.encode(), sync=False)
        else:
            self.save(record)
        self._rename_into(part, body)
        return replaced

    def finish_commit(self, record: Record) -> bool:
        """Rename the part of the record's generation to its body's path, if it exists and is sound."""
        self._require_claim(record.key)
        part = self.part_path(record.key.id, record.generation)
        try:
            file = OpenFile(part)
        except FileNotFoundError:
            return False
        if os.fstat(file.fd).st_size != record.length or sound_chunks(file.fd, record) < len(record.sums):
            return False
        self.set_time(part, record)
        self._rename_into(str(part), self.body_path(record.key))
        self.drop_journal(record.key.id, record.generation)
        return True

    def demote(self, record: Record, body: OpenFile | None, sound_bytes: int, state: FillState) -> None:
        """Make a damaged entry a part of `state`'s generation, with its first chunks, which are sound.

        1. The part, a copy: readers of the old file continue. 2. Its sums and state, from which any process
        can resume. 3. Record and body are removed. After a crash before 3 the entry is unchanged.
        """
        self._require_claim(record.key)
        self.drop_parts(record.key.id)
        part = self.part_path(record.key.id, state.generation)
        copy, position = OpenFile(part, os.O_RDWR | os.O_CREAT | os.O_EXCL), 0
        while body is not None and position < sound_bytes:
            position += os.copy_file_range(body.fd, copy.fd, sound_bytes - position, position, position)
        sums = record.sums[: sound_bytes // CHUNK_BYTES]
        self.sums_path(record.key.id, state.generation).write_bytes(
            b"".join(value.to_bytes(8, "little") for value in sums)
        )
        self.save_state(state)
        self.remove(record.key)

    def parts(self) -> list[Part]:
        """One row a part, and one for a state that has no part."""
        rows, names = [], sorted(path.name for path in self.partial.iterdir())
        with_part = {name[:32] for name in names if name.endswith(".part")}
        for name in names:
            id_, _, rest = name.partition(".")
            number = rest.removesuffix(".part")
            generation = int(number) if number != rest and number.isdecimal() else 0
            if len(id_) != 32 or not (generation or (rest == "state" and id_ not in with_part)):
                continue
            with contextlib.suppress(OSError):  # gone
                stat, state = (self.partial / name).stat(), None
                with contextlib.suppress(ValueError, OSError):
                    state = self.load_state(id_)
                claimed = self.claims is not None and self.claims.taken(claim_offset(id_))
                size = stat.st_size if generation else 0
                rows.append(Part(id_, generation, size, stat.st_mtime, claimed, state))
        return rows

    # --- files

    def _put(self, path: str | Path, text: bytes, *, sync: bool) -> None:
        """Put a file in place, atomically; `sync`: with its bytes on the disk."""
        name = str(path).rpartition("/")[2][-60:]
        temporary = f"{self.partial}/{os.getpid()}.{time.monotonic_ns()}.{name}.tmp"
        try:
            file = OpenFile(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            write_all(file.fd, text)
            if sync:
                os.fdatasync(file.fd)
            self._rename_into(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                Path(temporary).unlink(missing_ok=True)
            raise

    def _rename_into(self, source: str, target: str | Path) -> None:
        """Rename, making the folder; again if `remove` or `prune` removes it meanwhile, or one above it."""
        for attempt in range(5):
            try:
                os.rename(source, target)  # noqa: PTH104 - see `part_name`
                break
            except FileNotFoundError:
                if attempt == 4 or not Path(source).exists():
                    raise
                with contextlib.suppress(FileNotFoundError):  # a folder above it was pruned
                    Path(target).parent.mkdir(parents=True, exist_ok=True)
            except IsADirectoryError:  # not made by gup
                if attempt == 4:
                    raise
                unlink(Path(target))


def _stat(path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116 - a Path a file makes a walk over 100,000 files twice as slow
    except OSError:
        return None


def _mark(body: os.stat_result | None, record: os.stat_result | None) -> int:
    """0 when one of the files is missing."""
    if body is None or record is None:
        return 0
    return hash((body.st_ino, body.st_mtime_ns, record.st_ino, record.st_size)) & MAX_INTEGER or 1


def _read(path: Path, most_bytes: int) -> bytes | None:
    """At most one byte more than `most_bytes`; None when there is no file. InvalidError."""
    try:
        return read_regular(path, most_bytes + 1, os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in _SHORTAGES:
            raise
        raise InvalidError(f"it can't be read: {error.strerror}") from error


def unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except NotADirectoryError:
        return
    except (IsADirectoryError, PermissionError):  # unlink(2) of a directory, as Linux and POSIX report it
        if not path.is_dir():
            raise
        shutil.rmtree(path)


# --- chunks

_PROBE_STEP_BYTES = 128 * 1024


def span_of(record: Record, chunk: int) -> tuple[int, int]:
    start = chunk * CHUNK_BYTES
    return start, min(CHUNK_BYTES, record.length - start)


def _agrees(fd: int, record: Record, chunk: int) -> bool:
    """Whether the chunk's bytes are those that were stored; an unreadable one's are not."""
    start, length = span_of(record, chunk)
    try:
        piece = os.pread(fd, length, start)
    except OSError:
        return False
    return len(piece) == length and chunk_sum(piece) == record.sums[chunk]


def read_aside(fd: int, record: Record, chunk: int) -> bool:
    """Whether the chunk is sound, read without keeping its pages: the page cache is left to clients.

    Pages that were cached before are compared as they are: they are what a client would be sent.
    """
    start, length = span_of(record, chunk)
    known = in_page_cache(fd, start, length)
    try:
        os.posix_fadvise(fd, start, length, os.POSIX_FADV_RANDOM)  # no reading ahead into the next chunk
        sound = _agrees(fd, record, chunk)
        if not known:
            os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    return sound


def is_chunk_sound(fd: int, record: Record, chunk: int) -> bool:
    """Whether the chunk is what was stored. A mismatch counts when it is seen twice, then from the disk."""
    if _agrees(fd, record, chunk):
        return True
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, *span_of(record, chunk), os.POSIX_FADV_DONTNEED)
    return _agrees(fd, record, chunk)


def sound_chunks(fd: int, record: Record) -> int:
    """Number of sound chunks from the first on. Blocks for as long as reading them takes."""
    chunks = range(len(record.sums))
    return next((chunk for chunk in chunks if not is_chunk_sound(fd, record, chunk)), len(chunks))


def in_page_cache(fd: int, start: int, length: int) -> bool:
    """Whether reading these bytes would not wait for the disk, by samples; never blocks."""
    probe = [bytearray(1)]
    try:
        for offset in (*range(start, start + length, _PROBE_STEP_BYTES), start + length - 1):
            if not os.preadv(fd, probe, offset, os.RWF_NOWAIT):
                return True  # shorter than recorded: reading it finds out
    except OSError as error:
        # A file system that can't tell counts as warm; reading in the thread finds errors.
        return error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
    return True


# --- damage

_MOST_A_MINUTE = 16
_MOST_A_DAY = 2
"""Of one key."""
_DAY_SECONDS = 86400.0
_KEPT_LINES = 4096
_WHY = "the disk damages stored bodies repeatedly: replace it, then run gup cache verify --repair"


class BadDiskError(GupError):
    """The disk damages what is stored: nothing more is demoted or stored for a while."""


class Demotions:
    """The demotions of all processes, a line each in one file: Unix time and the key's id."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock

    def note(self, id_: str) -> None:
        """Count one more; BadDiskError when there were too many. Blocks; OSError."""
        now, rows = self._clock(), self._rows()
        of_key = sum(1 for at, other in rows if other == id_ and 0 <= now - at < _DAY_SECONDS)
        if of_key >= _MOST_A_DAY or _many(rows, now):
            raise BadDiskError(_WHY)
        with self._path.open("a") as file:
            file.write(f"{int(now)} {id_}\n")

    def disk_is_bad(self) -> str | None:
        """Why nothing should be stored now, if so. Blocks."""
        now = self._clock()
        try:
            recent = 0 <= now - self._path.stat().st_mtime < 60.0
        except OSError:
            return None
        return _WHY if recent and _many(self._rows(), now) else None

    def _rows(self) -> list[tuple[float, str]]:
        try:
            lines = self._path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        split = (line.partition(" ") for line in lines[-_KEPT_LINES:])
        rows = [
            (float(at), id_) for at, _, id_ in split if at.isdecimal() and len(at) < 16 and len(id_) == 32
        ]
        if len(lines) > 2 * _KEPT_LINES:
            self._path.write_text("".join(f"{int(at)} {id_}\n" for at, id_ in rows))
        return rows


def _many(rows: list[tuple[float, str]], now: float) -> bool:
    return sum(1 for at, _ in rows if 0 <= now - at < 60.0) >= _MOST_A_MINUTE
