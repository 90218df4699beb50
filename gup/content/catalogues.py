"""The catalogues of all upstreams together: what each lists, and what a stream is called; no I/O, no rule."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gup import config
from gup.content.catalog import Listed
from gup.content.key import ANY, Variant
from gup.content.routes import LIVEUPDATE_STREAM
from gup.content.stream_types import StreamTypes

Rows = Mapping[str, Listed]
"""One catalogue, by moniker in upper case."""
Stream = tuple[str, str, str]
"""Version, language and moniker of a content key."""

LIVEUPDATE_PRODUCT = "LiveUpdate"
"""What LiveUpdate's files are called whose names tell no product."""
_LIVEUPDATE_INDEX = re.compile(r"(.+)_[^_]+_[^_]+_livetri\.zip", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Label:
    """What people call a stream. It is looked up when it is shown: a changed catalogue renames.

    `version` is the one that the product is made for, "" where nothing tells it. `type` is one of
    `catalog.types`, or "other".
    """

    product: str
    version: str
    language: str
    type: str


class Catalogues:
    """What the upstreams list, by upstream. Immutable; a catalogue read anew makes new ones."""

    def __init__(
        self,
        rows: Mapping[str, Rows] | None = None,
        upstreams: Sequence[config.Upstream] = (),
        types: StreamTypes | None = None,
    ) -> None:
        """`rows` by the upstream's name; `upstreams` tell whose catalogue is asked for a variant's label."""
        self._rows = {u.name: (rows or {})[u.name] for u in upstreams if u.name in (rows or {})}
        self._variants = {u.name: Variant(u.version, u.language) for u in upstreams}
        self._types = types or StreamTypes(config.CONTENT_TYPES)

    def known(self, upstream: str) -> bool:
        """Whether the upstream's catalogue was ever read."""
        return upstream in self._rows

    def listed(self, upstream: str, moniker: str) -> Listed | None:
        """The upstream's own row of a moniker (in upper case, with braces)."""
        return self._rows.get(upstream, {}).get(moniker)

    def somewhere(self, moniker: str) -> Listed | None:
        """The first row of a moniker in any catalogue."""
        return next((rows[moniker] for rows in self._rows.values() if moniker in rows), None)

    def for_all_languages(self, moniker: str) -> bool:
        """Whether a stream is the same for all languages: a catalogue says so and none says otherwise."""
        found = [rows[moniker] for rows in self._rows.values() if moniker in rows]
        return bool(found) and all(listed.all_languages for listed in found)

    def type_of(self, moniker: str) -> str | None:
        """The type of a stream's content; None where no catalogue lists it."""
        listed = self.somewhere(moniker)
        return None if listed is None else self._types.of(listed.product)

    def label(self, stream: Stream, file: str = "") -> Label | None:
        """What a stream is called; None where no catalogue lists it.

        The same moniker may be listed differently by managers of different languages: the one of the
        stream's own variant is asked first. LiveUpdate has no catalogue: its index files' names tell.
        """
        version, language, moniker = stream
        if moniker == LIVEUPDATE_STREAM:
            return self._liveupdate(version, language, file)
        own = (name for name, variant in self._variants.items() if variant == Variant(version, language))
        rows = (self.listed(name, moniker) for name in own)
        listed = next((row for row in rows if row is not None), None) or self.somewhere(moniker)
        if listed is None:
            return None
        return Label(
            listed.product, listed.version, listed.language or language, self._types.of(listed.product)
        )

    def _liveupdate(self, version: str, language: str, file: str) -> Label:
        named = _LIVEUPDATE_INDEX.fullmatch(file)
        product = named[1].replace("$20", " ") if named else LIVEUPDATE_PRODUCT
        return Label(product, "" if version == ANY else version, language, self._types.of(product))
