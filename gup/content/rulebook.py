"""The delivery rules of one set of settings: checked, and with all that they compare; decides nothing."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from gup import config
from gup.content.decision import Decision, Origin
from gup.content.identity import Identities, Source, parse_source
from gup.content.key import ANY
from gup.content.languages import parse_language
from gup.content.releases import Releases, mistakes
from gup.content.rules import Rules
from gup.content.stream_types import StreamTypes
from gup.errors import SettingsError


class Rulebook:
    """Rules, upstreams and identities that belong together. Immutable: changed settings make a new one."""

    def __init__(self, settings: config.Settings) -> None:
        """SettingsError names every setting that the rules can't be applied with.

        Reads the tables of languages, tens of milliseconds: not to be called on an event loop that serves.
        """
        own = settings.rules
        self.types = StreamTypes(settings.catalog.types)
        problems = [f"rules.releases.{name}: {right}" for name, right in mistakes(own.releases)]
        self.releases = Releases({} if problems else own.releases)
        problems += _mistakes(settings, self.types, self.releases)
        if problems:
            raise SettingsError(problems)
        if own.mode != "off":
            parse_language("French")  # its name, so that no request has to wait for the tables
        self.mode: Literal["enforce", "report", "off"] = own.mode
        supported = [language for text in own.supported_languages if (language := parse_language(text))]
        self.rules = Rules(own, self.types, self.releases, supported)
        self.identities = Identities(
            _sources(own.version_sources), _sources(own.language_sources), self.releases
        )
        self.origins = {upstream.name: self._origin(upstream) for upstream in settings.upstream}
        """By the upstream's name."""
        servers = [upstream.url for upstream in settings.upstream if upstream.kind == "liveupdate"]
        self.liveupdate_url = own.liveupdate or next(iter(servers), None)

    def refuses(self, decision: Decision) -> bool:
        """Whether a decision is enforced: with `rules.mode` "report" it is only counted and logged."""
        return not decision.allowed and self.mode == "enforce"

    def _origin(self, upstream: config.Upstream) -> Origin:
        version = None if upstream.version == ANY else self.releases.version(upstream.version)
        language = None if upstream.language == ANY else parse_language(upstream.language)
        if language is not None and language.is_all:
            language = None
        return Origin(upstream.name, upstream.kind, version, language)


def _sources(texts: Sequence[str]) -> list[Source]:
    return [source for text in texts if (source := parse_source(text))]


def _mistakes(settings: config.Settings, types: StreamTypes, releases: Releases) -> list[str]:
    language = "must be a language, such as French or fr"
    version = "must be a release or a build, such as 14.3 RU2 or 14.3.4615.2000"
    names = f"must be one of {', '.join(sorted(types.names))}"
    source = "must be HEADER or HEADER: PRODUCT, such as User-Agent: SEP"
    own, found = settings.rules, list[str]()
    for number, upstream in enumerate(settings.upstream, 1):
        at = f"upstream#{number}"
        found += _wrong(
            f"{at}.version", [upstream.version], _or_any(releases.version), f'{version}, or "any"'
        )
        found += _wrong(
            f"{at}.language", [upstream.language], _or_any(parse_language), f'{language}, or "any"'
        )
    found += _wrong("rules.content_types", own.content_types, types.names.__contains__, names)
    found += _wrong("rules.supported_languages", own.supported_languages, parse_language, language)
    found += _wrong("rules.version_sources", own.version_sources, parse_source, source)
    found += _wrong("rules.language_sources", own.language_sources, parse_source, source)
    return found


def _or_any(parse: Callable[[str], object]) -> Callable[[str], object]:
    return lambda text: text == ANY or parse(text)


def _wrong(key: str, texts: Sequence[str], good: Callable[[str], object], right: str) -> Iterator[str]:
    return (f"{key}: {text!r} is not right: {right}" for text in texts if not good(text))
