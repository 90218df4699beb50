"""Who asks: the version and language that a client states in its request's headers; decides nothing.

How a client states them is not public (FIELD), so the places are settings, tried in order. What can't be
read counts as not stated, and is told.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gup.content.languages import Language, parse_language
from gup.content.releases import Releases, Version

Header = Callable[[str], str | None]
"""A request's field by its name in lower case, None when it has none."""

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110 section 5.6.2
_QUALITY = re.compile(r"q=([01](?:\.[0-9]{0,3})?)", re.IGNORECASE)
_ACCEPT_LANGUAGE = "accept-language"
_MAX_SHOWN = 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Client:
    """What a client states; None is undeclared. `notes` tell what was stated and could not be read."""

    version: Version | None = None
    language: Language | None = None
    notes: tuple[str, ...] = ()


NOBODY = Client()


@dataclass(frozen=True, slots=True)
class Source:
    """A header, or the version of `product` in it (`PRODUCT/VERSION`, RFC 9110 section 10.1.5)."""

    header: str
    product: str = ""

    @property
    def name(self) -> str:
        return f"{self.header}: {self.product}" if self.product else self.header

    def read(self, header: Header) -> str | None:
        """What stands there; None when nothing does."""
        value = header(self.header.lower())
        if value is None or not value.strip():
            return None
        if self.product:
            found = re.search(rf"(?<![^\s(;]){re.escape(self.product)}/([^\s();,]+)", value, re.IGNORECASE)
            return found[1] if found else None
        if self.header.lower() == _ACCEPT_LANGUAGE:
            return _most_wanted(value)
        return value.strip()


def parse_source(text: str) -> Source | None:
    """`HEADER` or `HEADER: PRODUCT`; None for anything else."""
    header, colon, product = (part.strip() for part in text.partition(":"))
    if not _TOKEN.fullmatch(header) or (colon and not _TOKEN.fullmatch(product)):
        return None
    return Source(header, product)


class Identities:
    """Reads clients' headers: where from is in the settings, what a version is in `releases`."""

    def __init__(self, versions: Sequence[Source], languages: Sequence[Source], releases: Releases) -> None:
        self._versions = tuple(versions)
        self._languages = tuple(languages)
        self._releases = releases
        self.vary = ", ".join(dict.fromkeys(source.header for source in (*versions, *languages))) or None
        """The fields that are read, as the Vary of an answer that depends on them; None when none is."""

    def read(self, header: Header) -> Client:
        notes: list[str] = []
        version = _first(self._versions, header, self._releases.version, "version", notes)
        language = _first(self._languages, header, parse_language, "language", notes)
        return Client(version, language, tuple(notes))

    def stated(self, version: str | None, language: str | None) -> Client:
        """The client that states these, wherever it does."""
        fields = {"client-version": version, "client-language": language}
        notes: list[str] = []
        return Client(
            _first((Source("client-version"),), fields.get, self._releases.version, "version", notes),
            _first((Source("client-language"),), fields.get, parse_language, "language", notes),
            tuple(notes),
        )


def _first(
    sources: Sequence[Source],
    header: Header,
    parse: Callable[[str], T | None],
    what: str,
    notes: list[str],
) -> T | None:
    for source in sources:
        text = source.read(header)
        if text is None:
            continue
        found = parse(text)
        if found is not None:
            return found
        shown = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
        notes.append(f"the {what} stated in {source.name}, {shown!r}, can't be read and counts as not stated")
    return None


def _most_wanted(value: str) -> str | None:
    """The first language of the highest quality in an Accept-Language (RFC 9110 section 12.5.4)."""
    best, wanted = 0.0, None
    for part in value.split(","):
        tag, _, parameter = (piece.strip() for piece in part.partition(";"))
        quality = _QUALITY.fullmatch(parameter)
        weight = float(quality[1]) if quality else float(not parameter)
        if tag and tag != "*" and weight > best:
            best, wanted = weight, tag
    return wanted
