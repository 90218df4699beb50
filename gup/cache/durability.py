"""What a power cut can't take: one process syncs the file system now and then, and marks up to when it did.

New entries are not synced one by one. An entry that the mark covers, or that was stored since the machine
started, is on the disk or in the page cache as it was written; of any other every chunk is compared before it
is sent, in every mode (cache.verify).
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from gup.cache.records import Record
from gup.cache.store import Store
from gup.files import replace_file, sync_file_system

log = logging.getLogger("gup.durability")

_FILE = "synced"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MARGIN_SECONDS = 5.0
"""A record's time is taken a moment before its body is in place, and clocks are set."""


class Mark(BaseModel):
    """The last sync: the boot of the machine it was made in, and its Unix time. 0: it failed."""

    boot_id: str = ""
    at: float = 0.0

    def covers(self, record: Record) -> bool:
        """Whether no power cut since can have torn the record's body."""
        this_boot = self.at > 0 and self.boot_id == boot_id()
        return this_boot or record.stored_at <= self.at - _MARGIN_SECONDS


def boot_id() -> str:
    """The machine's present boot; another text after each start."""
    return _BOOT_ID.read_text().strip()


def read_mark(run: Path) -> Mark:
    """The mark as it is kept; one that covers nothing when there is none. Blocks."""
    try:
        return Mark.model_validate_json((run / _FILE).read_bytes())
    except (OSError, ValueError):
        return Mark()


def write_mark(run: Path, mark: Mark) -> None:
    replace_file(run / _FILE, mark.model_dump_json().encode())


@dataclass(slots=True)
class Durability:
    """Syncs every `interval()` seconds if `committed()`, a count, has changed; in the controller."""

    store: Store
    interval: Callable[[], float]
    committed: Callable[[], int]
    _synced_count: int = -1
    _failed: bool = False

    async def run(self) -> None:
        while True:
            await self.sync()
            await asyncio.sleep(max(self.interval(), 0.1))

    async def sync(self) -> None:
        """Sync if something was committed since the last time. A refusal is told once, and tried again."""
        count = self.committed()
        if count == self._synced_count:
            return
        try:
            await asyncio.to_thread(self._sync)
        except OSError as error:
            if not self._failed:
                log.warning("the disk refuses to sync: stored bodies are compared before use: %s", error)
            self._failed = True
        else:
            self._failed, self._synced_count = False, count

    def _sync(self) -> None:
        mark, began = Mark(boot_id=boot_id()), time.time()
        try:
            sync_file_system(self.store.root)
            mark.at = began
        finally:
            write_mark(self.store.run, mark)
