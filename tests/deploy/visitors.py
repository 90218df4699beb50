"""Clients of a gup at 127.0.0.1:2967, with Python's own HTTP client: `python -m deploy.visitors TREE`.

Each checks every body: three with a connection for each request, three that keep theirs, one that takes the
large file slowly. They go on until standard input ends; then a line of JSON says how many requests there were
and what failed. When a kept connection has ended before an answer began, the request is sent once more on
a new one: a client may do so (RFC 9110 9.2.2), and can't know before.
"""

import hashlib
import http.client
import json
import sys
import threading
import time
from pathlib import Path

from harness.content import BIG

ENDED = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)
SLOW_BYTES_PER_SECOND = 5_000_000


class Visitors:
    def __init__(self, tree: Path) -> None:
        files = (path for path in tree.rglob("*") if path.is_file())
        self._digests = {
            f"/{path.relative_to(tree)}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }
        self._small = sorted(self._digests.keys() - {BIG})
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.found = {"requests": 0, "slow": 0, "again": 0, "longest": 0.0, "failures": []}

    def _ask(self, connection: http.client.HTTPConnection, path: str, *, slowly: bool = False) -> None:
        connection.request("GET", path)
        answer = connection.getresponse()
        digest = hashlib.sha256()
        while piece := answer.read(1 << 18):
            digest.update(piece)
            if slowly:
                time.sleep(len(piece) / SLOW_BYTES_PER_SECOND)
        if (answer.status, digest.hexdigest()) != (200, self._digests[path]):
            raise ValueError(
                f"{path}: {answer.status}, {answer.length} bytes missing or others than they were"
            )

    def _count(self, name: str, amount: object = 1) -> None:
        with self._lock:
            if name == "longest":
                self.found[name] = max(self.found[name], amount)
            else:
                self.found[name] += amount

    def visit(self, kind: str) -> None:
        connection, number = None, 0
        while not self._over.is_set():
            path, number = (BIG if kind == "slow" else self._small[number % len(self._small)]), number + 1
            began = time.monotonic()
            try:
                kept = connection is not None
                connection = connection or http.client.HTTPConnection("127.0.0.1", 2967, timeout=60)
                try:
                    self._ask(connection, path, slowly=kind == "slow")
                except ENDED:
                    connection.close()
                    if not kept:
                        raise
                    self._count("again")
                    self._ask(connection, path)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._count("failures", [f"{kind}: {error!r}"])
                time.sleep(0.1)
            if kind != "kept":
                connection.close()
                connection = None
            self._count("requests")
            self._count("slow", int(kind == "slow"))
            if kind != "slow":
                self._count("longest", time.monotonic() - began)
            time.sleep(0.01)
        if connection is not None:
            connection.close()

    def run(self) -> None:
        threads = [
            threading.Thread(target=self.visit, args=(kind,))
            for kind in ("new", "new", "new", "kept", "kept", "kept", "slow")
        ]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        self._over.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    visitors = Visitors(Path(sys.argv[1]))
    visitors.run()
    print(json.dumps(visitors.found))  # noqa: T201 - to the test
