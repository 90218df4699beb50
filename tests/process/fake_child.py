"""A worker or controller that serves lines instead of HTTP; started by a real supervisor in tests.

Each connection's lines are commands, each answered with one JSON line.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import time

from gup.process.child import Parent
from gup.process.shared_memory import POLICY_EPOCH, Page, Row, SharedFile

_BEAT_SECONDS = 0.2


class FakeChild:
    def __init__(self):
        self.parent = Parent(sys.argv)
        self.assignment = self.parent.assignment
        self.shared = SharedFile(os.dup(self.assignment.shared_fd))
        self.page = Page(os.dup(self.assignment.page_fd), self.assignment.blocks)
        self.counters = self.shared.counters(self.assignment.block)
        self.selector = selectors.DefaultSelector()
        self.messages = []
        self.workers = []
        self.beating = True
        for fd in self.assignment.listen_fds:
            listening = socket.socket(fileno=fd)
            self.selector.register(listening, selectors.EVENT_READ, self.accept)
        self.selector.register(self.parent, selectors.EVENT_READ, self.hear)
        self.events = socket.socket(fileno=self.assignment.event_fd)

    def run(self):
        if os.environ.get("FAKE_NEVER_READY") != self.assignment.role:
            self.parent.send({"ready": True})
        while True:
            if self.beating:
                self.page.row(Row.BEAT)[self.assignment.block] = time.monotonic_ns()
            for key, _ in self.selector.select(_BEAT_SECONDS):
                key.data(key.fileobj)

    def accept(self, listening):
        with contextlib.suppress(BlockingIOError):
            sock, _ = listening.accept()
            self.selector.register(sock, selectors.EVENT_READ, self.serve)

    def serve(self, sock):
        text = sock.recv(65536)
        if not text:
            self.selector.unregister(sock)
            sock.close()
            return
        for line in text.splitlines():
            self.counters.add("gup_requests_total", result="hit", code="200")
            sock.sendall(json.dumps(self.answer(line.decode())).encode() + b"\n")

    def answer(self, line):  # noqa: C901, PLR0911, PLR0912 - one row a command
        settings = self.assignment.settings
        match line:
            case "who":
                own = self.assignment
                return {"pid": os.getpid(), "role": own.role, "slot": own.slot, "generation": own.generation}
            case "totals":
                return self.shared.totals()
            case "since":
                return self.shared.since_start()
            case "workers":
                return self.workers
            case "messages":
                return self.messages
            case "settings":
                return {"rate": settings.wan.rate, "upstreams": [row.name for row in settings.upstream]}
            case "page":
                words = list(self.page.words[:16])
                return {"policy": words[POLICY_EPOCH], "words": words}
            case "hang":
                self.beating = False
                return {}
            case "reload":
                return {"sent": self.parent.send({"reload": True})}
            case "close control":
                self.selector.unregister(self.parent)
                self.parent.close()
                return {}
            case "environment":
                return dict(os.environ)
            case "event":
                return {"sent": self.events.send(b"used")}
            case "events":
                return {"got": self.events.recv(100).decode()}
        raise AssertionError(line)

    def hear(self, parent):
        messages = parent.receive()
        if messages is None:
            sys.exit(3)
        for message in messages:
            if "workers" in message:
                self.workers = message["workers"]
                continue
            self.messages.append(message)
            if message.get("stop"):
                sys.exit(0)
            if message.get("drain") or message.get("leave"):
                self.drain()

    def drain(self):
        if os.environ.get("FAKE_NEVER_DRAINS"):
            return
        for key in [key for key in self.selector.get_map().values() if key.data == self.accept]:
            self.selector.unregister(key.fileobj)
            key.fileobj.close()
        for key in [key for key in self.selector.get_map().values() if key.data == self.serve]:
            key.fileobj.setblocking(True)
            while key.fileobj.fileno() >= 0:
                self.serve_to_end(key)
        self.parent.send({"drained": True})
        sys.exit(0)

    def serve_to_end(self, key):
        if (text := key.fileobj.recv(65536)) == b"":
            key.fileobj.close()
        for line in text.splitlines():
            key.fileobj.sendall(json.dumps(self.answer(line.decode())).encode() + b"\n")


if __name__ == "__main__":
    FakeChild().run()
