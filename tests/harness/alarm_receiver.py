"""A receiver of alarm messages: a process that checks signatures by the words of the specification.

It answers as its file `say` tells ("200", "500", "302 http://…", "hang") and writes what comes to `seen`.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import subprocess
import sys
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from harness.processes import end, environment, free_port, listens, until

TOLERANCE_SECONDS = 300


def is_signed(secret: str, headers: Any, body: bytes) -> bool:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    number, at = headers["webhook-id"], headers["webhook-timestamp"]
    if abs(time.time() - int(at)) > TOLERANCE_SECONDS or "." in number:
        return False
    wanted = hmac.digest(key, f"{number}.{at}.".encode() + body, hashlib.sha256)
    shown = [word.removeprefix("v1,") for word in headers["webhook-signature"].split(" ")]
    return any(hmac.compare_digest(base64.b64decode(word), wanted) for word in shown)


class AlarmReceiver:
    """`restart` keeps its port, its folder and what it has seen."""

    def __init__(self, folder: Path, secret: str, say: str = "200") -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._secret, self._mark = folder, secret, uuid.uuid4().hex
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self.say(say)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        command = [sys.executable, __file__, str(self.port), self._secret, str(self._folder)]
        with (self._folder / "log").open("ab") as log:
            env = environment(self._mark, {"PYTHONPATH": str(Path(__file__).parents[1])})
            self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        until(lambda: listens(("127.0.0.1", self.port)), "the receiver listens")

    def stop(self) -> None:
        if self._process is not None:
            end(self._process, self._mark)
            self._process = None

    def say(self, what: str) -> None:
        (self._folder / "say").write_text(what)

    @property
    def seen(self) -> list[dict[str, Any]]:
        """Every request, with `answered`, `signed`, `headers` and `body`."""
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in (self._folder / "seen").read_text().splitlines()]
        return []

    def got(self, *states: str, alarm: str = "") -> list[dict[str, Any]]:
        """The data of the messages that were accepted, all signed well, by the order of their arrival."""
        found = []
        for one in self.seen:
            assert one["signed"], one
            message = one["body"]["data"]
            if one["answered"] == 200 and message["alarm"] == (alarm or message["alarm"]):
                found.append({**message, "message": one["headers"]["webhook-id"]})
        return [message for message in found if not states or message["state"] in states]

    def wait(self, *states: str, alarm: str = "", count: int = 1) -> list[dict[str, Any]]:
        def enough() -> list[dict[str, Any]]:
            found = self.got(*states, alarm=alarm)
            return found if len(found) >= count else []

        return until(enough, f"{count} messages of {alarm} {states}", 60)


def main() -> None:
    port, secret, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            say = (folder / "say").read_text().split()
            status = 200 if say[0] == "hang" else int(say[0])
            row = {
                "answered": 0 if say[0] == "hang" else status,
                "signed": is_signed(secret, self.headers, body),
                "headers": {name.lower(): value for name, value in self.headers.items()},
                "body": json.loads(body),
                "path": self.path,
            }
            with (folder / "seen").open("a") as seen:
                seen.write(json.dumps(row) + "\n")
            while say[0] == "hang" and (folder / "say").read_text() == "hang":
                time.sleep(0.02)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", say[1])
            elif len(say) > 1:
                self.send_header("Retry-After", say[1])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
