"""Which revisions a site's clients come from, as the traffic tells; decides what is fetched ahead. No I/O.

A client that asks for a delta names two revisions: the one it has, and the one it will have. One that asks
for a full names the latter. So the revisions named lately are those that clients of this site are at.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gup.content.deltas import Folder, Named, delta_path
from gup.content.key import Variant
from gup.control.rows import Stream
from gup.metrics import MAX_STREAMS

MAX_REVISIONS = 64
"""Remembered of each stream; those named longest ago are forgotten."""


@dataclass(slots=True)
class _Known:
    """One stream. `seen` has the time of the last naming of each revision, the latest at the end.

    `asked` are those from which a client has asked for the delta to the newest one: nothing is left to be
    done for them.
    """

    newest: str = ""
    announced_at: float = 0.0
    moniker: str = ""
    folder: Folder | None = None
    seen: OrderedDict[str, float] = field(default_factory=OrderedDict)
    asked: set[str] = field(default_factory=set)

    def name(self, named: Named, now: float) -> None:
        if named.from_revision is not None:
            self.see(named.from_revision, now)
            if named.revision == self.newest:
                self.asked.add(named.from_revision)

    def see(self, revision: str, now: float) -> None:
        self.seen[revision] = now
        self.seen.move_to_end(revision)
        while len(self.seen) > MAX_REVISIONS:
            forgotten, _ = self.seen.popitem(last=False)
            self.asked.discard(forgotten)


@dataclass(frozen=True, slots=True)
class Announced:
    """A revision that clients have begun to ask for, and where the others of the site are."""

    stream: Stream
    revision: str
    at: float
    from_revisions: tuple[str, ...]
    """The latest named first."""
    paths: tuple[str, ...]
    """Of the deltas from these."""

    @property
    def variant(self) -> Variant:
        return Variant(self.stream[0], self.stream[1])


class Revisions:
    """By stream; as many streams as are counted apart, the longest idle forgotten.

    `changed`: whether anything new was learned since it was last set to False (by whoever writes it down);
    `touched`: whether anything was named again.
    """

    def __init__(self) -> None:
        self._streams: OrderedDict[Stream, _Known] = OrderedDict()
        self.changed = self.touched = False

    def learn(self, stream: Stream, named: Named, now: float, moniker: str = "") -> bool:
        """What a client was sent, or began to be sent. Whether that makes another look worth while: the
        revision is newer than any before, or one that no client of the site was known to be at.
        """
        known = self._known(stream)
        self.touched = True
        known.moniker = moniker or known.moniker
        known.folder = named.folder or known.folder
        news = named.revision not in known.seen
        news = news or (named.from_revision is not None and named.from_revision not in known.seen)
        if named.revision > known.newest:
            known.newest, known.announced_at = named.revision, now
            known.asked.clear()
        known.name(named, now)
        known.see(named.revision, now)  # last: that is where the client will be
        self.changed = self.changed or news
        return news

    def refused(self, stream: Stream, named: Named, now: float) -> None:
        """Upstream does not have what was asked for: that announces nothing, but tells where a client is."""
        if named.from_revision is not None and stream in self._streams:
            self.touched = True
            self._known(stream).name(named, now)

    def _known(self, stream: Stream) -> _Known:
        known = self._streams.setdefault(stream, _Known())
        self._streams.move_to_end(stream)
        while len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        return known

    def announced(self, stream: Stream, now: float, *, within_seconds: float, most: int) -> Announced:
        """The stream's newest revision and, of the others named so lately, the `most` named last.

        Those are left out whose delta a client has asked for already.
        """
        known = self._streams[stream]
        lately = [
            revision
            for revision, at in reversed(known.seen.items())
            if revision < known.newest and revision not in known.asked and now - at <= within_seconds
        ][:most]
        folder = known.folder or self._folder_of_others(stream)
        paths = [delta_path(known.moniker or stream[2], old, known.newest, folder) for old in lately]
        return Announced(stream, known.newest, known.announced_at, tuple(lately), tuple(paths))

    def _folder_of_others(self, stream: Stream) -> Folder:
        """As the same upstream has it for other streams; else as the public log shows it (FIELD)."""
        others = (known.folder for other, known in self._streams.items() if other[:2] == stream[:2])
        return next((folder for folder in others if folder is not None), Folder.FROM)

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._streams)

    def to_json(self) -> list[dict[str, Any]]:
        """All of it; `restore` takes it back."""
        return [
            {
                "stream": list(stream),
                "newest": known.newest,
                "announced_at": known.announced_at,
                "moniker": known.moniker,
                "folder": known.folder,
                "seen": list(known.seen.items()),
            }
            for stream, known in self._streams.items()
        ]

    def restore(self, rows: Any) -> None:
        """Take back what `to_json` gave. What is not of that form is left out, what is newer stays."""
        for row in rows if isinstance(rows, list) else ():
            match row:
                case {
                    "stream": [str(version), str(language), str(moniker)],
                    "newest": str(newest),
                    "announced_at": int() | float() as at,
                    "moniker": str(spelled),
                    "folder": "from" | "to" | None as folder,
                    "seen": list(seen),
                }:
                    old = _Known(newest, float(at), spelled, Folder(folder) if folder else None)
                    self._restore((version, language, moniker), old, seen)

    def _restore(self, stream: Stream, old: _Known, seen: list[Any]) -> None:
        for pair in seen:
            match pair:
                case [str(revision), int() | float() as at]:
                    old.see(revision, float(at))
        newer = self._streams.get(stream)
        if newer is not None:
            for revision, at in newer.seen.items():
                old.see(revision, at)
            old.moniker, old.folder = newer.moniker or old.moniker, newer.folder or old.folder
            if newer.newest > old.newest:
                old.newest, old.announced_at = newer.newest, newer.announced_at
        self._streams[stream] = old
        while len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
