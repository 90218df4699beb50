"""Which manager's content a client gets, whether it may, and where it is stored; pure, asks nobody.

What a client states only chooses among the variants that upstreams are configured for. Nothing a client
states becomes a part of a key.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from gup import config
from gup.content.catalog import Listed
from gup.content.catalogues import Catalogues
from gup.content.decision import Decision, Origin
from gup.content.identity import Client, Header
from gup.content.key import ABSENT, ANY, EVERY, Variant
from gup.content.languages import ENGLISH
from gup.content.routes import LIVEUPDATE_STREAM, Route
from gup.content.rulebook import Rulebook
from gup.content.stream_types import CLIENT_PATCHES

Key = TypeVar("Key")
Value = TypeVar("Value")
_MOST_REMEMBERED = 4096
_ALL = Variant(ANY, ANY)
_NOT_A_STREAM = Decision("files beside the streams are for every client", "")
_FROM_LIVEUPDATE = Decision("LiveUpdate serves clients of every version", "")


@dataclass(frozen=True, slots=True)
class Choice:
    """`asked` is whose upstreams a fill asks, `stored` the variant of the key, `elsewhere` the variants whose
    stored body would be as good.

    `for_everybody`: the same whatever the client states. `refused`: the decision is enforced. `upstream` is
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
        """`route` with the key that was chosen; what its name itself states stays."""
        stored = route.variant or (None if self.stored == self.asked else self.stored)
        if stored == route.variant and self.elsewhere == route.elsewhere:
            return route
        return Route(
            route.kind,
            route.immutable,
            route.stream,
            route.revision,
            route.file,
            route.upstream_path,
            stored,
            self.elsewhere,
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """A variant that there are upstreams for, the most wanted of them, and all their names."""

    variant: Variant
    origin: Origin
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Option:
    """A place that may have a stream, and how it lists that."""

    place: _Place
    listed: Listed | None


class Choices:
    """What is chosen under one set of settings and catalogues; others make a new one."""

    def __init__(self, book: Rulebook, catalogues: Catalogues, upstreams: Sequence[config.Upstream]) -> None:
        self.book = book
        self.catalogues = catalogues
        self._places = _places(book, upstreams)
        self._options: dict[str, tuple[_Option, ...]] = {}
        self._everybody: dict[str, Choice | None] = {}
        self._by_client: dict[tuple[str, ...], Choice] = {}
        self._liveupdate = Choice("liveupdate", _ALL, _ALL, (_ALL,), _FROM_LIVEUPDATE, False, True)

    @property
    def any_place(self) -> bool:
        """Whether there is any upstream for content."""
        return bool(self._places)

    def choose(self, stream: str, header: Header) -> Choice:
        """For the client whose request has these headers; they are read only where they matter."""
        choice = self.standing(stream)
        return choice if choice is not None else self.choose_for(stream, self.book.identities.read(header))

    def standing(self, stream: str) -> Choice | None:
        """What is chosen for every client; None where it depends on the client."""
        if stream == LIVEUPDATE_STREAM:
            return self._liveupdate
        try:
            return self._everybody[stream]
        except KeyError:
            choice = self._for_everybody(stream)
            _remember(self._everybody, stream, choice)
            return choice

    def choose_for(self, stream: str, client: Client) -> Choice:
        """For a client that states this."""
        choice = self.standing(stream)
        if choice is not None:
            return choice
        # By what was written: a refusal repeats it, and what compares equal may be written differently.
        version = "" if client.version is None else client.version.text
        language = "" if client.language is None else client.language.text
        stated = (stream, version, language, *client.notes)
        known = self._by_client.get(stated)
        if known is None:
            known = self._decide(stream, client)
            _remember(self._by_client, stated, known)
        return known

    def places(self, stream: str) -> list[tuple[Variant, Variant]]:
        """Of each place that may have a stream its variant, and the one that its content is stored under."""
        if stream == LIVEUPDATE_STREAM:
            return [(_ALL, _ALL)]
        found = [option.place.variant for option in self._options_of(stream)]
        return [(variant, self._where(stream, variant)[1]) for variant in found]

    # --- for everybody

    def _for_everybody(self, stream: str) -> Choice | None:
        options = self._options_of(stream)
        if len(options) == 1:
            decision = self._standing(stream, options[0])
            return None if decision is None else self._made(stream, options[0], decision, for_everybody=True)
        if not self.catalogues.for_all_languages(stream) or self._is_bound(stream):
            return None
        decisions = [self._standing(stream, option) for option in options]
        first = decisions[0]
        if first is None or any(d is None or d.rule != first.rule for d in decisions):
            return None
        return self._made(stream, options[0], first, for_everybody=True)

    def _standing(self, stream: str, option: _Option) -> Decision | None:
        if stream == ABSENT:
            return _NOT_A_STREAM
        return self.book.rules.standing(option.listed, option.place.origin)

    def _is_bound(self, stream: str) -> bool:
        """Whether a stream is a client patch: it belongs to a version even where it is for all languages."""
        return self.catalogues.type_of(stream) == CLIENT_PATCHES

    def _options_of(self, stream: str) -> tuple[_Option, ...]:
        """The places that have a stream, as far as catalogues tell; all when none does."""
        found = self._options.get(stream)
        if found is None:
            every = tuple(_Option(place, self._listed(place, stream)) for place in self._places)
            found = tuple(option for option in every if option.listed is not None) or every
            _remember(self._options, stream, found)
        return found

    def _listed(self, place: _Place, stream: str) -> Listed | None:
        """How a place lists a stream. Where its catalogue is not known it may have what others list, and what
        that is they tell: a client patch passes nowhere as something unknown.
        """
        rows = (self.catalogues.listed(name, stream) for name in place.names)
        own = next((row for row in rows if row is not None), None)
        others = self.catalogues.somewhere(stream)
        if own is not None or others is None or any(map(self.catalogues.known, place.names)):
            return own
        return Listed(others.moniker, others.product, "")

    # --- by client

    def _decide(self, stream: str, client: Client) -> Choice:
        """The place that fits best: one that may serve the client, by language, by version, by priority.

        Where none may, the one whose refusal tells most: of the client's language, else of its version.
        """
        ranked = []
        for at, option in enumerate(self._options_of(stream)):
            decision = self._standing(stream, option)
            if decision is None:
                decision = self.book.rules.decide(option.listed, option.place.origin, client)
            language, version = _distance(option.place.origin, client)
            nearness = (language, version) if decision.allowed else (min(language, 1), version, language)
            ranked.append(((not decision.allowed, *nearness, at), option, decision))
        _, option, decision = min(ranked, key=lambda row: row[0])
        return self._made(stream, option, decision, for_everybody=False)

    def _made(self, stream: str, option: _Option, decision: Decision, *, for_everybody: bool) -> Choice:
        asked, stored, elsewhere = self._where(stream, option.place.variant)
        return Choice(
            option.place.origin.name,
            asked,
            stored,
            elsewhere,
            decision,
            self.book.refuses(decision),
            for_everybody,
            option.listed is None and stream != ABSENT,
        )

    def _where(self, stream: str, variant: Variant) -> tuple[Variant, Variant, tuple[Variant, ...]]:
        """Whom to ask, where it is stored, and where else the same bytes may be stored already."""
        variants = tuple(place.variant for place in self._places)
        if not self.catalogues.for_all_languages(stream):
            # Of one variant alone everything is, also what was stored when it was listed otherwise.
            return variant, variant, (_ALL,) if len(variants) == 1 else ()
        version = variant.version if self._is_bound(stream) else ANY
        same = tuple(other for other in variants if version in (ANY, other.version))
        wide = Variant(EVERY if version == ANY else version, EVERY)
        elsewhere = tuple(dict.fromkeys((variant, *same)))
        return wide if len(variants) > 1 else variant, Variant(version, ANY), elsewhere


def _places(book: Rulebook, upstreams: Sequence[config.Upstream]) -> tuple[_Place, ...]:
    """By priority, then as they stand in the settings."""
    names: dict[Variant, list[str]] = {}
    for upstream in sorted(upstreams, key=lambda upstream: upstream.priority):
        if upstream.kind != "liveupdate":
            names.setdefault(Variant(upstream.version, upstream.language), []).append(upstream.name)
    return tuple(_Place(variant, book.origins[own[0]], tuple(own)) for variant, own in names.items())


def _distance(origin: Origin, client: Client) -> tuple[int, int]:
    """How far a manager is from what a client states, by language before version."""
    return _language_distance(origin, client), _version_distance(origin, client)


def _language_distance(origin: Origin, client: Client) -> int:
    """0 where nothing is stated: all are as near. English is next to all: AutoUpgrade leads there (FIELD)."""
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
    return 1 if origin.version.same_release(client.version) else 3


def _remember(memory: dict[Key, Value], key: Key, value: Value) -> None:
    """Bounded: clients may invent monikers and versions without end."""
    if len(memory) >= _MOST_REMEMBERED:
        memory.clear()
    memory[key] = value
