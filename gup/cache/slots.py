"""Places for work that may be done only so many times at once on the whole machine; never does the work."""

from collections.abc import Callable

from gup.cache.claim import Claims


class Slots:
    """`count()` byte locks from `first` on: each is one place, freed by the kernel if its holder dies."""

    def __init__(self, claims: Claims, first: int, count: Callable[[], int]) -> None:
        self._claims = claims
        self._first = first
        self._count = count

    def count(self) -> int:
        """How many places there are, taken or not."""
        return self._count()

    def try_take(self, most: int | None = None) -> int | None:
        """A place, if one is free this instant; with `most`, one of the first so many."""
        count = self._count() if most is None else min(most, self._count())
        for place in range(self._first, self._first + count):
            if self._claims.try_claim(place):
                return place
        return None

    def give_back(self, place: int) -> None:
        self._claims.release(place)

    def taken(self) -> int:
        """How many places all processes hold at this moment: a system call for each, if there are any."""
        if not self._claims.any_taken(self._first, self._count()):
            return 0
        return sum(self._claims.taken(place) for place in range(self._first, self._first + self._count()))
