"""An archive of entries: a tar of records and bodies, written piece by piece; takes nothing in.

The first member says what it is, then each entry's record is followed by its body, and the last member says
how many there were: an archive that was cut off lacks it. Blocks on the disk.
"""

import json
import os
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gup
from gup.cache.checksum import ChunkSums
from gup.cache.chunks import read_aside
from gup.cache.record import Record
from gup.cache.store import OpenFile, Store
from gup.content.key import ContentKey
from gup.errors import GupError

FORMAT = 1
FIRST, LAST = "gup-archive.json", "gup-archive-end.json"
FOLDER = "content/"
_MAX_JSON_BYTES = 16 << 20
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
            left_out.append({"key": key.text, "why": str(error)})
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
        with tarfile.open(file, "r:") as archive:
            last = archive.getmember(LAST)
            found: dict[str, Any] = json.loads(content_of(archive, last))
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise ArchiveError("the archive broke off before its end") from error
    return found


def content_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(member)
    if content is None or member.size > _MAX_JSON_BYTES:
        raise ArchiveError(f"{member.name} is not what it should be")
    with content:
        return content.read()
