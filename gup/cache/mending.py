"""What is done about damage in a committed body: when it is mended, who is told; fetches nothing itself."""

from collections.abc import Awaitable, Callable, Coroutine

from gup.cache.disk import on_disk
from gup.cache.entries import Entries
from gup.cache.entry import Entry
from gup.cache.failures import Failures
from gup.cache.flight import Landing, Means
from gup.cache.growing import GrowingBody
from gup.cache.prior import note_damage
from gup.cache.record import Record
from gup.content.key import ContentKey, Kind, Variant
from gup.content.routes import Route, path_of
from gup.errors import Problem

Fly = Callable[[ContentKey, Route, Variant, bool], Awaitable[GrowingBody | Landing]]
"""Has the stored body of a key looked through, and mended if it is damaged; True: the damage is counted."""

_NO_ROOM = Problem(
    "overloaded", "stored bytes are damaged, and there is no room to mend them", retry_after_seconds=10.0
)
_HOPELESS = Problem("internal-error", "stored bytes are damaged again each time they were mended")


def route_of_record(record: Record) -> Route:
    """The route that led to a committed body."""
    key = record.key
    return Route(
        kind=record.kind,
        immutable=record.kind is not Kind.INDEX,
        stream=key.stream,
        revision=key.revision,
        file=key.file,
        upstream_path=path_of_record(record),
        variant=key.variant,
    )


def path_of_record(record: Record) -> str:
    """What upstream is asked for."""
    return record.path or path_of(record.key)


class Mending:
    """Begins repairs and tells the entries how they ended. `fly` does the work, under the key's claim."""

    def __init__(
        self,
        means: Means,
        entries: Entries,
        failures: Failures,
        fly: Fly,
        spawn: Callable[[Coroutine[None, None, None]], None],
    ) -> None:
        self._means = means
        self._entries = entries
        self._failures = failures
        self._fly = fly
        self._spawn = spawn

    def damaged(self, entry: Entry) -> None:
        """A reader came to a chunk that is not what was stored."""
        if not entry.noted:
            detail = "a chunk can't be read or does not agree with its sum"
            note_damage(self._means, "body", entry.key, detail)
        self._begin(entry, counted=True)

    def suspect(self, entry: Entry) -> None:
        """The file of an entry changed under our hands; its readers go on as far as chunks are sound."""
        self._begin(entry, counted=False)

    def retry(self, entry: Entry) -> None:
        """Try again what did not go the last time, if that may have changed."""
        if entry.damaged and not entry.mending and self._failures.get(entry.key) is None:
            self._begin(entry, counted=True)

    async def mend(self, key: ContentKey, *, counted: bool) -> Problem | None:
        """See Cache.mend."""
        record, _ = await on_disk(self._means.executor, self._entries.load_whatever, key)
        if record is None:
            return Problem("upstream-not-found", "there is no record of it")
        try:
            got = await self._fly(key, route_of_record(record), key.variant, counted)
        except Problem as problem:
            return problem
        return _NO_ROOM if got is Landing.UNSTORABLE else None

    def _begin(self, entry: Entry, *, counted: bool) -> None:
        failure = self._failures.get(entry.key)
        if failure is not None:
            entry.problem = failure
        elif entry.begin_mending():
            self._spawn(self._mend(entry, counted=counted))
        else:
            entry.problem = _HOPELESS

    async def _mend(self, entry: Entry, *, counted: bool) -> None:
        route = route_of_record(entry.record)
        try:
            got = await self._fly(entry.key, route, entry.key.variant, counted)
            record, file = await on_disk(self._means.executor, self._entries.load, entry.key)
        except Problem as problem:
            entry.not_mended(problem)
        except BaseException:
            entry.not_mended(None)
            raise
        else:
            same = record is not None and (record.etag, record.sums) == (entry.record.etag, entry.record.sums)
            if got is Landing.UNSTORABLE:
                entry.not_mended(_NO_ROOM)
            elif isinstance(got, GrowingBody) or not same or record is None or file is None:
                self._entries.drop(entry)
                entry.not_mended(None)
            else:
                entry.mended(record, file)
