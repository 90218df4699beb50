"""The reports' life: takes news of clients in, keeps the ledger, answers what is asked. Serves no HTTP.

Both files belong to one thread. What the disk refuses to take is tried again; nobody waits for it.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

from gup.client_names import ClientNames, is_hashed, read_key
from gup.config import Settings
from gup.content.catalog import CLIENT_PATCHES, Label
from gup.content.releases import Releases
from gup.control.events import Taken
from gup.control.reports import content, queries, restarts, savings
from gup.control.reports.batch import Batch, StreamId
from gup.control.reports.database import BegunAnewError
from gup.control.reports.ledger import EARLIER, Days, Ledger, Reading, counted
from gup.control.reports.pieces import Pieces
from gup.control.reports.records import Records
from gup.control.shown import stream_labels
from gup.control.surroundings import Surroundings
from gup.upstream.schedule import site_time

_T = TypeVar("_T")
LAGGING_SHOWN = 1000
"""Of one stream."""
_LAGGING_IN_ALL = 10_000
_OFF = "reports.addresses is off: no client is remembered"


@dataclass(frozen=True, slots=True)
class Around:
    """What reports are given by the plane: settings in force, clocks, and what is held in the store.

    `believed` is the time by which things grow old. `on_refusal` is told of what the disk took nothing,
    and why; None: it took it.
    """

    process: Surroundings
    settings: Callable[[], Settings]
    clock: Callable[[], float]
    believed: Callable[[], float]
    held: Callable[[], Mapping[StreamId, str]]
    on_refusal: Callable[[str, str | None], None]


class Reports:
    """`see` and `take` are called on the loop, as are all others; what is due is written by the jobs."""

    def __init__(self, around: Around) -> None:
        self._around = around
        folder = around.process.store.root / "reports"
        self._records = Records(folder)
        self._ledger = Ledger(folder)
        self._batch = Batch()
        self._pieces = Pieces()
        self._names: ClientNames | None = None
        self._called = ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gup-reports")

    # --- news

    @property
    def keeps_clients(self) -> bool:
        return self._around.settings().reports.addresses != "off"

    def see(self, clients: tuple[str, ...]) -> None:
        """These asked for something."""
        for client in clients:
            name = self._name(client)
            if name is not None:
                self._batch.see(name, self._around.clock())

    def take(self, taken: Taken) -> None:
        """Who took and asked for what."""
        at = min(taken.at, self._around.clock())
        for take in taken.takes:
            name = self._name(take.client)
            if name is not None:
                self._batch.add(replace(take, client=name), at, self._pieces)

    def _name(self, client: str) -> str | None:
        """What may be kept: just after a reload workers still call clients by the settings of before."""
        mode = self._around.settings().reports.addresses
        if mode == "full" or (mode == "hashed" and is_hashed(client)):
            return client
        return self._names.hashed(client) if mode == "hashed" and self._names is not None else None

    # --- jobs

    async def flush(self) -> None:
        """Write what is new of clients."""
        await self._call_clients_right()
        batch, self._batch = self._batch, Batch()
        if not batch:
            return
        try:
            await self._in_thread(lambda: self._records.write(batch))
        except OSError as error:
            batch.absorb(self._batch)
            self._batch = batch
            self._around.on_refusal("reports", str(error))
        else:
            self._around.on_refusal("reports", None)

    async def tick(self) -> None:
        """Write what the counters have counted."""
        read = self._reading()
        try:
            await self._in_thread(lambda: self._ledger.update(read()))
        except OSError as error:
            self._around.on_refusal("savings", str(error))
        else:
            self._around.on_refusal("savings", None)

    async def prune(self) -> None:
        """Forget what is older than the settings say."""
        settings, now = self._around.settings(), self._around.believed()
        own = settings.reports

        def forget() -> None:
            self._records.prune(now, own.retention, own.max_clients)
            oldest = site_time(settings, now) - timedelta(seconds=own.ledger)
            self._ledger.prune(oldest.date().isoformat())

        try:
            await self._in_thread(forget)
        except OSError as error:
            self._around.on_refusal("reports", str(error))

    async def _call_clients_right(self) -> None:
        """After a start or a reload: no client may be called by more than the settings allow."""
        mode = self._around.settings().reports.addresses
        if mode == self._called:
            return
        names = await self._named()
        by_old_names, self._batch = self._batch, Batch()  # what comes from now on is called right

        def rename() -> None:
            self._records.write(by_old_names)
            if mode == "off":
                self._records.forget_all()
            elif mode == "hashed":
                self._records.rename(lambda name: name if is_hashed(name) else names.hashed(name))

        try:
            await self._in_thread(rename)
        except OSError as error:
            self._around.on_refusal("reports", str(error))
            if mode == "full":
                by_old_names.absorb(self._batch)
                self._batch = by_old_names
            return
        self._called = mode
        self._around.on_refusal("reports", None)

    async def _named(self) -> ClientNames:
        if self._names is None:
            path = self._around.process.store.run / "address-key"
            self._names = ClientNames("hashed", await self._in_thread(lambda: read_key(path)))
        return self._names

    async def rename_all(self, clients: list[str]) -> dict[str, str]:
        """What each is to be called as the settings are now; those that may not be kept are left out."""
        mode, names = self._around.settings().reports.addresses, await self._named()
        if mode == "off":
            return {}

        def renamed() -> dict[str, str]:
            hashed = mode == "hashed"
            return {name: names.hashed(name) if hashed and not is_hashed(name) else name for name in clients}

        return await self._in_thread(renamed)

    async def stop(self) -> None:
        """Write what is due, and close."""
        await self.flush()
        await self.tick()

        def close() -> None:
            self._records.database.close()
            self._ledger.database.close()

        await self._in_thread(close)
        await asyncio.to_thread(self._thread.shutdown)

    # --- what is asked

    async def content(self) -> dict[str, Any]:
        """*Content taken here*."""
        await self.flush()
        held = dict(self._around.held())

        def look() -> list[tuple[content.StreamReport, int, list[queries.ClientState]]]:
            states, counts = queries.stream_states(self._records), queries.revision_counts(self._records)
            found, left = [], _LAGGING_IN_ALL
            for report in content.gather(states, counts, held):
                most = min(left, LAGGING_SHOWN)
                behind, clients = queries.lagging(self._records, report.stream, report.newest, most)
                found.append((report, behind, clients))
                left -= len(clients)
            return found

        rows = [
            content.shown(report, behind, lagging, self._label)
            for report, behind, lagging in await self._in_thread(look)
        ]
        return self._head() | {"content": rows}

    async def restarts(self) -> dict[str, Any]:
        """*Restart pending*, and how many clients state what."""
        await self.flush()

        def look() -> tuple[list[queries.Group], list[StreamId]]:
            states = queries.stream_states(self._records)
            return queries.groups(self._records), [state.stream for state in states]

        groups, streams = await self._in_thread(look)
        labels = {stream: self._label(stream) for stream in streams}
        patches = [stream for stream, label in labels.items() if label and label.type == CLIENT_PATCHES]

        def judge() -> list[restarts.Restart]:
            releases = Releases(self._around.settings().rules.releases)
            takers = [client for stream in patches for client in queries.takers(self._records, stream)]
            return restarts.judge(takers, releases)

        return self._head() | restarts.shown(await self._in_thread(judge), groups, labels, self._label)

    async def clients(self, wanted: queries.Wanted) -> tuple[int, int, list[queries.ClientRow]]:
        """How many clients are known, how many of them match, and a page of those."""
        await self.flush()

        def look() -> tuple[int, int, list[queries.ClientRow]]:
            known, _ = queries.clients(self._records, queries.Wanted(limit=0))
            return (known, *queries.clients(self._records, wanted))

        return await self._in_thread(look)

    async def savings(self) -> tuple[str, Days]:
        """Today, and what each day counted, the oldest first: together the counters as they are now."""
        await self.tick()
        reading = await self._in_thread(self._reading())
        try:
            days = await self._in_thread(self._ledger.days)
            rest_on = reading.today
        except OSError:  # what single days counted can't be read now; what all did is known
            days, rest_on = {}, EARLIER
        return reading.today, savings.completed(days, counted(reading.totals), rest_on)

    def stream_labels(self, slot: int) -> tuple[str, str]:
        """Product and language of a stream's number, as the metrics have them."""
        process = self._around.process
        return stream_labels(process.stream_names(), slot, process.product_of)

    # ---

    def _head(self) -> dict[str, Any]:
        own = self._around.settings().reports
        return {
            "at": self._around.clock(),
            "addresses": own.addresses,
            "retention_seconds": own.retention,
            "note": None if self.keeps_clients else _OFF,
        }

    def _label(self, stream: StreamId) -> Label | None:
        return self._around.process.label_of(stream, "")

    def _reading(self) -> Callable[[], Reading]:
        """The counters as they are now; to be called in a thread: a time zone is read from its file."""
        settings, process = self._around.settings(), self._around.process
        now, installed, totals = self._around.clock(), process.installed_at, process.totals()
        return lambda: Reading(
            totals,
            installed,
            site_time(settings, installed).date().isoformat(),
            site_time(settings, now).date().isoformat(),
        )

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        """The work's result; a file that was found damaged is begun anew, and the work done again."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, work)
        except BegunAnewError:
            return await loop.run_in_executor(self._thread, work)
