"""Which type of content a stream is: client patches, virus definitions, …; by its product's name alone."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

CLIENT_PATCHES = "client_patches"
"""The type that the delivery rules bind."""
OTHER = "other"
"""The type of a product that fits no pattern."""


class StreamTypes:
    """The table `catalog.types`: patterns with `*`, `?` and `[…]`, compared without case, in order."""

    def __init__(self, types: Mapping[str, Sequence[str]]) -> None:
        self._patterns = tuple(
            (name, pattern.casefold()) for name, patterns in types.items() for pattern in patterns
        )
        self.names = frozenset((*types, OTHER))
        self.of = lru_cache(maxsize=1024)(self._of)
        """The type of a product."""

    def _of(self, product: str) -> str:
        name = " ".join(product.casefold().split())
        return next((type_ for type_, pattern in self._patterns if fnmatchcase(name, pattern)), OTHER)
