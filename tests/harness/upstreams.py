"""A stock upstream as a real process: nginx, read through its own log."""

import os
import re
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from harness.processes import end, environment, free_port, listens, needs
from harness.trees import Tree
from harness.waiting import until


@dataclass(frozen=True, slots=True)
class Logged:
    """One request as the upstream's own log has it. Times are Unix seconds, to the millisecond."""

    method: str
    path: str
    status: int
    body_bytes: int
    range: str
    ended_at: float = 0.0
    took_seconds: float = 0.0

    @property
    def began_at(self) -> float:
        return self.ended_at - self.took_seconds


_NGINX = """\
daemon off;
{user}worker_processes 1;
pid {prefix}/nginx.pid;
error_log {prefix}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    log_format counted '$request_method|$request_uri|$status|$body_bytes_sent|$http_range'
                       '|$msec|$request_time';
    access_log {prefix}/access.log counted;
    types {{ }}
    default_type application/octet-stream;
    client_body_temp_path {prefix}/body;
    proxy_temp_path {prefix}/proxy;
    fastcgi_temp_path {prefix}/fastcgi;
    uwsgi_temp_path {prefix}/uwsgi;
    scgi_temp_path {prefix}/scgi;
    sendfile on;
    keepalive_timeout 65;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        {extra}
    }}
}}
"""


class Nginx:
    """A stock nginx over a tree. `rate` (such as "10m") slows answers; `extra` goes into its server block."""

    def __init__(self, tree: Tree, prefix: Path, *, rate: str = "", extra: str = "") -> None:
        program = needs("nginx")
        self.tree = tree
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._prefix = prefix
        self._mark = uuid.uuid4().hex
        prefix.mkdir(parents=True, exist_ok=True)
        config = prefix / "nginx.conf"
        config.write_text(
            _NGINX.format(
                user="" if os.geteuid() else "user root;\n",
                prefix=prefix,
                port=self.port,
                root=tree.root,
                extra=(f"limit_rate {rate};\n" if rate else "") + extra,
            )
        )
        self._command = [program, "-p", str(prefix), "-c", str(config), "-e", str(prefix / "error.log")]
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(self._command, env=environment(self._mark), stdin=subprocess.DEVNULL)
        until(lambda: listens(("127.0.0.1", self.port)) or process.poll() is not None, "nginx listens", 10)
        assert process.poll() is None, (self._prefix / "error.log").read_text()
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        end(self._process, self._mark)

    def restart(self) -> None:
        """Start again on the same port, after `stop`."""
        self._process = self._start()

    def log(self, path: str | None = None, *, methods: Sequence[str] = ("GET",)) -> list[Logged]:
        """What nginx logged, of one path or of all. A request is logged when it has ended."""
        rows = [_nginx_row(line) for line in (self._prefix / "access.log").read_text().splitlines()]
        return [row for row in rows if row.method in methods and (path is None or same(row.path, path))]

    def requests(self, path: str) -> int:
        return len(self.log(path))

    def body_bytes(self, path: str) -> int:
        return sum(row.body_bytes for row in self.log(path))


def same(one: str, other: str) -> bool:
    """Whether two URL paths differ in the escapes of braces alone."""
    plain = [re.sub("%7[bB]", "{", re.sub("%7[dD]", "}", path)) for path in (one, other)]
    return plain[0] == plain[1]


def _nginx_row(line: str) -> Logged:
    method, path, status, size, range_, ended, took = line.split("|")
    return Logged(method, path, int(status), int(size), range_.removeprefix("-"), float(ended), float(took))


class Elsewhere:
    """What a service stands before and nobody starts here: another gup, or nothing. `table`: its settings."""

    def __init__(self, port: int, **table: str) -> None:
        self.port, self.url, self.table = port, f"http://127.0.0.1:{port}", table

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""
