"""Archives of entries: written to seed other sites, read in bounded memory and checked entry by entry."""

import json
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import gup
from gup.cache.chunks import read_aside
from gup.cache.records import CHUNK_BYTES, MAX_RECORD_BYTES, ChunkSums, Record
from gup.cache.store import OpenFile, Store
from gup.content.key import ContentKey
from gup.errors import GupError
from gup.fsutil import write_all
from gup.jsonmodel import InvalidError, Members, parse, plain_text, shown

_BLOCK = 512
_PIECE_BYTES = 256 * 1024
_MAX_HEADER_BYTES = 64 * 1024
"""Of a pax header, and of a long name."""
_MAX_HEADERS = 8
"""Pax headers and long names before one member."""
_MAX_SIZE = 1 << 62
_FILES, _WITHOUT_CONTENT = frozenset((0, *b"07")), frozenset(b"123456")
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE = b"xgLKS"


class TarError(GupError):
    """The stream is no tar archive, is cut off, or has a header that can't be read."""


@dataclass(frozen=True, slots=True)
class Member:
    """One member's name and the size of its content; `is_file` is False for links, folders and devices."""

    name: str
    size_bytes: int
    is_file: bool


@dataclass(slots=True)
class _Extended:
    """What the headers before a member say of it."""

    name: str | None = None
    size_bytes: int | None = None


class TarReader:
    """Members in their order. `read` gives the content of the last one; what was not read is passed over."""

    def __init__(self, stream: IO[bytes]) -> None:
        """`stream.read` may give any amount. One that can seek is not read where it need not be."""
        self._stream = stream
        seekable = getattr(stream, "seekable", None)
        self._seeks = bool(seekable is not None and seekable())
        self._held = b""
        self._left = 0
        self._padding = 0

    def next(self) -> Member | None:
        """The next member; None at the end. TarError when it can't be read on."""
        extended = _Extended()
        for _ in range(_MAX_HEADERS + 1):
            self._skip(self._left + self._padding)
            self._left = self._padding = 0
            block = self._take(_BLOCK)
            if not block or block == bytes(_BLOCK):
                return None
            kind, name, size_bytes = _parse(block)
            if kind in _WITHOUT_CONTENT:
                return Member(extended.name or name, 0, False)
            if kind in _FILES and extended.size_bytes is not None:
                size_bytes = extended.size_bytes
            self._left, self._padding = size_bytes, -size_bytes % _BLOCK
            if kind == _SPARSE:
                raise TarError("it has a sparse member")
            if kind in (_PAX, _LONG_NAME):
                if size_bytes > _MAX_HEADER_BYTES:
                    raise TarError(f"a header of {size_bytes} bytes; {_MAX_HEADER_BYTES} are allowed")
                _extend(extended, kind, self.read(size_bytes))
            elif kind not in (_PAX_GLOBAL, _LONG_LINK):
                return Member(extended.name or name, size_bytes, kind in _FILES)
        raise TarError(f"more than {_MAX_HEADERS} headers before one member")

    def read(self, size_bytes: int) -> bytes:
        """So many bytes of the member's content, fewer at its end only; TarError when it is cut off."""
        wanted = min(size_bytes, self._left)
        piece = self._take(wanted)
        if len(piece) < wanted:
            raise TarError("it is cut off")
        self._left -= wanted
        return piece

    def _take(self, size_bytes: int) -> bytes:
        """So many bytes; none at the end of the stream. TarError when it ends in between."""
        pieces = [self._held[:size_bytes]]
        self._held = self._held[size_bytes:]
        missing = size_bytes - len(pieces[0])
        while missing:
            piece = self._stream.read(missing if self._seeks else _PIECE_BYTES)
            if not piece:
                break
            pieces.append(piece[:missing])
            self._held = piece[missing:]
            missing -= len(pieces[-1])
        taken = b"".join(pieces)
        if taken and missing:
            raise TarError("it is cut off")
        return taken

    def _skip(self, size_bytes: int) -> None:
        if self._seeks:
            self._stream.seek(size_bytes, 1)
            return
        while size_bytes:
            piece = self._take(min(size_bytes, _PIECE_BYTES))
            if not piece:
                raise TarError("it is cut off")
            size_bytes -= len(piece)


def _parse(block: bytes) -> tuple[int, str, int]:
    """Type, name and size in a header block."""
    if block[257:262] != b"ustar" or _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
        raise TarError("it has a damaged header, or is no tar archive")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    return block[156], name, _number(block[124:136])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="replace")


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary form."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        digits = field.strip(b" \0") or b"0"
        if not all(0x30 <= digit <= 0x37 for digit in digits):
            raise TarError("it has a header with a bad number")
        value = int(digits, 8)
    if value > _MAX_SIZE:
        raise TarError("it has a header with a number that is too large")
    return value


def _extend(extended: _Extended, kind: int, content: bytes) -> None:
    if kind == _LONG_NAME:
        extended.name = _text(content)
        return
    while content.strip(b"\0"):
        length, _, rest = content.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 8 else 0
        record, content = content[len(length) + 1 : size], content[size:]
        keyword, equals, value = record.partition(b"=")
        if not rest or not equals or not value.endswith(b"\n"):
            raise TarError("it has a damaged pax header")
        if keyword == b"path":
            extended.name = value[:-1].decode(errors="replace")
        elif keyword == b"size":
            if not value[:-1].isdigit() or len(value) > 20:
                raise TarError("it has a pax header with a bad size")
            extended.size_bytes = min(int(value), _MAX_SIZE)
        elif keyword.startswith(b"GNU.sparse."):
            raise TarError("it has a sparse member")


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
