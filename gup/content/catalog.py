"""The manager's catalogue: which moniker is which product, and how the manager spells it; no I/O.

FIELD: `ContentInfo.txt` has a line a moniker: `{GUID}: product version - short name - language`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

CATALOG_PATH = "/content/ContentInfo.txt"
MAX_CATALOG_BYTES = 1 << 20
"""What is read of a catalogue: thousands of lines."""

_LINE = re.compile(r"(\{[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\})\s*:\s*(.+)")
_ALL_LANGUAGES = "SymAllLanguages"


@dataclass(frozen=True, slots=True)
class Listed:
    """One stream as the catalogue lists it. `moniker` is in the manager's own spelling."""

    moniker: str
    product: str
    language: str

    @property
    def all_languages(self) -> bool:
        return self.language == _ALL_LANGUAGES


def parse_catalog(text: bytes) -> Mapping[str, Listed]:
    """What a ContentInfo.txt lists, by moniker in upper case; lines that are something else are passed over.

    UTF-8 or UTF-16 with its mark, either line end.
    """
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        decoded = text.decode("utf-16", errors="replace")
    else:
        decoded = text.decode("utf-8-sig", errors="replace")
    rows: dict[str, Listed] = {}
    for line in decoded.splitlines():
        match = _LINE.match(line.strip())
        if match is None:
            continue
        moniker, rest = match[1], [part.strip() for part in match[2].split(" - ")]
        rows[moniker.upper()] = Listed(moniker, rest[0], rest[-1] if len(rest) > 1 else _ALL_LANGUAGES)
    return rows


def respelled(path: str, moniker: str) -> str | None:
    """`path` (percent-encoded, as asked upstream) with the moniker spelled so; None if it is spelled so."""
    encoded = moniker.replace("{", "%7B").replace("}", "%7D")
    parts = path.split("/")
    if len(parts) < 3 or parts[2].upper() != encoded.upper() or parts[2] == encoded:
        return None
    parts[2] = encoded
    return "/".join(parts)
