"""Answers of an upstream: whole responses with head and body, read by gup's client as a fill reads them.

The first byte is the request: a whole body, a range, a condition or a HEAD, of a manager or of another gup.
"""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from harness.private import private_counters, private_turns

import gup.upstream.connector  # noqa: F401 - imported late by gup, and must be instrumented too
from fuzz import Check
from fuzz.endpoints import upstream
from gup.cache.part_file import zip_end_is_right
from gup.cache.records import FillState, Head, Phase, Record, head_of
from gup.config import Settings
from gup.content.key import ContentKey, Kind
from gup.content.routes import path_of
from gup.upstream.bandwidth import Wan
from gup.upstream.exchange import RemoteHead, UpstreamFailure, Validators
from gup.upstream.health import Board
from gup.upstream.pool import Answer, Pool
from gup.upstream.session import Ask

_KEY = ContentKey("any", "any", "{535CB6A4-441F-4E8A-A897-804CD859100E}", "260801001", "full.zip")
_PATH = path_of(_KEY)
ASKS = {
    b"w": Ask(_PATH, "fill"),
    b"r": Ask(_PATH, "fill", start=5, if_range='"a"'),
    b"c": Ask(_PATH, "fill", if_none_match='"a"'),
    b"h": Ask(_PATH, "fill", method="HEAD"),
}
_HANG_SECONDS = 20.0


@contextmanager
def target() -> Iterator[Check]:
    """Any answer is a failure in words or a head without contradictions, which records and states can hold,
    and a body of no more bytes than it announced.
    """
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        told = [b""]
        context = _pool(Path(folder), lambda _head: told[0])
        pool = runner.run(context.__aenter__())

        def check(given: bytes) -> None:
            told[0] = given[1:]
            ask = ASKS.get(given[:1], ASKS[b"w"])
            for one in pool.upstreams:
                runner.run(_ask(pool, one, ask))

        try:
            yield check
        finally:
            runner.run(context.__aexit__(None, None, None))


@asynccontextmanager
async def _pool(folder: Path, answer):
    async with upstream(answer) as url:
        tables = [
            {"url": url, "name": kind, "kind": kind, "health_interval": 0} for kind in ("manager", "gup")
        ]
        settings = Settings.model_validate({"upstream": tables}).upstream
        names = [one.name for one in settings]
        wan = Wan(memoryview(bytearray(16)).cast("Q"), 0, private_turns(), lambda: 0, folder / "wan.lock")
        board = Board.private(names)
        pool = Pool(
            settings, private_counters(names), wan, user_agent="gup/test", via="1.1 here (gup)", board=board
        )
        try:
            yield pool
        finally:
            await pool.close()
            wan.close()


async def _ask(pool: Pool, one, ask: Ask) -> None:
    async with asyncio.timeout(_HANG_SECONDS):
        try:
            answer = await pool.ask(one, ask)
        except UpstreamFailure as failure:
            assert failure.detail.isprintable()
            assert failure.detail
            return
        if isinstance(answer, RemoteHead):
            assert answer.status in (304, 404, 410) or ask.method == "HEAD"
            _keep(answer)
            return
        try:
            _require_sense(answer.head, ask)
            _keep(answer.head)
            await _read(answer)
        finally:
            answer.close()


def _require_sense(head: RemoteHead, ask: Ask) -> None:
    assert head.status == 200 or (head.status == 206 and ask.ranged)
    assert head.start >= 0
    assert head.length is None or head.length > head.start
    if head.stop is not None:
        assert head.start < head.stop
        assert head.length is None or head.stop <= head.length
    assert 0 <= head.age_seconds <= 1 << 31
    assert head.validators.same_as(head.validators)
    if head.validators.if_range is not None:
        assert head.validators.if_range.isprintable()
    Validators.same_as(head.validators, Validators())


async def _read(answer: Answer) -> None:
    head, received, tail = answer.head, 0, b""
    try:
        while piece := await answer.read():
            received += len(piece)
            tail = (tail + piece)[-100:]
    except UpstreamFailure as failure:
        assert failure.detail.isprintable()
        return
    zip_end_is_right(tail)
    if head.stop is not None:
        assert received <= head.stop - head.start


def _keep(remote: RemoteHead) -> None:
    """What is stored of it is read back."""
    head = head_of(_KEY, remote)
    state = FillState(_KEY, Kind.FULL, 1, Phase.STREAMING, head, path=_PATH, told={"u": remote.validators})
    assert FillState.decode(state.encode()) == state
    if remote.length is not None and 0 < remote.length < 1 << 20:
        record = Record.of(_KEY, Kind.FULL, head, (1,), time.time(), 1, _PATH)
        assert Record.decode(record.encode()) == record
        assert isinstance(record.head, Head)
