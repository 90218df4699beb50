"""What clients ask for, taken apart: for whom it is news. Owns demand, storms and what is fetched ahead."""

from collections.abc import Callable

from gup.content.deltas import named
from gup.content.key import ContentKey
from gup.control.events import Asked, Begun, FullsTaken
from gup.control.index import Index
from gup.control.prefetch import Prefetcher
from gup.control.rows import stream_of
from gup.control.storms import Storm, Storms
from gup.control.streams import Demand


class Traffic:
    """Told by the plane of every event that names content; everything but the prefetching is no I/O."""

    def __init__(self, prefetcher: Prefetcher, index: Index, clock: Callable[[], float]) -> None:
        self.prefetcher = prefetcher
        self.demand = Demand()
        self.storms = Storms()
        self._index = index
        self._clock = clock

    def take(self, event: Asked | Begun | FullsTaken) -> None:
        match event:
            case Asked():
                for use in event.uses:
                    self.sent(ContentKey.parse(use.key), use.count)
            case Begun():
                self.prefetcher.asked(event.key, event.path)
            case FullsTaken():
                for address, key, times in event.rows:
                    self.storms.note_client(stream_of(ContentKey.parse(key)), address, times, self._clock())

    def sent(self, key: ContentKey, times: int) -> None:
        """Clients are sent this so many times, from the store or while it arrives."""
        names, stream = named(key), stream_of(key)
        if names is not None:
            self.demand.met(stream, names.revision)
            self.storms.count(stream, names.kind, key.text, times, self._clock())
            self.prefetcher.asked(key)

    def missed(self, key: ContentKey) -> None:
        """A client asked for this, and it can't be had."""
        names = named(key)
        if names is not None:
            self.demand.unmet(stream_of(key), names.revision, self._clock())
            self.prefetcher.refused(key)

    def look(self) -> None:
        """Begin and end storms."""
        self.storms.look(self._clock(), self._index.has_deltas)

    def standing_storms(self) -> list[Storm]:
        """The storms there are, with what they cost."""

        def length_of(key: str) -> int:
            row = self._index.rows.get(key)
            return row.length_bytes if row is not None else 0

        return self.storms.standing(length_of, self._index.mean_delta_bytes)
