"""The reports on clients: content taken, restarts pending, who they are.

"Taken" is not "installed": gup sees what was sent and which version a client states, never a client's disk.
"""

import asyncio
import sqlite3
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal

from gup.client_names import ClientNames, is_hashed, read_key
from gup.config import Settings
from gup.content.catalog import CLIENT_PATCHES, Stream
from gup.content.releases import Releases, Version
from gup.control.api import schemas
from gup.control.dependencies import ControlDependencies
from gup.control.events import Taken
from gup.control.stats.client_records import (
    MAX_CLIENTS,
    Batch,
    ReceivedParts,
    prune_clients,
    rename_clients,
    write_batch,
)
from gup.control.stats.database import StatsDatabase
from gup.control.stats.savings import prune_days
from gup.control.traffic import revision_time
from gup.upstream.bandwidth import site_time

SHOWN = 10_000
"""Rows shown at most, of all streams together."""
LAGGING_SHOWN = 1000
"""Lagging clients shown of one stream."""
SAYING = (
    "Taken is not installed: a client listed as pending was sent a client patch and still states the build "
    "of before. It may wait for a restart, or not have begun to install."
)
_OFF = "reports.addresses is off: no client is remembered"
_HAS = "max(revision, came_from)"
"""The revision that a client has: what it took here or what it came from, whichever is newer."""
_CLIENT = "name AS address, seen_at, nullif(version, '') AS version, nullif(language, '') AS language"
_STREAMS = """
SELECT version, language, moniker, t.id, count(*), max(revision), max(asked)
FROM standings JOIN streams t ON t.id = stream GROUP BY stream
"""
_REVISIONS = f"""
SELECT revision, sum(has) AS clients, sum(took) AS took, min(first) AS first_taken_at,
  max(last) AS last_taken_at
FROM (SELECT revision, 0 AS has, count(*) AS took, min(taken_at) AS first, max(taken_at) AS last
      FROM takes WHERE stream = :stream GROUP BY revision
      UNION ALL SELECT {_HAS}, count(*), 0, NULL, NULL FROM standings WHERE stream = :stream GROUP BY 1)
WHERE revision <> '' GROUP BY revision ORDER BY revision DESC
"""  # noqa: S608 - constants of ours
_BEHIND = f"FROM standings JOIN clients ON id = client WHERE stream = :stream AND {_HAS} < :newest"
_LAGGING = f"""
SELECT {_CLIENT}, nullif({_HAS}, '') AS revision, nullif(taken_at, 0) AS taken_at, nullif(asked, '') AS asked,
  nullif(asked_at, 0) AS asked_at {_BEHIND} ORDER BY {_HAS}, name LIMIT :most
"""
_TAKERS = f"""
SELECT {_CLIENT}, nullif(version_then, '') AS version_then, revision, taken_at
FROM standings JOIN clients ON id = client WHERE stream = ? AND revision <> '' ORDER BY name
"""  # noqa: S608
_GROUPS = """
SELECT nullif(version, '') AS version, nullif(language, '') AS language, count(*) AS clients
FROM clients GROUP BY 1, 2 ORDER BY clients DESC, version, language LIMIT 1000
"""
_MATCHING = """
FROM clients WHERE seen_at >= :since AND (:version IS NULL OR version = :version COLLATE NOCASE)
AND (:language IS NULL OR language = :language COLLATE NOCASE)
"""
_NEWEST = "SELECT name, seen_at FROM clients ORDER BY seen_at DESC LIMIT ?"
_PAGE = f"""
SELECT {_CLIENT}, first_at AS first_seen_at, id {_MATCHING}
AND (:seen_at IS NULL OR (seen_at, id) < (:seen_at, :id)) ORDER BY seen_at DESC, id DESC LIMIT :most
"""


class Reports:
    """Takes in news of clients, and answers what is asked of them.

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
        held: Callable[[], Mapping[Stream, str]],
        on_written: Callable[[str | None], None],
    ) -> None:
        """`age_clock` returns the time that ages are measured from, `held` the newest revisions in the store.

        `on_written` as in StatsDatabase.store.
        """
        self._dependencies = dependencies
        self._database = database
        self._settings = settings
        self._clock = clock
        self._age_clock = age_clock
        self._held = held
        self._on_written = on_written
        self._batch = Batch()
        self._parts = ReceivedParts()
        self._names: ClientNames | None = None
        self._named_by = ""

    # --- news

    @property
    def keeps_clients(self) -> bool:
        return self._settings().reports.addresses != "off"

    def see(self, clients: Iterable[str]) -> None:
        """These clients made a request."""
        for client in clients:
            if (name := self._name(client)) is not None:
                self._batch.see(name, self._clock())

    def take(self, taken: Taken) -> None:
        """What clients took and asked for."""
        at = min(taken.at, self._clock())
        for take in taken.rows:
            if (name := self._name(take.client)) is not None:
                self._batch.add(take._replace(client=name), at, self._parts)

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
        if batch.seen and not await self._database.store(lambda db: write_batch(db, batch), self._on_written):
            self._put_back(batch)

    async def prune(self) -> None:
        """Delete what is older than the settings allow."""
        settings, now = self._settings(), self._age_clock()
        own = settings.reports

        def forget(db: sqlite3.Connection) -> None:
            prune_clients(db, now, own.retention, own.max_clients)
            oldest = site_time(settings, now) - timedelta(seconds=own.ledger)
            prune_days(db, oldest.date().isoformat())
            db.execute("PRAGMA incremental_vacuum").fetchall()

        await self._database.store(forget, self._on_written)

    def _put_back(self, batch: Batch) -> None:
        batch.absorb(self._batch)
        self._batch = batch

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
                prune_clients(db, self._clock(), 0.0, 0)
                db.execute("PRAGMA incremental_vacuum").fetchall()
            elif mode == "hashed":
                rename_clients(db, lambda name: name if is_hashed(name) else names.hashed(name))

        if await self._database.store(rename, self._on_written):
            self._named_by = mode
        elif mode == "full":
            self._put_back(by_old_names)

    # --- what is asked

    async def newest_clients(self) -> list[tuple[str, float]]:
        """Stored clients with the time they were seen last; none when the disk refuses."""
        await self._rename_clients()
        try:
            return await self._database.run(lambda db: db.execute(_NEWEST, (MAX_CLIENTS,)).fetchall())
        except OSError:
            return []

    async def content(self) -> schemas.ContentReport:
        """*Content taken here*."""
        await self.write_clients()
        held = dict(self._held())
        content = await self._database.run(lambda db: list(self._streams(db, held)))
        return schemas.ContentReport(**self._head(), content=content)

    def _streams(self, db: sqlite3.Connection, held: Mapping[Stream, str]) -> Iterator[schemas.StreamReport]:
        """Reports on the streams that clients asked for or that are held."""
        found = {row[:3]: row[3:] for row in db.execute(_STREAMS)}
        left = SHOWN
        for stream in sorted(found.keys() | held.keys()):
            id_, clients, taken, asked = found.get(stream, (None, 0, "", ""))
            here = held.get(stream, "")
            revisions = [schemas.RevisionClients(**row) for row in _rows(db, _REVISIONS, {"stream": id_})]
            known = sorted({here, taken, asked, *(row.revision for row in revisions)} - {""})
            lag = _Lag(known)
            asking = {"stream": id_, "newest": lag.newest, "most": min(left, LAGGING_SHOWN)}
            (behind,) = db.execute(f"SELECT count(*) {_BEHIND}", asking).fetchone()
            lagging = list(_rows(db, _LAGGING, asking))
            left -= len(lagging)
            label = self._dependencies.label_of(stream, "")
            yield schemas.StreamReport(
                product=label.product if label else stream[2],
                version=(label and label.version) or stream[0],
                language=(label and label.language) or stream[1],
                type=label.type if label else None,
                moniker=stream[2],
                variant=schemas.Variant(version=stream[0], language=stream[1]),
                clients=clients,
                current=clients - behind,
                behind=behind,
                newest_held=here or None,
                newest_taken=taken or None,
                newest_asked=asked or None,
                **lag.of(here),
                revisions=revisions,
                lagging=[schemas.LaggingClient(**row, **lag.of(row["revision"])) for row in lagging],
            )

    async def restarts(self) -> schemas.RestartReport:
        """*Restart pending*, and how many clients state what."""
        await self.write_clients()

        def look(db: sqlite3.Connection) -> schemas.RestartReport:
            releases, streams = Releases(self._settings().rules.releases), db.execute(_STREAMS).fetchall()
            labels = {row[3]: self._dependencies.label_of(row[:3], "") for row in streams}
            found = [
                schemas.Restart(**row, state=state, product=label.product, moniker=moniker)
                for _, _, moniker, id_, *_ in streams
                if (label := labels[id_]) is not None and label.type == CLIENT_PATCHES
                for row in _rows(db, _TAKERS, (id_,))
                if (state := _restart_state(row["version_then"], row["version"], releases)) != "restarted"
            ]
            counts = Counter(row.state for row in found)
            return schemas.RestartReport(
                **self._head(),
                clients=[schemas.ClientGroup(**row) for row in _rows(db, _GROUPS)],
                catalogue_known=any(labels.values()),
                pending=counts["pending"],
                unknown=counts["unknown"],
                saying=SAYING,
                restart_pending=found[:SHOWN],
            )

        return await self._database.run(look)

    async def clients(
        self,
        *,
        since: float,
        version: str | None,
        language: str | None,
        after: tuple[float, int] | None,
        most: int,
    ) -> dict[str, Any]:
        """A page of clients by what they state (None: anything), newest first: members of schemas.Clients."""
        await self.write_clients()
        seen_at, id_ = after or (None, None)
        wanted = {"since": since, "version": version, "language": language, "seen_at": seen_at, "id": id_}

        def look(db: sqlite3.Connection) -> dict[str, Any]:
            rows = list(_rows(db, _PAGE, {**wanted, "most": most + 1}))
            numbers = [row.pop("id") for row in rows]
            last = rows[:most][-1:]
            return {
                "known": db.execute("SELECT count(*) FROM clients").fetchone()[0],
                "matching": db.execute(f"SELECT count(*) {_MATCHING}", wanted).fetchone()[0],
                "clients": [schemas.KnownClient(**row) for row in rows[:most]],
                "cursor": (last[0]["seen_at"], numbers[most - 1]) if len(rows) > most else None,
            }

        return await self._database.run(look)

    def _head(self) -> dict[str, Any]:
        own = self._settings().reports
        return {
            "at": self._clock(),
            "addresses": own.addresses,
            "retention_seconds": own.retention,
            "note": None if self.keeps_clients else _OFF,
        }


def _rows(db: sqlite3.Connection, query: str, given: Any = ()) -> Iterator[dict[str, Any]]:
    """The rows by the names of their columns."""
    found = db.execute(query, given)
    names = [column[0] for column in found.description]
    return (dict(zip(names, row, strict=True)) for row in found)


class _Lag:
    """How far a revision lies behind the newest of those `known`."""

    def __init__(self, known: list[str]) -> None:
        self._known = known
        self.newest = known[-1] if known else ""

    def of(self, revision: str | None) -> dict[str, Any]:
        """In revisions, and in whole days by the dates in them; None where one has no date."""
        newest, own = revision_time(self.newest), revision_time(revision or "")
        return {
            "lag_revisions": len(self._known) - bisect_right(self._known, revision or ""),
            "lag_seconds": None if newest is None or own is None else max(0.0, newest - own),
        }


def _restart_state(
    version_then: str | None, version_now: str | None, releases: Releases
) -> Literal["pending", "unknown", "restarted"]:
    """What is known of a client that took a client patch; one that states no build may run it or not."""
    then, now = releases.version(version_then or ""), releases.version(version_now or "")
    if then is None or now is None:
        return "unknown"
    if then.older_than(now) or (then.release == now.release and then.patch < now.patch):
        return "restarted"
    return "pending" if _tells_builds(then) and _tells_builds(now) else "unknown"


def _tells_builds(version: Version) -> bool:
    """Whether the version names a build: the name of a release does not change with a patch."""
    return version.text.count(".") == 3 or bool(version.patch)
