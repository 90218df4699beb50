"""The delivery rules: may this client have this stream from this upstream, and why; pure, asks nobody.

FIELD, "Delivery rules of the seed": they bind client patches. Other content goes to everybody unless its type
is switched off.
"""

from collections.abc import Collection
from dataclasses import dataclass

from gup import config
from gup.content.catalog import Listed
from gup.content.decision import ANYBODY, Action, Decision, Fit, Origin, Remedy, Rule
from gup.content.identity import Client
from gup.content.languages import ENGLISH, Language, parse_language
from gup.content.releases import Release, Releases, Version
from gup.content.stream_types import CLIENT_PATCHES, StreamTypes

FIRST_WITH_PATCHES = Release(14, 3, 2)
"""14.3 RU2: client patches are on LiveUpdate from it on, so no older manager can have them."""

LIVEUPDATE = Remedy(Action.LIVEUPDATE, "Meanwhile let the client take it from a LiveUpdate server.")


@dataclass(frozen=True, slots=True)
class _Patch:
    """A client patch at an upstream: whom it is for. None is anybody, or not known."""

    version: Version | None
    manager_language: Language | None
    own_language: Language | None
    """As the catalogue lists it; differs from the manager's where AutoUpgrade brings clients to English."""

    @property
    def fits(self) -> Fit:
        return Fit(self.version, self.own_language or self.manager_language)


class Rules:
    """The rules as the settings have them. Immutable; changed settings make new ones."""

    def __init__(
        self,
        settings: config.Rules,
        types: StreamTypes,
        releases: Releases,
        supported_languages: Collection[Language] = (),
    ) -> None:
        self._settings = settings
        self._types = types
        self._releases = releases
        self._supported = supported_languages

    def standing(self, stream: Listed | None, origin: Origin) -> Decision | None:
        """What holds for every client; None when it depends on the client, whom only `decide` looks at.

        `stream` is the catalogue's row, None for a moniker that no catalogue lists.
        """
        found = self._decide_for_all(stream, origin)
        return found if isinstance(found, Decision) else None

    def decide(self, stream: Listed | None, origin: Origin, client: Client) -> Decision:
        """Whether `client` may have `stream` from `origin`."""
        found = self._decide_for_all(stream, origin)
        return found if isinstance(found, Decision) else self._decide_for(found, client)

    # --- the same for every client

    def _decide_for_all(self, stream: Listed | None, origin: Origin) -> Decision | _Patch:
        if self._settings.mode == "off":
            return Decision("the rules are off", "" if stream is None else self._types.of(stream.product))
        if stream is None:
            return self._decide_unlisted(origin)
        return self._decide_by_type(stream) or self._decide_by_origin(stream, origin)

    def _decide_unlisted(self, origin: Origin) -> Decision:
        if self._settings.unlisted == "serve" or origin.kind == "liveupdate":  # LiveUpdate has no catalogue
            return Decision("no catalogue lists it, so no rule binds it", "")
        remedy = _change('rules.unlisted = "serve"')
        return Decision("no catalogue lists it", "", Rule.UNLISTED, remedies=(remedy,))

    def _decide_by_type(self, stream: Listed) -> Decision | None:
        settings, type_ = self._settings, self._types.of(stream.product)
        if settings.content_types and type_ not in settings.content_types:
            because = f"content of the type {type_} is not served here"
            remedy = _change(f"{type_} among rules.content_types")
            return Decision(because, type_, Rule.CONTENT_TYPE, remedies=(remedy,))
        if type_ != CLIENT_PATCHES:
            return Decision(f"content of the type {type_} is for every client", type_)
        if not settings.download_client_patches:
            remedy = _change("rules.download_client_patches = true")
            because = "client patches are switched off here"
            return Decision(because, type_, Rule.CLIENT_PATCHES_OFF, remedies=(remedy,))
        return None

    def _decide_by_origin(self, stream: Listed, origin: Origin) -> Decision | _Patch:
        if origin.kind == "liveupdate":
            return Decision("LiveUpdate serves clients of every version", CLIENT_PATCHES)
        if origin.version is not None and origin.version.release < FIRST_WITH_PATCHES:
            because = f"{origin.name} is {origin.version}, and client patches come with {FIRST_WITH_PATCHES}"
            upgrade = Remedy(Action.UPGRADE_MANAGER, f"Bring the manager to {FIRST_WITH_PATCHES} or later.")
            return Decision(because, CLIENT_PATCHES, Rule.MANAGER_TOO_OLD, remedies=(upgrade, LIVEUPDATE))
        patch = self._patch(stream, origin)
        if patch.fits == ANYBODY:
            because = "neither settings nor catalogue tell which version and language it is for"
            note = f"version and language of the upstream {origin.name} are not set: nothing was compared"
            return Decision(because, CLIENT_PATCHES, notes=(note,))
        return patch

    def _patch(self, stream: Listed, origin: Origin) -> _Patch:
        version = origin.version
        if version is None:
            # The catalogue's word, if that is a release with patches: "14.3" alone names a line of products.
            listed = self._releases.version(stream.version)
            version = listed if listed is not None and listed.release >= FIRST_WITH_PATCHES else None
        language = parse_language(stream.language)
        if language is not None and language.is_all:
            return _Patch(version, None, None)
        return _Patch(version, origin.language, language)

    # --- by client

    def _decide_for(self, patch: _Patch, client: Client) -> Decision:
        return (
            self._refuse_version(patch, client)
            or self._refuse_language(patch, client)
            or self._decide_on_silence(patch, client)
        )

    def _refuse_version(self, patch: _Patch, client: Client) -> Decision | None:
        wanted, has = patch.version, client.version
        if wanted is None or has is None:
            return None
        exact = self._settings.version_match == "build"
        if (wanted == has) if exact else wanted.same_release(has):
            return None
        remedies = [Remedy(Action.UPGRADE_CLIENT, f"Bring the client to {wanted}, the manager's version.")]
        notes = client.notes
        if has.release < FIRST_WITH_PATCHES:
            notes = (*notes, f"no manager has client patches for {has}: they come with {FIRST_WITH_PATCHES}")
        else:
            at = 0 if wanted.older_than(has) else 1  # nobody takes anything back: the older side goes first
            manager = Remedy(Action.UPGRADE_MANAGER, f"Bring the manager to {has}, the client's version.")
            remedies.insert(at, manager)
        return Decision(
            f"the client is {has} and the manager {wanted}; client patches need the same "
            f"{'build' if exact else 'release'} on both",
            CLIENT_PATCHES,
            Rule.VERSION,
            client,
            patch.fits,
            (*remedies, LIVEUPDATE),
            notes,
        )

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
        return Decision(
            f"{because}; client patches need the same language on both",
            CLIENT_PATCHES,
            Rule.LANGUAGE,
            client,
            patch.fits,
            (*self._language_remedies(patch, has), LIVEUPDATE),
            client.notes,
        )

    def _language_remedies(self, patch: _Patch, has: Language) -> list[Remedy]:
        remedies = [Remedy(Action.MANAGER_OF_LANGUAGE, f"Let a manager whose language is {has} serve it.")]
        if has == ENGLISH:
            if not self._settings.english_after_autoupgrade:
                remedies.append(_change("rules.english_after_autoupgrade = true, for English patches"))
        elif has not in self._supported:
            remedies.append(self._autoupgrade(patch, has))
        return remedies

    def _autoupgrade(self, patch: _Patch, has: Language) -> Remedy:
        """FIELD, rule 3: a client in an unsupported language becomes an English one."""
        whether = f"{has} is not supported" if self._supported else f"If {has} is not supported"
        text = (
            f"{whether}: enable AutoUpgrade, which installs the English package and English client patches."
        )
        if patch.manager_language not in (None, ENGLISH) and not self._settings.english_after_autoupgrade:
            text += " To get those here then, set rules.english_after_autoupgrade or add an English manager."
        return Remedy(Action.AUTOUPGRADE_TO_ENGLISH, text)

    def _decide_on_silence(self, patch: _Patch, client: Client) -> Decision:
        fits, settings = patch.fits, self._settings
        silent: dict[str, list[str]] = {}  # what is not stated, and the places where it could be
        if fits.version is not None and client.version is None:
            silent["version"] = settings.version_sources
        if fits.language is not None and client.language is None:
            silent["language"] = settings.language_sources
        if not silent:
            because = "the client's version and language are right for it"
            return Decision(because, CLIENT_PATCHES, None, client, fits, (), client.notes)
        because = f"the client does not state its {' or '.join(silent)}"
        if settings.undeclared == "serve":
            because += ', and rules.undeclared is "serve"'
            return Decision(because, CLIENT_PATCHES, None, client, fits, (), client.notes)
        places = " and ".join(sources[0] for sources in silent.values() if sources)
        text = f"Let the client state its {' and '.join(silent)}" + (f", as in {places}." if places else ".")
        remedies = (Remedy(Action.DECLARE, text), LIVEUPDATE)
        return Decision(because, CLIENT_PATCHES, Rule.UNDECLARED, client, fits, remedies, client.notes)


def _change(setting: str) -> Remedy:
    return Remedy(Action.CHANGE_SETTING, f"Whoever runs this service can allow it: {setting}.")
