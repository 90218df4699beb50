"""Releases of the product, by name and by build, compared and ordered.

A build belongs to the newest release of its major and minor version whose first build is not above it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

Build = tuple[int, int, int, int]

KNOWN_RELEASES: Mapping[str, str] = {
    "14.3": "14.3.558.0000",  # FIELD, as the next three
    "14.3 RU1": "14.3.3384.1000",
    "14.3 RU2": "14.3.4615.2000",
    "14.3 RU3": "14.3.5413.3000",
    # RU4 to RU6: the ranges of Tenable's plugin 171960, which names Broadcom's article 154575
    "14.3 RU4": "14.3.7388.4000",
    "14.3 RU5": "14.3.8259.5000",
    "14.3 RU6": "14.3.9205.6000",
    "14.3 RU7": "14.3.9681.7000",  # reports by users that name release and build
    "14.3 RU8": "14.3.10148.8000",  # events published with an integration for clients of RU8
    "14.3 RU9": "14.3.11213.9000",  # users' reports; encyclopedias name 11216, the build after it
    "14.3 RU10": "14.3.12154.10000",  # Broadcom's article 386578, as cited
    "14.4": "14.4.115.0000",  # Broadcom's article 430629, as cited
}
"""Names and first builds; `rules.releases` adds to them and overrides them."""

_MAX_LENGTH = 64
_NAME = re.compile(
    r"(\d{1,4})(?:\.(\d{1,4}))?"
    r"(?:[ ._-]*RU[ ._-]*(\d{1,3}))?"
    r"(?:[ ._-]*MP[ ._-]*(\d{1,3}))?"
    r"(?:[ ._-]*Patch[ ._-]*(\d{1,3}))?",
    re.IGNORECASE | re.ASCII,
)
_DOTTED = re.compile(r"(\d{1,4})\.(\d{1,4})\.(\d{1,9})(?:\.(\d{1,9}))?(?:\.\d{1,9})?", re.ASCII)
_IN_TEXT = re.compile(
    r"(?<![\w.])\d{1,3}\.\d{1,3}(?:\.\d{1,9}){0,2}(?: ?RU ?\d{1,3})?(?: ?MP ?\d{1,3})?(?![\w.])",
    re.IGNORECASE | re.ASCII,
)
_MAX_DOTTED_UPDATE = 99
"""In "14.3.2.1" the third number is a release update, the fourth a maintenance patch: no build is so low."""


@dataclass(frozen=True, slots=True, order=True)
class Release:
    """A release, in the order that releases came: 14.3, 14.3 MP1, 14.3 RU1, 14.3 RU2, 14.4."""

    major: int
    minor: int = 0
    update: int = 0
    maintenance: int = 0

    def __str__(self) -> str:
        update = f" RU{self.update}" if self.update else ""
        return f"{self.major}.{self.minor}{update}" + (f" MP{self.maintenance}" if self.maintenance else "")


@dataclass(frozen=True, slots=True)
class Version:
    text: str = field(compare=False)
    release: Release
    build: Build | None
    patch: int = 0

    def __str__(self) -> str:
        """The release, with the build if it was written as one: `14.3 RU2 (14.3.4615.2000)`."""
        if _parse_build(self.text):
            return f"{self.release} ({self.text})"
        return f"{self.release} Patch {self.patch}" if self.patch else str(self.release)

    def older_than(self, other: "Version") -> bool:
        """By release, then by build as far as both are known."""
        if self.release != other.release:
            return self.release < other.release
        return self.build is not None and other.build is not None and self.build < other.build


class Releases:
    """The table of releases and their first builds: the known ones, overridden by those of `more`."""

    def __init__(self, more: Mapping[str, str] | None = None) -> None:
        """ValueError when `more` has a name or a build that is malformed; `mistakes` says which."""
        self._first: dict[Release, Build] = {}
        for name, build in (*KNOWN_RELEASES.items(), *(more or {}).items()):
            release, first = _parse_name(name), _parse_build(build)
            if release is None or first is None:
                raise ValueError(f"{name!r} = {build!r} is no release and its first build")
            self._first[release] = first
        self._newest_first = sorted(self._first.items(), key=lambda row: row[1], reverse=True)
        self.version = lru_cache(maxsize=1024)(self._version)
        """The version that a text names; None when it names none. Cached: a site has few of them."""

    def _version(self, text: str) -> Version | None:
        text = text.strip()
        if len(text) > _MAX_LENGTH:
            return None
        build = _parse_build(text)
        if build is not None:
            known = (row[0] for row in self._newest_first if row[1] <= build and row[1][:2] == build[:2])
            return Version(text, next(known, Release(*build[:2])), build)
        release = _parse_name(text)
        if release is None:
            return None
        named = _NAME.fullmatch(text)
        patch = int(named[5] or 0) if named else 0
        return Version(text, release, None if patch else self._first.get(release), patch)


def mistakes(releases: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Each name in `releases` that is wrong, or whose build is, with what would be right."""
    for name, build in releases.items():
        if _parse_name(name) is None:
            yield name, "must be the name of a release, such as 14.3 RU11"
        elif _parse_build(build) is None:
            yield name, f"{build!r} is not right: must be a build, such as 14.3.4615.2000"


def find_release(text: str) -> str:
    """The release that a product's name ends with ("Virus Definitions Win32 12.1 RU6"), "" without one."""
    found = _IN_TEXT.findall(text)
    return str(found[-1]) if found else ""


def _parse_name(text: str) -> Release | None:
    named = _NAME.fullmatch(text)
    if named is not None:
        return Release(*(int(number or 0) for number in named.groups()[:4]))
    dotted = _DOTTED.fullmatch(text)
    release = Release(*(int(number or 0) for number in dotted.groups())) if dotted else None
    return release if release and max(release.update, release.maintenance) <= _MAX_DOTTED_UPDATE else None


def _parse_build(text: str) -> Build | None:
    """Four numbers; a fifth, as in installed folders, is dropped."""
    dotted = _DOTTED.fullmatch(text)
    if dotted is None or dotted[4] is None or int(dotted[3]) <= _MAX_DOTTED_UPDATE:
        return None
    major, minor, update, maintenance = map(int, dotted.groups())
    return major, minor, update, maintenance
