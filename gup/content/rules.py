"""The delivery rules: may this client have this stream from this upstream, and why.

FIELD, "Delivery rules of the seed": they bind client patches. Other content goes to everybody unless its type
is switched off.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from gup import config
from gup.content.catalog import CLIENT_PATCHES, Listed, StreamTypes
from gup.content.client_identity import NOBODY, Client, Identities, parse_source
from gup.content.key import ANY
from gup.content.languages import ENGLISH, Language, parse_language
from gup.content.releases import Release, Releases, Version, mistakes
from gup.errors import Problem, SettingsError

FIRST_WITH_PATCHES = Release(14, 3, 2)
"""14.3 RU2: the first release whose client patches are on LiveUpdate, so no older manager has them."""


class Rule(StrEnum):
    """The rule by which a request is refused; the label of `gup_rule_refusals_total`."""

    UNLISTED = "unlisted"
    CONTENT_TYPE = "content_type"
    CLIENT_PATCHES_OFF = "client_patches_off"
    MANAGER_TOO_OLD = "manager_too_old"
    VERSION = "version"
    LANGUAGE = "language"
    UNDECLARED = "undeclared"


Action = Literal[
    "upgrade-client",
    "upgrade-manager",
    "manager-of-language",
    "autoupgrade-to-english",
    "declare",
    "change-setting",
    "liveupdate",
]
"""What would help a client that was refused, as a word for programs."""


class Remedy(NamedTuple):
    """What would help; `text` is a sentence for people."""

    action: Action
    text: str


LIVEUPDATE = Remedy("liveupdate", "Until then the client can use a LiveUpdate server.")


@dataclass(frozen=True, slots=True)
class Origin:
    """An upstream as the rules see it; None where the settings state nothing."""

    name: str
    kind: Literal["manager", "liveupdate", "gup"] = "manager"
    version: Version | None = None
    language: Language | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """`rule` is None exactly when the client may have it; `because` is a sentence either way.

    `type` is the stream's type, "" for an unlisted one. `client` is NOBODY where the decision holds for every
    client. `fits` is the client that the stream is for. `notes` says what was malformed or not comparable.
    """

    because: str
    type: str
    rule: Rule | None = None
    client: Client = NOBODY
    fits: Client = NOBODY
    remedies: tuple[Remedy, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def allowed(self) -> bool:
        return self.rule is None


@dataclass(frozen=True, slots=True)
class _Patch:
    """Whom a client patch of an upstream is for; None is anybody, or unknown.

    `own_language` is as the catalogue lists it; it differs from the manager's where AutoUpgrade brings
    clients to English.
    """

    version: Version | None
    manager_language: Language | None
    own_language: Language | None

    @property
    def fits(self) -> Client:
        return Client(self.version, self.own_language or self.manager_language)

    def decision(
        self, because: str, client: Client, rule: Rule | None = None, *remedies: Remedy, note: str = ""
    ) -> Decision:
        notes = (*client.notes, note) if note else client.notes
        remedies = (*remedies, LIVEUPDATE) if rule else ()
        return Decision(because, CLIENT_PATCHES, rule, client, self.fits, remedies, notes)


class Rulebook:
    """The rules of one set of settings, with upstreams and client identities. Immutable."""

    def __init__(self, settings: config.Settings) -> None:
        """SettingsError names every setting that makes the rules inapplicable.

        Loads the language tables, which takes tens of milliseconds: not to be called on an event loop that
        serves.
        """
        own = self._settings = settings.rules
        self.types = StreamTypes(settings.catalog.types)
        problems = [f"rules.releases.{name}: {right}" for name, right in mistakes(own.releases)]
        self.releases = Releases({} if problems else own.releases)
        problems += _mistakes(settings, self.types, self.releases)
        if problems:
            raise SettingsError(problems)
        if own.mode != "off":
            parse_language("French")  # its name, so that no request has to wait for the tables
        self.mode = own.mode
        self._supported = [language for text in own.supported_languages if (language := parse_language(text))]
        self.identities = Identities(own, self.releases)
        self.origins = {upstream.name: self._origin(upstream) for upstream in settings.upstream}
        servers = (upstream.url for upstream in settings.upstream if upstream.kind == "liveupdate")
        self.liveupdate_url = own.liveupdate or next(servers, None)

    def _origin(self, upstream: config.Upstream) -> Origin:
        version = None if upstream.version == ANY else self.releases.version(upstream.version)
        language = None if upstream.language == ANY else parse_language(upstream.language)
        return Origin(upstream.name, upstream.kind, version, language if language and language.code else None)

    def standing(self, stream: Listed | None, origin: Origin) -> Decision | None:
        """The decision that holds for every client; None when it depends on the client: see `decide`.

        `stream` is the catalogue's row, None for a moniker that no catalogue lists.
        """
        found = self._decide_for_all(stream, origin)
        return found if isinstance(found, Decision) else None

    def decide(self, stream: Listed | None, origin: Origin, client: Client) -> Decision:
        found = self._decide_for_all(stream, origin)
        if isinstance(found, Decision):
            return found
        refusal = self._refuse_version(found, client) or self._refuse_language(found, client)
        return refusal or self._decide_undeclared(found, client)

    def refuses(self, decision: Decision) -> bool:
        """Whether a decision is enforced: with `rules.mode` "report" it is only counted and logged."""
        return not decision.allowed and self.mode == "enforce"

    def _decide_for_all(  # noqa: C901, PLR0911 - the rules in their order
        self, stream: Listed | None, origin: Origin
    ) -> Decision | _Patch:
        settings, type_ = self._settings, "" if stream is None else self.types.of(stream.product)

        def refused(rule: Rule, because: str, *remedies: Remedy) -> Decision:
            return Decision(because, type_, rule, remedies=remedies)

        if self.mode == "off":
            return Decision("the rules are off", type_)
        if stream is None:
            if settings.unlisted == "serve" or origin.kind == "liveupdate":  # LiveUpdate has no catalogue
                return Decision("no catalogue lists it, so no rule applies", "")
            return refused(Rule.UNLISTED, "no catalogue lists it", _change('rules.unlisted = "serve"'))
        if settings.content_types and type_ not in settings.content_types:
            remedy = _change(f"{type_} among rules.content_types")
            return refused(Rule.CONTENT_TYPE, f"content of the type {type_} is not served here", remedy)
        if type_ != CLIENT_PATCHES:
            return Decision(f"content of the type {type_} is for every client", type_)
        if not settings.download_client_patches:
            remedy = _change("rules.download_client_patches = true")
            return refused(Rule.CLIENT_PATCHES_OFF, "client patches are switched off here", remedy)
        if origin.kind == "liveupdate":
            return Decision("LiveUpdate serves clients of every version", type_)
        if origin.version is not None and origin.version.release < FIRST_WITH_PATCHES:
            because = f"{origin.name} is {origin.version}, and client patches come with {FIRST_WITH_PATCHES}"
            upgrade = Remedy("upgrade-manager", f"Upgrade the manager to {FIRST_WITH_PATCHES} or later.")
            return refused(Rule.MANAGER_TOO_OLD, because, upgrade, LIVEUPDATE)
        version = origin.version
        if version is None:
            # The catalogue's version, if it is a release with patches: "14.3" alone names a line of products.
            listed = self.releases.version(stream.version)
            version = listed if listed is not None and listed.release >= FIRST_WITH_PATCHES else None
        languages = (
            (None, None) if stream.all_languages else (origin.language, parse_language(stream.language))
        )
        patch = _Patch(version, *languages)
        if patch.fits != NOBODY:
            return patch
        because = "neither the settings nor the catalogue state its version and language"
        note = f"version and language of the upstream {origin.name} are not set: nothing was compared"
        return patch.decision(because, NOBODY, note=note)

    def _refuse_version(self, patch: _Patch, client: Client) -> Decision | None:
        wanted, has = patch.version, client.version
        if wanted is None or has is None:
            return None
        exact = self._settings.version_match == "build"
        if (wanted == has) if exact else wanted.release == has.release:
            return None
        remedies = [Remedy("upgrade-client", f"Install {wanted} on the client, the manager's version.")]
        note = ""
        if has.release < FIRST_WITH_PATCHES:
            note = f"no manager has client patches for {has}: they come with {FIRST_WITH_PATCHES}"
        else:
            at = 0 if wanted.older_than(has) else 1  # versions only go up: first what the older side can do
            manager = Remedy("upgrade-manager", f"Upgrade the manager to {has}, the client's version.")
            remedies.insert(at, manager)
        same = "build" if exact else "release"
        because = f"the client is {has} and the manager {wanted}; client patches need the same {same} on both"
        return patch.decision(because, client, Rule.VERSION, *remedies, note=note)

    def _refuse_language(self, patch: _Patch, client: Client) -> Decision | None:
        has = client.language
        if has is None or has.is_all:
            return None
        manager, own = patch.manager_language, patch.own_language
        english = self._settings.english_after_autoupgrade and has == ENGLISH
        if manager is not None and manager != has and not english:
            because = f"the client is {has} and the manager {manager}"
        elif own is not None and own != has:
            because = f"the client is {has} and the patch {own}"
        else:
            return None
        because += "; client patches need the same language on both"
        return patch.decision(because, client, Rule.LANGUAGE, *self._language_remedies(patch, has))

    def _language_remedies(self, patch: _Patch, has: Language) -> Iterator[Remedy]:
        yield Remedy("manager-of-language", f"Serve it from a manager in {has}.")
        after_autoupgrade = self._settings.english_after_autoupgrade
        if has == ENGLISH and not after_autoupgrade:
            yield _change("rules.english_after_autoupgrade = true, for English patches")
        elif has != ENGLISH and has not in self._supported:  # FIELD, rule 3: it becomes an English client
            whether = f"{has} is not supported" if self._supported else f"If {has} is not supported"
            english = "enable AutoUpgrade, which installs the English package and English client patches."
            text = f"{whether}: {english}"
            if patch.manager_language not in (None, ENGLISH) and not after_autoupgrade:
                here = "set rules.english_after_autoupgrade or add an English manager"
                text += f" To serve those here, {here}."
            yield Remedy("autoupgrade-to-english", text)

    def _decide_undeclared(self, patch: _Patch, client: Client) -> Decision:
        fits, settings = patch.fits, self._settings
        silent: dict[str, list[str]] = {}  # what is not stated, and the places where it could be
        if fits.version is not None and client.version is None:
            silent["version"] = settings.version_sources
        if fits.language is not None and client.language is None:
            silent["language"] = settings.language_sources
        if not silent:
            return patch.decision("the client's version and language are right for it", client)
        because = f"the client does not state its {' or '.join(silent)}"
        if settings.undeclared == "serve":
            return patch.decision(f'{because}, and rules.undeclared is "serve"', client)
        places = " and ".join(sources[0] for sources in silent.values() if sources)
        text = f"Have the client state its {' and '.join(silent)}" + (f", as in {places}." if places else ".")
        return patch.decision(because, client, Rule.UNDECLARED, Remedy("declare", text))


def _change(setting: str) -> Remedy:
    return Remedy("change-setting", f"The administrator of this service can allow it: {setting}.")


def _mistakes(settings: config.Settings, types: StreamTypes, releases: Releases) -> Iterator[str]:
    own = settings.rules
    language = "must be a language, such as French or fr"
    or_any = f'{language}, or "any"'
    version = 'must be a release or a build, such as 14.3 RU2 or 14.3.4615.2000, or "any"'
    names = f"must be one of {', '.join(sorted(types.names))}"
    source = "must be HEADER or HEADER: PRODUCT, such as User-Agent: SEP"
    rows: list[tuple[str, Iterable[str], Callable[[str], object], str]] = []
    for number, upstream in enumerate(settings.upstream, 1):
        rows.append((f"upstream#{number}.version", {upstream.version} - {ANY}, releases.version, version))
        rows.append((f"upstream#{number}.language", {upstream.language} - {ANY}, parse_language, or_any))
    rows += [
        ("rules.content_types", own.content_types, types.names.__contains__, names),
        ("rules.canary.types", own.canary.types, types.names.__contains__, names),
        ("rules.supported_languages", own.supported_languages, parse_language, language),
        ("rules.version_sources", own.version_sources, parse_source, source),
        ("rules.language_sources", own.language_sources, parse_source, source),
    ]
    for key, texts, good, right in rows:
        yield from (f"{key}: {text!r} is not right: {right}" for text in texts if not good(text))


# --- decisions as problems, JSON and text


def problem(decision: Decision, liveupdate_url: str | None) -> Problem:
    """The 403 for a client that was refused, with a Link to the LiveUpdate server where that would help."""
    assert decision.rule is not None, "only a refusal is a problem"
    fields = document(decision, liveupdate_url)
    extensions = {name: fields[name] for name in ("rule", "client", "fits", "remedies")}
    if decision.notes:
        extensions["notes"] = fields["notes"]
    sentences = [f"{decision.because[:1].upper()}{decision.because[1:]}."]
    detail = " ".join(sentences + [remedy.text for remedy in decision.remedies])
    by_liveupdate = liveupdate_url is not None and LIVEUPDATE in decision.remedies
    headers = (("Link", f'<{liveupdate_url}>; rel="alternate"'),) if by_liveupdate else ()  # RFC 8288
    return Problem("rule-refused", detail, headers=headers, extensions=extensions)


def document(decision: Decision, liveupdate_url: str | None) -> dict[str, Any]:
    remedies = [remedy._asdict() for remedy in decision.remedies]
    for remedy in remedies:
        if remedy["action"] == "liveupdate" and liveupdate_url is not None:
            remedy["url"] = liveupdate_url
    return {
        "allowed": decision.allowed,
        "rule": None if decision.rule is None else str(decision.rule),
        "because": decision.because,
        "type": decision.type or None,
        "client": _stated(decision.client),
        "fits": _stated(decision.fits),
        "remedies": remedies,
        "notes": list(decision.notes),
    }


def _stated(client: Client) -> dict[str, str | None]:
    stated = {"version": client.version, "language": client.language}
    return {name: None if what is None else str(what) for name, what in stated.items()}


def lines(fields: Mapping[str, Any]) -> Iterator[str]:
    verdict = "allowed" if fields["allowed"] else f"refused by the rule {fields['rule']}"
    yield f"{verdict}: {fields['because']}"
    if fields["type"]:
        yield f"type of content: {fields['type']}"
    fits = fields["fits"]
    if any(fits.values()):
        yield f"fits: version {fits['version'] or 'any'}, language {fits['language'] or 'any'}"
    for remedy in fields["remedies"]:
        yield f"remedy: {remedy['text']}" + (f" ({remedy['url']})" if "url" in remedy else "")
    for note in fields["notes"]:
        yield f"note: {note}"
