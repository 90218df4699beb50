"""Archives of entries: written to seed other sites, read in bounded memory and checked entry by entry.

An archive is a tar: a manifest, a record and a body for each entry, and an ending.
"""

import asyncio
import os
import tarfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any

import aiofiles
from pydantic import BaseModel, Field, TypeAdapter

import gup
from gup.cache.purges import Purges
from gup.cache.records import CHUNK_BYTES, MAX_RECORD_BYTES, ChunkSums, Record
from gup.cache.store import OpenFile, Store, read_aside
from gup.content.key import ContentKey
from gup.errors import GupError, quoted
from gup.files import write_all
from gup.jsonmodel import Count, InvalidError, Time, parse, plain_text, read, shown

FORMAT = 1
FIRST, LAST = "gup-archive.json", "gup-archive-end.json"
_FOLDER = "content/"
_PIECE_BYTES = 256 * 1024
_MAX_FIRST_BYTES = 64 * 1024
_MAX_LAST_BYTES = 64 << 20
_MAX_TEXT = 2000
_MOST_REFUSED = 10_000
_MOST_SHOWN = 300
_MOST_REASONS = 1000
_NOT_OURS = "it is not an archive made by gup cache export"

_Text = Annotated[str, Field(max_length=_MAX_TEXT)]


class ArchiveError(GupError):
    """Why an archive, or a member of it, is rejected."""


class Manifest(BaseModel):
    """The first member: the archive's format, its site, and when it was made (Unix seconds)."""

    format: Count
    gup: _Text
    site: _Text
    made_at: Time


class LeftOut(BaseModel):
    """An entry that was not exported, and why."""

    key: _Text
    why: _Text


class Ending(BaseModel):
    """The last member: what the archive holds, and what was left out: entries that could not be read, and how
    many that the archive is not for, by reason.
    """

    entries: Count
    bytes: Count
    left_out: Annotated[list[LeftOut], Field(max_length=100_000)]
    not_wanted: Annotated[dict[_Text, Count], Field(max_length=_MOST_REASONS)] = Field(default_factory=dict)


# --- writing


async def written(
    store: Store,
    keys: Iterable[ContentKey],
    site: str,
    now: float,
    not_wanted: Mapping[str, int] | None = None,
) -> AsyncIterator[bytes]:
    """The archive in pieces; damaged and missing entries are left out, and named in the last member.

    `not_wanted` counts the entries that were not selected, by reason.
    """
    first = Manifest(format=FORMAT, gup=gup.__version__, site=site, made_at=now)
    yield member_bytes(FIRST, first.model_dump_json().encode(), now)
    reasons = ((plain_text(why, _MAX_TEXT), count) for why, count in (not_wanted or {}).items())
    last = Ending(entries=0, bytes=0, left_out=[], not_wanted=dict(islice(reasons, _MOST_REASONS)))
    for key in keys:
        try:
            record, file = await asyncio.to_thread(_sound, store, key)
        except (ValueError, OSError) as error:
            last.left_out.append(LeftOut(key=key.text, why=plain_text(str(error), _MAX_TEXT)))
            continue
        yield member_bytes(_record_name(key), record.encode(), record.stored_at)
        async for piece in _body_member(record, file):
            yield piece
        last.entries += 1
        last.bytes += record.length
    yield member_bytes(LAST, last.model_dump_json().encode(), now)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _sound(store: Store, key: ContentKey) -> tuple[Record, OpenFile]:
    """The entry, verified; ValueError says what is wrong."""
    record = store.load(key)
    if record is None:
        raise ValueError("there is no such entry")
    file = store.open_body(record)
    if file is None:
        raise ValueError("the body is missing or does not match its record")
    if not all(read_aside(file.fd, record, chunk) for chunk in range(len(record.sums))):
        raise ValueError("the body is damaged")
    return record, file


async def _body_member(record: Record, file: OpenFile) -> AsyncIterator[bytes]:
    yield _header(_FOLDER + record.key.text, record.length, record.stored_at)
    sums, left = ChunkSums(), record.length
    async with aiofiles.open(file.fd, "rb", buffering=0, closefd=False) as body:
        while piece := await body.read(min(_PIECE_BYTES, left)):
            sums.add(piece)
            left -= len(piece)
            yield piece
    if sums.finish() != record.sums:
        raise ArchiveError(f"{record.key.text} was changed while it was read")
    yield bytes(-record.length % tarfile.BLOCKSIZE)


def member_bytes(name: str, content: bytes, at: float) -> bytes:
    return _header(name, len(content), at) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _header(name: str, size_bytes: int, at: float) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size_bytes, int(at), 0o644
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _record_name(key: ContentKey) -> str:
    return _FOLDER + str(key.path.with_name(f".{key.file}.gup"))


def summary(file: Path) -> dict[str, Any]:
    """The last member of a written archive; ArchiveError when it was cut off."""
    why = "the archive is truncated: its last member is missing"
    try:
        with file.open("rb") as stream:
            archive = TarReader(stream)
            while (member := archive.next()) is not None:
                if member.name == LAST:
                    ending = parse(archive.read(_MAX_LAST_BYTES + 1), LAST, _MAX_LAST_BYTES)
                    return read(TypeAdapter(Ending), ending, LAST).model_dump()
    except (TarError, InvalidError, OSError) as error:
        raise ArchiveError(f"{why}: {error}") from error
    raise ArchiveError(why)


# --- reading


class TarError(GupError):
    """The stream is not a tar archive, is cut off, or has an unreadable header."""


_MAX_HEADERS_BYTES = 256 * 1024
"""Limit on the headers before one member's content: pax headers and long names."""
_READ_BYTES = 32 * tarfile.BLOCKSIZE
_ODD = (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError)
"""What tarfile raises for invalid headers."""


class _Source:
    """A stream of which only a limited number of bytes may be read. `read` may return fewer."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.allowed = 0
        self.seek, self.tell = getattr(stream, "seek", None), getattr(stream, "tell", None)
        self.seeks = hasattr(stream, "seekable") and stream.seekable()

    def read(self, size_bytes: int) -> bytes:
        if size_bytes > self.allowed:
            raise TarError(f"it has headers of more than {_MAX_HEADERS_BYTES} bytes before one member")
        piece = self._stream.read(size_bytes)
        self.allowed -= len(piece)
        return piece


class TarReader:
    """Members in order. `read` gives the content of the current one; unread content is skipped.

    tarfile reads headers of any size into memory: the limit is set anew for each member.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._source = _Source(stream)
        self._archive: Any = None  # made with the first member
        self._content: IO[bytes] | None = None

    def next(self) -> tarfile.TarInfo | None:
        """The next member; None at the end. TarError when the archive is damaged."""
        source = self._source
        while not source.seeks and self.read(_PIECE_BYTES):
            pass
        self._content, source.allowed = None, _MAX_HEADERS_BYTES
        try:
            if self._archive is None:
                open_: Any = tarfile.open
                self._archive = open_(
                    fileobj=source, mode="r:" if source.seeks else "r|", bufsize=_READ_BYTES
                )
            member: tarfile.TarInfo | None = self._archive.next()
            self._archive.members = []  # tarfile would keep them all
            if member is not None and member.isreg():
                if member.issparse() or member.size < 0:
                    raise TarError("it has a sparse member, or one of a negative size")
                self._content = self._archive.extractfile(member)
        except _ODD as error:
            raise TarError(
                f"it has a damaged header, or it is not a tar archive: {quoted(str(error))}"
            ) from error
        return member

    def read(self, size_bytes: int) -> bytes:
        """`size_bytes` of the member's content, fewer at its end only; TarError when it is cut off."""
        self._source.allowed = 1 << 62
        try:
            return self._content.read(size_bytes) if self._content is not None else b""
        except tarfile.TarError as error:
            raise TarError(f"it is truncated: {error}") from error


# --- reading into a store


@dataclass(slots=True)
class Imported:
    """The result of an import. `complete`: it was read to its last member; `problem`: why not."""

    imported: int = 0
    imported_bytes: int = 0
    present: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)
    complete: bool = False
    problem: str | None = None


@dataclass(slots=True)
class Import:
    """One archive on its way into a store. `refuse_room` and `taken` are called from its thread."""

    store: Store
    now: float
    refuse_room: Callable[[int], str]
    """Why a body of this many bytes is rejected, or ""."""
    taken: Callable[[Record], None]
    """Called with each new entry."""
    _done: Imported = field(default_factory=Imported)

    def take(self, stream: IO[bytes]) -> Imported:
        """Import what is valid. ArchiveError, before anything is stored, when `stream` is no archive."""
        done, archive = self._done, TarReader(stream)
        _require_ours(archive)
        record = None
        try:
            while not done.complete and (member := archive.next()) is not None:
                if len(done.refused) >= _MOST_REFUSED:
                    done.problem = f"{_MOST_REFUSED} members were refused: the rest was not read"
                    return done
                done.complete = member.name == LAST
                if not done.complete:
                    record = self._member(archive, member, record)
        except TarError as error:
            done.problem = f"reading the archive failed: {error}"
        if not done.complete and done.problem is None:
            done.problem = "the archive is truncated: its last member is missing"
        return done

    def _member(self, archive: TarReader, member: tarfile.TarInfo, record: Record | None) -> Record | None:
        """Import a member that comes after `record`'s. If it is a record itself, its body comes next."""
        name = member.name.removeprefix(_FOLDER)
        try:
            if member.isreg() and name != member.name and name.rpartition("/")[2].startswith("."):
                return _read_record(archive, member)
            self._body(archive, member, record)
        except ArchiveError as error:
            self._refuse(name, str(error))
        except OSError as error:
            self._refuse(name, f"it can't be written: {error.strerror or error}")
        return None

    def _refuse(self, name: str, why: str) -> None:
        """The name comes from outside and is shown to people."""
        letters = (c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:_MOST_SHOWN])
        self._done.refused.append({"name": "".join(letters), "why": why})

    def _body(self, archive: TarReader, member: tarfile.TarInfo, record: Record | None) -> None:
        if not member.isreg() or not member.name.startswith(_FOLDER):
            raise ArchiveError("neither a record nor a body")
        if record is None or member.name != _FOLDER + record.key.text:
            raise ArchiveError("a body that does not follow its record")
        store, key = self.store, record.key
        if self._is_present(key):
            return
        if member.size != record.length:
            raise ArchiveError(f"{member.size} bytes long instead of {record.length}")
        if why := self.refuse_room(record.length):
            raise ArchiveError(why)
        temporary = store.partial / f"{os.getpid()}.{time.monotonic_ns()}.{key.id}.tmp"
        try:
            _copy(archive, temporary, record)
            with store.claimed(key.id) as claimed:
                if not claimed:
                    raise ArchiveError("it is being fetched; import it again later")
                if self._is_present(key):
                    return
                order = Purges(store.run).stamp  # it comes after every purge so far
                record = replace(record, pinned=False, generation=int(self.now * 1_000_000_000), order=order)
                store.drop_parts(key.id)
                temporary.rename(store.part_path(key.id, record.generation))
                store.commit(record)
                store.drop_state(key.id)
        finally:
            temporary.unlink(missing_ok=True)
        self._done.imported += 1
        self._done.imported_bytes += record.length
        self.taken(record)

    def _is_present(self, key: ContentKey) -> bool:
        """Whether the entry's path is taken, by a sound body or not: an import overwrites nothing."""
        present = any(map(os.path.lexists, (self.store.body_path(key), self.store.record_path(key))))
        self._done.present += present
        return present


def _require_ours(archive: TarReader) -> None:
    fields = None
    try:
        member = archive.next()
        if member is not None and member.name == FIRST and member.isreg():
            fields = parse(archive.read(_MAX_FIRST_BYTES + 1), FIRST, _MAX_FIRST_BYTES)
    except (TarError, InvalidError) as error:
        raise ArchiveError(_NOT_OURS) from error
    if not isinstance(fields, dict) or "format" not in fields:
        raise ArchiveError(_NOT_OURS)
    if (found := fields["format"]) != FORMAT:
        raise ArchiveError(f"it is an archive of format {shown(found)}; this gup reads format {FORMAT}")
    try:
        read(TypeAdapter(Manifest), fields, FIRST)
    except InvalidError as error:
        raise ArchiveError(f"its first member is damaged: {error}; export it again") from error


def _read_record(archive: TarReader, member: tarfile.TarInfo) -> Record:
    try:
        record = Record.decode(archive.read(MAX_RECORD_BYTES + 1))
    except InvalidError as error:
        raise ArchiveError(f"a damaged record: {error}; export the entry again") from error
    if member.name != _record_name(record.key):
        raise ArchiveError("a record under another entry's name")
    return record


def _copy(content: TarReader, path: Path, record: Record) -> None:
    sums, file = ChunkSums(), OpenFile(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for wanted in record.sums:
        piece = content.read(CHUNK_BYTES)
        if sums.add(piece) not in ([], [wanted]):
            break
        write_all(file.fd, piece)
    if sums.finish() != record.sums:
        raise ArchiveError("damaged: its bytes don't match the sums in its record")
