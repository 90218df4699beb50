"""Where the files of deploy/ are, and the programs that judge them; among them a real Prometheus."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from harness.needs import program
from harness.processes import end, environment, free_port, until

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SETTLE_SECONDS = 60.0


def run(*command, status=0, timeout=50, **more):
    """What the command says, both streams together; it must end with this status."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
        **more,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def load(path):
    return yaml.safe_load(path.read_text())


def rules():
    """Every rule of every group, alerts and recorded ones."""
    files = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
    assert files
    return [rule for file in files for group in load(file)["groups"] for rule in group["rules"]]


def alerts():
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


class Prometheus:
    """`targets` are control planes by site. Everything is as in deploy/prometheus, but for the intervals."""

    def __init__(self, folder: Path, targets: Mapping[str, Sequence[tuple[str, int]]]) -> None:
        self._mark = uuid.uuid4().hex
        self._url = f"http://127.0.0.1:{free_port()}"
        command = [program("prometheus"), f"--config.file={folder / 'prometheus.yml'}", "--log.level=warn"]
        command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={self._url[7:]}"]
        shutil.copytree(DEPLOY / "prometheus", folder)
        config = yaml.safe_load((folder / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        rows = [
            {"targets": [f"{host}:{port}" for host, port in gups], "labels": {"site": site}}
            for site, gups in targets.items()
        ]
        (folder / "targets" / "local.yml").write_text(yaml.safe_dump(rows))
        env = environment(self._mark, {"GOMAXPROCS": "1"})
        with (folder / "log").open("wb") as out:
            self._process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        until(lambda: self._ready() or self._process.poll() is not None, "Prometheus runs")
        assert self._process.poll() is None, (folder / "log").read_text()

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end(self._process, self._mark)

    def _get(self, path: str, **parameters: object) -> Any:
        """What is found; AssertionError with Prometheus's own words when the question is wrong."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        assert (found["status"], found.get("warnings")) == ("success", None), found
        return found["data"]

    def query(self, expr: str) -> Any:
        """The samples of an instant query."""
        return self._get("query", query=expr)["result"]

    def query_range(self, expr: str, begin: float, finish: float) -> Any:
        return self._get("query_range", query=expr, start=begin, end=finish, step=1)["result"]

    def label_values(self, label: str, metric: str) -> Any:
        return self._get(f"label/{label}/values", **{"match[]": metric})

    def rules(self) -> list[dict[str, Any]]:
        """Each rule with its health and last error, as the evaluation went."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def settled(self, problems: Callable[[], Iterable[str]]) -> None:
        """Until nothing is wrong any more: a scrape may be late, and then its target counts as down."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while wrong := list(problems()):
            assert time.monotonic() < deadline, "\n".join(wrong)
            time.sleep(0.5)
