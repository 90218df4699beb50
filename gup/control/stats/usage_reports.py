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
from gup.content.catalog import CLIENT_PATCHES, Stream
from gup.content.releases import Releases
from gup.control.api import schemas
from gup.control.dependencies import ControlDependencies
from gup.control.events import Taken
from gup.control.stats import client_records
from gup.control.stats.client_records import Batch, ReceivedParts, write_batch
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
_NEWEST = f"SELECT name, seen_at FROM clients ORDER BY seen_at DESC LIMIT {client_records.MAX_CLIENTS}"  # noqa: S608
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
        clock: Callable[[], float],
        age_clock: Callable[[], float],
        held: Callable[[], Mapping[Stream, str]],
    ) -> None:
        """`age_clock` tells the time that ages are measured from, `held` the newest revisions stored."""
        self._dependencies = dependencies
        self._database = database
        self._clock, self._age_clock = clock, age_clock
        self._held = held
        self._batch = Batch()
        self._parts = ReceivedParts()
        self._names: ClientNames | None = None
        self._named_by = ""
        """The mode by which stored clients are named; "" after a start, until they are."""

    # --- news

    @property
    def mode(self) -> str:
        """`reports.addresses`: full, hashed or off."""
        return self._dependencies.settings().reports.addresses

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
        if self.mode == "full" or (self.mode == "hashed" and is_hashed(client)):
            return client
        return self._names.hashed(client) if self.mode == "hashed" and self._names is not None else None

    # --- jobs

    async def write_clients(self) -> None:
        """Store what is new about clients."""
        await self._rename_clients()
        batch, self._batch = self._batch, Batch()
        if batch.seen and not await self._database.store("reports", lambda db: write_batch(db, batch)):
            self._put_back(batch)

    async def prune(self) -> None:
        """Delete what is older than the settings allow."""
        settings, now = self._dependencies.settings(), self._age_clock()
        own = settings.reports

        def forget(db: sqlite3.Connection) -> None:
            client_records.prune(db, now, own.retention, own.max_clients)
            oldest = site_time(settings, now) - timedelta(seconds=own.ledger)
            prune_days(db, oldest.date().isoformat())
            db.execute("PRAGMA incremental_vacuum").fetchall()

        await self._database.store("reports", forget)

    def _put_back(self, batch: Batch) -> None:
        batch.absorb(self._batch)
        self._batch = batch

    async def _rename_clients(self) -> None:
        """After a start or reload, rename the stored clients if the settings forbid their names."""
        mode = self.mode
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
                client_records.prune(db, self._clock(), 0.0, 0)
                db.execute("PRAGMA incremental_vacuum").fetchall()
            elif mode == "hashed":
                client_records.rename(db, lambda name: name if is_hashed(name) else names.hashed(name))

        if await self._database.store("reports", rename):
            self._named_by = mode
        elif mode == "full":
            self._put_back(by_old_names)

    # --- what is asked

    async def newest_clients(self) -> list[tuple[str, float]]:
        """Stored clients with the time they were seen last; none when the disk refuses."""
        await self._rename_clients()
        try:
            return await self._database.run(lambda db: db.execute(_NEWEST).fetchall())
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
            newest = known[-1] if known else ""
            asking = {"stream": id_, "newest": newest, "most": min(left, LAGGING_SHOWN)}
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
                **_lag(known, here),
                revisions=revisions,
                lagging=[schemas.LaggingClient(**row, **_lag(known, row["revision"])) for row in lagging],
            )

    async def restarts(self) -> schemas.RestartReport:
        """*Restart pending*, and how many clients state what."""
        await self.write_clients()

        def look(db: sqlite3.Connection) -> schemas.RestartReport:
            releases, streams = (
                Releases(self._dependencies.settings().rules.releases),
                db.execute(_STREAMS).fetchall(),
            )
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

    async def clients(self, most: int, **wanted: Any) -> dict[str, Any]:
        """A page of clients, newest first: members of schemas.Clients.

        `wanted`: those seen `since` then, their `version` and `language` (None: any), and `seen_at` and `id`
        of the last one on the page before (None: the first page).
        """
        await self.write_clients()

        def look(db: sqlite3.Connection) -> dict[str, Any]:
            rows = list(_rows(db, _PAGE, {**wanted, "most": most + 1}))
            places = [(row["seen_at"], row.pop("id")) for row in rows]
            return {
                "known": db.execute("SELECT count(*) FROM clients").fetchone()[0],
                "matching": db.execute(f"SELECT count(*) {_MATCHING}", wanted).fetchone()[0],
                "clients": [schemas.KnownClient(**row) for row in rows[:most]],
                "cursor": places[most - 1] if len(rows) > most else None,
            }

        return await self._database.run(look)

    def _head(self) -> dict[str, Any]:
        return {
            "at": self._clock(),
            "addresses": self.mode,
            "retention_seconds": self._dependencies.settings().reports.retention,
            "note": _OFF if self.mode == "off" else None,
        }


def _rows(db: sqlite3.Connection, query: str, given: Any = ()) -> Iterator[dict[str, Any]]:
    """The rows by the names of their columns."""
    found = db.execute(query, given)
    names = [column[0] for column in found.description]
    return (dict(zip(names, row, strict=True)) for row in found)


def _lag(known: list[str], revision: str | None) -> dict[str, Any]:
    """How far a revision lies behind the newest of those `known`, which are in order.

    In revisions, and in whole days by the dates in them; None where one has no date.
    """
    newest, own = revision_time(known[-1] if known else ""), revision_time(revision or "")
    return {
        "lag_revisions": len(known) - bisect_right(known, revision or ""),
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
    # The name of a release does not change with a patch: it names no build.
    builds = all(version.text.count(".") == 3 or version.patch for version in (then, now))
    return "pending" if builds else "unknown"
