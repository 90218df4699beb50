"""The reports: content taken, restarts pending, clients, savings.

"Taken" is not "installed": gup sees what was sent and which version a client states, never a client's disk.
"""

import asyncio
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any

from gup.client_names import ClientNames, is_hashed, read_key
from gup.config import Settings
from gup.content.catalog import CLIENT_PATCHES, Label
from gup.content.releases import Releases, Version
from gup.control.api import schemas
from gup.control.dependencies import ControlDependencies
from gup.control.events import Taken
from gup.control.exposition import stream_labels
from gup.control.stats.client_records import (
    MAX_CLIENTS,
    Batch,
    ClientRow,
    ClientState,
    Group,
    ReceivedParts,
    RevisionCount,
    StreamId,
    StreamState,
    Wanted,
    clients,
    forget_clients,
    groups,
    lagging,
    newest_clients,
    prune_clients,
    rename_clients,
    revision_counts,
    stream_states,
    takers,
    write_batch,
)
from gup.control.stats.database import StatsDatabase
from gup.control.stats.savings import (
    EARLIER,
    Days,
    Reading,
    add_reading,
    completed,
    counted,
    days_counted,
    prune_days,
)
from gup.control.traffic import revision_time
from gup.upstream.bandwidth import site_time

LabelOf = Callable[[StreamId], Label | None]


@dataclass(frozen=True, slots=True)
class StreamReport:
    """One stream. `known` are the revisions that were held, taken or asked for."""

    stream: StreamId
    held: str
    asked: str
    taken: str
    clients: int
    counts: tuple[RevisionCount, ...]

    @property
    def newest(self) -> str:
        """The newest revision held, taken or asked for."""
        return max(self.held, self.asked, self.taken)

    @property
    def known(self) -> list[str]:
        found = {self.held, self.asked, self.taken, *(count.revision for count in self.counts)}
        return sorted(found - {""})


def stream_reports(
    states: Iterable[StreamState], counts: Iterable[RevisionCount], held: Mapping[StreamId, str]
) -> list[StreamReport]:
    """Reports on the streams that clients asked for or that are held."""
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
) -> schemas.StreamReport:
    """A stream's report; `behind` clients lag, of which some are given."""
    known = report.known
    return schemas.StreamReport(
        **labels(report.stream, label_of),
        clients=report.clients,
        current=report.clients - behind,
        behind=behind,
        newest_held=report.held or None,
        newest_taken=report.taken or None,
        newest_asked=report.asked or None,
        lag_revisions=sum(revision > report.held for revision in known),
        lag_seconds=_lag_seconds(report.held, report.newest),
        revisions=[schemas.RevisionClients.model_validate(count) for count in report.counts],
        lagging=[_lagging(client, report.newest, known) for client in lagging],
    )


def labels(stream: StreamId, label_of: LabelOf) -> dict[str, Any]:
    """Product, version and language of a stream: from the catalogue, else moniker and variant."""
    label = label_of(stream)
    version, language, moniker = stream
    return {
        "product": label.product if label else moniker,
        "version": (label.version if label else "") or version,
        "language": (label.language if label else "") or language,
        "type": label.type if label else None,
        "moniker": moniker,
        "variant": schemas.Variant(version=version, language=language),
    }


def _lagging(client: ClientState, newest: str, known: list[str]) -> schemas.LaggingClient:
    return schemas.LaggingClient(
        address=client.name,
        version=client.version or None,
        language=client.language or None,
        revision=client.revision or None,
        lag_revisions=sum(revision > client.revision for revision in known),
        lag_seconds=_lag_seconds(client.revision, newest),
        taken_at=client.taken_at or None,
        asked=client.asked or None,
        asked_at=client.asked_at or None,
        seen_at=client.seen_at,
    )


def _lag_seconds(revision: str, newest: str) -> float | None:
    """The difference of the dates in the revisions, in whole days; None where one has no date."""
    there, here = revision_time(newest), revision_time(revision)
    return None if there is None or here is None else max(0.0, there - here)


SHOWN = 10_000
"""Rows shown at most."""

SAYING = (
    "Taken is not installed: a client listed as pending was sent a client patch and still states the build "
    "of before. It may wait for a restart, or not have begun to install."
)


class State(StrEnum):
    """What is known about a client that took a client patch."""

    PENDING = "pending"
    UNKNOWN = "unknown"
    """It states no build, so it is unknown whether it runs the patch."""
    RESTARTED = "restarted"


@dataclass(frozen=True, slots=True)
class Restart:
    """One client and the patch that it took last."""

    client: ClientState
    state: State


def restart_states(clients: Iterable[ClientState], releases: Releases) -> list[Restart]:
    """The states of clients that took a patch."""
    return [Restart(client, _state(client, releases)) for client in clients]


def _state(client: ClientState, releases: Releases) -> State:
    then, now = releases.version(client.version_then), releases.version(client.version)
    if then is None or now is None:
        return State.UNKNOWN
    if then.older_than(now) or (then.release == now.release and then.patch < now.patch):
        return State.RESTARTED
    return State.PENDING if _tells_builds(then) and _tells_builds(now) else State.UNKNOWN


def _tells_builds(version: Version) -> bool:
    """Whether the version names a build: the name of a release does not change with a patch."""
    return version.text.count(".") == 3 or bool(version.patch)


def _row(restart: Restart, label_of: LabelOf) -> schemas.Restart:
    client = restart.client
    return schemas.Restart(
        address=client.name,
        state="pending" if restart.state is State.PENDING else "unknown",
        version=client.version or None,
        language=client.language or None,
        version_then=client.version_then or None,
        product=labels(client.stream, label_of)["product"],
        moniker=client.stream[2],
        revision=client.taken,
        taken_at=client.taken_at,
        seen_at=client.seen_at,
    )


LAGGING_SHOWN = 1000
"""Lagging clients shown of one stream."""
_LAGGING_IN_ALL = 10_000
_OFF = "reports.addresses is off: no client is remembered"


class Reports:
    """Takes in news of clients, keeps the savings ledger, and answers what is asked of both.

    All methods belong to the event loop. What the disk refuses to take is tried again; nobody waits for it.
    """

    def __init__(
        self,
        dependencies: ControlDependencies,
        database: StatsDatabase,
        *,
        settings: Callable[[], Settings],
        clock: Callable[[], float],
        age_clock: Callable[[], float],
        held: Callable[[], Mapping[StreamId, str]],
        on_written: Callable[[str, str | None], None],
    ) -> None:
        """`age_clock` returns the time that ages are measured from, `held` the newest revisions in the store.

        `on_written` is told after each try to write what it was, and why the disk refused (None: it did not).
        """
        self._dependencies = dependencies
        self._database = database
        self._settings = settings
        self._clock = clock
        self._age_clock = age_clock
        self._held = held
        self._on_written = on_written
        self._batch = Batch()
        self._pieces = ReceivedParts()
        self._names: ClientNames | None = None
        self._named_by = ""

    # --- news

    @property
    def keeps_clients(self) -> bool:
        return self._settings().reports.addresses != "off"

    def see(self, clients: Iterable[str]) -> None:
        """These clients made a request."""
        for client in clients:
            name = self._name(client)
            if name is not None:
                self._batch.see(name, self._clock())

    def take(self, taken: Taken) -> None:
        """What clients took and asked for."""
        at = min(taken.at, self._clock())
        for take in taken.rows:
            name = self._name(take.client)
            if name is not None:
                self._batch.add(take._replace(client=name), at, self._pieces)

    def _name(self, client: str) -> str | None:
        """The name to store, or None; just after a reload workers still send names by the old settings."""
        mode = self._settings().reports.addresses
        if mode == "full" or (mode == "hashed" and is_hashed(client)):
            return client
        return self._names.hashed(client) if mode == "hashed" and self._names is not None else None

    # --- jobs

    async def write_clients(self) -> None:
        """Store what is new about clients."""
        await self._rename_clients()
        batch, self._batch = self._batch, Batch()
        if batch and not await self._written("reports", lambda db: write_batch(db, batch)):
            batch.absorb(self._batch)
            self._batch = batch

    async def write_savings(self) -> None:
        """Store what the counters have counted."""
        read = self._reading()
        await self._written("savings", lambda db: add_reading(db, read()))

    async def prune(self) -> None:
        """Delete what is older than the settings allow."""
        settings, now = self._settings(), self._age_clock()
        own = settings.reports

        def forget(db: sqlite3.Connection) -> None:
            prune_clients(db, now, own.retention, own.max_clients)
            oldest = site_time(settings, now) - timedelta(seconds=own.ledger)
            prune_days(db, oldest.date().isoformat())
            db.execute("PRAGMA incremental_vacuum").fetchall()

        await self._written("reports", forget)

    async def _written(self, what: str, work: Callable[[sqlite3.Connection], None]) -> bool:
        try:
            await self._database.run(work)
        except OSError as error:
            self._on_written(what, str(error))
            return False
        self._on_written(what, None)
        return True

    async def _rename_clients(self) -> None:
        """After a start or reload, rename the stored clients if the settings forbid their names."""
        mode = self._settings().reports.addresses
        if mode == self._named_by:
            return
        if self._names is None:
            path = self._dependencies.store.run / "address-key"
            self._names = ClientNames("hashed", await asyncio.to_thread(read_key, path))
        names = self._names
        by_old_names, self._batch = self._batch, Batch()  # what comes from now on is called right

        def rename(db: sqlite3.Connection) -> None:
            write_batch(db, by_old_names)
            if mode == "off":
                forget_clients(db)
                db.execute("PRAGMA incremental_vacuum").fetchall()
            elif mode == "hashed":
                rename_clients(db, lambda name: name if is_hashed(name) else names.hashed(name))

        if await self._written("reports", rename):
            self._named_by = mode
        elif mode == "full":
            by_old_names.absorb(self._batch)
            self._batch = by_old_names

    # --- what is asked

    async def newest_clients(self) -> list[tuple[str, float]]:
        """Stored clients with the time they were seen last; none when the disk refuses."""
        await self._rename_clients()
        try:
            return await self._database.run(lambda db: newest_clients(db, MAX_CLIENTS))
        except OSError:
            return []

    async def content(self) -> schemas.ContentReport:
        """*Content taken here*."""
        await self.write_clients()
        held = dict(self._held())

        def look(db: sqlite3.Connection) -> list[schemas.StreamReport]:
            found, left = [], _LAGGING_IN_ALL
            for report in stream_reports(stream_states(db), revision_counts(db), held):
                behind, clients = lagging(db, report.stream, report.newest, min(left, LAGGING_SHOWN))
                found.append(content_row(report, behind, clients, self._label))
                left -= len(clients)
            return found

        return schemas.ContentReport(**self._head(), content=await self._database.run(look))

    async def restarts(self) -> schemas.RestartReport:
        """*Restart pending*, and how many clients state what."""
        await self.write_clients()

        def look(db: sqlite3.Connection) -> tuple[list[Group], list[StreamId]]:
            return groups(db), [state.stream for state in stream_states(db)]

        stating, streams = await self._database.run(look)
        called = {stream: self._label(stream) for stream in streams}
        patches = [stream for stream, label in called.items() if label and label.type == CLIENT_PATCHES]

        def judge(db: sqlite3.Connection) -> list[Restart]:
            releases = Releases(self._settings().rules.releases)
            return restart_states((client for stream in patches for client in takers(db, stream)), releases)

        found = [row for row in await self._database.run(judge) if row.state is not State.RESTARTED]
        counts = Counter(row.state for row in found)
        return schemas.RestartReport(
            **self._head(),
            clients=[
                schemas.ClientGroup(
                    version=group.version or None, language=group.language or None, clients=group.clients
                )
                for group in stating
            ],
            catalogue_known=any(label is not None for label in called.values()),
            pending=counts[State.PENDING],
            unknown=counts[State.UNKNOWN],
            saying=SAYING,
            restart_pending=[_row(row, self._label) for row in found[:SHOWN]],
        )

    async def clients(self, wanted: Wanted) -> tuple[int, int, list[ClientRow]]:
        """How many clients are known, how many of them match, and a page of those."""
        await self.write_clients()

        def look(db: sqlite3.Connection) -> tuple[int, int, list[ClientRow]]:
            known, _ = clients(db, Wanted(limit=0))
            return (known, *clients(db, wanted))

        return await self._database.run(look)

    async def savings(self) -> tuple[str, Days]:
        """Today's date, and what each day counted, the oldest first: together the present counters."""
        await self.write_savings()
        reading = await asyncio.to_thread(self._reading())
        try:
            days = await self._database.run(days_counted)
            rest_on = reading.today
        except OSError:  # what single days counted can't be read now; what all did is known
            days, rest_on = {}, EARLIER
        return reading.today, completed(days, counted(reading.totals), rest_on)

    def stream_labels(self, slot: int) -> tuple[str, str]:
        """Product and language of a stream's slot, as in the metrics."""
        return stream_labels(self._dependencies.stream_names(), slot, self._dependencies.product_of)

    # ---

    def _head(self) -> dict[str, Any]:
        own = self._settings().reports
        return {
            "at": self._clock(),
            "addresses": own.addresses,
            "retention_seconds": own.retention,
            "note": None if self.keeps_clients else _OFF,
        }

    def _label(self, stream: StreamId) -> Label | None:
        return self._dependencies.label_of(stream, "")

    def _reading(self) -> Callable[[], Reading]:
        """Returns the present counters; to be called in a thread, since it reads a time zone's file."""
        settings, installed = self._settings(), self._dependencies.installed_at
        now, totals = self._clock(), self._dependencies.totals()
        return lambda: Reading(
            totals,
            installed,
            site_time(settings, installed).date().isoformat(),
            site_time(settings, now).date().isoformat(),
        )
