"""The version and language that a client states in its request's headers.

How a client states them is not public (FIELD), so the places are settings, tried in order. What cannot be
read counts as not stated. Two readers share this: `Identities` for the rules, which compare versions, and
`Declarations` for log and reports, which only show the text and must be fast.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from gup.config import Rules
from gup.config.settings import is_token
from gup.content.languages import Language, parse_language
from gup.content.releases import Releases, Version

Header = Callable[[str], str | None]
"""A request's field by its name in lower case, None when it has none."""
Headers = tuple[tuple[str, str], ...]
"""A request's fields, names in lower case."""

_QUALITY = re.compile(r"q=([01](?:\.[0-9]{0,3})?)", re.IGNORECASE)
_ACCEPT_LANGUAGE = "accept-language"
_MAX_SHOWN = 64
_MOST_REMEMBERED = 4096

Texts = list[tuple[str, str]]
"""Pairs: the place (header, or header and product) and the text stated there."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Client:
    """What a client states; None is undeclared. `notes` names what was stated but could not be read."""

    version: Version | None = None
    language: Language | None = None
    notes: tuple[str, ...] = ()


NOBODY = Client()


class Source(NamedTuple):
    """A header, or the version of `product` in it (`PRODUCT/VERSION`, RFC 9110 section 10.1.5)."""

    header: str
    product: str = ""

    @property
    def name(self) -> str:
        return f"{self.header}: {self.product}" if self.product else self.header

    def read(self, header: Header) -> str | None:
        value = header(self.header.lower())
        if value is None or not value.strip():
            return None
        if self.product:
            found = re.search(rf"(?<![^\s(;]){re.escape(self.product)}/([^\s();,]+)", value, re.IGNORECASE)
            return found[1] if found else None
        return _most_wanted(value) if self.header.lower() == _ACCEPT_LANGUAGE else value.strip()


def parse_source(text: str) -> Source | None:
    header, colon, product = (part.strip() for part in text.partition(":"))
    if not is_token(header) or (colon and not is_token(product)):
        return None
    return Source(header, product)


def _sources(texts: Sequence[str]) -> list[Source]:
    return list(filter(None, map(parse_source, texts)))


def _stated_in(sources: list[Source], header: Header) -> Texts:
    return [(source.name, text) for source in sources if (text := source.read(header)) is not None]


class Identities:
    """Reads versions and languages to compare, from the headers that `rules` name."""

    def __init__(self, rules: Rules, releases: Releases) -> None:
        self._versions, self._languages = _sources(rules.version_sources), _sources(rules.language_sources)
        self._releases = releases
        headers = (source.header for source in (*self._versions, *self._languages))
        self.vary = ", ".join(dict.fromkeys(headers)) or None
        """The headers that are read, as the Vary of an answer that depends on them; None when none is."""

    def read(self, header: Header) -> Client:
        return self._client(_stated_in(self._versions, header), _stated_in(self._languages, header))

    def stated(self, version: str | None, language: str | None) -> Client:
        versions, languages = (
            [(name, text)] if text and text.strip() else []
            for name, text in (("client-version", version), ("client-language", language))
        )
        return self._client(versions, languages)

    def _client(self, versions: Texts, languages: Texts) -> Client:
        notes: list[str] = []
        version = _first(versions, self._releases.version, "version", notes)
        language = _first(languages, parse_language, "language", notes)
        return Client(version, language, tuple(notes))


def _first(texts: Texts, parse: Callable[[str], T | None], what: str, notes: list[str]) -> T | None:
    for name, text in texts:
        found = parse(text)
        if found is not None:
            return found
        shown = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
        notes.append(f"the {what} stated in {name}, {shown!r}, can't be read and counts as not stated")
    return None


def _most_wanted(value: str) -> str | None:
    best, wanted = 0.0, None
    for part in value.split(","):
        tag, _, parameter = (piece.strip() for piece in part.partition(";"))
        quality = _QUALITY.fullmatch(parameter)
        weight = float(quality[1]) if quality else float(not parameter)
        if tag and tag != "*" and weight > best:
            best, wanted = weight, tag
    return wanted


@dataclass(frozen=True, slots=True, eq=False)
class Stated:
    """Version and language as text, "" where not stated. Compared by identity, which is fast."""

    version: str = ""
    language: str = ""


NOTHING = Stated()


class Declarations:
    """Reads them as text. Clients send the same headers all day, so what was read is remembered."""

    def __init__(self, rules: Rules) -> None:
        self._versions, self._languages = _sources(rules.version_sources), _sources(rules.language_sources)
        self._wanted = frozenset(source.header.lower() for source in (*self._versions, *self._languages))
        self._is_version = Releases().version
        names = b"|".join(re.escape(name.encode("latin-1")) for name in sorted(self._wanted))
        self._line = re.compile(rb"\n(" + (names or rb"(?!)") + rb"):[ \t]*+([^\r\n]*)", re.IGNORECASE)
        self._known: dict[Headers, Stated] = {}
        self._stated: dict[tuple[str, str], Stated] = {("", ""): NOTHING}

    def of(self, headers: Headers) -> Stated:
        wanted = self._wanted
        return self._look_up(tuple([field for field in headers if field[0] in wanted]))

    def of_head(self, head: bytes) -> Stated:
        """The same for the bytes of a head that is known to be well-formed (gup.server.hot_cache)."""
        lines = self._line.findall(head)
        return self._look_up(
            tuple([(name.lower().decode(), value.strip(b" \t").decode("latin-1")) for name, value in lines])
        )

    def _look_up(self, found: Headers) -> Stated:
        if not found:
            return NOTHING
        if (stated := self._known.get(found)) is not None:
            return stated
        fields: dict[str, str] = {}
        for name, value in found:
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
        versions = _stated_in(self._versions, fields.get)
        languages = _stated_in(self._languages, fields.get)
        # As for the rules: a version that cannot be read does not hide that of a later source.
        readable = [text for _, text in versions if self._is_version(text)]
        version = next(iter(readable + [text for _, text in versions]), "")
        pair = (_printable(version), _printable(languages[0][1] if languages else ""))
        if len(self._known) >= _MOST_REMEMBERED:
            self._known.clear()
            self._stated = {("", ""): NOTHING}
        stated = self._known[found] = self._stated.setdefault(pair, Stated(*pair))
        return stated


def _printable(text: str) -> str:
    return "".join(letter for letter in text[:_MAX_SHOWN] if letter.isprintable()).strip()
