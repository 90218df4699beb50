"""The entries in memory: rows by key, in several orders, by stream, and by what may be evicted first.

The rows are in an SQLite database in memory: an entry takes some 600 bytes there, and 4 KiB as Python objects
in sorted lists, through which the garbage collector goes as well. New rows gather in a dictionary and are
put into the database together, before it is asked for more than a single row.
"""

import asyncio
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, TypeAdapter
from sortedcontainers import SortedDict

from gup.cache.store import Stored
from gup.content.key import ContentKey, Kind, content_revision
from gup.jsonmodel import Count, Time

Stream = tuple[str, str, str]
"""Version, language and moniker: revisions are compared within a stream."""


def stream_of(key: ContentKey) -> Stream:
    return (key.version, key.language, key.stream)


def _is_key(text: str) -> str:
    ContentKey.parse(text)  # BadKeyError is a ValueError
    return text


@dataclass(frozen=True, slots=True)
class Row:
    """An entry: its record's fields, and hits and bytes, which no record has. Times are Unix seconds."""

    key: Annotated[str, AfterValidator(_is_key)]
    kind: Kind
    length_bytes: Count
    stored_at: Time
    used_at: Time
    hits: Count = 0
    pinned: bool = False
    sent_bytes: Count = 0
    received_bytes: Count = 0
    mark: Count = 0
    """`Stored.mark` of the files that the row was read from; 0 when they have not been read."""

    @property
    def version(self) -> str:
        return self.key.split("/", 1)[0]

    @property
    def language(self) -> str:
        return self.key.split("/", 2)[1]

    @property
    def stream(self) -> str:
        return self.key.split("/", 3)[2]

    @property
    def revision(self) -> str:
        return self.key.rsplit("/", 2)[1]

    @property
    def file(self) -> str:
        return self.key.rsplit("/", 1)[1]

    @property
    def stream_id(self) -> Stream:
        version, language, stream, _ = self.key.split("/", 3)
        return version, language, stream

    @property
    def content_revision(self) -> str | None:
        _, revision, file = self.key.rsplit("/", 2)
        return content_revision(self.kind, revision, file)

    def used(self, count: int, sent_bytes: int, at: float) -> "Row":
        hits, sent_bytes = self.hits + count, self.sent_bytes + sent_bytes
        return replace(self, hits=hits, sent_bytes=sent_bytes, used_at=max(self.used_at, at))


ROW = TypeAdapter(Row)


def make_row(
    key: ContentKey, kind: Kind, length_bytes: int, *, stored_at: float, used_at: float, **more: Any
) -> Row:
    return Row(key.text, kind, length_bytes, stored_at, used_at, **more)


def row_of(stored: Stored, known: Row | None = None) -> Row:
    """The row of a body found on disk; hits and totals come from the previous row."""
    record, size_bytes, used_at = stored.record, stored.size_bytes, stored.used_at
    assert record is not None
    more: dict[str, Any] = {"received_bytes": size_bytes}
    if known is not None:
        used_at = max(used_at, known.used_at)
        more = {name: getattr(known, name) for name in ("hits", "sent_bytes", "received_bytes")}
    more |= {"stored_at": record.stored_at, "used_at": used_at, "pinned": record.pinned, "mark": stored.mark}
    return make_row(record.key, record.kind, size_bytes, **more)


Place = tuple[float, str]
"""A row's position in an order: its value and its key."""
ORDERS: dict[str, Callable[[Row], float]] = {
    "key": lambda _: 0,
    "used": lambda row: row.used_at,
    "stored": lambda row: row.stored_at,
    "length": lambda row: row.length_bytes,
    "hits": lambda row: row.hits,
}
"""The orders of listings, with their sort keys."""
_COLUMN_OF = {"used": "used_at", "stored": "stored_at", "length": "length_bytes", "hits": "hits"}
ROWS_AT_ONCE = 200
"""A loop over many rows yields to other tasks after this many: some milliseconds."""
_KINDS = tuple(Kind)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}
_COLUMNS = "kind, length_bytes, stored_at, used_at, hits, pinned, sent_bytes, received_bytes, mark"
_INDEX_FILES, _CURRENT, _FULLS, _DELTAS = 3, 2, 1, 0
"""Worth: index files, the newest revision and what has none, superseded fulls and deltas."""
_SCHEMA = f"""
PRAGMA journal_mode = OFF;
CREATE TABLE entries (id INTEGER PRIMARY KEY, stream INT, name TEXT, {_COLUMNS}, revision TEXT, worth INT);
CREATE UNIQUE INDEX by_name ON entries (stream, name);
CREATE INDEX by_revision ON entries (stream, revision);
CREATE INDEX by_worth ON entries (worth, used_at) WHERE NOT pinned;
""" + "".join(
    f"CREATE INDEX by_{order} ON entries ({column}, stream, name);\n" for order, column in _COLUMN_OF.items()
)
_PUT = f"""
INSERT INTO entries (stream, name, {_COLUMNS}, revision, worth) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (stream, name) DO UPDATE SET
"""  # noqa: S608
_PUT += ", ".join(f"{name} = excluded.{name}" for name in f"{_COLUMNS}, revision, worth".split(", "))
_SELECT = f"SELECT id, stream, name, {_COLUMNS} FROM entries"  # noqa: S608 - constants of ours
_NEW_WORTH = f"""
UPDATE entries SET worth = CASE WHEN revision = :newest THEN {_CURRENT}
  WHEN kind = {_NUMBERS[Kind.DELTA]} THEN {_DELTAS} ELSE {_FULLS} END
WHERE stream = :stream AND revision IN (:newest, :before) AND kind <> {_NUMBERS[Kind.INDEX]}
"""  # noqa: S608


class Held(Protocol):
    """What the worth of an entry depends on, be it stored or in a replay of the demand."""

    @property
    def kind(self) -> Kind: ...
    @property
    def length_bytes(self) -> int: ...
    @property
    def content_revision(self) -> str | None: ...


@dataclass(slots=True)
class HeldStream:
    """What is held of one stream: entries by revision, the newest revision, deltas."""

    entries: int = 0
    revisions: Counter[str] = field(default_factory=Counter)
    newest: str = ""
    deltas: int = 0
    delta_bytes: int = 0

    def count(self, row: Held, step: int) -> None:
        self.entries += step
        if row.kind is Kind.DELTA:
            self.deltas += step
            self.delta_bytes += step * row.length_bytes
        if (revision := row.content_revision) is not None:
            self.revisions[revision] += step
            if self.revisions[revision]:
                self.newest = max(revision, self.newest)
            else:
                del self.revisions[revision]
                self.newest = self.newest if revision != self.newest else max(self.revisions, default="")

    def worth(self, kind: Kind, revision: str | None) -> int:
        """The class of an entry: those of a lower one are evicted first."""
        if kind is Kind.INDEX:
            return _INDEX_FILES
        if revision is None or revision == self.newest:
            return _CURRENT
        return _DELTAS if kind is Kind.DELTA else _FULLS

    def beyond(self, keep: int) -> list[str]:
        """The revisions beyond the `keep` newest."""
        if len(self.revisions) <= keep:
            return []
        return sorted(self.revisions, reverse=True)[keep:]  # of equal length


@dataclass(slots=True)
class _Stream(HeldStream):
    """A stream in the database, and its number there."""

    stream: Stream = ("", "", "")
    number: int = 0
    stored_newest: str = ""
    """The newest revision by which the database has the rows' worth."""


class EntryTable(Mapping[str, Row]):
    """Rows by key. It belongs to the event loop: nothing here blocks or takes longer than it has rows to
    return.
    """

    def __init__(self) -> None:
        self.total_bytes = 0
        self._count = 0
        self._database = sqlite3.connect(":memory:", isolation_level=None)
        self._database.executescript(_SCHEMA)
        self._new: dict[str, Row | None] = {}
        """What is not in the database yet; None for a discarded row."""
        self._last: tuple[str, Row | None] = "", None
        """The last key that was asked for, with its row: a change is mostly of that one."""
        self._streams: SortedDict[str, _Stream] = SortedDict()
        """By the beginning of their keys."""
        self._numbers: dict[str, int] = {}
        """Of streams by the beginning of their keys; kept, since cursors of listings rely on them."""
        self._prefixes: list[str] = []

    def close(self) -> None:
        """Free the database; only the totals can be read then."""
        self._database.close()

    # --- one row

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return (row.key for row in self._all())

    def __getitem__(self, key: str) -> Row:
        row = self.get(key)
        if row is None:
            raise KeyError(key)
        return row

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) is not None

    def get(self, key: str, _default: None = None) -> Row | None:  # type: ignore[override]  # rows are not None
        if key != self._last[0]:
            self._last = key, self._new[key] if key in self._new else self._look_up(key)
        return self._last[1]

    def _look_up(self, key: str) -> Row | None:
        prefix, name = _split(key)
        if prefix not in self._streams:
            return None
        number = self._numbers[prefix]
        found = self._database.execute(f"{_SELECT} WHERE stream = ? AND name = ?", (number, name))
        return next(self._rows(found), None)

    def put(self, row: Row) -> None:
        self._change(row.key, row)

    def discard(self, key: str) -> None:
        self._change(key, None)

    def _change(self, key: str, row: Row | None) -> None:
        before, prefix = self.get(key), _split(key)[0]
        if row is not None:
            if (held := self._streams.get(prefix)) is None:
                held = self._streams[prefix] = self._new_stream(prefix, row.stream_id)
            held.count(row, 1)
            self._count += 1
            self.total_bytes += row.length_bytes
        if before is not None:
            held = self._streams[prefix]
            held.count(before, -1)
            self._count -= 1
            self.total_bytes -= before.length_bytes
            if not held.entries:
                del self._streams[prefix]
        self._new[key] = row
        self._last = key, row
        if len(self._new) >= ROWS_AT_ONCE:
            self._store()

    def _new_stream(self, prefix: str, stream: Stream) -> _Stream:
        number = self._numbers.setdefault(prefix, len(self._prefixes))
        if number == len(self._prefixes):
            self._prefixes.append(prefix)
        return _Stream(stream=stream, number=number)

    def _store(self) -> None:
        """Put what is new into the database."""
        if not self._new:
            return
        rows, gone, new = [], [], self._new
        self._new = {}
        touched: dict[str, _Stream] = {}
        for key, row in new.items():
            prefix, name = _split(key)
            if row is None:
                if prefix in self._numbers:
                    gone.append((self._numbers[prefix], name))
                if (other := self._streams.get(prefix)) is not None:
                    touched[prefix] = other
                continue
            held = touched[prefix] = self._streams[prefix]
            revision = row.content_revision
            times_and_counts = (row.length_bytes, row.stored_at, row.used_at, row.hits, row.pinned)
            more = (row.sent_bytes, row.received_bytes, row.mark, revision, held.worth(row.kind, revision))
            rows.append((held.number, name, _NUMBERS[row.kind], *times_and_counts, *more))
        self._database.executemany("DELETE FROM entries WHERE stream = ? AND name = ?", gone)
        self._database.executemany(_PUT, rows)
        for held in touched.values():
            if held.newest != held.stored_newest:  # a row is worth less once, when it is superseded
                own = {"stream": held.number, "newest": held.newest, "before": held.stored_newest}
                self._database.execute(_NEW_WORTH, own)
                held.stored_newest = held.newest

    def _rows(self, found: Iterable[tuple[Any, ...]]) -> Iterator[Row]:
        for _, stream, name, kind, length, stored_at, used_at, hits, pinned, *more in found:
            key = self._prefixes[stream] + name
            yield Row(key, _KINDS[kind], length, stored_at, used_at, hits, bool(pinned), *more)

    def _ask(self, statement: str, *values: object) -> Iterator[Row]:
        self._store()
        return self._rows(self._database.execute(f"{_SELECT} {statement}", values))

    # --- many rows

    def page(
        self, order: str, limit: int, *, descending: bool = False, after: Place | None = None
    ) -> list[Row]:
        """At most `limit` rows in one of ORDERS, ties by key within a stream, after a place. Costs what it
        returns.
        """
        if order == "key":
            return self._page_by_key(limit, descending=descending, after=after[1] if after else None)
        columns, way = (_COLUMN_OF[order], "stream", "name"), " DESC" if descending else ""
        by = f"ORDER BY {', '.join(column + way for column in columns)} LIMIT ?"
        if after is None:
            return list(self._ask(by, limit))
        value, (prefix, name) = after[0], _split(after[1])
        place = (value, self._numbers.get(prefix, -1), name)
        return list(
            self._ask(
                f"WHERE ({', '.join(columns)}) {'<' if descending else '>'} (?, ?, ?) {by}", *place, limit
            )
        )

    def _page_by_key(self, limit: int, *, descending: bool, after: str | None) -> list[Row]:
        prefix, name = _split(after) if after is not None else (None, "")
        least, most = (None, prefix) if descending else (prefix, None)
        rows: list[Row] = []
        for one in self._streams.irange(least, most, reverse=descending):
            number, left, way = self._numbers[one], limit - len(rows), " DESC" if descending else ""
            if one == prefix:
                where = f"WHERE stream = ? AND name {'<' if descending else '>'} ? ORDER BY name{way} LIMIT ?"
                rows += self._ask(where, number, name, left)
            else:
                rows += self._ask(f"WHERE stream = ? ORDER BY name{way} LIMIT ?", number, left)
            if len(rows) >= limit:
                break
        return rows

    def _all(self) -> Iterator[Row]:
        """Every row, in parts: what changes meanwhile may be in it or not."""
        last = -1
        while True:
            self._store()
            found = self._database.execute(
                f"{_SELECT} WHERE id > ? ORDER BY id LIMIT ?", (last, ROWS_AT_ONCE)
            )
            if not (part := found.fetchall()):
                return
            last = part[-1][0]
            yield from self._rows(part)

    async def every(self, stream: str | None = None) -> AsyncIterator[list[Row]]:
        """All rows (of streams that are so called, if given), a part at a time: the loop gets its turn."""
        if stream is None:
            rows = self._all()
        else:
            called = [one for one in self.streams() if one[2].casefold() == stream.casefold()]
            rows = chain.from_iterable(map(self.of_stream, called))
        part: list[Row] = []
        for row in rows:
            part.append(row)
            if len(part) == ROWS_AT_ONCE:
                yield part
                part = []
                await asyncio.sleep(0)
        yield part

    def streams(self) -> list[Stream]:
        return [held.stream for held in self._streams.values()]

    def of_stream(self, stream: Stream) -> list[Row]:
        held = self._streams.get(_prefix(stream))
        return list(self._ask("WHERE stream = ?", held.number)) if held is not None else []

    def newest_held(self) -> Mapping[Stream, str]:
        return {held.stream: held.newest for held in self._streams.values() if held.newest}

    def deltas(self, stream: Stream) -> tuple[int, int]:
        """How many deltas a stream has, and their bytes."""
        held = self._streams.get(_prefix(stream))
        return (held.deltas, held.delta_bytes) if held is not None else (0, 0)

    # --- what may be evicted: rows that are not pinned

    def last_use_before(self, at: float) -> float | None:
        self._store()
        (found,) = self._database.execute(
            "SELECT max(used_at) FROM entries WHERE used_at < ?", (at,)
        ).fetchone()
        return found  # type: ignore[no-any-return]

    def beyond(self, keep: int) -> Iterator[Row]:
        """Rows of revisions beyond the `keep` newest of their stream."""
        for held in list(self._streams.values()):
            for revision in held.beyond(keep):
                yield from self._ask(
                    "WHERE stream = ? AND revision = ? AND NOT pinned", held.number, revision
                )

    def unused_since(self, at: float) -> Iterator[Row]:
        return self._ask("WHERE worth IN (0, 1, 2, 3) AND used_at < ? AND NOT pinned", at)

    def by_worth(self) -> Iterator[Row]:
        """The least valuable first: superseded deltas, superseded fulls, all else, index files; of each the
        least recently used.
        """
        return self._ask("WHERE NOT pinned ORDER BY worth, used_at")


def _split(key: str) -> tuple[str, str]:
    """The beginning that the keys of a stream share, and the rest."""
    *stream, name = key.split("/", 3)
    return "/".join((*stream, "")), name


def _prefix(stream: Stream) -> str:
    return "/".join((*stream, ""))
