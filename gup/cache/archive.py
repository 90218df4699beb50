"""An archive of entries: a tar of records and bodies, written piece by piece; takes nothing in.

The first member says what it is, then each entry's record is followed by its body, and the last member says
how many there were: an archive that was cut off lacks it. Blocks on the disk.
"""

import json
import os
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gup
from gup.cache.checksum import ChunkSums
from gup.cache.chunks import read_aside
from gup.cache.record import Record
from gup.cache.store import OpenFile, Store
from gup.cache.tar_reader import Member, TarError, TarReader
from gup.content.key import ContentKey
from gup.errors import GupError
from gup.jsonmodel import InvalidError, Members, parse, plain_text

FORMAT = 1
FIRST, LAST = "gup-archive.json", "gup-archive-end.json"
FOLDER = "content/"
MAX_FIRST_BYTES = 64 * 1024
_MAX_LAST_BYTES = 64 << 20
_MAX_LEFT_OUT = 100_000
_MAX_TEXT = 2000
PIECE_BYTES = 256 * 1024


class ArchiveError(GupError):
    """What was given is no archive of gup's, or of another format; the text says which."""


def written(store: Store, keys: Iterable[ContentKey], site: str, now: float) -> Iterator[bytes]:
    """The archive of these entries, in pieces; what is damaged or has gone is left out, and named last."""
    yield from _json_member(FIRST, {"format": FORMAT, "gup": gup.__version__, "site": site, "made_at": now})
    entries = size_bytes = 0
    left_out: list[dict[str, str]] = []
    for key in keys:
        try:
            record, file = _sound(store, key)
        except (ValueError, OSError) as error:
            left_out.append({"key": key.text, "why": plain_text(str(error), _MAX_TEXT)})
            continue
        yield from _member(record_name(key), record.encode(), record.stored_at)
        yield from _body_member(record, file)
        entries += 1
        size_bytes += record.length
    yield from _json_member(LAST, {"entries": entries, "bytes": size_bytes, "left_out": left_out})
    yield bytes(2 * tarfile.BLOCKSIZE)


def _sound(store: Store, key: ContentKey) -> tuple[Record, OpenFile]:
    """The entry's record and its body, after all of it was compared; ValueError says what is wrong."""
    record = store.load(key)
    if record is None:
        raise ValueError("there is no such entry")
    file = store.open_body(record)
    if file is None:
        raise ValueError("the body is missing or is not the one that was recorded")
    if not all(read_aside(file.fd, record, chunk) for chunk in range(len(record.sums))):
        raise ValueError("the body is damaged")
    return record, file


def _body_member(record: Record, file: OpenFile) -> Iterator[bytes]:
    yield _header(FOLDER + record.key.text, record.length, record.stored_at)
    sums, at = ChunkSums(), 0
    while at < record.length:
        piece = os.pread(file.fd, min(PIECE_BYTES, record.length - at), at)
        if not piece:
            raise ArchiveError(f"{record.key.text} was cut while it was read")
        sums.add(piece)
        at += len(piece)
        yield piece
    if sums.finish() != record.sums:
        raise ArchiveError(f"{record.key.text} was changed while it was read")
    yield bytes(-record.length % tarfile.BLOCKSIZE)


def _json_member(name: str, fields: dict[str, Any]) -> Iterator[bytes]:
    return _member(name, json.dumps(fields, ensure_ascii=False).encode() + b"\n", time.time())


def _member(name: str, content: bytes, at: float) -> Iterator[bytes]:
    yield _header(name, len(content), at)
    yield content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _header(name: str, size_bytes: int, at: float) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size_bytes, int(at), 0o644
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def record_name(key: ContentKey) -> str:
    return FOLDER + str(key.path.with_name(f".{key.file}.gup"))


def summary(file: Path) -> dict[str, Any]:
    """What the last member of a written archive says; ArchiveError when it was cut off."""
    try:
        with file.open("rb") as stream:
            archive = TarReader(stream)
            while (member := archive.next()) is not None and member.name != LAST:
                pass
            if member is None:
                raise ArchiveError("the archive broke off before its end")
            return asdict(Ending.from_json(read_json(archive, member, _MAX_LAST_BYTES)))
    except (TarError, InvalidError, OSError) as error:
        raise ArchiveError(f"the archive broke off before its end: {error}") from error


def read_json(archive: TarReader, member: Member, most_bytes: int) -> Any:
    """A member that is JSON; InvalidError when it is no JSON, or too long (it is not read then)."""
    if member.size_bytes > most_bytes:
        raise InvalidError(f"{member.name}: {member.size_bytes} bytes long; {most_bytes} are allowed")
    return parse(archive.read(member.size_bytes), member.name, most_bytes)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The first member: which format the archive has, and who made it when (Unix seconds)."""

    format: int
    gup: str
    site: str
    made_at: float

    @classmethod
    def from_json(cls, fields: object) -> "Manifest":
        """InvalidError when `fields` are no manifest."""
        members = Members(fields, FIRST)
        return cls(
            members.whole("format"),
            members.text("gup", _MAX_TEXT),
            members.text("site", _MAX_TEXT),
            members.time("made_at"),
        )


@dataclass(frozen=True, slots=True)
class Ending:
    """The last member: what the archive holds, and which entries were left out and why."""

    entries: int
    bytes: int
    left_out: list[dict[str, str]]

    @classmethod
    def from_json(cls, fields: object) -> "Ending":
        """InvalidError when `fields` are no ending."""
        members = Members(fields, LAST)
        rows = [Members(row, LAST) for row in members.rows("left_out", _MAX_LEFT_OUT)]
        return cls(
            members.whole("entries"),
            members.whole("bytes"),
            [{name: row.text(name, _MAX_TEXT) for name in ("key", "why")} for row in rows],
        )
