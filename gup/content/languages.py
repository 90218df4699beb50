"""Languages as people, managers and clients write them, and which of them are equal.

A name ("French", "Deutsch", "Chinese (Simplified)") or a tag of BCP 47 ("fr", "fr-CA"). Two are the same when
language and script are: a region changes words, not whether a person can read them.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import langcodes

_MAX_LENGTH = 64
_ALL = frozenset(("symalllanguages", "alllanguages", "all languages"))
_TAG = re.compile(r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{1,8})*")
_NO_LANGUAGE = frozenset(("und", "mul", "mis", "zxx"))
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_AS_SPACES = str.maketrans("()-_", "    ")
_WORDS = re.compile(r"[^\W\d_]+(?: [^\W\d_]+)*")


@dataclass(frozen=True, slots=True)
class Language:
    """A language: its macro language and script ("fr-Latn"), "" for all; and how it was written."""

    code: str
    text: str = field(compare=False)

    def __str__(self) -> str:
        return self.text

    @property
    def is_all(self) -> bool:
        return not self.code

    def fits(self, other: "Language") -> bool:
        """Whether content in this language is for clients of the other; all languages fit every client."""
        return self.is_all or other.is_all or self.code == other.code


ENGLISH = Language("en-Latn", "English")


@lru_cache(maxsize=1024)
def parse_language(text: str) -> Language | None:
    text = text.strip()
    if text.casefold() in _ALL:
        return Language("", text)
    if not 0 < len(text) <= _MAX_LENGTH:
        return None
    import langcodes  # noqa: PLC0415 - 35 ms, and 4 MB with its names: for those who compare languages

    code = None
    if _TAG.fullmatch(text):
        with suppress(ValueError):  # LanguageTagError among them
            language = langcodes.get(text.replace("_", "-"))
            code = _code(language) if language.is_valid() else None
    code = code or _by_name(text, langcodes.find)
    return Language(code, text) if code else None


def _by_name(text: str, find: "Callable[[str], langcodes.Language]") -> str | None:
    """The language of a name. The library reads "Chinese Simplified" as "Chinese" and skips what it does not
    know behind a name, so the words are turned round too; where both mean one language, that is more exact.
    """
    words = _CAMEL.sub(" ", text.translate(_AS_SPACES)).split()
    name = " ".join(words)
    if not _WORDS.fullmatch(name) or (len(name) <= 3 and name.isascii()):  # short ones are codes, none valid
        return None
    try:
        found = find(name)
        with suppress(LookupError):
            turned = find(" ".join((words[-1], *words[:-1])))
            found = turned if turned.language == found.language else found
    except LookupError:
        return None
    return _code(found)


def _code(language: "langcodes.Language") -> str | None:
    if language.language in _NO_LANGUAGE or not language.language:
        return None
    full = language.prefer_macrolanguage().maximize()
    name = "no" if full.language == "nb" else full.language  # CLDR takes Norwegian for Bokmål; names do too
    return f"{name}-{full.script}" if full.script else str(name)
