"""A process that stands in for `gup serve`: caches whole bodies in memory, and misbehaves as it is told.

`python stand_in.py MODE UPSTREAM`; modes: right, corrupt, twice, forbid, boast, crash, refuse, die.
"""

import asyncio
import sys
from datetime import UTC, datetime

import aiohttp
from aiohttp import web

from gup.demo.content import decide

MODIFIED_AT = datetime(2025, 3, 3, tzinfo=UTC).timestamp()


class StandIn:
    def __init__(self, mode, upstream, session):
        self.mode = mode
        self.upstream = upstream
        self.session = session
        self.bodies = {}
        self.received = 0
        self.sent = 0

    async def fetch(self, path):
        async with self.session.get(self.upstream + path) as response:
            body = await response.read()
        self.received += len(body)
        return body

    async def body(self, path):
        """Everybody awaits the one fetch."""
        if path not in self.bodies:
            self.bodies[path] = asyncio.create_task(self.fetch(path))
            if self.mode == "twice" and path.endswith(".dax"):
                await self.fetch(path)
        return await asyncio.shield(self.bodies[path])

    async def content(self, request):
        body = await self.body(request.path)
        if self.mode == "forbid" and request.path.endswith(".dax"):
            raise web.HTTPForbidden
        if self.mode == "corrupt" and request.path.endswith(".dax"):
            body = body[:-1] + bytes([body[-1] ^ 1])
        status, start, stop = decide(request.headers, '"fixed"', MODIFIED_AT, len(body))
        headers = {"ETag": '"fixed"', "Cache-Status": "stand-in; hit"}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        self.sent += stop - start
        return web.Response(status=status, body=body[start:stop], headers=headers)

    async def status(self, _request):
        received = self.received + (1 if self.mode == "boast" else 0)
        totals = {"upstream_received_bytes": received, "client_sent_bytes": self.sent}
        return web.json_response({"totals": {"since_start": totals}})


async def listen(application):
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


async def main(mode, upstream):
    async with aiohttp.ClientSession() as session:
        stand_in = StandIn(mode, upstream, session)
        content, control = web.Application(), web.Application()
        content.router.add_get("/content/{rest:.*}", stand_in.content)
        control.router.add_get("/api/v1/status", stand_in.status)
        urls = await listen(content), await listen(control)
        line = f"gup: serving on {urls[0]}, control plane on {urls[1]}, 1 workers"
        sys.stderr.write(f"a line before\n{line}\n")
        sys.stderr.flush()
        if mode == "die":
            await asyncio.sleep(0.5)
            sys.exit("this is the end")
        await asyncio.Event().wait()


if __name__ == "__main__":
    mode, upstream = sys.argv[1:]
    if mode == "refuse":
        sys.exit("no upstream is good enough")
    if mode == "crash":
        raise RuntimeError("not ready for this")
    asyncio.run(main(mode, upstream))
