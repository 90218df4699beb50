"""Which manager's content a client gets, whether it may, and under which variant that is stored.

What a client states only chooses among the variants that upstreams are configured for. Nothing a client
states becomes a part of a key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from gup import config
from gup.content.catalog import CLIENT_PATCHES, Catalogues, Label, Listed
from gup.content.client_identity import Client, Header
from gup.content.key import ABSENT, ANY, EVERY, Variant
from gup.content.languages import ENGLISH, parse_language
from gup.content.routes import LIVEUPDATE_STREAM, Route
from gup.content.rules import Decision, Origin, Rulebook, document, lines

_MOST_REMEMBERED = 4096
"""Clients may invent monikers and versions without end, so the caches are bounded."""
_ALL = Variant(ANY, ANY)
_NOT_A_STREAM = Decision("files outside the streams are for every client", "")
_FROM_LIVEUPDATE = Decision("LiveUpdate serves clients of every version", "")


@dataclass(frozen=True, slots=True)
class Choice:
    """`asked` is the variant whose upstreams a fill asks, `stored` the variant of the key, `elsewhere` the
    variants whose stored body is equivalent.

    `for_everybody`: independent of what the client states. `refused`: the decision is enforced. `upstream` is
    the name of the manager that it was decided for.
    """

    upstream: str
    asked: Variant
    stored: Variant
    elsewhere: tuple[Variant, ...]
    decision: Decision
    refused: bool
    for_everybody: bool
    unlisted: bool = False

    def of(self, route: Route) -> Route:
        """`route` with the key that was chosen; a variant that its name states stays."""
        stored = route.variant or (None if self.stored == self.asked else self.stored)
        if stored == route.variant and self.elsewhere == route.elsewhere:
            return route
        return replace(route, variant=stored, elsewhere=self.elsewhere)


@dataclass(frozen=True, slots=True)
class _Source:
    """A configured variant, its first upstream by priority, and the names of all its upstreams."""

    variant: Variant
    origin: Origin
    names: tuple[str, ...]


_Option = tuple[_Source, Listed | None]


class Choices:
    """The choices under one set of settings and catalogues. Immutable: others make a new object."""

    def __init__(self, book: Rulebook, catalogues: Catalogues, upstreams: Sequence[config.Upstream]) -> None:
        self.book = book
        self.catalogues = catalogues
        names: dict[Variant, list[str]] = {}
        for upstream in sorted(upstreams, key=lambda upstream: upstream.priority):
            if upstream.kind != "liveupdate":
                names.setdefault(Variant(upstream.version, upstream.language), []).append(upstream.name)
        self._sources = [_Source(variant, book.origins[own[0]], tuple(own)) for variant, own in names.items()]
        self.any_source = bool(self._sources)
        self.standing = lru_cache(_MOST_REMEMBERED)(self._for_everybody)
        """The choice for every client, by the stream; None where it depends on the client."""
        self._options_of = lru_cache(_MOST_REMEMBERED)(self._find_options)
        self._by_client: dict[tuple[str, ...], Choice] = {}

    def choose(self, stream: str, header: Header) -> Choice:
        """Headers are read only where the choice depends on the client."""
        return self.standing(stream) or self.choose_for(stream, self.book.identities.read(header))

    def choose_for(self, stream: str, client: Client) -> Choice:
        if (choice := self.standing(stream)) is not None:
            return choice
        # Keyed by the text as written: a refusal repeats it, and what compares equal may be written
        # differently.
        texts = ("" if stated is None else stated.text for stated in (client.version, client.language))
        stated = (stream, *texts, *client.notes)
        if stated not in self._by_client:
            if len(self._by_client) >= _MOST_REMEMBERED:
                self._by_client.clear()
            self._by_client[stated] = self._decide(stream, client)
        return self._by_client[stated]

    def variants(self, stream: str) -> list[tuple[Variant, Variant]]:
        """Each variant that may have a stream, and the one that its content is stored under."""
        if stream == LIVEUPDATE_STREAM:
            return [(_ALL, _ALL)]
        found = [source.variant for source, _ in self._options_of(stream)]
        return [(variant, self._where(stream, variant)[1]) for variant in found]

    def _for_everybody(self, stream: str) -> Choice | None:
        if stream == LIVEUPDATE_STREAM:
            return Choice(
                "liveupdate", _ALL, _ALL, (_ALL,), _FROM_LIVEUPDATE, refused=False, for_everybody=True
            )
        options = self._options_of(stream)
        if len(options) > 1 and (not self.catalogues.for_all_languages(stream) or self._is_bound(stream)):
            return None
        decisions = [self._standing(stream, option) for option in options]
        first = decisions[0]
        if first is None or any(d is None or d.rule != first.rule for d in decisions):
            return None
        return self._made(stream, options[0], first, for_everybody=True)

    def _standing(self, stream: str, option: _Option) -> Decision | None:
        return _NOT_A_STREAM if stream == ABSENT else self.book.standing(option[1], option[0].origin)

    def _is_bound(self, stream: str) -> bool:
        """Whether a stream is a client patch: it belongs to a version even where it is for all languages."""
        return self.catalogues.type_of(stream) == CLIENT_PATCHES

    def _find_options(self, stream: str) -> list[_Option]:
        """By the catalogues; all sources when no catalogue lists the stream."""
        every = [(source, self._listed(source, stream)) for source in self._sources]
        return [option for option in every if option[1] is not None] or every

    def _listed(self, source: _Source, stream: str) -> Listed | None:
        """A source's catalogue row of a stream. Until its catalogue is known other catalogues' rows are used,
        so that no client patch passes as unlisted.
        """
        rows = (self.catalogues.listed(name, stream) for name in source.names)
        own = next((row for row in rows if row is not None), None)
        others = self.catalogues.somewhere(stream)
        if own is not None or others is None or any(map(self.catalogues.known, source.names)):
            return own
        return Listed(others.moniker, others.product, "")

    def _decide(self, stream: str, client: Client) -> Choice:
        """The best source: one that may serve the client, then by language, by version, by priority.

        Where none may, the one with the most useful refusal: of the client's language, else of its version.
        """

        def rank(row: tuple[_Option, Decision]) -> tuple[int, ...]:
            origin, allowed = row[0][0].origin, row[1].allowed
            language, version = _language_distance(origin, client), _version_distance(origin, client)
            return (0, language, version) if allowed else (1, min(language, 1), version, language)

        rows = [
            (option, self._standing(stream, option) or self.book.decide(option[1], option[0].origin, client))
            for option in self._options_of(stream)
        ]
        return self._made(stream, *min(rows, key=rank), for_everybody=False)

    def _made(self, stream: str, option: _Option, decision: Decision, *, for_everybody: bool) -> Choice:
        source, listed = option
        where, refused = self._where(stream, source.variant), self.book.refuses(decision)
        unlisted = listed is None and stream != ABSENT
        return Choice(source.origin.name, *where, decision, refused, for_everybody, unlisted)

    def _where(self, stream: str, variant: Variant) -> tuple[Variant, Variant, tuple[Variant, ...]]:
        """The variants to ask, to store under, and under which the same bytes may be stored already."""
        variants = [source.variant for source in self._sources]
        if not self.catalogues.for_all_languages(stream):
            # A single configured variant owns everything, also what was stored when it was listed otherwise.
            return variant, variant, (_ALL,) if len(variants) == 1 else ()
        version = variant.version if self._is_bound(stream) else ANY
        same = (other for other in variants if version in (ANY, other.version))
        wide = Variant(EVERY if version == ANY else version, EVERY)
        elsewhere = tuple(dict.fromkeys((variant, *same)))
        return wide if len(variants) > 1 else variant, Variant(version, ANY), elsewhere


def _language_distance(origin: Origin, client: Client) -> int:
    """0 where nothing is stated. English is next to all: AutoUpgrade leads there (FIELD)."""
    if client.language is None or (origin.language is not None and origin.language.fits(client.language)):
        return 0
    if origin.language is None:
        return 1
    return 2 if origin.language == ENGLISH else 3


def _version_distance(origin: Origin, client: Client) -> int:
    if client.version is None or origin.version == client.version:
        return 0
    if origin.version is None:
        return 2
    return 1 if origin.version.release == client.version.release else 3


def why_not_for(stored: Variant, version: str | None, language: str | None, label: Label | None) -> str:
    """Why a site of this version and language (None: of any) has no use for what is stored under a variant;
    "" when it has.

    What is for all versions or languages is for every site, unless the catalogue says otherwise: everything
    is stored so where the upstreams' settings have neither.
    """
    own_version, own_language = stored.version, stored.language
    if label is not None:
        if (
            own_version == ANY and label.type == CLIENT_PATCHES
        ):  # other products are for clients of any version
            own_version = label.version or ANY
        own_language = label.language if own_language == ANY and label.language else own_language
    versions = {own_version.casefold(), "" if label is None else label.version.casefold()}
    if version is not None and own_version != ANY and version.casefold() not in versions:
        return f"it is for {own_version}"
    if language is None or own_language in (ANY, language):
        return ""
    found, wanted = parse_language(own_language), parse_language(language)
    if found is None or wanted is None:
        fits = own_language.casefold() == language.casefold()
    else:
        fits = found.fits(wanted)
    return "" if fits else f"it is for {own_language}"


# --- why, for people and programs


def explain(
    book: Rulebook,
    catalogues: Catalogues,
    upstreams: Sequence[config.Upstream],
    read_from: Mapping[str, str],
    moniker: str,
    client: Client,
) -> dict[str, Any]:
    """What the rules decide for one client and stream at each upstream: `gup rules explain --json`, the API.

    `moniker` is in braces and upper case. `read_from` maps upstream names to where their catalogue was read.
    `served_from` is the content upstream that the service would choose for the client; None where it would
    refuse, or has none.
    """
    choices = Choices(book, catalogues, upstreams)
    choice = choices.choose_for(moniker, client) if choices.any_source else None
    answers: list[dict[str, Any]] = []
    for upstream in upstreams:
        listed = catalogues.listed(upstream.name, moniker)
        decision = book.decide(listed, book.origins[upstream.name], client)
        answer = {
            "upstream": upstream.name,
            "catalogue": read_from.get(upstream.name, "not read yet"),
            "product": None if listed is None else listed.product,
            "product_language": None if listed is None else listed.language or None,
            "refused": book.refuses(decision),
        }
        answers.append(answer | document(decision, book.liveupdate_url))
    # LiveUpdate serves everybody, but not under /content/: where there are managers, they decide.
    managers = [answer for answer, one in zip(answers, upstreams, strict=True) if one.kind != "liveupdate"]
    return {
        "moniker": moniker,
        "mode": book.mode,
        "allowed": any(answer["allowed"] for answer in managers or answers),
        "served_from": None if choice is None or choice.refused else choice.upstream,
        "decisions": answers,
        "client_notes": list(client.notes),
    }


def explained(explanation: Mapping[str, Any]) -> list[str]:
    out = [f"{explanation['moniker']}: {'allowed' if explanation['allowed'] else 'refused'}"]
    if explanation["mode"] != "enforce":
        out[0] += f' (rules.mode is "{explanation["mode"]}": nothing is refused)'
    if explanation["served_from"] is not None and len(explanation["decisions"]) > 1:
        out[0] += f", from {explanation['served_from']}"
    notes = [f"note: {note}" for note in explanation["client_notes"]]
    out += notes
    for answer in explanation["decisions"]:
        out += ["", f"from {answer['upstream']}"]
        out.append(f"  product: {answer['product'] or 'not listed'} (catalogue: {answer['catalogue']})")
        out += [f"  {line}" for line in lines(answer) if line not in notes]
    return out
