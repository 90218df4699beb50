"""The simulated management server's files on disk, and the catalogue of them; never speaks HTTP."""

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import xxhash

from gup.content.key import Kind
from gup.demo import tree
from gup.demo.answer import Validators
from gup.demo.catalogue import CATALOGUE_JSON, Catalogue, PublishedFile, PublishedStream

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
    """One stream's next revision, written and ready to be offered: the full first, then the deltas."""

    at: int
    ordinal: int
    files: tuple[ShelvedFile, ...]


class _DigestingFile:
    """Where `tree.write` writes: digests whatever passes."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._digest = xxhash.xxh3_128()
        self.length = 0

    def write(self, piece: bytes) -> int:
        self._digest.update(piece)
        self.length += len(piece)
        return self._out.write(piece)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class Shelf:
    """All that is on offer. `prepare` may run in a thread, one at a time; the rest on one thread alone."""

    def __init__(self, directory: Path, seed: int, streams: tuple[tree.Stream, ...]) -> None:
        """`directory` exists and is the shelf's own; nothing is on offer before `publish`."""
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
        planned = tree.files_of(self.streams[at], ordinal)
        with self._writing:
            return Publication(at, ordinal, tuple(self._shelve(file) for file in planned))

    def publish(self, publications: Iterable[Publication]) -> list[ShelvedFile]:
        """Offer them all at once; returns the files withdrawn for them, to be given to `discard`."""
        withdrawn: list[ShelvedFile] = []
        for publication in publications:
            held = self._publications[publication.at]
            assert publication.ordinal == self.next_ordinal(publication.at), publication
            held.append(publication)
            self._files |= {_folded(file.published.path): file for file in publication.files}
            if len(held) > KEEP_PUBLICATIONS:
                withdrawn += held.popleft().files
        for file in withdrawn:
            del self._files[_folded(file.published.path)]
        self._serial += 1
        self.catalogue_json = CATALOGUE_JSON.dump_json(self._catalogue())
        return withdrawn

    @staticmethod
    def discard(withdrawn: Iterable[ShelvedFile]) -> None:
        """Remove withdrawn files from the disk; a response that has one open still ends well. Blocks."""
        for file in withdrawn:
            file.location.unlink()

    def find(self, path: str) -> ShelvedFile | None:
        """The file on offer at a decoded path; monikers are equal without case."""
        return self._files.get(_folded(path))

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
        revisions = tuple(tree.revision(ordinal) for ordinal in range(first, publication.ordinal + 1))
        return PublishedStream(
            stream.moniker, stream.product, stream.language, revisions, full, tuple(deltas)
        )

    def _shelve(self, file: tree.PlannedFile) -> ShelvedFile:
        location = self._next_location()
        with location.open("wb") as raw:
            out = _DigestingFile(raw)
            tree.write(file, self._seed, out)
        start = None if file.from_ordinal is None else tree.revision(file.from_ordinal)
        published = PublishedFile(file.path, file.kind, out.length, out.hexdigest(), start)
        return _shelved(published, location, tree.released_at(file.to_ordinal))

    def _shelve_content_info(self) -> ShelvedFile:
        body = tree.content_info(self.streams)
        location = self._next_location()
        location.write_bytes(body)
        digest = xxhash.xxh3_128_hexdigest(body)
        published = PublishedFile(tree.CONTENT_INFO_PATH, Kind.INDEX, len(body), digest)
        shelved = _shelved(published, location, tree.released_at(FIRST_NEWEST))
        self._files[_folded(published.path)] = shelved
        return shelved

    def _next_location(self) -> Path:
        self._written += 1
        return self._directory / f"{self._written:08d}"


def _shelved(published: PublishedFile, location: Path, modified: datetime) -> ShelvedFile:
    return ShelvedFile(published, location, Validators(f'"{published.digest}"', modified))


def _folded(path: str) -> str:
    return path.casefold()
