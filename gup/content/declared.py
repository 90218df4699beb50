"""What a client states of itself, as text: for the log and for reports. Compares nothing, refuses nothing."""

import re
from dataclasses import dataclass

from gup.config import Rules
from gup.content.identity import Source, parse_source
from gup.content.releases import Releases

_MOST_LETTERS = 64
_MOST_REMEMBERED = 4096

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Stated:
    """Version and language as stated, "" where nothing was. Equal only to itself: compared very often."""

    version: str = ""
    language: str = ""


NOTHING = Stated()


class Declarations:
    """Reads them from where the settings say. Clients send the same all day: what was read is remembered."""

    def __init__(self, rules: Rules) -> None:
        self._versions = _sources(rules.version_sources)
        self._languages = _sources(rules.language_sources)
        self._wanted = frozenset(source.header.lower() for source in (*self._versions, *self._languages))
        self._is_version = Releases().version
        names = b"|".join(re.escape(name.encode("latin-1")) for name in sorted(self._wanted))
        self._line = re.compile(rb"\n(" + (names or rb"(?!)") + rb"):[ \t]*+([^\r\n]*)", re.IGNORECASE)
        self._known: dict[Headers, Stated] = {}
        self._stated: dict[tuple[str, str], Stated] = {("", ""): NOTHING}

    def of(self, headers: Headers) -> Stated:
        """What a request's headers state; names are in lower case."""
        wanted = self._wanted
        return self._look_up(tuple([field for field in headers if field[0] in wanted]))

    def of_head(self, head: bytes) -> Stated:
        """The same of a whole head that is known to be well formed (gup.server.plain): needs no parser."""
        lines = self._line.findall(head)
        return self._look_up(
            tuple([(name.lower().decode(), value.strip(b" \t").decode("latin-1")) for name, value in lines])
        )

    def _look_up(self, found: Headers) -> Stated:
        if not found:
            return NOTHING
        stated = self._known.get(found)
        return self._read(found) if stated is None else stated

    def _read(self, found: Headers) -> Stated:
        fields: dict[str, str] = {}
        for name, value in found:
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
        versions = [text for source in self._versions if (text := source.read(fields.get))]
        # as the rules do: what can't be read does not keep a later source from being read
        readable = next((text for text in versions if self._is_version(text)), None)
        languages = [text for source in self._languages if (text := source.read(fields.get))]
        pair = (_printable(readable or next(iter(versions), "")), _printable(next(iter(languages), "")))
        if len(self._known) >= _MOST_REMEMBERED:
            self._known.clear()
            self._stated = {("", ""): NOTHING}
        stated = self._known[found] = self._stated.setdefault(pair, Stated(*pair))
        return stated


def _sources(texts: list[str]) -> list[Source]:
    return [source for text in texts if (source := parse_source(text))]


def _printable(text: str) -> str:
    return "".join(letter for letter in text[:_MOST_LETTERS] if letter.isprintable()).strip()
