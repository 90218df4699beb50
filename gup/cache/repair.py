"""Mends a committed body: good chunks copied to a new file, bad ones fetched and compared; serves nobody.

The caller holds the key's claim. The record stays as it is: what takes the old file's place has its bytes.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from gup.cache.asking import counted_as
from gup.cache.chunks import is_sound, read_chunk, runs, span_of
from gup.cache.disk import on_disk
from gup.cache.flight import Flight, Landing, Means
from gup.cache.prior import Damage
from gup.cache.record import Record
from gup.cache.room import Room
from gup.cache.store import OpenFile
from gup.content.key import Kind
from gup.errors import GupError, Problem
from gup.upstream.connection import Answer, Ask, Upstream
from gup.upstream.download import TRIES
from gup.upstream.exchange import RemoteHead, UpstreamFailure

log = logging.getLogger("gup.repair")

_FIRST_BACKOFF_SECONDS = 0.2
_Result = TypeVar("_Result")


async def mend(means: Means, flight: Flight, path: str, room: Room, damage: Damage) -> bool:
    """Bring a flight to its end by mending the body, twice if the disk was full; False: fetch it anew.

    Raises as `Repair.run` does, and Unstorable.
    """
    await room.reserve(damage.record.length)
    path = damage.record.path or path
    try:
        await room.twice(lambda: Repair(means, flight, path, damage).run())
    except NotTheSame as error:
        log.warning("%s can't be mended and is fetched anew: %s", flight.key.text, str(error))
        return False
    finally:
        room.release(committed=False)
    flight.land(Landing.COMMITTED)
    means.counters.add("gup_fills_total", outcome="committed")
    return True


class NotTheSame(GupError):  # noqa: N818 - an observation, not our error
    """No upstream has the bytes that are missing: they changed, or only whole bodies are given."""


class Repair:
    """One body's repair. `missing` are the chunks that are still to be fetched; it shrinks here alone."""

    def __init__(self, means: Means, flight: Flight, path: str, damage: Damage) -> None:
        self._means = means
        self._flight = flight
        self._path = path
        self._share = flight.share
        self._damage = damage
        self._record: Record = damage.record
        self._missing: list[int] = []
        self._generation = int(means.wall_clock() * 1_000_000_000)

    async def run(self) -> None:
        """Put a whole body in place of the damaged one.

        NotTheSame when it has to be fetched anew; UpstreamFailure or Problem when nobody could be asked: the
        damaged body stays then, for its good chunks. DiskError when the disk refuses.
        """
        means, key = self._means, self._record.key
        try:
            part = await self._in_thread(self._begin)
            await self._fetch_missing(part)
            await self._in_thread(self._finish, part)
        finally:
            await self._in_thread(means.store.drop_part, key.id, self._generation)
        means.raise_store_epoch()
        log.info("mended %s: %d of %d chunks", key.text, len(self._damage.bad), len(self._record.sums))

    # --- the file

    def _begin(self) -> OpenFile:
        """A new part with the good chunks. They are compared again on the way: the disk is not trusted."""
        means, record, source = self._means, self._record, self._damage.file
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        part = OpenFile(means.store.part_path(record.key.id, self._generation), flags)
        bad = set(self._damage.bad)
        for chunk in range(len(record.sums)):
            piece = read_chunk(source.fd, record, chunk) if source is not None and chunk not in bad else None
            if piece is None:
                self._missing.append(chunk)
            else:
                _write(part, piece, span_of(record, chunk)[0])
        return part

    def _finish(self, part: OpenFile) -> None:
        os.fsync(part.fd)
        self._means.store.mend(self._record, self._generation)

    # --- upstream

    async def _fetch_missing(self, part: OpenFile) -> None:
        if not self._missing:
            return
        problem: GupError | None = None
        for upstream in self._upstreams():
            try:
                await self._fetch_from(upstream, part)
            except (UpstreamFailure, NotTheSame) as error:
                log.warning("%s: not mended by %s: %s", self._record.key.text, upstream.name, str(error))
                problem = error if problem is None or isinstance(error, NotTheSame) else problem
            else:
                return
        if problem is None:
            raise Problem("no-upstream", f"no upstream has {self._flight.variant}")
        raise problem

    def _upstreams(self) -> Sequence[Upstream]:
        flight = self._flight
        chosen, _ = self._means.pool.chosen(flight.variant, flight.key.text, flight.via, resuming=False)
        return chosen

    async def _fetch_from(self, upstream: Upstream, part: OpenFile) -> None:
        """Fetch run after run of missing chunks; one that breaks off is gone on with from its last chunk."""
        fruitless = 0
        while self._missing:
            left = len(self._missing)
            try:
                await self._fetch_run(upstream, part, *next(runs(self._missing)))
            except UpstreamFailure as failure:
                fruitless = 0 if len(self._missing) < left else fruitless + 1
                if not failure.again or fruitless >= TRIES:
                    raise
                await asyncio.sleep(_FIRST_BACKOFF_SECONDS * 2 ** max(fruitless - 1, 0))

    async def _fetch_run(self, upstream: Upstream, part: OpenFile, first: int, last: int) -> None:
        answer = await self._ask(upstream, first, last)
        held = bytearray()
        try:
            for chunk in range(first, last + 1):
                offset, length = span_of(self._record, chunk)
                while len(held) < length:
                    piece = await answer.read()
                    if not piece:
                        detail = f"{upstream.name} broke off while bytes were mended"
                        raise UpstreamFailure("error", "upstream-error", detail, again=True)
                    held += piece
                body = bytes(held[:length])
                if not is_sound(body, self._record, chunk):
                    self._waste(len(held))
                    raise NotTheSame(f"{upstream.name} has other bytes at {offset}")
                await self._in_thread(_write, part, body, offset)
                del held[:length]
                self._missing.remove(chunk)
            self._waste(len(held))
        finally:
            answer.close()

    async def _ask(self, upstream: Upstream, first: int, last: int) -> Answer:
        record, means = self._record, self._means
        start = span_of(record, first)[0]
        stop = sum(span_of(record, last))
        # Another upstream may tag the same bytes otherwise; the sums decide in any case.
        own = upstream.name == record.upstream or record.kind is Kind.INDEX
        ask = Ask(
            path=self._path,
            purpose="repair",
            stream=counted_as(means, self._flight),
            start=start,
            stop=stop,
            if_range=record.upstream_etag if own else None,
            share=self._share,
            via=self._flight.via,
        )
        try:
            answer = await means.pool.ask(upstream, ask)
        except UpstreamFailure as failure:
            if failure.status == 416:
                raise NotTheSame(f"{upstream.name} has a shorter body") from failure
            raise
        if isinstance(answer, RemoteHead):
            slug = "upstream-gone" if answer.status == 410 else "upstream-not-found"
            raise UpstreamFailure("not_found", slug, f"{upstream.name} answered {answer.status}", again=False)
        head = answer.head
        if head.status != 206 or head.start != start or head.length not in (None, record.length):
            answer.close()
            raise NotTheSame(f"{upstream.name} does not give a part of the body that was stored")
        return answer

    def _waste(self, amount: int) -> None:
        if amount:
            self._means.counters.waste("mismatch", counted_as(self._means, self._flight), amount)

    async def _in_thread(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        return await on_disk(self._means.executor, work, *arguments)


def _write(part: OpenFile, piece: bytes, offset: int) -> None:
    view = memoryview(piece)
    while view:
        done = os.pwrite(part.fd, view, offset)
        offset += done
        view = view[done:]
