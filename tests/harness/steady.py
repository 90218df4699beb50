"""Clients that go on asking while a test changes the service. Nothing is retried: every failure is kept."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Self

import xxhash

from harness.clients import request_text

PIECE_BYTES = 64 * 1024


class Steady:
    """Clients of one address, in a thread of their own, until `stop`.

    `bodies` are what they ask for, by path; each answer is compared. `busy` clients ask again at once over a
    kept connection, `lazy` ones after a pause, `new` ones over a new connection each time. `slow` ones take
    `large`, a path of `bodies`, at `rate` bytes a second, over a kept connection.
    """

    def __init__(
        self,
        address: tuple[str, int],
        bodies: Mapping[str, bytes],
        *,
        busy: int = 0,
        lazy: int = 0,
        new: int = 0,
        slow: int = 0,
        large: str = "",
        rate: int = 0,
        seed: int = 1,
        first: bytes = b"",
    ) -> None:
        """`first` is what each connection begins with."""
        self._first = first
        self._address, self._large, self._rate = address, large, rate
        self._sums = {path: (len(body), xxhash.xxh3_64_intdigest(body)) for path, body in bodies.items()}
        self._small = [path for path in bodies if path != large]
        self._random = random.Random(seed)
        self._stopping = False
        self.done = {"busy": 0, "lazy": 0, "new": 0, "slow": 0}
        """Complete and right answers, by the kind of client."""
        self.began = 0
        """Large bodies of which something has arrived."""
        self.closed = 0
        """Connections that the service announced to close, and closed."""
        self.failures: list[str] = []
        kinds: list[tuple[str, int, Callable[[str], Awaitable[None]]]] = [
            ("busy", busy, self._ask_on),
            ("lazy", lazy, self._ask_on),
            ("new", new, self._ask_anew),
            ("slow", slow, self._ask_on),
        ]
        self._clients = [work(kind) for kind, count, work in kinds for _ in range(count)]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="steady")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Each client ends what it has begun."""
        self._stopping = True
        self._thread.join()

    @property
    def total(self) -> int:
        return sum(self.done.values())

    async def _run(self) -> None:
        await asyncio.gather(*self._clients)

    async def _ask_on(self, kind: str) -> None:
        connection = None
        while not self._stopping:
            try:
                if connection is None:
                    connection = await asyncio.open_connection(*self._address)
                    connection[1].write(self._first)
                kept = await self._ask(kind, *connection)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure
                self.failures.append(f"{kind}: {error!r}")
                kept = False
            if not kept and connection is not None:
                connection[1].close()
                connection = None
            await asyncio.sleep(self._random.uniform(0.0, 0.3) if kind == "lazy" else 0.002)
        if connection is not None:
            connection[1].close()

    async def _ask_anew(self, kind: str) -> None:
        while not self._stopping:
            try:
                reader, writer = await asyncio.open_connection(*self._address)
                writer.write(self._first)
                try:
                    await self._ask(kind, reader, writer)
                finally:
                    writer.close()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure
                self.failures.append(f"{kind}: {error!r}")
            await asyncio.sleep(0.01)

    async def _ask(self, kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection stays. Raises what is wrong."""
        path = self._large if kind == "slow" else self._random.choice(self._small)
        writer.write(request_text(path, {"Host": f"{self._address[0]}:{self._address[1]}"}))
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith("http/1.1 200 "), head.partition("\r\n")[0]
        left = length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        found, loop = xxhash.xxh3_64(), asyncio.get_running_loop()
        began = loop.time()
        self.began += kind == "slow"
        while left:
            piece = await reader.readexactly(min(left, PIECE_BYTES))
            found.update(piece)
            left -= len(piece)
            if kind == "slow" and self._rate:
                await asyncio.sleep(began + (length - left) / self._rate - loop.time())
        assert (length, found.intdigest()) == self._sums[path], f"{path}: a wrong body"
        self.done[kind] += 1
        closes = "\r\nconnection: close" in head
        self.closed += closes
        return not closes
