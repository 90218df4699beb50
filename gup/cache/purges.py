"""Purges: which bodies an operator has had removed, so that none that was fetched before is served again.

Each purge has a number, and each body the highest number that was known when its fetch began. A purge names a
body when it selects its key and its number is the higher one. Such a body is not stored, and not served to a
new request, wherever it comes from: a fill under way, a part, memory, a record that could not be removed.

The purges of the last 30 days are lines of run/purges. Only the controller writes it; all processes read it
when the highest number, which they share, has changed.
"""

import fnmatch
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from pydantic import TypeAdapter

from gup.cache.records import Head
from gup.content.catalog import Catalogues, Stream
from gup.content.key import ContentKey, Kind, content_revision
from gup.content.languages import Language, parse_language
from gup.content.routes import LIVEUPDATE_STREAM
from gup.files import FileError, append_line, read_file, replace_file
from gup.jsonmodel import Count, Flag, InvalidError, Time, parse, read

FILE = "purges"
KEPT_SECONDS = 30 * 86400.0
_MAX_LINE_BYTES = 1 << 20
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Selection:
    """What a purge selects: one key, or all keys that fit each condition that is given. Text is compared
    without case.

    `streams` are those whose label in the catalogue fits product, version and language.
    """

    key: str | None = None
    kind: Kind | None = None
    stream: str | None = None
    revision: str | None = None
    pattern: str | None = None
    product: str | None = None
    version: str | None = None
    language: str | None = None
    streams: tuple[Stream, ...] = ()
    pinned: Flag = False
    """Pinned entries too; one key is selected in any case."""

    def selects(self, key: ContentKey, kind: Kind, *, pinned: bool = False) -> bool:
        if self.key is not None:
            return key.text == self.key
        return (self.pinned or not pinned) and self._fits(key, kind)

    def _fits(self, key: ContentKey, kind: Kind) -> bool:
        names = key.revision, content_revision(kind, key.revision, key.file)
        return (
            self.kind in (None, kind)
            and is_same(self.stream, key.stream)
            and (self.revision is None or self.revision in names)
            and (self.pattern is None or _pattern(self.pattern)(key.text.casefold()) is not None)
            and self._fits_label(key)
        )

    def _fits_label(self, key: ContentKey) -> bool:
        stream = (key.version, key.language, key.stream)
        if stream in self.streams or (self.product, self.version, self.language) == (None, None, None):
            return True
        product, version, language = key.stream, key.version, key.language
        if key.stream == LIVEUPDATE_STREAM and (label := Catalogues().label(stream, key.file)) is not None:
            product, version = label.product, label.version or key.version
        return (
            is_same(self.product, product)
            and is_same(self.version, version, key.version)
            and is_language(self.language, language)
        )


def is_same(wanted: str | None, *found: str) -> bool:
    return wanted is None or wanted.casefold() in map(str.casefold, found)


def is_language(wanted: str | None, *found: str) -> bool:
    """Each may be written in other ways: French, fr, fr-CA."""
    if is_same(wanted, *found):
        return True
    language = _language(wanted or "")
    return language is not None and language in map(_language, found)


@lru_cache(maxsize=256)
def _language(text: str) -> Language | None:
    return parse_language(text)


@lru_cache(maxsize=256)
def _pattern(text: str) -> Callable[[str], object]:
    return re.compile(fnmatch.translate(text.casefold())).match


@dataclass(frozen=True, slots=True)
class Purge:
    """`at` is in Unix seconds."""

    number: Count
    at: Time
    selection: Selection

    def names(self, key: ContentKey, kind: Kind, order: int, *, pinned: bool = False) -> bool:
        """Whether a body of this key is not to be served whose fetch began at the number `order`."""
        return order < self.number and self.selection.selects(key, kind, pinned=pinned)


@cache
def _model() -> TypeAdapter[Purge]:
    return TypeAdapter(Purge)


class Purges:
    """The purges as one process knows them. `shared` is the highest number as the controller has told it."""

    def __init__(self, run: Path, shared: Callable[[], int] = lambda: 0) -> None:
        self._path, self._shared = run / FILE, shared
        self._threads = threading.Lock()
        self._of_key: dict[str, int] = {}
        """The highest number of a purge of each key alone."""
        self._others: tuple[Purge, ...] = ()
        self.number = 0
        """The highest number: that of a fetch which begins now."""
        self._read()

    @property
    def now(self) -> int:
        """As `number`, and new purges are read. Cheap enough for each request."""
        if self._shared() > self.number:
            self._read()
        return self.number

    def name(self, key: ContentKey, kind: Kind, order: int, *, pinned: bool = False) -> bool:
        """Whether a purge names this body. From any thread."""
        if order >= self.now:
            return False
        if self._of_key.get(key.text, 0) > order:
            return True
        return any(purge.names(key, kind, order, pinned=pinned) for purge in self._others)

    def name_head(self, key: ContentKey, kind: Kind, head: Head, *, pinned: bool = False) -> bool:
        return self.name(key, kind, head.order, pinned=pinned)

    def _read(self) -> None:
        with self._threads:
            told = self._shared()
            purges = read_purges(self._path)
            of_key: dict[str, int] = {}
            for purge in purges:
                if (text := purge.selection.key) is not None:
                    of_key[text] = max(purge.number, of_key.get(text, 0))
            self._of_key, self._others = of_key, tuple(p for p in purges if p.selection.key is None)
            # What can't be read must not be looked for again at each request.
            self.number = max([told, self.number, *(purge.number for purge in purges)])


def read_purges(path: Path) -> list[Purge]:
    """The purges in the file, without lines that a crash has torn."""
    try:
        lines = read_file(path, _MAX_BYTES).splitlines()
    except FileError:
        return []
    found = []
    for line in lines:
        try:
            found.append(read(_model(), parse(line, "purge", _MAX_LINE_BYTES), "purge"))
        except InvalidError:
            continue
    return found


def add_purge(run: Path, purge: Purge) -> None:
    """Note a purge, so that it survives a power cut; OSError. The number is shared afterwards. Blocks."""
    append_line(run / FILE, _model().dump_json(purge))


def reserve_room(run: Path) -> None:
    """Have room for the next purges, also when the disk is full; OSError. Blocks."""
    append_line(run / FILE)


def keep_purges(run: Path, purges: Iterable[Purge]) -> None:
    """Replace the file; OSError. Blocks."""
    text = b"".join(_model().dump_json(purge) + b"\n" for purge in purges)
    replace_file(run / FILE, text)
