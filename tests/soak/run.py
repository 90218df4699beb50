"""`python -m soak.run --minutes 30 --seed 1`: clients, faults, an operator; prints what came of it."""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.clients import Ended, RawConnection
from harness.commands import command
from harness.processes import until
from harness.service import Gup
from harness.upstreams import ScriptedUpstream

from soak.chaos import Chaos, offer
from soak.footprint import Footprint
from soak.model import Content, Question, WrongError, contents, judge, question

MB = 1_000_000
CLIENTS = 16
PATIENCE_SECONDS = 30.0
"""Of a client for the next byte: longer than any of the service's own limits here."""
LIMIT = 60 * MB
"""Less than all content together: there is always something to evict."""
SETTINGS: dict[str, Any] = {
    "cache": {"max_size": LIMIT, "min_free": 0, "index_ttl": "500ms", "error_ttl": "300ms"},
    "wan": {"rate": 30 * MB},
    "fill": {"queue_timeout": 5.0, "range_wait": 1.0},
    "upstream": [],
}


class Findings:
    """What the clients saw, over all their threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.words: Counter[str] = Counter()
        self.body_bytes = 0
        self.wrong: list[str] = []

    def add(self, word: str, body_bytes: int = 0) -> None:
        with self._lock:
            self.words[word] += 1
            self.body_bytes += body_bytes


class Client:
    """One client: asks, judges, now and then leaves early or takes a new connection."""

    def __init__(self, gup: Gup, all_contents: list[Content], findings: Findings, seed: str) -> None:
        self._gup = gup
        self._contents = all_contents
        self._findings = findings
        self._chance = random.Random(seed)
        self._etags: dict[str, str] = {}
        self._asked: Question | None = None

    def run(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                self._visit(stopping)
            except (ConnectionError, Ended):
                self._findings.add("gone")
                stopping.wait(0.05)
            except TimeoutError:
                self._findings.wrong.append(
                    f"{time.time():.3f}: no answer in {PATIENCE_SECONDS} s: {self._asked}"
                )

    def _visit(self, stopping: threading.Event) -> None:
        with RawConnection(self._gup.data, PATIENCE_SECONDS) as connection:
            for _ in range(self._chance.randint(1, 30)):
                if stopping.is_set():
                    return
                asked = self._asked = question(self._chance, self._contents, self._etags)
                connection.ask(asked.path, asked.headers, method=asked.method)
                answer = connection.head()
                if asked.leave_after_bytes is not None:
                    length = int(answer.header("content-length") or 0)
                    connection.read(min(asked.leave_after_bytes, length, 100_000))
                    self._findings.add("left")
                    return
                connection.finish(answer, asked.method)
                self._judge(asked, answer)
                if not answer.complete or (answer.header("connection") or "") == "close":
                    return

    def _judge(self, asked: Question, answer: Any) -> None:
        try:
            word = judge(asked, answer)
        except WrongError as error:
            self._findings.wrong.append(f"{asked}: {error}")
            return
        if answer.status == 200 and answer.header("etag"):
            self._etags[asked.path] = answer.header("etag")
        self._findings.add(word, len(answer.body))


def soak(directory: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Run it all; the report. What is wrong stands in its `wrong`."""
    all_contents = contents(seed)
    findings, stopping = Findings(), threading.Event()
    with ScriptedUpstream() as first, ScriptedUpstream() as second:
        for upstream in (first, second):
            for content in all_contents:
                offer(upstream, content)
        settings = SETTINGS | {
            "upstream": [
                {"name": name, "url": upstream.url, "priority": priority, "read_timeout": 2.0}
                for priority, (name, upstream) in enumerate((("first", first), ("second", second)))
            ]
        }
        with Gup(directory / "cache", settings=settings) as gup:
            chaos = Chaos(gup, [first, second], all_contents, settings, seed)
            footprint = Footprint(gup)
            clients = [Client(gup, all_contents, findings, f"{seed}/{n}") for n in range(CLIENTS)]
            began = time.monotonic()
            with ThreadPoolExecutor(CLIENTS) as pool:
                running = [pool.submit(client.run, stopping) for client in clients]
                try:
                    while (age := time.monotonic() - began) < seconds and not findings.wrong:
                        chaos.act(age / seconds)
                        footprint.look(age / seconds)
                        stopping.wait(0.5)
                finally:
                    stopping.set()
            for client in running:
                client.result()
            chaos.calm()
            findings.wrong += [*_aftermath(gup, all_contents), *footprint.complaints()]
            if findings.wrong:
                sys.stderr.write(gup.log)
            return {
                "seconds": round(time.monotonic() - began, 1),
                "seed": seed,
                "answers": dict(findings.words),
                "body_bytes": findings.body_bytes,
                "done_to_it": dict(chaos.done),
                "requests_of_upstreams": len(first.requests()) + len(second.requests()),
                "footprint": footprint.figures(),
                "wrong": findings.wrong,
            }


def _aftermath(gup: Gup, all_contents: list[Content]) -> list[str]:
    """When nobody makes trouble any more, everything is to be had, and nothing is left lying about."""
    wrong = []
    try:
        for content in all_contents:
            until(lambda c=content: gup.get(c.path).body == c.body, f"{content.path} is right again", 30)
        for name in ("gup_fills_in_progress", "gup_fill_waiters", "gup_client_connections"):
            gup.wait_metric(0, name)
        until(lambda: not gup.parts(), "no part is left", 15)
        until(lambda: sum(gup.bodies().values()) <= LIMIT, "the size is under its limit", 15)
    except AssertionError as error:
        wrong.append(str(error))
    if gup.stop(60) != 0:
        wrong.append(f"it ended with status {gup.process.returncode}")
    verified = command("cache", "verify", "--cache-dir", gup.cache_dir)
    if verified.returncode != 0:
        wrong.append(f"gup cache verify: {verified.stdout}{verified.stderr}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gup-soak-") as directory:
        report = soak(Path(directory), 60 * arguments.minutes, arguments.seed)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
