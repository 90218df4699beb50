"""The simulated content: every file a function of a seed, its catalogue, and the files on disk."""

import random
import re
import threading
import uuid
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, cast

import xxhash
from pydantic import TypeAdapter

from gup.content.key import Kind
from gup.units import format_http_date, parse_http_date

CATALOGUE_PATH = "/simulation/catalog"
COUNTS_PATH = "/simulation/counts"
PUBLISH_PATH = "/simulation/publish"


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A published file: `digest` is 32 hexadecimal digits of XXH3-128 over its `length` bytes."""

    path: str
    kind: Kind
    length: int
    digest: str
    from_revision: str | None = None


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

    def delta_from(self, revision: str) -> PublishedFile | None:
        """The delta that leads from `revision` to the newest, if one reaches back that far."""
        return next((delta for delta in self.deltas if delta.from_revision == revision), None)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Everything that is published; `serial` rises with every publication."""

    serial: int
    content_info: PublishedFile
    streams: tuple[PublishedStream, ...]


@dataclass(slots=True)
class FileCounts:
    """What the server sent of one file: `fetches` are GETs answered with bytes (200 or 206)."""

    kind: Kind
    length: int
    fetches: int = 0
    not_modified: int = 0
    other_requests: int = 0
    sent_bytes: int = 0


@dataclass(slots=True)
class Counts:
    """Everything that went over the simulated WAN since the server started. Byte counts are of bodies.

    Counted when sent. `files` are those published now; of withdrawn files only the sums are kept.
    """

    requests: int = 0
    not_found: int = 0
    sent_bytes: int = 0
    sending: int = 0
    withdrawn_files: int = 0
    withdrawn_fetched_again: int = 0
    files: dict[str, FileCounts] = field(default_factory=dict)


CATALOGUE_JSON = TypeAdapter(Catalogue)
COUNTS_JSON = TypeAdapter(Counts)


def digest_of(body: bytes) -> str:
    """The digest that a PublishedFile carries, of a whole body in memory."""
    return xxhash.xxh3_128_hexdigest(body)


# --- the tree: names, sizes and bytes, after what a management server offers (FIELD)


CONTENT_INFO_PATH = "/content/ContentInfo.txt"
ALL_LANGUAGES = "SymAllLanguages"
DELTA_DEPTH = 3
"""Deltas lead from this many revisions back; a client further behind needs the full."""
REVISIONS_A_DAY = 3

_FIRST_DAY = date(2025, 3, 3)
_PIECE_BYTES = 64 * 1024
_DELTA_BYTES = (100_000, 300_000)
_NAMESPACE = uuid.UUID("6d0b9d4e-7d1c-4d5b-9a58-0f6d1d1b4a27")

_KNOWN = (
    (
        "{07B590B3-9282-482f-BBAA-6D515D385869}",
        "SEPC Virus Definitions Win64 (x64) 14.3 - MicroDefsB.CurDefs",
    ),
    ("{535CB6A4-441F-4e8a-A897-804CD859100E}", "SEPC Virus Definitions Win32 14.3 - MicroDefsB.CurDefs"),
    ("{55DE35DC-862A-44c9-8A2B-3EF451665D0A}", "SEPC CIDS Signatures 14.3 - MicroDefsB.CurDefs"),
    (
        "{D6AEBC07-D833-485f-9723-6C908D37F806}",
        "SEPC Behavior And Security Heuristics 14.3 - MicroDefsB.CurDefs",
    ),
    ("{B6DC6C8F-46FA-40c7-A806-B669BE1D2D19}", "SEPC Submission Control Data 14.3 - MicroDefsB.CurDefs"),
    ("{C60DC234-65F9-4674-94AE-62158EFCA433}", "SEPM Virus Definitions Win32 v11 - MicroDefsB.CurDefs"),
)
_LANGUAGES = ("English", "French", "German", "Spanish", "Japanese")
_FULL_SCALE = (2.0, 1.5, 1.0, 0.75, 0.5, 1.25)
"""Streams differ in size; the scale of each in turn, times the size asked for."""
_MEMBERS = ("virscan1.dat", "virscan2.dat", "virscan3.dat", "catalog.dat")


@dataclass(frozen=True, slots=True)
class Stream:
    """One moniker: what it stands for, its language, and about how long its fulls are."""

    moniker: str
    product: str
    language: str
    full_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file of the tree: a full when `from_ordinal` is None, else the delta from that revision."""

    stream: Stream
    to_ordinal: int
    from_ordinal: int | None = None

    @property
    def kind(self) -> Kind:
        return Kind.FULL if self.from_ordinal is None else Kind.DELTA

    @property
    def path(self) -> str:
        """As clients ask for it; a delta lies in its *from* revision's folder, as in the public log."""
        to = revision(self.to_ordinal)
        if self.from_ordinal is None:
            return f"/content/{self.stream.moniker}/{to}/full.zip"
        start = revision(self.from_ordinal)
        return f"/content/{self.stream.moniker}/{start}/xdelta{start}_To_{to}.dax"


def revision(ordinal: int) -> str:
    """The revision number (`YYMMDDrrr`) of the `ordinal`th revision since the simulation's first day."""
    return f"{_day(ordinal):%y%m%d}{1 + ordinal % REVISIONS_A_DAY:03d}"


def released_at(ordinal: int) -> datetime:
    """When the revision counts as released: whole seconds, UTC."""
    hour = 6 + 6 * (ordinal % REVISIONS_A_DAY)
    return datetime.combine(_day(ordinal), time(hour), UTC)


def _day(ordinal: int) -> date:
    return _FIRST_DAY + timedelta(days=ordinal // REVISIONS_A_DAY)


def streams(count: int, full_bytes: int) -> tuple[Stream, ...]:
    """The first `count` streams: the publicly known monikers, then client patches language by language."""
    return tuple(
        Stream(moniker, product, language, max(1024, round(full_bytes * _FULL_SCALE[at % len(_FULL_SCALE)])))
        for at, (moniker, product, language) in enumerate(islice(_products(), count))
    )


def _products() -> Iterator[tuple[str, str, str]]:
    for moniker, product in _KNOWN:
        yield moniker, product, ALL_LANGUAGES
    release_update = 2
    while True:
        for language in _LANGUAGES:
            product = f"SEPC Client Patch Win64 14.3 RU{release_update}"
            moniker = str(uuid.uuid5(_NAMESPACE, f"{product}/{language}")).upper()
            yield f"{{{moniker}}}", product, language
        release_update += 1


def content_info(offered: tuple[Stream, ...]) -> bytes:
    """The text of `ContentInfo.txt`: one moniker a line, its product, version and language."""
    lines = [f"{stream.moniker}: {stream.product} - {stream.language}\r\n" for stream in offered]
    return "".join(lines).encode("ascii")


def files_of(stream: Stream, ordinal: int) -> tuple[PlannedFile, ...]:
    """The files of one revision: its full, and deltas from the revisions before it."""
    oldest = max(0, ordinal - DELTA_DEPTH)
    deltas = (PlannedFile(stream, ordinal, start) for start in range(oldest, ordinal))
    return (PlannedFile(stream, ordinal), *deltas)


class DigestingFile:
    """Digests what is written through it. Without a way to seek, in which zipfile would write other bytes."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._digest = xxhash.xxh3_128()
        self.length = 0

    def write(self, piece: bytes) -> int:
        self._digest.update(piece)
        self.length += len(piece)
        return self._out.write(piece)

    def flush(self) -> None:
        self._out.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def write(file: PlannedFile, seed: int, out: DigestingFile) -> None:
    """Write the file's bytes, the same for the same seed; memory stays at one piece."""
    if file.kind is Kind.FULL:
        _write_full(file, seed, out)
        return
    chance = _chance(seed, file.path)
    for piece in _pieces(chance, chance.randint(*_DELTA_BYTES)):
        out.write(piece)


def _write_full(file: PlannedFile, seed: int, out: DigestingFile) -> None:
    """A real ZIP of stored members, as definitions come: already compressed, so stored is honest."""
    chance = _chance(seed, file.path)
    total_bytes = round(file.stream.full_bytes * chance.uniform(0.95, 1.05))
    released = released_at(file.to_ordinal)
    stamp = (released.year, released.month, released.day, released.hour, 0, 0)
    with zipfile.ZipFile(cast(BinaryIO, out), "w", zipfile.ZIP_STORED) as archive:
        number = revision(file.to_ordinal)
        note = f"[DefDates]\r\nCurDefs=20{number[:6]}.{number[6:]}\r\nProduct={file.stream.product}\r\n"
        archive.writestr(zipfile.ZipInfo("definfo.dat", stamp), note)
        for name in _MEMBERS:
            with archive.open(zipfile.ZipInfo(name, stamp), "w") as member:
                for piece in _pieces(chance, total_bytes // len(_MEMBERS)):
                    member.write(piece)


def _chance(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed}/{name}")  # noqa: S311 - repeatable by design, no secret


def _pieces(chance: random.Random, total_bytes: int) -> Iterator[bytes]:
    for start in range(0, total_bytes, _PIECE_BYTES):
        yield chance.randbytes(min(_PIECE_BYTES, total_bytes - start))


# --- conditions and ranges (RFC 9110 sections 13, 14)


_SINGLE_RANGE = re.compile(r"bytes\s*=\s*(\d*)\s*-\s*(\d*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Validators:
    """What a file is known by: an entity tag (with its quotes) and Unix time in whole seconds."""

    etag: str | None
    modified_at: float | None

    @property
    def last_modified(self) -> str | None:
        return None if self.modified_at is None else format_http_date(self.modified_at)


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and the half-open span of the body to send; empty for 304 and 416."""

    status: Literal[200, 206, 304, 416]
    start: int
    stop: int


def decide(headers: Mapping[str, str], known: Validators, length: int) -> Answer:
    """The answer to a GET or HEAD with `headers` (looked up without case) for a file of `length` bytes."""
    if _unchanged(headers, known):
        return Answer(304, 0, 0)
    if "Range" not in headers or not _range_holds(headers, known):
        return Answer(200, 0, length)
    return _ranged(headers["Range"], length)


def _unchanged(headers: Mapping[str, str], known: Validators) -> bool:
    """RFC 9110 section 13.2.2: If-Modified-Since counts only without If-None-Match."""
    if "If-None-Match" in headers:
        tags = [tag.strip().removeprefix("W/") for tag in headers["If-None-Match"].split(",")]
        return "*" in tags or (known.etag or "").removeprefix("W/") in tags
    since = parse_http_date(headers.get("If-Modified-Since", ""))
    return since is not None and known.modified_at is not None and known.modified_at <= since


def _range_holds(headers: Mapping[str, str], known: Validators) -> bool:
    """RFC 9110 section 13.1.5: a strong tag or the exact date, else the range is ignored."""
    condition = headers.get("If-Range")
    return condition is None or condition in (known.etag, known.last_modified)


def _ranged(text: str, length: int) -> Answer:
    """RFC 9110 section 14.2: what is no single byte range is ignored; a range past the end is refused."""
    match = _SINGLE_RANGE.fullmatch(text.strip())
    if match is None or not (match[1] or match[2]):
        return Answer(200, 0, length)
    if not match[1]:
        start, stop = max(0, length - int(match[2])), length
    else:
        start, stop = int(match[1]), min(length, int(match[2]) + 1) if match[2] else length
        if match[2] and int(match[2]) < int(match[1]):
            return Answer(200, 0, length)
    if start >= stop:
        return Answer(416, 0, 0)
    return Answer(206, start, stop)


# --- the files on disk


FIRST_NEWEST = 6
"""Ordinal of the newest revision at the start: history enough for clients that are far behind."""
KEEP_PUBLICATIONS = 12
"""Publications of a stream whose files stay; older ones are withdrawn, so a long run fills no disk."""


@dataclass(frozen=True, slots=True)
class ShelvedFile:
    """A published file, where it lies, and what it is known by."""

    published: PublishedFile
    location: Path
    validators: Validators


@dataclass(frozen=True, slots=True)
class Publication:
    """One stream's next revision, written and ready to be published: the full first, then the deltas."""

    at: int
    ordinal: int
    files: tuple[ShelvedFile, ...]


class Shelf:
    """The published files. `prepare` may run in other threads, one at a time; the rest on one thread."""

    def __init__(self, directory: Path, seed: int, streams: tuple[Stream, ...]) -> None:
        """`directory` exists and is the shelf's own; nothing is published before `publish`."""
        assert streams, "a shelf without streams"
        self._directory = directory
        self._seed = seed
        self.streams = streams
        self._writing = threading.Lock()
        self._written = 0
        self._publications: list[deque[Publication]] = [deque() for _ in streams]
        self._files: dict[str, ShelvedFile] = {}
        self._serial = 0
        self._content_info = self._shelve_content_info()
        self.catalogue_json = b""

    def next_ordinal(self, at: int) -> int:
        """The ordinal that stream number `at` publishes next."""
        publications = self._publications[at]
        return publications[-1].ordinal + 1 if publications else FIRST_NEWEST

    def prepare(self, at: int, ordinal: int) -> Publication:
        """Write the files of a stream's revision. Blocks on the disk."""
        planned = files_of(self.streams[at], ordinal)
        with self._writing:
            return Publication(at, ordinal, tuple(self._shelve(file) for file in planned))

    def publish(self, publications: Iterable[Publication]) -> list[ShelvedFile]:
        """Publish them all at once; returns the files withdrawn for them, to be given to `discard`."""
        withdrawn: list[ShelvedFile] = []
        for publication in publications:
            held = self._publications[publication.at]
            assert publication.ordinal == self.next_ordinal(publication.at), publication
            held.append(publication)
            self._files |= {file.published.path.casefold(): file for file in publication.files}
            if len(held) > KEEP_PUBLICATIONS:
                withdrawn += held.popleft().files
        for file in withdrawn:
            del self._files[file.published.path.casefold()]
        self._serial += 1
        self.catalogue_json = CATALOGUE_JSON.dump_json(self._catalogue())
        return withdrawn

    @staticmethod
    def discard(withdrawn: Iterable[ShelvedFile]) -> None:
        """Remove withdrawn files from the disk; a response that has one open still ends well. Blocks."""
        for file in withdrawn:
            file.location.unlink()

    def find(self, path: str) -> ShelvedFile | None:
        """The published file at a decoded path; monikers are compared without case."""
        return self._files.get(path.casefold())

    def files(self) -> Iterable[ShelvedFile]:
        return self._files.values()

    def _catalogue(self) -> Catalogue:
        newest = [held[-1] for held in self._publications if held]
        return Catalogue(
            self._serial,
            self._content_info.published,
            tuple(self._published_stream(publication) for publication in newest),
        )

    def _published_stream(self, publication: Publication) -> PublishedStream:
        stream = self.streams[publication.at]
        full, *deltas = (file.published for file in publication.files)
        first = max(0, publication.ordinal - FIRST_NEWEST)
        revisions = tuple(revision(ordinal) for ordinal in range(first, publication.ordinal + 1))
        return PublishedStream(
            stream.moniker, stream.product, stream.language, revisions, full, tuple(deltas)
        )

    def _shelve(self, file: PlannedFile) -> ShelvedFile:
        location = self._next_location()
        with location.open("wb") as raw:
            out = DigestingFile(raw)
            write(file, self._seed, out)
        start = None if file.from_ordinal is None else revision(file.from_ordinal)
        published = PublishedFile(file.path, file.kind, out.length, out.hexdigest(), start)
        return _shelved(published, location, released_at(file.to_ordinal))

    def _shelve_content_info(self) -> ShelvedFile:
        body = content_info(self.streams)
        location = self._next_location()
        location.write_bytes(body)
        published = PublishedFile(CONTENT_INFO_PATH, Kind.INDEX, len(body), digest_of(body))
        shelved = _shelved(published, location, released_at(FIRST_NEWEST))
        self._files[published.path.casefold()] = shelved
        return shelved

    def _next_location(self) -> Path:
        self._written += 1
        return self._directory / f"{self._written:08d}"


def _shelved(published: PublishedFile, location: Path, modified: datetime) -> ShelvedFile:
    return ShelvedFile(published, location, Validators(f'"{published.digest}"', modified.timestamp()))
