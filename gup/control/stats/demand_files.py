"""The files of the record of demand: frames of JSON, each with its length and checksum; read in any process.

`reports/demand/` has a file for each day. A frame that a crash has torn is recognised. Keys have numbers,
which begin anew in each file, and with each start of the service.
"""

import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from gup.content.key import Kind
from gup.files import write_all

_FRAME = struct.Struct(">cII")
KEYS, ROWS, GROUPS, ANEW = b"K", b"R", b"G", b"A"


class Op(IntEnum):
    """What happened to a body; of a row `number` is the requests, or as said here."""

    USE = 0
    """Requested: where it is not stored it is fetched."""
    MORE = 1
    """Requested while it was fetched: the requests count, and nothing else."""
    FILL = 2
    """Fetched for a client; what it is requested is told by later rows, but for index files."""
    PREFETCH = 3
    PURGED = 4
    PIN = 5
    UNPIN = 6
    CHANGED = 7
    """Upstream had another body under this key, of `number` bytes."""
    FAILED = 8
    """No upstream had it, or could be asked."""
    PLACED = 9
    """Stored without the WAN: imported, or there when the file was begun; `number` is 1 for a pinned one."""


class Key(NamedTuple):
    """A key of a file; `length_bytes` is -1 while it is unknown. `local`: it came from another member."""

    text: str
    kind: Kind
    length_bytes: int
    local: bool


class Line(NamedTuple):
    """What happened in some seconds before `at`: rows of a key's number, an Op and a number, in order.

    `sent_bytes` and `received_bytes` are what was really sent to clients and came over the WAN meanwhile,
    `downloads`, `queued` and `of_address` the most at once: bodies being sent, and waiting to be, and full
    packages that one address began in a second.
    """

    at: float
    seconds: float
    sent_bytes: int
    received_bytes: int
    downloads: int
    queued: int
    of_address: int
    rows: list[int]


class Group(NamedTuple):
    """Requests for a stream by clients that state the same; `refused` are those that a rule refused."""

    version: str
    language: str
    stream: str
    requests: int
    refused: int


def append(path: Path, frames: Iterable[tuple[bytes, Any]], size_bytes: int) -> int:
    """Write frames behind the first `size_bytes`, and cut off what a failure left there; the size then."""
    pieces = []
    for kind, value in frames:
        body = zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 6)
        pieces.append(_FRAME.pack(kind, zlib.crc32(body), len(body)) + body)
    content = b"".join(pieces)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size > size_bytes:
            os.ftruncate(fd, size_bytes)
        write_all(fd, content)
    finally:
        os.close(fd)
    return size_bytes + len(content)


def files(folder: Path) -> list[Path]:
    """The files of the record, the oldest first."""
    return sorted(folder.glob("[0-9]*-[0-9]*.demand"), key=number_of) if folder.is_dir() else []


def number_of(path: Path) -> int:
    return int(path.stem.split("-")[0])


def begun_at(path: Path) -> float:
    return float(path.stem.split("-")[1])


def _frames_of(path: Path, kinds: bytes) -> Iterator[tuple[bytes, Any]]:
    """The frames of these kinds; ends at the first that is torn or damaged."""
    with path.open("rb") as file:
        while len(head := file.read(_FRAME.size)) == _FRAME.size:
            kind, checksum, length = _FRAME.unpack(head)
            if kind not in kinds:
                file.seek(length, os.SEEK_CUR)
                continue
            body = file.read(length)
            if len(body) < length or zlib.crc32(body) != checksum:
                return
            try:
                yield kind, json.loads(zlib.decompress(body))
            except (ValueError, zlib.error):
                return


def read_keys(path: Path) -> list[dict[int, Key]]:
    """The keys of a file by their number; a dictionary for each start of the service."""
    found: list[dict[int, Key]] = [{}]
    for kind, value in _frames_of(path, KEYS + ANEW):
        if kind == ANEW:
            found.append({})
            continue
        for number, text, kind_, length, local in value:
            found[-1][number] = Key(text, Kind(kind_), length, bool(local))
    return found


def read_lines(path: Path) -> Iterator[tuple[int, Line]]:
    """The lines of a file, each with which start of the service it belongs to."""
    start = 0
    for kind, value in _frames_of(path, ROWS + ANEW):
        if kind == ANEW:
            start += 1
            continue
        for line in value:
            yield start, Line(*line)


def read_groups(folder: Path, since: float) -> list[Group]:
    """What clients with the same version and language asked for since then (Unix seconds), added up."""
    served, refused = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for path in files(folder):
        for _, (at, rows) in _frames_of(path, GROUPS):
            for version, language, stream, requests, turned_away in rows if at >= since else ():
                served[version, language, stream] += requests
                refused[version, language, stream] += turned_away
    return [Group(*name, served[name], refused[name]) for name in served.keys() | refused.keys()]


def mend(path: Path) -> int:
    """Cut off a torn frame at the end, and have numbers begin anew; the size then."""
    end = 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while end + _FRAME.size <= size:
            file.seek(end)
            following = end + _FRAME.size + _FRAME.unpack(file.read(_FRAME.size))[2]
            if following > size:
                break
            end = following
    return append(path, [(ANEW, 0)], end)
