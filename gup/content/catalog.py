"""The manager's catalogue: which moniker is which product, and how the manager spells it; no I/O.

FIELD: `ContentInfo.txt` has a line a moniker: `{GUID}: product and version - short name - language`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gup.content.languages import parse_language
from gup.content.releases import find_release

CATALOG_PATH = "/content/ContentInfo.txt"
MAX_CATALOG_BYTES = 1 << 20
"""What is read of a catalogue: thousands of lines."""

_MONIKER = r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
_LINE = re.compile(rf"(\{{{_MONIKER}\}})\s*:\s*(.+)")
_BARE = re.compile(rf"\{{?({_MONIKER})\}}?")


@dataclass(frozen=True, slots=True)
class Listed:
    """One stream as the catalogue lists it. `moniker` is in the manager's own spelling.

    `product` ends with the version that it is made for; `version` is that alone ("12.1 RU6"), "" where the
    product names none. `language` is "" where the line states none.
    """

    moniker: str
    product: str
    language: str
    version: str = ""

    @property
    def all_languages(self) -> bool:
        stated = parse_language(self.language)
        return stated is not None and stated.is_all


def parse_catalog(text: bytes) -> Mapping[str, Listed]:
    """What a ContentInfo.txt lists, by moniker in upper case; lines that are something else are passed over.

    UTF-8 or UTF-16, with its mark or without, any line end.
    """
    rows: dict[str, Listed] = {}
    for line in _decoded(text).splitlines():
        match = _LINE.match(line.strip())
        if match is not None:
            rows[match[1].upper()] = _listed(match[1], match[2])
    return rows


def _decoded(text: bytes) -> str:
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return text.decode("utf-16", errors="replace")
    if text[:1] == b"\0" or text[1:2] == b"\0":  # a mark left out: a line begins with a letter or a brace
        return text.decode("utf-16-be" if text[:1] == b"\0" else "utf-16-le", errors="replace")
    return text.decode("utf-8-sig", errors="replace")


def _listed(moniker: str, rest: str) -> Listed:
    # From the right: a product's name may itself contain " - ".
    parts = [part.strip() for part in rest.split(" - ")]
    language = ""
    if len(parts) > 2 or (len(parts) == 2 and parse_language(parts[1])):
        language = parts.pop()
    product = " - ".join(parts[:-1] if len(parts) > 1 else parts)
    return Listed(moniker, product, language, find_release(product))


def normal_moniker(text: str) -> str | None:
    """`text` as streams are called: braces, upper case; None when it is no moniker."""
    found = _BARE.fullmatch(text.strip())
    return f"{{{found[1].upper()}}}" if found else None


def respelled(path: str, moniker: str) -> str | None:
    """`path` (percent-encoded, as asked upstream) with the moniker spelled so; None if it is spelled so."""
    encoded = moniker.replace("{", "%7B").replace("}", "%7D")
    parts = path.split("/")
    if len(parts) < 3 or parts[2].upper() != encoded.upper() or parts[2] == encoded:
        return None
    parts[2] = encoded
    return "/".join(parts)
