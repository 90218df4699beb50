"""Purges: which bodies an operator has had removed, so that none that was fetched before is served again.

Each body carries what was known of purges when its fetch began, and when that was (gup.cluster.orders). A
purge names it when it selects its key and was not known; one with a time, when the fetch began before. Such a
body is not stored, and not served to a new request, wherever it comes from: a fill under way, a part, memory,
a record that could not be removed.

The purges of the last 30 days are lines of run/purges. Only the controller writes it; all processes read it
again when it has changed.
"""

import fnmatch
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from pydantic import TypeAdapter

from gup.cache.records import Head, Record
from gup.cluster.orders import LONE, KnownText, Writer, knows, stamped, unstamped
from gup.content.catalog import Catalogues, Stream
from gup.content.key import ContentKey, Kind, content_revision
from gup.content.languages import Language, parse_language
from gup.content.routes import LIVEUPDATE_STREAM
from gup.files import FileError, append_line, read_file, replace_file
from gup.jsonmodel import Count, Flag, InvalidError, Time, parse, read

FILE = "purges"
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
    fetched_before: Time | None = None
    """Unix seconds: only bodies whose fetch over the WAN began before, at whichever node they are."""
    unused_since: Time | None = None
    """Unix seconds: only what a node has not sent to a client since. Such a purge frees space, once."""

    def given(self) -> dict[str, object]:
        """The conditions that are given, as JSON values."""
        every: dict[str, object] = _selection().dump_python(self, mode="json", exclude_defaults=True)
        return every

    @classmethod
    def of(cls, given: Mapping[str, object]) -> "Selection":
        """InvalidError when these are no conditions."""
        return read(_selection(), dict(given), "selection")

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


@cache
def _selection() -> TypeAdapter[Selection]:
    return TypeAdapter(Selection)


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
    """`at` is in Unix seconds, `node` who has ordered it."""

    number: Count
    at: Time
    selection: Selection
    node: Writer = LONE

    def names(
        self, key: ContentKey, kind: Kind, known: str, at: float | None, *, pinned: bool = False
    ) -> bool:
        """Whether a body of this key is not to be served whose fetch began at `at`, when that was known. A
        time that was not kept is before any other.
        """
        before = self.selection.fetched_before
        return (
            not knows(known, self.node, self.number)
            and (before is None or at is None or at < before)
            and self.selection.selects(key, kind, pinned=pinned)
        )


@dataclass(frozen=True, slots=True)
class _Known:
    """A line that says what is known, where that is more than the purges in the file."""

    known: KnownText


_Line = Purge | _Known


@cache
def _model() -> TypeAdapter[_Line]:
    return TypeAdapter(_Line)


class Purges:
    """The purges as one process knows them. `changes` is shared, and raised with each change of the file."""

    def __init__(
        self, run: Path, changes: Callable[[], int] = lambda: 0, now: Callable[[], float] = time.time
    ) -> None:
        """`now` is Unix seconds, in a cluster those of the engine."""
        self._path, self._changes, self._now = run / FILE, changes, now
        self._threads = threading.Lock()
        self._read()

    @property
    def known(self) -> str:
        """What is known now. Cheap enough for each request."""
        if self._changes() != self._seen:
            self._read()
        return self._text

    @property
    def stamp(self) -> str:
        """To be kept with a body whose fetch begins."""
        return stamped(self.known, self._now())

    def name(
        self, key: ContentKey, kind: Kind, order: str, *, pinned: bool = False, stored_at: float | None = None
    ) -> bool:
        """Whether a purge names this body. From any thread. `stored_at`, for a body of an earlier version,
        which has not kept when its fetch began.
        """
        known, at = unstamped(order)
        if known == self.known:
            return False
        own, at = self._of_key.get(key.text, ()), stored_at if at is None else at
        return any(purge.names(key, kind, known, at, pinned=pinned) for purge in (*own, *self._others))

    def name_head(self, key: ContentKey, kind: Kind, head: Head, *, pinned: bool = False) -> bool:
        stored_at = head.stored_at if isinstance(head, Record) else None
        return self.name(key, kind, head.order, pinned=pinned, stored_at=stored_at)

    def _read(self) -> None:
        with self._threads:
            changes, (purges, known) = self._changes(), read_purges(self._path)
            of_key: dict[str, list[Purge]] = defaultdict(list)
            for purge in purges:
                if (text := purge.selection.key) is not None:
                    of_key[text].append(purge)
            self._of_key, self._others = of_key, [p for p in purges if p.selection.key is None]
            self._text, self._seen = known, changes


def read_purges(path: Path) -> tuple[list[Purge], str]:
    """The purges in the file, without lines that a crash has torn; and what is known."""
    try:
        lines = read_file(path, _MAX_BYTES).splitlines()
    except FileError:
        return [], ""
    found, known = list[Purge](), ""
    for line in lines:
        try:
            one = read(_model(), parse(line, "purge", _MAX_LINE_BYTES), "purge")
        except InvalidError:
            continue
        if isinstance(one, Purge):
            found.append(one)
        else:
            known = one.known
    own = max((purge.number for purge in found if purge.node == LONE), default=0)
    return found, f"{LONE}={own}" if own else known


def add_purge(run: Path, purge: Purge) -> None:
    """Note a purge, so that it survives a power cut; OSError. It is shared afterwards. Blocks."""
    append_line(run / FILE, _model().dump_json(purge))


def reserve_room(run: Path) -> None:
    """Have room for the next purges, also when the disk is full; OSError. Blocks."""
    append_line(run / FILE)


def keep_purges(run: Path, purges: Iterable[Purge], known: str = "") -> None:
    """Replace the file; OSError. Blocks."""
    lines = [_model().dump_json(purge) for purge in purges]
    lines += [_model().dump_json(_Known(known))] if known else []
    replace_file(run / FILE, b"".join(line + b"\n" for line in lines))
