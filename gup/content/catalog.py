"""Catalogues: which product a stream is, its type of content, and how a manager spells its moniker.

FIELD: `ContentInfo.txt` has a line a moniker: `{GUID}: product and version - short name - language`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from types import MappingProxyType

from gup import config
from gup.content.key import ANY, Variant
from gup.content.languages import parse_language
from gup.content.releases import find_release
from gup.content.routes import LIVEUPDATE_STREAM

CATALOG_PATH = "/content/ContentInfo.txt"
MAX_CATALOG_BYTES = 1 << 20
"""Upper limit on a catalogue; real ones have thousands of lines at most."""

CLIENT_PATCHES = "client_patches"
"""The type of content that the delivery rules bind."""
OTHER = "other"
LIVEUPDATE_PRODUCT = "LiveUpdate"
"""LiveUpdate index files name the product; for its other files this one is shown."""

_MONIKER = r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
_LINE = re.compile(rf"(\{{{_MONIKER}\}})\s*:\s*(.+)")
_BARE = re.compile(rf"\{{?({_MONIKER})\}}?")
_LIVEUPDATE_INDEX = re.compile(r"(.+)_[^_]+_[^_]+_livetri\.zip", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Listed:
    """A catalogue's row of one stream. `moniker` is in the manager's own spelling.

    `product` ends with the version that it is made for; `version` is that alone ("12.1 RU6"), "" where the
    product names none. `language` is "" where the line states none.
    """

    moniker: str
    product: str
    language: str
    version: str = ""

    @property
    def all_languages(self) -> bool:
        return (stated := parse_language(self.language)) is not None and stated.is_all


Rows = Mapping[str, Listed]
"""One catalogue, by moniker in upper case."""
Stream = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Label:
    """The name of a stream for people. It is looked up when it is shown, so a changed catalogue renames.

    `version` is the one that the product is made for, "" where no catalogue states it. `type` is one of
    `catalog.types`, or "other".
    """

    product: str
    version: str
    language: str
    type: str


class StreamTypes:
    """The table `catalog.types`: patterns with `*`, `?` and `[…]`, compared without case, in order."""

    def __init__(self, types: Mapping[str, Sequence[str]]) -> None:
        self._patterns = tuple(
            (name, pattern.casefold()) for name, patterns in types.items() for pattern in patterns
        )
        self.names = frozenset((*types, OTHER))
        self.of = lru_cache(maxsize=1024)(self._of)
        """The type of a product, by its name in the catalogue."""

    def _of(self, product: str) -> str:
        name = " ".join(product.casefold().split())
        return next((type_ for type_, pattern in self._patterns if fnmatchcase(name, pattern)), OTHER)


class Catalogues:
    """The catalogues of all upstreams. Immutable; a catalogue that is read again makes a new object."""

    def __init__(
        self,
        rows: Mapping[str, Rows] = MappingProxyType({}),
        upstreams: Sequence[config.Upstream] = (),
        types: StreamTypes | None = None,
    ) -> None:
        """`rows` by the upstream's name. Rows of upstreams that are not configured are ignored."""
        self._rows = {u.name: rows[u.name] for u in upstreams if u.name in rows}
        self._variants = {u.name: Variant(u.version, u.language) for u in upstreams}
        self._types = types or StreamTypes(config.CONTENT_TYPES)

    def known(self, upstream: str) -> bool:
        return upstream in self._rows

    def listed(self, upstream: str, moniker: str) -> Listed | None:
        """The upstream's own row of a moniker (in upper case, with braces)."""
        return self._rows.get(upstream, {}).get(moniker)

    def somewhere(self, moniker: str) -> Listed | None:
        return next((rows[moniker] for rows in self._rows.values() if moniker in rows), None)

    def streams(self) -> set[Stream]:
        """What the content of the listed streams may be stored as."""
        variants = {(variant.version, variant.language) for variant in self._variants.values()} | {(ANY, ANY)}
        return {
            (*variant, moniker) for variant in variants for rows in self._rows.values() for moniker in rows
        }

    def for_all_languages(self, moniker: str) -> bool:
        """Whether a stream is the same for all languages: a catalogue says so and none says otherwise."""
        found = [rows[moniker] for rows in self._rows.values() if moniker in rows]
        return bool(found) and all(listed.all_languages for listed in found)

    def type_of(self, moniker: str) -> str | None:
        listed = self.somewhere(moniker)
        return None if listed is None else self._types.of(listed.product)

    def label(self, stream: Stream, file: str = "") -> Label | None:
        """The label of a stream; None where no catalogue lists it.

        Managers of different languages may list the same moniker differently, so the catalogue of the
        stream's own variant comes first. LiveUpdate has no catalogue: its index files state the product in
        their names.
        """
        version, language, moniker = stream
        if moniker == LIVEUPDATE_STREAM:
            named = _LIVEUPDATE_INDEX.fullmatch(file)
            product = named[1].replace("$20", " ") if named else LIVEUPDATE_PRODUCT
            return Label(product, "" if version == ANY else version, language, self._types.of(product))
        own = (name for name, variant in self._variants.items() if variant == Variant(version, language))
        row = next(filter(None, (self.listed(name, moniker) for name in own)), self.somewhere(moniker))
        if row is None:
            return None
        return Label(row.product, row.version, row.language or language, self._types.of(row.product))


def opened_by_outbreak(label: Label | None) -> bool:
    """Whether content is of definitions: neither client patches nor another type.

    What no catalogue lists may be definitions, as may a LiveUpdate server's, whose names do not tell.
    """
    return label is None or label.type not in (CLIENT_PATCHES, OTHER) or label.product == LIVEUPDATE_PRODUCT


def parse_catalog(text: bytes) -> Rows:
    """The rows of a ContentInfo.txt; other lines are skipped.

    UTF-8 or UTF-16, with or without a byte order mark, any line end.
    """
    rows: dict[str, Listed] = {}
    for line in _decoded(text).splitlines():
        match = _LINE.match(line.strip())
        if match is None:
            continue
        # From the right: a product's name may itself contain " - ".
        parts, language = [part.strip() for part in match[2].split(" - ")], ""
        if len(parts) > 2 or (len(parts) == 2 and parse_language(parts[1])):
            language = parts.pop()
        product = " - ".join(parts[:-1] if len(parts) > 1 else parts)
        rows[match[1].upper()] = Listed(match[1], product, language, find_release(product))
    return rows


def _decoded(text: bytes) -> str:
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return text.decode("utf-16", errors="replace")
    if text[:1] == b"\0" or text[1:2] == b"\0":  # without a mark; a line begins with a letter or a brace
        return text.decode("utf-16-be" if text[:1] == b"\0" else "utf-16-le", errors="replace")
    return text.decode("utf-8-sig", errors="replace")


def normal_moniker(text: str) -> str | None:
    """The moniker in braces and upper case; None when `text` is none."""
    found = _BARE.fullmatch(text.strip())
    return f"{{{found[1].upper()}}}" if found else None


def respelled(path: str, moniker: str) -> str | None:
    """`path` (percent-encoded, as upstream) with its moniker spelled as `moniker`; None if unchanged."""
    encoded = moniker.replace("{", "%7B").replace("}", "%7D")
    parts = path.split("/")
    if len(parts) < 3 or parts[2].upper() != encoded.upper() or parts[2] == encoded:
        return None
    parts[2] = encoded
    return "/".join(parts)
