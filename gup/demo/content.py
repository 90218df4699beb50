"""The simulated content: streams, revisions, files whose bytes follow from a seed, conditions and ranges."""

import hashlib
import re
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import BinaryIO

import xxhash
from pydantic import TypeAdapter, ValidationError

from gup.content.key import Kind
from gup.errors import GupError
from gup.units import format_http_date, parse_http_date

# --- the published catalogue


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """`digest` is 32 hexadecimal digits of XXH3-128 over the `length` bytes, `modified_at` is Unix time."""

    path: str
    kind: Kind
    length: int
    digest: str
    modified_at: float
    from_revision: str | None = None

    @property
    def etag(self) -> str:
        return f'"{self.digest}"'


@dataclass(frozen=True, slots=True)
class PublishedStream:
    """A moniker's revisions, oldest first, and the files that lead to the newest."""

    moniker: str
    product: str
    language: str
    revisions: tuple[str, ...]
    full: PublishedFile
    deltas: tuple[PublishedFile, ...]

    @property
    def newest(self) -> str:
        return self.revisions[-1]

    @property
    def files(self) -> tuple[PublishedFile, ...]:
        return self.full, *self.deltas

    def delta_from(self, revision: str) -> PublishedFile | None:
        """The delta from `revision` to the newest; None if it is too old."""
        return next((delta for delta in self.deltas if delta.from_revision == revision), None)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Everything that is published; `serial` rises with every publication."""

    serial: int
    content_info: PublishedFile
    streams: tuple[PublishedStream, ...]


CATALOGUE_JSON = TypeAdapter(Catalogue)


class NoCatalogueError(GupError):
    """What should be a catalogue is not one."""


def read_catalogue(body: bytes) -> Catalogue:
    """From JSON; NoCatalogueError names the first mistake."""
    try:
        return CATALOGUE_JSON.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise NoCatalogueError(f"not a catalogue: {place + ': ' if place else ''}{first['msg']}") from error


# Where a simulated management server has it, what it counted, and takes the order to publish.
CATALOGUE_PATH = "/simulation/catalog"
COUNTS_PATH = "/simulation/counts"
PUBLISH_PATH = "/simulation/publish"


# --- streams and revisions, as a management server offers them (FIELD)


CONTENT_INFO_PATH = "/content/ContentInfo.txt"
ALL_LANGUAGES = "SymAllLanguages"
FIRST_NEWEST = 6
"""Ordinal of the newest revision at the start: enough history for clients that are far behind."""
DELTA_DEPTH = 3
"""Deltas lead from this many revisions back; a client further behind needs the full."""

_FIRST_DAY = datetime(2025, 3, 3, 6, tzinfo=UTC)
_REVISIONS_A_DAY = 3
_PIECE_BYTES = 64 * 1024
DELTA_BYTES = 200_000
"""The size of deltas, on average: they have half as much to half as much again."""
_NAMESPACE = uuid.UUID("6d0b9d4e-7d1c-4d5b-9a58-0f6d1d1b4a27")
_KNOWN = (
    ("{07B590B3-9282-482f-BBAA-6D515D385869}", "SEPC Virus Definitions Win64 (x64) 14.3"),
    ("{535CB6A4-441F-4e8a-A897-804CD859100E}", "SEPC Virus Definitions Win32 14.3"),
    ("{55DE35DC-862A-44c9-8A2B-3EF451665D0A}", "SEPC CIDS Signatures 14.3"),
    ("{D6AEBC07-D833-485f-9723-6C908D37F806}", "SEPC Behavior And Security Heuristics 14.3"),
    ("{B6DC6C8F-46FA-40c7-A806-B669BE1D2D19}", "SEPC Submission Control Data 14.3"),
    ("{C60DC234-65F9-4674-94AE-62158EFCA433}", "SEPM Virus Definitions Win32 v11"),
)
_LANGUAGES = ("English", "French", "German", "Spanish", "Japanese")
_FULL_SCALE = (2.0, 1.5, 1.0, 0.75, 0.5, 1.25)
"""The sizes of the streams' fulls, in turn, as multiples of the requested size."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A moniker, its product and language, and the approximate sizes of its fulls and deltas."""

    moniker: str
    product: str
    language: str
    full_bytes: int
    delta_bytes: int = DELTA_BYTES


def streams(count: int, full_bytes: int, delta_bytes: int = DELTA_BYTES) -> tuple[Stream, ...]:
    """The first `count` streams: the publicly known monikers, then client patches language by language."""

    def full(at: int) -> int:
        return max(1024, round(full_bytes * _FULL_SCALE[at % len(_FULL_SCALE)]))

    return tuple(
        Stream(moniker, product, language, full(at), max(2, delta_bytes))
        for at, (moniker, product, language) in enumerate(islice(_products(), count))
    )


def _products() -> Iterator[tuple[str, str, str]]:
    for moniker, product in _KNOWN:
        yield moniker, f"{product} - MicroDefsB.CurDefs", ALL_LANGUAGES
    release_update = 2
    while True:
        for language in _LANGUAGES:
            product = f"SEPC Client Patch Win64 14.3 RU{release_update}"
            moniker = str(uuid.uuid5(_NAMESPACE, f"{product}/{language}")).upper()
            yield f"{{{moniker}}}", product, language
        release_update += 1


def released_at(ordinal: int) -> datetime:
    """The release time of a stream's revision number `ordinal`: whole seconds, UTC."""
    return _FIRST_DAY + timedelta(days=ordinal // _REVISIONS_A_DAY, hours=6 * (ordinal % _REVISIONS_A_DAY))


def revision(ordinal: int) -> str:
    return f"{released_at(ordinal):%y%m%d}{1 + ordinal % _REVISIONS_A_DAY:03d}"


# --- files: written below a folder by their URL's path, the same bytes for the same seed


def write_revision(root: Path, seed: int, stream: Stream, ordinal: int) -> PublishedStream:
    """Write a revision's full, then its deltas from the revisions before it. Blocks on the disk."""
    newest, moment = revision(ordinal), released_at(ordinal).timestamp()
    path = f"/content/{stream.moniker}/{newest}/full.zip"
    full = _written(root, seed, path, Kind.FULL, moment, partial(_write_full, stream, ordinal))
    deltas, write_delta = [], partial(_write_delta, stream.delta_bytes)
    for start in map(revision, range(max(0, ordinal - DELTA_DEPTH), ordinal)):
        # A delta lies in its *from* revision's folder, as in the public log.
        path = f"/content/{stream.moniker}/{start}/xdelta{start}_To_{newest}.dax"
        deltas.append(_written(root, seed, path, Kind.DELTA, moment, write_delta, start))
    known = tuple(map(revision, range(max(0, ordinal - FIRST_NEWEST), ordinal + 1)))
    return PublishedStream(stream.moniker, stream.product, stream.language, known, full, tuple(deltas))


def write_content_info(root: Path, offered: tuple[Stream, ...]) -> PublishedFile:
    """`ContentInfo.txt` has one moniker a line: its product, version and language. Blocks."""
    lines = [f"{stream.moniker}: {stream.product} - {stream.language}\r\n" for stream in offered]
    moment = released_at(FIRST_NEWEST).timestamp()
    text = "".join(lines).encode()
    return _written(root, 0, CONTENT_INFO_PATH, Kind.INDEX, moment, lambda out, _: out.write(text))


def _written(
    root: Path,
    seed: int,
    path: str,
    kind: Kind,
    modified_at: float,
    write: Callable[[BinaryIO, Random], object],
    from_revision: str | None = None,
) -> PublishedFile:
    file = root / path[1:]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w+b") as out:
        write(out, Random(f"{seed}/{path}"))  # noqa: S311 - repeatable by design, no secret
        length = out.seek(0, 2)
        out.seek(0)
        digest = hashlib.file_digest(out, xxhash.xxh3_128).hexdigest()
    return PublishedFile(path, kind, length, digest, modified_at, from_revision)


def _write_full(stream: Stream, ordinal: int, out: BinaryIO, chance: Random) -> None:
    """A real ZIP of stored members, like definitions, which are compressed already."""
    total_bytes = round(stream.full_bytes * chance.uniform(0.95, 1.05))
    stamp, number = released_at(ordinal).timetuple()[:6], revision(ordinal)
    with zipfile.ZipFile(out, "w") as archive:
        note = f"[DefDates]\r\nCurDefs=20{number[:6]}.{number[6:]}\r\nProduct={stream.product}\r\n"
        archive.writestr(zipfile.ZipInfo("definfo.dat", stamp), note)
        with archive.open(zipfile.ZipInfo("virscan.dat", stamp), "w") as member:
            member.writelines(_noise(chance, total_bytes))


def _write_delta(usual_bytes: int, out: BinaryIO, chance: Random) -> None:
    out.writelines(_noise(chance, chance.randint(usual_bytes // 2, usual_bytes * 3 // 2)))


def _noise(chance: Random, total_bytes: int) -> Iterator[bytes]:
    for start in range(0, total_bytes, _PIECE_BYTES):
        yield chance.randbytes(min(_PIECE_BYTES, total_bytes - start))


# --- conditions and ranges


_SINGLE_RANGE = re.compile(r"bytes\s*=\s*(\d*)\s*-\s*(\d*)", re.IGNORECASE)


def decide(
    headers: Mapping[str, str], etag: str | None, modified_at: float | None, length: int
) -> tuple[int, int, int]:
    """Status (200, 206, 304 or 416) and the half-open span of the body that a request gets.

    RFC 9110 sections 13 and 14; `headers` are looked up without case.
    """
    if "If-None-Match" in headers:  # section 13.2.2: If-Modified-Since counts only without it
        tags = {tag.strip().removeprefix("W/") for tag in headers["If-None-Match"].split(",")}
        unchanged = not tags.isdisjoint({"*", (etag or "").removeprefix("W/")})
    else:
        since = parse_http_date(headers.get("If-Modified-Since", ""))
        unchanged = since is not None and modified_at is not None and modified_at <= since
    if unchanged:
        return 304, 0, 0
    asked = _SINGLE_RANGE.fullmatch(headers.get("Range", "").strip())
    date = None if modified_at is None else format_http_date(modified_at)
    # Sections 14.2 and 13.1.5: anything but a single range of the same body is ignored.
    if asked is None or not any(asked.groups()) or headers.get("If-Range") not in (None, etag, date):
        return 200, 0, length
    first, last = asked.groups()
    if not first:
        start, stop = max(0, length - int(last)), length
    else:
        start, stop = int(first), min(length, int(last) + 1) if last else length
        if last and int(last) < start:
            return 200, 0, length
    return (206, start, stop) if start < stop else (416, 0, 0)
