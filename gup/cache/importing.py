"""Takes an archive's entries into the store: compared, under their claims, nothing overwritten; fetches none.

Blocks on the disk and on whoever gives the archive.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from gup.cache.archive import (
    FIRST,
    FOLDER,
    FORMAT,
    LAST,
    MAX_FIRST_BYTES,
    ArchiveError,
    Manifest,
    read_json,
    record_name,
)
from gup.cache.checksum import CHUNK_BYTES, ChunkSums
from gup.cache.record import MAX_RECORD_BYTES, Record
from gup.cache.store import OpenFile, Store
from gup.cache.tar_reader import Member, TarError, TarReader
from gup.content.key import ContentKey
from gup.fsutil import write_all
from gup.jsonmodel import InvalidError, Members, shown

_MOST_REFUSED = 10_000
_MOST_SHOWN = 300
_NOT_OURS = "it is no archive made by gup cache export"


@dataclass(frozen=True, slots=True)
class Custody:
    """What an import needs of whoever owns the store, called from its thread.

    `claim` takes a key's claim by its offset, `release` gives it back. `room` says why a body of so many
    bytes can't be taken, "" when it can. `taken` is told of each entry that is there now.
    """

    claim: Callable[[int], bool]
    release: Callable[[int], None]
    room: Callable[[int], str]
    taken: Callable[[Record], None]


@dataclass(slots=True)
class Imported:
    """What became of an archive. Changed by its import only.

    `complete` says whether the archive was read to its last member; `problem` why not.
    """

    imported: int = 0
    imported_bytes: int = 0
    present: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)
    complete: bool = False
    problem: str | None = None


class _NotTakenError(Exception):
    """Why an entry was not taken."""


class Import:
    """One archive on its way into a store."""

    def __init__(self, store: Store, custody: Custody, now: float) -> None:
        self._store = store
        self._custody = custody
        self._now = now
        self._record: Record | None = None
        """The record whose body comes next."""
        self._done = Imported()

    def take(self, stream: IO[bytes]) -> Imported:
        """Take all that can be taken. ArchiveError, before anything is, when `stream` is no archive."""
        done, archive = self._done, TarReader(stream)
        _require_ours(archive)
        try:
            while (member := archive.next()) is not None:
                if member.name == LAST:
                    done.complete = True
                    break
                if len(done.refused) >= _MOST_REFUSED:
                    done.problem = f"{_MOST_REFUSED} members were refused: the rest was not looked at"
                    break
                self._member(archive, member)
        except TarError as error:
            done.problem = f"the archive can't be read on: {error}"
        if not done.complete and done.problem is None:
            done.problem = "the archive ends before its last member: it was cut off"
        return done

    def _member(self, archive: TarReader, member: Member) -> None:
        record, self._record = self._record, None
        name = member.name.removeprefix(FOLDER)
        why = ""
        try:
            if not member.is_file or name == member.name:
                why = "neither a record nor a body"
            elif name.rpartition("/")[2].startswith("."):
                self._record = _record(archive, member)
            elif record is None or name != record.key.text:
                why = "a body without its record before it"
            else:
                self._body(archive, member, record)
        except _NotTakenError as error:
            why = str(error)
        except OSError as error:
            why = f"it can't be written: {error.strerror or error}"
        if why:
            self._done.refused.append({"name": _shown(name), "why": why})

    def _body(self, archive: TarReader, member: Member, record: Record) -> None:
        store, key = self._store, record.key
        if _is_there(store, key):
            self._done.present += 1
            return
        if member.size_bytes != record.length:
            raise _NotTakenError(f"{member.size_bytes} bytes long instead of {record.length}")
        if why := self._custody.room(record.length):
            raise _NotTakenError(why)
        temporary = store.partial / f"{os.getpid()}.{time.monotonic_ns()}.{key.id}.tmp"
        try:
            if not _copied(archive, temporary, record):
                raise _NotTakenError("damaged: its bytes are not those that were recorded")
            taken = self._publish(temporary, record)
        finally:
            temporary.unlink(missing_ok=True)
        if taken is None:
            self._done.present += 1
        else:
            self._done.imported += 1
            self._done.imported_bytes += record.length
            self._custody.taken(taken)

    def _publish(self, temporary: Path, record: Record) -> Record | None:
        """Put the body in its place under its claim; None when one has come there meanwhile."""
        offset = record.key.claim_offset
        if not self._custody.claim(offset):
            raise _NotTakenError("it is being fetched at this moment")
        try:
            if _is_there(self._store, record.key):
                return None
            return _commit(temporary, record, self._store, self._now)
        finally:
            self._custody.release(offset)


def _require_ours(archive: TarReader) -> None:
    fields = _first(archive)
    if fields is None:
        raise ArchiveError(_NOT_OURS)
    found = fields["format"]
    if found != FORMAT:
        raise ArchiveError(f"it is an archive of format {shown(found)}; this gup reads format {FORMAT}")
    try:
        Manifest.from_json(fields.values)
    except InvalidError as error:
        raise ArchiveError(f"its first member is damaged: {error}; export it again") from error


def _first(archive: TarReader) -> Members | None:
    """The first member; None when it is not that of an archive of ours."""
    try:
        member = archive.next()
        if member is None or member.name != FIRST or not member.is_file:
            return None
        fields = Members(read_json(archive, member, MAX_FIRST_BYTES), FIRST)
    except (TarError, InvalidError):
        return None
    return fields if "format" in fields else None


def _record(archive: TarReader, member: Member) -> Record:
    if member.size_bytes > MAX_RECORD_BYTES:
        raise _NotTakenError(
            f"a damaged record: {member.size_bytes} bytes long; {MAX_RECORD_BYTES} are allowed; "
            "export the entry again"
        )
    try:
        record = Record.decode(archive.read(member.size_bytes))
    except InvalidError as error:
        raise _NotTakenError(f"a damaged record: {error}; export the entry again") from error
    if member.name != record_name(record.key):
        raise _NotTakenError("a record under another entry's name")
    return record


def _shown(name: str) -> str:
    """A member's name for people: anybody may have chosen it."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name[:_MOST_SHOWN]
    )


def _is_there(store: Store, key: ContentKey) -> bool:
    """Whether anything stands in the entry's place, sound or not: an import overwrites nothing."""
    return os.path.lexists(store.body_path(key)) or os.path.lexists(store.record_path(key))


def _copied(content: TarReader, path: Path, record: Record) -> bool:
    """Write the body to `path`; False when a chunk of it is not what was recorded."""
    sums, file = ChunkSums(), OpenFile(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for wanted in record.sums:
        piece = content.read(CHUNK_BYTES)
        if sums.add(piece) not in ([], [wanted]):
            return False
        write_all(file.fd, piece)
    return sums.finish() == record.sums


def _commit(temporary: Path, record: Record, store: Store, now: float) -> Record:
    """Publish the body as a fill does. What lay unfinished of the key is of no use any more."""
    key, generation = record.key, int(now * 1_000_000_000)
    for other in store.generations(key.id):
        store.drop_part(key.id, other)
    part = store.part_path(key.id, generation)
    temporary.rename(part)
    taken = replace(record, pinned=False, generation=generation)
    store.commit(taken)
    store.drop_state(key.id)
    return taken
