"""The committed bodies that this process has open, in order of use; never mends them, never fetches."""

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from gup.cache.disk import on_disk
from gup.cache.durability import read_mark
from gup.cache.entry import Entry
from gup.cache.flight import Means
from gup.cache.record import Record
from gup.cache.store import OpenFile
from gup.content.key import ContentKey

_Result = TypeVar("_Result")


class Entries:
    """Bounded; the least recently used is closed first. Changes here alone, on the loop."""

    def __init__(self, means: Means, max_open: int) -> None:
        self.on_damage: Callable[[Entry], None]
        """Told of every damaged chunk that a reader comes to; set once, before any entry is opened."""
        self._means = means
        self._max_open = max_open
        self._rows: OrderedDict[ContentKey, Entry] = OrderedDict()
        self._epoch = means.store_epoch()
        self._mode = means.settings.cache.verify

    def known(self, key: ContentKey) -> Entry | None:
        """The entry if it is open."""
        self._heed()
        return self._rows.get(key)

    async def get(self, key: ContentKey) -> Entry | None:
        """The entry, opened if need be; None when its record or body is missing or not as recorded."""
        entry = self.known(key)
        if entry is None:
            found = await self._in_thread(self._load, key)
            if found is None:
                return None
            entry = self._add(*found)
        self.used(entry)
        return entry

    async def get_damaged(self, key: ContentKey) -> Entry | None:
        """The entry with what is left of its body, for the chunks that are sound; None without any file."""
        found = await self._in_thread(self._load_damaged, key)
        if found is None:
            return None
        entry = self._add(*found, trusting=False)
        entry.counted = True
        entry.doubt()
        return entry

    def _load(self, key: ContentKey) -> tuple[Record, OpenFile, bool] | None:
        """Record and body as they lie on disk, and whether they need not be compared; blocks."""
        record = self.load_record(key)
        file = self._means.store.open_body(record) if record is not None else None
        if record is None or file is None:
            return None
        return record, file, self._mode == "scrub" and read_mark(self._means.store.run).covers(record)

    def load_record(self, key: ContentKey) -> Record | None:
        """The record alone, None when there is none or it is damaged; blocks."""
        try:
            return self._means.store.load(key)
        except ValueError:
            return None

    def _load_damaged(self, key: ContentKey) -> tuple[Record, OpenFile] | None:
        record, file = self.load_record(key), self._means.store.open_whatever(key)
        return (record, file) if record is not None and file is not None else None

    def _add(self, record: Record, file: OpenFile, trusting: bool) -> Entry:
        entry = Entry(record, file, self._means.executor, self.on_damage, trusting=trusting)
        return self._rows.setdefault(record.key, entry)

    def used(self, entry: Entry) -> None:
        if self._rows.get(entry.key) is entry:
            self._rows.move_to_end(entry.key)
        while len(self._rows) > self._max_open:
            self._rows.popitem(last=False)

    def drop(self, entry: Entry) -> None:
        """Close it, as far as nobody reads it any more."""
        if self._rows.get(entry.key) is entry:
            del self._rows[entry.key]

    def adopt(self, entry: Entry, record: Record) -> bool:
        """Take over what another process learned of the same body."""
        if record.etag != entry.record.etag or record.generation != entry.record.generation:
            self.drop(entry)
            return False
        entry.record = record
        return True

    def clear(self) -> None:
        self._rows.clear()

    # --- what others did

    def _heed(self) -> None:
        mode = self._means.settings.cache.verify
        if mode != self._mode:  # a reload: what was trusted may have to be verified now
            self._mode = mode
            self._rows.clear()
        epoch = self._means.store_epoch()
        if epoch != self._epoch:
            self._epoch = epoch
            self.close_removed()

    def close_removed(self) -> None:
        """Close every entry whose file has no link left; call when the store's epoch was raised."""
        for entry in [entry for entry in self._rows.values() if os.fstat(entry.fd).st_nlink == 0]:
            del self._rows[entry.key]

    def changed(self) -> list[Entry]:
        """Entries whose file is not as it was recorded though nobody replaced it: closed, and doubted.

        gup never writes to a published file; 1 µs each.
        """
        found = []
        for entry in list(self._rows.values()):
            stat = os.fstat(entry.fd)
            if not entry.record.fits(stat) and stat.st_nlink and not entry.counted:
                self.drop(entry)
                entry.doubt()
                found.append(entry)
        return found

    async def _in_thread(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        return await on_disk(self._means.executor, work, *arguments)
