"""The WAN before an upstream: a relay of a fixed rate and latency, in a process of its own.

Each direction takes half of the latency; what comes back shares one rate over all connections. `Wan` starts
it and reads what passed; the module run as a program is the relay.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Self

import uvloop
from harness.processes import free_port, listens, until

PIECE_BYTES = 16 * 1024
_CHECK_BYTES = 1024
"""What is no longer is the answer to a health check, which a cache makes at any time."""
_QUEUE_SECONDS = 0.01
"""Of the link; without a queue it would idle whenever the relay waits for a core."""
_MOST_WAITING_BYTES = 256 * 1024
"""Of one connection, in the relay; so much a router may hold."""


@dataclass(slots=True)
class Passed:
    """What came back since the last look. Times are on the monotonic clock, which all processes share."""

    passed_bytes: int = 0
    """Heads too."""
    first_at: float = 0.0
    """When the first byte left the link."""
    last_at: float = 0.0


class _Relay:
    """All connections of the link, and the moment it is free again."""

    def __init__(self, upstream_port: int, per_second: int, latency_seconds: float) -> None:
        self.upstream_port = upstream_port
        self.half_seconds = latency_seconds / 2
        self.passed = Passed()
        self._per_second = per_second
        self._free_at = 0.0

    async def carry(self, size_bytes: int) -> float:
        """Wait for the link's queue; when these bytes come out at its other end."""
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + size_bytes / self._per_second
        if (wait := self._free_at - now - _QUEUE_SECONDS) > 0:
            await asyncio.sleep(wait)
        return self._free_at + self.half_seconds

    async def connected(self, client: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, up = await asyncio.open_connection("127.0.0.1", self.upstream_port, limit=PIECE_BYTES)
        back = asyncio.create_task(self._back(upstream, writer))
        try:
            while piece := await client.read(PIECE_BYTES):
                await asyncio.sleep(self.half_seconds)
                up.write(piece)
        except (ConnectionError, asyncio.CancelledError):  # the end of the measurement
            back.cancel()
        finally:
            with contextlib.suppress(ConnectionError):
                up.close()
            with contextlib.suppress(asyncio.CancelledError):
                await back
            writer.close()

    async def _back(self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()

        def deliver(piece: bytes) -> None:
            passed = self.passed
            now = time.monotonic()
            if len(piece) > _CHECK_BYTES:
                passed.first_at = passed.first_at or now
                passed.last_at = now
                passed.passed_bytes += len(piece)
            writer.write(piece)

        with contextlib.suppress(ConnectionError):
            while piece := await upstream.read(PIECE_BYTES):
                at = await self.carry(len(piece))
                loop.call_later(max(0.0, at - time.monotonic()), deliver, piece)
                if writer.transport.get_write_buffer_size() > _MOST_WAITING_BYTES:
                    await writer.drain()
        await asyncio.sleep(self.half_seconds + 0.01)

    async def run(self, port: int) -> None:
        server = await asyncio.start_server(self.connected, "127.0.0.1", port, backlog=2048)
        loop = asyncio.get_running_loop()
        told = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(told), sys.stdin)
        while await told.readline():
            passed, self.passed = self.passed, Passed()
            text = json.dumps({name: getattr(passed, name) for name in Passed.__slots__})
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        server.close()


class Wan:
    """A relay that runs. It stands on its own port and forwards to `upstream_port`."""

    def __init__(self, upstream_port: int, per_second: int, latency_seconds: float) -> None:
        self.port = free_port()
        numbers = [str(word) for word in (self.port, upstream_port, per_second, latency_seconds)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.link", *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        until(lambda: listens(("127.0.0.1", self.port)), "the link is up")
        self.look()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=10)

    def look(self) -> Passed:
        """What has passed since the last look."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Passed(**json.loads(self._process.stdout.readline()))


def main() -> None:
    port, upstream_port, per_second, latency = sys.argv[1:]
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # a real link does not wait for a core
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Relay(int(upstream_port), int(per_second), float(latency)).run(int(port)))


if __name__ == "__main__":
    main()
