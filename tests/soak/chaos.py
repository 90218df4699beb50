"""What is done to the service while it serves: faults, kills, purges, other limits; judges nothing."""

import os
import random
import signal
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from harness.processes import command_line, until
from harness.service import Gup
from harness.upstreams import Answer, ScriptedUpstream

from soak.model import LIE_BYTES, Content

_RESTARTS_UNTIL = 0.4
"""Share of the time after which the oldest worker and the controller live on: their memory is watched."""


def right(content: Content) -> Answer:
    return Answer(content.body, etag=content.etag, last_modified=1_785_574_800.0 + len(content.versions))


def offer(upstream: ScriptedUpstream, content: Content, *before: Answer) -> None:
    """Serve the newest version, after these answers, one each."""
    upstream.answer(content.path, *before, right(content))


class Chaos:
    """One act at a time, drawn by chance from the seed."""

    def __init__(
        self, gup: Gup, upstreams: list[ScriptedUpstream], contents: list[Content], settings: Any, seed: int
    ) -> None:
        self._gup, self._upstreams, self._contents, self._settings = gup, upstreams, contents, settings
        self._chance = random.Random(f"chaos {seed}")
        self.done: Counter[str] = Counter()
        self._acts = {
            self.upstream_fault: 12,
            self.purge: 4,
            self.new_index: 2,
            self.pin: 1,
            self.limits: 1,
            self.kill_worker: 2,
            self.kill_controller: 1,
            self.power_cut: 1,
        }

    def act(self, progress: float) -> None:
        (act,) = self._chance.choices(list(self._acts), list(self._acts.values()))
        if progress > _RESTARTS_UNTIL and act in (self.kill_controller, self.power_cut):
            act = self.upstream_fault
        if act == self.power_cut and self._chance.random() > 0.2:
            return
        act()
        self.done[act.__name__] += 1

    def calm(self) -> None:
        """Upstreams are as they should be, limits as they were."""
        for upstream in self._upstreams:
            for content in self._contents:
                offer(upstream, content)
        self._gup.rewrite(self._settings)

    # --- acts

    def upstream_fault(self) -> None:
        content = self._chance.choice(self._contents)
        at = self._chance.randrange(len(content.body))
        good = right(content)
        faults = [
            {"reset_at": at},
            {"close_at": at},
            {"ranges": False, "reset_at": at},
            {"piece_seconds": 0.05},
        ]
        faults += [{"announced": len(content.body) + LIE_BYTES}, {"content_type": "text/html"}]
        faults += [{"body": b"trouble", "status": 500}, {"body": b"busy", "status": 503}, {"body": b""}]
        fault = replace(good, **self._chance.choice(faults))
        upstream = self._chance.choice(self._upstreams)
        offer(upstream, content, *[fault] * self._chance.randint(1, 3))
        # most is stored already: without this, hardly a fault would be met
        self._purge(content)

    def purge(self) -> None:
        self._purge(self._chance.choice(self._contents))

    def _purge(self, content: Content) -> None:
        for key in self._keys(content):
            with suppress(OSError):
                self._gup.api(f"/api/v1/content/{quote(key)}", "DELETE")

    def _keys(self, content: Content) -> list[str]:
        """Its path below content/ is its key, wherever the route put it."""
        file = content.path.removeprefix("/content/")
        return [key for key in self._gup.bodies() if key.endswith(file)]

    def new_index(self) -> None:
        (content,) = (content for content in self._contents if content.path.endswith(".txt"))
        content.versions.append(self._chance.randbytes(self._chance.randint(1000, 9000)))
        for upstream in self._upstreams:
            offer(upstream, content)

    def pin(self) -> None:
        for key in self._keys(self._chance.choice(self._contents)):
            with suppress(OSError):
                self._gup.api(f"/api/v1/content/{quote(key)}/pin", self._chance.choice(["PUT", "DELETE"]))

    def limits(self) -> None:
        downloads = self._chance.choice([0, 4])
        rate = self._chance.choice([5_000_000, 30_000_000])
        self._gup.rewrite(self._settings | {"wan": {"rate": rate}, "clients": {"max_downloads": downloads}})

    def kill_worker(self) -> None:
        """The youngest: the other one's memory tells of leaks."""
        workers = self._gup.workers()
        if workers:
            with suppress(ProcessLookupError):
                os.kill(max(workers), signal.SIGKILL)

    def kill_controller(self) -> None:
        for pid in self._gup.children():
            if "gup.process.controller" in command_line(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def power_cut(self) -> None:
        """Everything at once, and a new start, on other ports."""
        self._gup.kill()
        until(lambda: self._gup.process.poll() is not None, "it is gone")
        self._gup.start()
