"""What stands between two ends on a bad day: a connection that is late, or that some members can't make."""

import asyncio
import re
import socket
import threading

_ASKER = re.compile(rb"\r\nGUP-From: (\S+)\r\n", re.IGNORECASE)


class Relay:
    """A port that passes on to another one of this machine, until `close`.

    Answers come `delay_seconds` late. Connections of the members in `refused` are closed with what they have
    asked, and those of the members in `silent` stay open and carry nothing more; both are known by the name
    that each of a member's questions begins with. `heads` are the first questions of all connections.
    """

    def __init__(self, target_port, *, members=False):
        """`members`: its clients are members of a cluster, and are told apart by their names."""
        self.target_port, self._members = target_port, members
        self.delay_seconds = 0.0
        self.refused, self.silent, self.heads = set(), set(), []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._stopping, self._loop = asyncio.Event(), None
        self._connections = {}
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), name="relay")
        self._thread.start()
        started.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def refuse(self, *names):
        """From now on these members can't reach what is behind it; nor do their connections stay."""
        self.refused.update(names)
        self._loop.call_soon_threadsafe(self._cut, names)

    def _cut(self, names):
        for task, name in self._connections.items():
            if name in names:
                task.cancel()

    async def _run(self, started):
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._serve, sock=self._listening)
        started.set()
        await self._stopping.wait()
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader, writer):
        task = asyncio.current_task()
        self._connections[task] = ""
        ends = [writer]
        try:
            head, name = b"", ""
            if self._members:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                name = self._connections[task] = _ASKER.search(head)[1].decode()
                if name in self.refused:
                    return
            there, back = await asyncio.open_connection("127.0.0.1", self.target_port)
            ends.append(back)
            back.write(head)
            ways = [
                asyncio.ensure_future(way)
                for way in (self._carry(reader, back, name, late=False), self._carry(there, writer, name))
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return
        finally:
            del self._connections[task]
            for end in ends:
                end.close()

    async def _carry(self, source, target, name, *, late=True):
        while piece := await source.read(1 << 18):
            if late and self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            while name in self.silent:  # noqa: ASYNC110 - a test changes it, in another thread
                await asyncio.sleep(0.02)
            target.write(piece)
            await target.drain()
