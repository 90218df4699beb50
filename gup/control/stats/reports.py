"""The reports on clients and savings."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, TypeVar

from gup.addresses import Names, is_hashed, read_key
from gup.config import Settings
from gup.content.catalogues import Label
from gup.content.releases import Releases, Version
from gup.content.stream_types import CLIENT_PATCHES
from gup.control.dependencies import Surroundings
from gup.control.events import Taken
from gup.control.exposition import stream_labels
from gup.control.stats import clients as queries
from gup.control.stats.clients import (
    Batch,
    ClientState,
    Group,
    Pieces,
    Records,
    RevisionCount,
    StreamId,
    StreamState,
)
from gup.control.stats.database import BegunAnewError
from gup.control.stats.savings import EARLIER, Days, Ledger, Reading, completed, counted
from gup.control.traffic import revision_time
from gup.upstream.schedule import site_time

LabelOf = Callable[[StreamId], Label | None]


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What there is to say of one stream. `known` are its revisions that were held, taken or asked for."""

    stream: StreamId
    held: str
    asked: str
    taken: str
    clients: int
    counts: tuple[RevisionCount, ...]

    @property
    def newest(self) -> str:
        """The newest revision that could be had or was wanted here."""
        return max(self.held, self.asked, self.taken)

    @property
    def known(self) -> list[str]:
        found = {self.held, self.asked, self.taken, *(count.revision for count in self.counts)}
        return sorted(found - {""})


def stream_reports(
    states: Iterable[StreamState], counts: Iterable[RevisionCount], held: Mapping[StreamId, str]
) -> list[StreamReport]:
    """A report a stream, of those that clients asked for and those that are held."""
    by_stream: dict[StreamId, list[RevisionCount]] = defaultdict(list)
    for count in counts:
        by_stream[count.stream].append(count)
    found = {state.stream: state for state in states}
    reports = []
    for stream in sorted(found.keys() | held.keys()):
        state = found.get(stream) or StreamState(stream, 0, "", "")
        newest_first = sorted(by_stream[stream], key=lambda count: count.revision, reverse=True)
        reports.append(
            StreamReport(
                stream,
                held.get(stream, ""),
                state.newest_asked,
                state.newest_taken,
                state.clients,
                tuple(newest_first),
            )
        )
    return reports


def content_row(
    report: StreamReport, behind: int, lagging: Iterable[ClientState], label_of: LabelOf
) -> dict[str, Any]:
    """The report as the API shows it; `behind` clients stand before the newest, of whom some are given."""
    known = report.known
    return labels(report.stream, label_of) | {
        "clients": report.clients,
        "current": report.clients - behind,
        "behind": behind,
        "newest_held": report.held or None,
        "newest_taken": report.taken or None,
        "newest_asked": report.asked or None,
        "lag_revisions": sum(revision > report.held for revision in known),
        "lag_seconds": _lag_seconds(report.held, report.newest),
        "revisions": [
            {
                "revision": count.revision,
                "clients": count.clients,
                "took": count.took,
                "first_taken_at": count.first_taken_at,
                "last_taken_at": count.last_taken_at,
            }
            for count in report.counts
        ],
        "lagging": [_lagging(client, report.newest, known) for client in lagging],
    }


def labels(stream: StreamId, label_of: LabelOf) -> dict[str, Any]:
    """What people call a stream: the catalogue's words, else the moniker and the variant."""
    label = label_of(stream)
    version, language, moniker = stream
    return {
        "product": label.product if label else moniker,
        "version": (label.version if label else "") or version,
        "language": (label.language if label else "") or language,
        "type": label.type if label else None,
        "moniker": moniker,
        "variant": {"version": version, "language": language},
    }


def _lagging(client: ClientState, newest: str, known: list[str]) -> dict[str, Any]:
    return {
        "address": client.name,
        "version": client.version or None,
        "language": client.language or None,
        "revision": client.revision or None,
        "lag_revisions": sum(revision > client.revision for revision in known),
        "lag_seconds": _lag_seconds(client.revision, newest),
        "taken_at": client.taken_at or None,
        "asked": client.asked or None,
        "asked_at": client.asked_at or None,
        "seen_at": client.seen_at,
    }


def _lag_seconds(revision: str, newest: str) -> float | None:
    """By the dates in the revisions, so in whole days; None where one has none."""
    there, here = revision_time(newest), revision_time(revision)
    return None if there is None or here is None else max(0.0, there - here)


SHOWN = 10_000
"""Rows at most."""

SAYING = (
    "Taken is not installed: a client listed as pending was sent a client patch and still states the build "
    "of before. It may wait for a restart, or not have begun to install."
)


class State(StrEnum):
    """What is known of a client that took a patch."""

    PENDING = "pending"
    UNKNOWN = "unknown"
    """It states no build, so that nothing tells whether it runs the patch."""
    RESTARTED = "restarted"


@dataclass(frozen=True, slots=True)
class Restart:
    """One client and the patch that it took last."""

    client: ClientState
    state: State


def restart_states(clients: Iterable[ClientState], releases: Releases) -> list[Restart]:
    """How those who took a patch stand."""
    return [Restart(client, _state(client, releases)) for client in clients]


def _state(client: ClientState, releases: Releases) -> State:
    then, now = releases.version(client.version_then), releases.version(client.version)
    if then is None or now is None:
        return State.UNKNOWN
    if then.older_than(now) or (then.release == now.release and then.patch < now.patch):
        return State.RESTARTED
    return State.PENDING if _tells_builds(then) and _tells_builds(now) else State.UNKNOWN


def _tells_builds(version: Version) -> bool:
    """A release's name alone stays the same when a patch is installed."""
    return version.text.count(".") == 3 or bool(version.patch)


def restart_table(
    found: Iterable[Restart],
    groups: Iterable[Group],
    streams: Mapping[StreamId, Label | None],
    label_of: LabelOf,
) -> dict[str, Any]:
    """The report as the API shows it. Without any catalogue nobody knows which streams are client patches."""
    rows = [row for row in found if row.state is not State.RESTARTED]
    counts = Counter(row.state for row in rows)
    return {
        "clients": [
            {"version": group.version or None, "language": group.language or None, "clients": group.clients}
            for group in groups
        ],
        "catalogue_known": any(label is not None for label in streams.values()),
        "pending": counts[State.PENDING],
        "unknown": counts[State.UNKNOWN],
        "saying": SAYING,
        "restart_pending": [_row(row, label_of) for row in rows[:SHOWN]],
    }


def _row(restart: Restart, label_of: LabelOf) -> dict[str, Any]:
    client = restart.client
    return {
        "address": client.name,
        "state": str(restart.state),
        "version": client.version or None,
        "language": client.language or None,
        "version_then": client.version_then or None,
        "product": labels(client.stream, label_of)["product"],
        "moniker": client.stream[2],
        "revision": client.taken,
        "taken_at": client.taken_at,
        "seen_at": client.seen_at,
    }


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
        self._names: Names | None = None
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
        for take in taken.rows:
            name = self._name(take.client)
            if name is not None:
                self._batch.add(take._replace(client=name), at, self._pieces)

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

    async def _named(self) -> Names:
        if self._names is None:
            path = self._around.process.store.run / "address-key"
            self._names = Names("hashed", await self._in_thread(lambda: read_key(path)))
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

        def look() -> list[tuple[StreamReport, int, list[queries.ClientState]]]:
            states, counts = queries.stream_states(self._records), queries.revision_counts(self._records)
            found, left = [], _LAGGING_IN_ALL
            for report in stream_reports(states, counts, held):
                most = min(left, LAGGING_SHOWN)
                behind, clients = queries.lagging(self._records, report.stream, report.newest, most)
                found.append((report, behind, clients))
                left -= len(clients)
            return found

        rows = [
            content_row(report, behind, lagging, self._label)
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

        def judge() -> list[Restart]:
            releases = Releases(self._around.settings().rules.releases)
            takers = [client for stream in patches for client in queries.takers(self._records, stream)]
            return restart_states(takers, releases)

        return self._head() | restart_table(await self._in_thread(judge), groups, labels, self._label)

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
        return reading.today, completed(days, counted(reading.totals), rest_on)

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
