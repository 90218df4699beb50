"""The content key: the name of one stored body, with its variant and its kind."""

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from pathlib import PurePosixPath
from typing import NamedTuple

from gup.jsonmodel import InvalidError

ANY = "any"
"""Version or language of content that is the same for every client."""
EVERY = "*"
"""Version or language in a choice of upstreams: all that have the content alike. Not in a key."""
ABSENT = "_"
"""Placeholder for a stream or a revision that the URL does not have; no name in a URL maps to it."""
MAX_PART_BYTES = 240
"""Longest part of a key: a record is called `.{file}.gup`, and file systems end at 255."""
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Controls, line ends, and what UTF-8 can't encode."""
_FIT = re.compile(r"(?:[!-\-0-~][ -.0-~]{0,239}/){4}[!-\-0-~][ -.0-~]{0,239}")
"""Keys in ASCII that need no closer look."""

FULL = re.compile(r"full\..+", re.IGNORECASE | re.ASCII)
_DELTA = re.compile(r"xdelta([0-9]+)_To_([0-9]+)\.dax", re.IGNORECASE | re.ASCII)
_COMPARABLE = re.compile(r"[0-9]{9}")


class BadKeyError(InvalidError):
    """A text that is not a content key: as a file name it could lead anywhere."""


class Kind(StrEnum):
    """The kind of a file; decides freshness, priority in the fill queue and labels."""

    FULL = "full"
    DELTA = "delta"
    INDEX = "index"
    OTHER = "other"


class DeltaStep(NamedTuple):
    """Which revision a delta takes a client from, and to which."""

    from_revision: str
    to_revision: str


@lru_cache(maxsize=4096)
def delta_step(file: str) -> DeltaStep | None:
    """From the file name; None when it names no delta. The folder is ambiguous (FIELD)."""
    found = _DELTA.fullmatch(file)
    return DeltaStep(found[1], found[2]) if found else None


def content_revision(kind: Kind, revision: str, file: str) -> str | None:
    """The revision that a body brings a client to; None when the names do not state it.

    A delta's folder is its old revision in one source and the newest in another (FIELD.md), so its file name
    decides. Only nine-digit names can be compared.
    """
    step = delta_step(file) if kind is Kind.DELTA else None
    found = step.to_revision if step else revision
    return found if _COMPARABLE.fullmatch(found) else None


@dataclass(frozen=True, slots=True)
class Variant:
    """Version and language that a body belongs to; two variants never share bytes."""

    version: str = ANY
    language: str = ANY

    @property
    def is_wide(self) -> bool:
        """Whether it matches several variants: such a variant selects upstreams, and never a body."""
        return EVERY in (self.version, self.language)

    def covers(self, other: "Variant") -> bool:
        return self.version in (EVERY, other.version) and self.language in (EVERY, other.language)

    def widened(self) -> "Variant":
        return Variant(*(EVERY if part == ANY else part for part in (self.version, self.language)))


@dataclass(frozen=True)
class ContentKey:
    """The name of one body. Every part is a safe file name; BadKeyError for any other."""

    version: str
    language: str
    stream: str
    revision: str
    file: str

    def __post_init__(self) -> None:
        if _FIT.fullmatch(self.text):
            return
        for part in (self.version, self.language, self.stream, self.revision, self.file):
            if not part:
                why = "it is empty"
            elif part[0] == "." or "/" in part:
                why = "it begins with a dot or contains '/'"
            elif _UNFIT.search(part):
                why = "it contains a control character"
            elif len(part) > MAX_PART_BYTES or len(part.encode()) > MAX_PART_BYTES:
                why = f"it is longer than {MAX_PART_BYTES} bytes"
            else:
                continue
            raise BadKeyError(f"not a content key: its part {part!r:.80} is wrong: {why}")

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def variant(self) -> Variant:
        return Variant(self.version, self.language)

    @cached_property
    def text(self) -> str:
        """The key as one line, the form used in logs, in the API and in records."""
        return f"{self.version}/{self.language}/{self.stream}/{self.revision}/{self.file}"

    @cached_property
    def path(self) -> PurePosixPath:
        """Where the body lies, below `content/` in the cache directory."""
        return PurePosixPath(self.version, self.language, self.stream, self.revision, self.file)

    @cached_property
    def _digest(self) -> bytes:
        return hashlib.blake2b(self.text.encode(), digest_size=16).digest()

    @cached_property
    def id(self) -> str:
        """32 hexadecimal digits: names the key's files in `partial/`."""
        return self._digest.hex()

    @cached_property
    def claim_offset(self) -> int:
        """The byte of `partial/claims` whose lock is the key's claim (62 bits)."""
        return int.from_bytes(self._digest[:8], "big") >> 2

    @classmethod
    def parse(cls, text: str) -> "ContentKey":
        """Inverse of `text`; BadKeyError when `text` is no key."""
        parts = text.split("/", 5) if isinstance(text, str) else ()  # a JSON file may hold anything
        if len(parts) != 5:
            raise BadKeyError(f"not a content key, which has five parts separated by '/': {text!r:.80}")
        return cls(*parts)


# --- revisions in names


class Folder(StrEnum):
    """Which of a delta's two revisions names its folder: one source says the old, another the new (FIELD). So
    the folder is taken from the traffic, and what a delta leads from and to from its file name alone.
    """

    FROM = "from"
    TO = "to"


@dataclass(frozen=True, slots=True)
class Named:
    """The revisions in a name. `from_revision` and `folder` are set for deltas; None is neither."""

    kind: Kind
    revision: str
    from_revision: str | None = None
    folder: Folder | None = None


@lru_cache(maxsize=4096)  # several reports name each key
def named(key: ContentKey) -> Named | None:
    """The revision that a body brings a client to, and a delta's other one; None for all other content.

    Only nine digits can be compared (FIELD: YYMMDDrrr).
    """
    step = delta_step(key.file)
    if step is not None:
        if not all(map(_COMPARABLE.fullmatch, step)):
            return None
        folders = {step.to_revision: Folder.TO, step.from_revision: Folder.FROM}
        return Named(Kind.DELTA, step.to_revision, step.from_revision, folders.get(key.revision))
    if FULL.fullmatch(key.file) and _COMPARABLE.fullmatch(key.revision):
        return Named(Kind.FULL, key.revision)
    return None
