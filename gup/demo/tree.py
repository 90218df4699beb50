"""The simulated content tree, a pure function of a seed: names, sizes and bytes of every file. Never any I/O.

Modelled on what a management server offers (docs: monikers, revisions `YYMMDDrrr`, `full.zip`, `.dax`). The
client patches' monikers are not public; ours are made up.
"""

import io
import random
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import islice
from typing import Protocol

from gup.content.key import Kind

CONTENT_INFO_PATH = "/content/ContentInfo.txt"
ALL_LANGUAGES = "SymAllLanguages"
DELTA_DEPTH = 3
"""How many revisions back a delta reaches; whoever is further behind needs the full."""
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


class Writable(Protocol):
    """Where a file's bytes go, in order."""

    def write(self, piece: bytes, /) -> int: ...


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
    """What the publication of a revision offers: its full, and deltas from the revisions before it."""
    oldest = max(0, ordinal - DELTA_DEPTH)
    deltas = (PlannedFile(stream, ordinal, start) for start in range(oldest, ordinal))
    return (PlannedFile(stream, ordinal), *deltas)


def write(file: PlannedFile, seed: int, out: Writable) -> None:
    """Write the file's bytes, the same for the same seed; memory stays at one piece."""
    if file.kind is Kind.FULL:
        _write_full(file, seed, out)
        return
    chance = _chance(seed, file.path)
    for piece in _pieces(chance, chance.randint(*_DELTA_BYTES)):
        out.write(piece)


def _write_full(file: PlannedFile, seed: int, out: Writable) -> None:
    """A real ZIP of stored members, as definitions come: already compressed, so stored is honest."""
    chance = _chance(seed, file.path)
    total_bytes = round(file.stream.full_bytes * chance.uniform(0.95, 1.05))
    released = released_at(file.to_ordinal)
    stamp = (released.year, released.month, released.day, released.hour, 0, 0)
    with zipfile.ZipFile(_Appending(out), "w", zipfile.ZIP_STORED) as archive:
        number = revision(file.to_ordinal)
        note = f"[DefDates]\r\nCurDefs=20{number[:6]}.{number[6:]}\r\nProduct={file.stream.product}\r\n"
        archive.writestr(zipfile.ZipInfo("definfo.dat", stamp), note)
        for name in _MEMBERS:
            with archive.open(zipfile.ZipInfo(name, stamp), "w") as member:
                for piece in _pieces(chance, total_bytes // len(_MEMBERS)):
                    member.write(piece)


class _Appending:
    """Hides that `out` could seek: zipfile writes other bytes into a seekable file than into a stream."""

    def __init__(self, out: Writable) -> None:
        self._out = out

    def write(self, piece: bytes) -> int:
        return self._out.write(piece)

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        """`out` belongs to the caller."""


def _chance(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed}/{name}")  # noqa: S311 - repeatable by design, no secret


def _pieces(chance: random.Random, total_bytes: int) -> Iterator[bytes]:
    for start in range(0, total_bytes, _PIECE_BYTES):
        yield chance.randbytes(min(_PIECE_BYTES, total_bytes - start))


def body(file: PlannedFile, seed: int) -> bytes:
    """The whole file in memory: for tests and small trees."""
    out = io.BytesIO()
    write(file, seed, out)
    return out.getvalue()
