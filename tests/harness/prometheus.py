"""A real Prometheus with the configuration of deploy/, scraping every 2 s; asked over its own API."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import yaml

from harness.deployed import DEPLOY, program
from harness.processes import end, environment, free_port
from harness.waiting import until

START_TIMEOUT_SECONDS = 30.0
SETTLE_SECONDS = 40.0


class Prometheus:
    """`targets` are control planes by site. Everything is as in deploy/prometheus, but for the intervals."""

    def __init__(self, folder: Path, targets: dict[str, tuple[str, int]]) -> None:
        self._folder = folder
        self._mark = uuid.uuid4().hex
        shutil.copytree(DEPLOY / "prometheus", folder)
        config = yaml.safe_load((folder / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        rows = [
            {"targets": [f"{host}:{port}"], "labels": {"site": site}}
            for site, (host, port) in targets.items()
        ]
        (folder / "targets" / "local.yml").write_text(yaml.safe_dump(rows))
        self._port = free_port()
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [program("prometheus"), f"--config.file={self._folder / 'prometheus.yml'}"]
        command += [f"--storage.tsdb.path={self._folder / 'data'}", "--log.level=warn"]
        command += [f"--web.listen-address=127.0.0.1:{self._port}"]
        log = self._folder / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                env=environment(self._mark, {"GOMAXPROCS": "1"}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        until(lambda: self._ready() or process.poll() is not None, "Prometheus runs", START_TIMEOUT_SECONDS)
        assert process.poll() is None, log.read_text()
        return process

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end(self._process, self._mark)

    def _get(self, path: str, **parameters: object) -> Any:
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        assert found["status"] == "success", found
        assert not found.get("warnings"), found
        return found["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an instant query; AssertionError with Prometheus's own words when it is wrong."""
        found: list[dict[str, Any]] = self._get("query", query=expr)["result"]
        return found

    def query_range(self, expr: str, begin: float, finish: float) -> list[dict[str, Any]]:
        data = self._get("query_range", query=expr, start=begin, end=finish, step=1)
        found: list[dict[str, Any]] = data["result"]
        return found

    def label_values(self, label: str, metric: str) -> list[str]:
        found: list[str] = self._get(f"label/{label}/values", **{"match[]": metric})
        return found

    def settled(self, problems: Callable[[], Iterable[str]]) -> None:
        """Until nothing is wrong any more: a scrape may be late, and then its target counts as down."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while wrong := list(problems()):
            assert time.monotonic() < deadline, "\n".join(wrong)
            time.sleep(0.5)

    def rules(self) -> list[dict[str, Any]]:
        """Each rule with its health and last error, as the evaluation went."""
        groups = self._get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]
