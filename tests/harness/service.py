"""A real `gup serve`: started as an administrator would, watched through what it offers to everybody."""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from harness.clients import RawConnection, Response, Swarm, address_of, fetch
from harness.content import name_of
from harness.processes import (
    MEASURED,
    children_of,
    command_line,
    end,
    environment,
    marked,
    owners_of_connection,
    until,
)
from harness.upstreams import ScriptedUpstream
from harness.warm import TEMPLATE, can_start

READY = re.compile(r"gup: serving on (http://\S+), control plane on (https?://\S+), (\d+) workers?")
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Metrics:
    """One reading of /metrics."""

    samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float]
    text: str = field(repr=False)

    def __call__(self, name: str, **labels: str) -> float:
        """Sum over the series of `name` that carry these labels; AssertionError when there is none."""
        wanted = set(labels.items())
        found = [value for (n, present), value in self.samples.items() if n == name and wanted <= present]
        assert found, f"no series {name} {labels}"
        return sum(found)

    def series(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        return {labels: value for (found, labels), value in self.samples.items() if found == name}


def parse_metrics(text: str) -> Metrics:
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, f"twice in /metrics: {key}"
            samples[key] = sample.value
    return Metrics(samples, text)


def toml(settings: Mapping[str, Any]) -> str:
    """The settings as a TOML file: sections of plain values and of tables; a list of sections is an array of
    tables.
    """
    lines = []
    for section, content in settings.items():
        for table in content if isinstance(content, list) else [content]:
            lines.append(f"[[{section}]]" if isinstance(content, list) else f"[{section}]")
            below = {f"{section}.{key}": value for key, value in table.items() if isinstance(value, dict)}
            lines += [
                f"{key} = {json.dumps(value)}"
                for key, value in table.items()
                if f"{section}.{key}" not in below
            ]
            lines += [toml(below)] if below else []
    return "\n".join(lines) + "\n"


def _sizes(folder: Path, suffix: str = "") -> Iterator[tuple[Path, int]]:
    """Files below the folder with their sizes; what the service deletes meanwhile is left out."""
    for parent, _, names in os.walk(folder):  # not rglob: a folder that vanishes meanwhile would end it
        for path in (Path(parent, name) for name in names if name[0] != "." and name.endswith(suffix)):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                if stat.S_ISREG(found.st_mode):
                    yield path, found.st_size


class Gup:
    """One service on one cache directory. Started by the constructor unless told not to; `stop` ends it.

    `upstreams` become flags; `settings` (sections of the file) become a file, where `upstream` may stand
    instead of flags. One that is `measured` takes part in `make coverage`; its start takes longer, and it is
    ended by SIGTERM, since killed processes write down nothing.
    """

    PROGRAM = (sys.executable, "-m", "gup")

    def __init__(
        self,
        cache_dir: Path,
        upstreams: Sequence[str] = (),
        *,
        workers: int | None = 2,
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        bind: str = "127.0.0.1:0",
        admin: str = "127.0.0.1:0",
        start: bool = True,
        measured: bool = False,
    ) -> None:
        self._clients = contextlib.ExitStack()
        self.cache_dir = cache_dir
        self.folder = cache_dir.with_name(cache_dir.name + ".test")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mark = uuid.uuid4().hex
        unlimited = {} if settings and "wan" in settings else {"GUP_WAN__RATE": "0"}
        # what upstream is asked for is counted: catalogues are read where a test is about them
        unread = {} if settings and "catalog" in settings else {"GUP_CATALOG__REFRESH": "0"}
        self._measured = {MEASURED: os.environ[MEASURED]} if measured and MEASURED in os.environ else {}
        self._env = {**self._measured, **unlimited, **unread, "PYTHONPATH": str(REPOSITORY), **(env or {})}
        self._runs = 0
        self.process: Any = None
        self.data: tuple[str, int] = ("", 0)
        self.admin: tuple[str, int] = ("", 0)
        self.command = [*self.PROGRAM, "serve"]
        if settings:
            file = self.folder / "gup.toml"
            file.write_text(toml(settings))
            self.command += ["--config", str(file)]
        for url in upstreams:
            self.command += ["--upstream", url]
        self.command += ["--cache-dir", str(cache_dir)]
        if workers is not None:  # else of the file, where a reload may change them
            self.command += ["--workers", str(workers)]
        if bind:
            self.command += ["--listen", bind]
        self.command += ["--admin", admin]
        if start:
            self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End it. A traceback in its log fails the test; a failed test shows the logs, a fixture's too."""
        self.close_clients()
        if self._measured and self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.kill()
        logs = [path.read_text(errors="replace") for path in sorted(self.folder.glob("run*.log"))]
        for text in logs:
            print(f"--- gup's log\n{text[-6000:]}")  # noqa: T201 - shown by pytest with the failure
        if kind is None:
            assert not any("Traceback (most recent call last)" in text for text in logs), "\n".join(logs)

    def rewrite(self, settings: Mapping[str, Any]) -> None:
        """Other settings in the file, and a SIGHUP so that they are read."""
        (self.folder / "gup.toml").write_text(toml(settings))
        self.signal(signal.SIGHUP)

    # --- life

    def launch(self) -> None:
        """Start the process and don't wait for it."""
        assert self.process is None or self.process.poll() is not None, "runs already"
        self._runs += 1
        env = environment(self._mark, self._env)
        with self._log().open("wb") as log:
            if self.PROGRAM is Gup.PROGRAM and can_start(self._env):
                arguments = self.command[len(self.PROGRAM) :]
                self.process = TEMPLATE.start(arguments, env, self.folder, log.fileno())
                return
            self.process = subprocess.Popen(
                self.command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )

    def start(self) -> None:
        """Start, and wait for the ready line."""
        self.launch()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Until the ready line is there; AssertionError with the log when it does not come."""
        try:
            until(lambda: READY.search(self.log) or self.process.poll() is not None, "the ready line", 60)
            found = READY.search(self.log)
            assert found, f"gup did not start, status {self.process.returncode}:\n{self.log}"
        except BaseException:
            self.kill()  # nobody else has it yet who could end it
            raise
        self.data, self.admin = address_of(found[1]), address_of(found[2])

    def _log(self) -> Path:
        return self.folder / f"run{self._runs}.log"

    @property
    def log(self) -> str:
        """What this run wrote to its standard output and error."""
        return self._log().read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_seconds: float = 40.0) -> int:
        """The exit status, when it ends by itself."""
        return self.process.wait(timeout_seconds)

    def stop(self, timeout_seconds: float = 40.0) -> int:
        """SIGTERM; the exit status. AssertionError when any process of it is left."""
        if self.process.poll() is None:
            self.process.terminate()
        status = self.wait(timeout_seconds)
        until(lambda: not marked(self._mark), "all of gup's processes ended", 5)
        return status

    def kill(self) -> None:
        """SIGKILL to all of it; for the end of a test, and for a power cut."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.kill()
        end(self.process, self._mark)

    # --- processes

    @property
    def pids(self) -> list[int]:
        """Its processes that stay, the supervisor first."""
        found = [pid for pid in marked(self._mark) if "gup.control.replay" not in command_line(pid)]
        return sorted(found, key=lambda pid: (pid != self.process.pid, pid))

    def workers(self) -> list[int]:
        """The workers' pids, as the kernel has them."""
        return [pid for pid in self.children() if "gup.process.worker" in command_line(pid)]

    def worker_of(self, connection: RawConnection) -> int:
        """Which process serves this connection."""
        return self.worker_of_port(self.data[1], connection.local_port)

    def worker_of_port(self, local_port: int, remote_port: int) -> int:
        """Which process holds the connection between these ports, its own port first."""
        what = f"a process holds {local_port} - {remote_port}"
        (owner,) = until(lambda: owners_of_connection(local_port, remote_port, self.children()), what)
        return owner

    def children(self) -> list[int]:
        return children_of(self.process.pid)

    def leader_of(self, upstream: ScriptedUpstream, path: str) -> int:
        """Which process made the first request for this path."""
        return self.worker_of_port(upstream.requests(path)[0].peer_port, upstream.port)

    def connect_to(self, pid: int, timeout_seconds: float = 30.0) -> RawConnection:
        """A connection that this worker serves (the kernel spreads them: others are closed again)."""
        for _ in range(64):
            connection = self.connect(timeout_seconds)
            if self.worker_of(connection) == pid:
                return connection
            connection.close()
        raise AssertionError(f"no connection came to worker {pid}")

    @staticmethod
    def kill_worker(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    # --- asking it

    @property
    def url(self) -> str:
        return f"http://{self.data[0]}:{self.data[1]}"

    @property
    def admin_url(self) -> str:
        return f"http://{self.admin[0]}:{self.admin[1]}"

    def connect(self, timeout_seconds: float = 30.0, **how: Any) -> RawConnection:
        """A new connection; closed with the service, if not before."""
        return self._clients.enter_context(RawConnection(self.data, timeout_seconds, **how))

    def begin(self, target: str, count: int = 0, pid: int = 0) -> tuple[RawConnection, Response]:
        """A client that has asked (this worker, if named) and has the head and so much of the body."""
        connection = self.connect_to(pid) if pid else self.connect()
        return connection, connection.begin(target, count)

    def swarm(self) -> Swarm:
        return self._clients.enter_context(Swarm(self.data))

    def close_clients(self) -> None:
        self._clients.close()

    def get(self, target: str, headers: dict[str, str] | None = None, *, method: str = "GET") -> Response:
        return fetch(self.data, target, headers, method=method)

    def serves(self, target: str, body: bytes, headers: dict[str, str] | None = None) -> Response:
        """The answer, which must be a whole 200 with this body."""
        answer = self.get(target, headers)
        assert (answer.status, answer.complete, answer.body == body) == (200, True, True), (
            target,
            answer.status,
        )
        return answer

    def metrics(self) -> Metrics:
        answer = fetch(self.admin, "/metrics")
        assert answer.status == 200, answer
        return parse_metrics(answer.body.decode())

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics()(name, **labels)

    def wait_metric(self, wanted: float, name: str, timeout_seconds: float = 30.0, **labels: str) -> None:
        """Until the metric has this value."""
        until(lambda: self.metric(name, **labels) == wanted, f"{name} {labels} is {wanted}", timeout_seconds)

    def api(
        self, path: str, method: str = "GET", *, given: Mapping[str, Any] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of one call of the control plane, `given` some JSON; None for an empty body.

        What changes something shows the token that commands on this machine show.
        """
        shown = {} if method == "GET" else {"Authorization": f"Bearer {self.token}"}
        sent = json.dumps(given).encode() if given is not None else b""
        if sent:
            shown["Content-Type"] = "application/json"
        answer = fetch(self.admin, path, shown, method=method, body=sent)
        return answer.status, json.loads(answer.body) if answer.body else None

    @property
    def token(self) -> str:
        return (self.cache_dir / "run" / "admin-token").read_text().strip()

    def alarms(self, *names: str) -> list[dict[str, Any]]:
        """The alarms that stand, or those of these names."""
        code, found = self.api("/api/v1/alarms")
        assert code == 200, found
        return [alarm for alarm in found["alarms"] if not names or alarm["name"] in names]

    def reload(self, **settings: Any) -> None:
        """Other settings in the file, and a reload by the control plane; they hold soon after."""
        (self.folder / "gup.toml").write_text(toml(settings))
        assert self.api("/api/v1/reload", "POST")[0] == 200

    def wait_replaced(self, before: Mapping[str, Any], workers: int) -> dict[str, Any]:
        """Until other processes serve than in that status, so many workers of them; their status."""

        def found() -> dict[str, Any] | None:
            with contextlib.suppress(OSError):  # the controller is being replaced
                status = self.status()
                current = [row for row in status["workers"] if not row["leaving"] and row["ready"]]
                new = {row["pid"] for row in current}.isdisjoint(row["pid"] for row in before["workers"])
                if new and len(current) == workers and status["pid"] != before["pid"]:
                    return status
            return None

        return until(found, f"{workers} other workers serve")

    def upstream(self, name: str = "") -> dict[str, Any]:
        """The state of the upstream with this name, or of the first."""
        return next(row for row in self.status()["upstreams"] if name in ("", row["name"]))

    def status(self) -> dict[str, Any]:
        code, found = self.api("/api/v1/status")
        assert code == 200, found
        return found

    # --- its files

    def bodies(self) -> dict[str, int]:
        """Committed bodies with their sizes, by path below content/."""
        root = self.cache_dir / "content"
        return {str(path.relative_to(root)): size for path, size in _sizes(root)}

    def stored(self, path: str) -> bool:
        """Whether a committed body has the file name of this path."""
        return any(name_of(key) == name_of(path) for key in self.bodies())

    def wait_log(self, text: str, timeout_seconds: float = 30.0) -> None:
        """Until this run has logged the text: what is logged is written by a thread, soon after."""
        until(lambda: text in self.log, f"{text!r} is logged", timeout_seconds)

    def wait_stored(self, *paths: str, timeout_seconds: float = 30.0) -> None:
        """Until bodies with these file names are committed: the record is there before its body is."""
        root = self.cache_dir / "content"

        def there(name: str) -> bool:
            return any(record.with_name(name).exists() for record in root.rglob(f".{name}.gup"))

        for name in map(name_of, paths):
            until(lambda name=name: there(name), f"{name} is committed", timeout_seconds)

    def parts(self) -> dict[str, int]:
        return {path.name: size for path, size in _sizes(self.cache_dir / "partial", ".part")}
