"""Languages as people, managers and clients write them, and which of them are equal.

A name ("French", "Deutsch", "Chinese (Simplified)") or a tag of BCP 47 ("fr", "fr-CA"). Two are the same when
language and script are: a region changes words, not whether a person can read them.
"""

import re
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


ALL_LANGUAGES = Language("", "SymAllLanguages")
ENGLISH = Language("en-Latn", "English")


@lru_cache(maxsize=1024)
def parse_language(text: str) -> Language | None:
    """The language that `text` names; None when it names none."""
    text = text.strip()
    if text.casefold() in _ALL:
        return Language("", text)
    if not 0 < len(text) <= _MAX_LENGTH:
        return None
    found = (_by_tag(text.replace("_", "-")) if _TAG.fullmatch(text) else None) or _by_name(text)
    return Language(found, text) if found else None


def _by_tag(tag: str) -> str | None:
    import langcodes  # noqa: PLC0415 - 35 ms, and 4 MB with its names: for those who compare languages

    try:
        language = langcodes.get(tag)
    except ValueError:  # LanguageTagError among them
        return None
    return _code(language) if language.is_valid() else None


def _by_name(text: str) -> str | None:
    """The language of a name. The library reads "Chinese Simplified" as "Chinese" and skips what it does not
    know behind a name, so the words are turned round too; where both mean one language, that is more exact.
    """
    words = _CAMEL.sub(" ", text.translate(_AS_SPACES)).split()
    name = " ".join(words)
    if not _WORDS.fullmatch(name) or (len(name) <= 3 and name.isascii()):  # short ones are codes, none valid
        return None
    found, turned = _find(name), _find(" ".join((words[-1], *words[:-1])))
    if found is None:
        return None
    if turned is not None and turned.language == found.language:
        found = turned
    return _code(found)


def _find(name: str) -> "langcodes.Language | None":
    import langcodes  # noqa: PLC0415 - see _by_tag

    try:
        return langcodes.find(name)
    except LookupError:
        return None


def _code(language: "langcodes.Language") -> str | None:
    import langcodes  # noqa: PLC0415 - see _by_tag

    if language.language in _NO_LANGUAGE or not language.language:
        return None
    full = langcodes.get(langcodes.standardize_tag(language.to_tag(), macro=True)).maximize()
    name = "no" if full.language == "nb" else full.language  # CLDR takes Norwegian for Bokmål; names do too
    return f"{name}-{full.script}" if full.script else str(name)
