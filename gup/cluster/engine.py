"""The engine, Valkey or Redis, through redis-py. Only the controller speaks to it; nothing waits for it.

A call that takes longer than 0.2 s has failed, and is not repeated: the next beat comes soon.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from gup.cluster.beat import Beat, EngineError
from gup.cluster.share import GRANT_NS, Classes
from gup.cluster.signing import read_password
from gup.config import Cluster

CALL_SECONDS = 0.2
CONNECT_SECONDS = 1.0
"""For a connection with TLS and password."""
_LIFE_MS = GRANT_NS // 1_000_000
"""Of a row and of a grant."""
_MOST_ORDERS = 100
_MOST_KEPT = 100_000
_SCRIPT = Path(__file__).with_name("beat.lua")
_PORT = 6379
_SENTINEL_PORT = 26379


class Engine:
    """A connection to the engine, made when it is needed."""

    def __init__(self, settings: Cluster) -> None:
        """FileError when the password can't be read."""
        self._client = _client(settings)
        self._beat = self._client.register_script(_SCRIPT.read_text(encoding="utf-8"))
        self._prefix = f"gup:{{{settings.site}}}:"
        self._keys = [self._prefix + name for name in ("members", "demands", "grants", "orders")]
        self._connected = False

    async def time_ms(self) -> int:
        """The engine's time."""
        seconds, microseconds = await self._call(self._client.time())
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def beat(
        self,
        name: str,
        row: str,
        *,
        start: int,
        rate: int,
        demand: Classes,
        grant: int,
        last_order: str = "0",
        time_ms: int | None = None,
    ) -> Beat:
        """Tell this node's row, and hear of the others; EngineError. `time_ms` is for tests."""
        own_time = "" if time_ms is None else time_ms
        arguments = [name, row, _LIFE_MS, rate, *demand, grant, _LIFE_MS, last_order, _MOST_ORDERS, own_time]
        answer = await self._call(self._beat(keys=self._keys, args=[*arguments, start]))
        try:
            return _parse(answer)
        except (TypeError, ValueError, IndexError) as error:
            raise EngineError(f"its answer can't be read: {error}") from error

    async def budget(self, sealed: Mapping[str, str]) -> dict[str, str]:
        """Put rows of the WAN's budget by the ids of nodes; all that the engine has then. EngineError."""
        key = self._prefix + "budget"

        async def exchange() -> dict[str, str]:
            async with self._client.pipeline(transaction=False) as pipe:
                if sealed:
                    pipe.hset(key, mapping=cast("Any", sealed))
                pipe.hgetall(key)
                found = (await pipe.execute())[-1]
            return {str(id_): str(text) for id_, text in found.items()}

        return cast("dict[str, str]", await self._call(exchange()))

    async def drop_budget(self, ids: Sequence[str]) -> None:
        """Remove rows; EngineError."""
        await self._call(cast("Any", self._client.hdel(self._prefix + "budget", *ids)))

    async def orders(self) -> list[tuple[str, str]]:
        """All orders that the engine has, by the ids of their entries, sealed; EngineError."""
        found = await self._call(self._client.xrange(self._keys[3]))
        return [(str(id_), str(fields.get("order", ""))) for id_, fields in found]

    async def put_orders(self, sealed: Sequence[str], in_place_of: Sequence[str] = ()) -> None:
        """Add orders that it has not, and remove entries with these ids; EngineError."""
        if not sealed and not in_place_of:
            return

        async def put() -> None:
            async with self._client.pipeline(transaction=False) as pipe:
                for text in sealed:
                    pipe.xadd(self._keys[3], {"order": text}, maxlen=_MOST_KEPT, approximate=True)
                if in_place_of:
                    pipe.xdel(self._keys[3], *in_place_of)
                await pipe.execute()

        await self._call(put())

    async def _call(self, call: Any) -> Any:
        """EngineError with the cause; the connection is made anew then."""
        try:
            if not self._connected:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await cast("Any", self._client.ping())
                self._connected = True
            async with asyncio.timeout(CALL_SECONDS):
                return await call
        except (
            RedisError,
            OSError,
            TimeoutError,
            ValueError,
        ) as error:  # ValueError: bytes of no such protocol
            await self._drop()
            text = " ".join(str(error).split())[:200]
            raise EngineError(text or "it does not answer in time") from error
        finally:
            if asyncio.iscoroutine(call):
                call.close()  # if it was not awaited
            # asyncio.wait_for, which redis uses, may swallow a cancellation before Python 3.12 (gh-86296).
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError

    async def _drop(self) -> None:
        self._connected = False
        with contextlib.suppress(Exception):
            await self._client.connection_pool.disconnect()

    async def close(self) -> None:
        manager = getattr(self._client.connection_pool, "sentinel_manager", None)
        for client in (self._client, *(manager.sentinels if manager is not None else ())):
            with contextlib.suppress(Exception):
                await client.aclose()


def _client(settings: Cluster) -> Redis:
    assert settings.url is not None
    url = urlsplit(settings.url)
    shared: dict[str, Any] = {
        "decode_responses": True,
        "encoding_errors": "replace",
        "protocol": 2,
        "socket_timeout": CONNECT_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        "retry": Retry(NoBackoff(), 0),
    }
    if url.scheme == "rediss":
        shared |= {"ssl": True}
        if settings.ca_file is not None:
            shared["ssl_ca_certs"] = str(settings.ca_file)
    own = dict(shared) | {
        "username": unquote(url.username) if url.username else None,
        "password": read_password(settings.password_file) if settings.password_file else None,
        "db": int(url.path.strip("/") or 0),
    }
    if settings.sentinels:
        places = [urlsplit(f"//{place}") for place in settings.sentinels]
        sentinels = [(place.hostname or "", place.port or _SENTINEL_PORT) for place in places]
        quick = shared | {"socket_timeout": CALL_SECONDS, "socket_connect_timeout": CALL_SECONDS}
        sentinel: Any = cast("Any", Sentinel)(sentinels, sentinel_kwargs=quick, **own)
        return cast("Redis", sentinel.master_for(settings.sentinel_name or ""))
    return Redis(host=url.hostname or "", port=url.port or _PORT, **own)


def _parse(answer: Any) -> Beat:
    time_ms, grant, share, rows, orders = answer
    return Beat(
        time_ms=int(time_ms),
        grant=int(grant) if int(grant) >= 0 else None,
        share=int(share),
        rows={str(name): str(row) for name, row in zip(rows[::2], rows[1::2], strict=True)},
        orders=tuple(
            (str(id_), {str(name): str(value) for name, value in zip(fields[::2], fields[1::2], strict=True)})
            for id_, fields in orders
        ),
    )
