"""A service with fake children, run as a real process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent
LINE = re.compile(
    r"gup: serving on http://(\S+):(\d+), control plane on http://(\S+):(\d+), (\d+) workers?\n"
)
# Puts inherited descriptors where systemd would, then becomes the service.
SYSTEMD = """
import os, sys
count = int(sys.argv[1])
high = [os.dup2(int(fd), 200 + n) for n, fd in enumerate(sys.argv[2:2 + count])]
for n, fd in enumerate(high):
    os.dup2(fd, 3 + n, inheritable=True)
    os.close(fd)
os.execv(sys.executable, [sys.executable, *sys.argv[2 + count:]])
"""


class Service:
    """One process of `serve`, its log and its ports."""

    def __init__(self, folder, settings, environment, sockets):
        self.folder = folder
        self.file = folder / "settings.json"
        self.settings = {
            "cache": {"directory": str(folder / "cache")},
            "listen": {"address": "127.0.0.1", "port": 0, "admin_port": 0, "drain_timeout": "5s"},
            "upstream": [{"url": "http://one:80"}, {"url": "http://two:80"}],
            "workers": {"count": 2},
        }
        self.write(**settings)
        self.lines = []
        self.asked = 0
        script = [str(HERE / "run_service.py"), str(self.file)]
        fds = [str(sock.fileno()) for sock in sockets]
        self.process = subprocess.Popen(
            [sys.executable, *(["-c", SYSTEMD, str(len(fds)), *fds] if fds else []), *script],
            pass_fds=[sock.fileno() for sock in sockets],
            stderr=subprocess.PIPE,
            env=os.environ | environment,
            text=True,
        )

    def write(self, **settings):
        self.settings |= settings
        self.file.write_text(json.dumps(self.settings))

    def until(self, pattern):
        """Read the log up to a line with `pattern`."""
        for line in self.process.stderr:
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no {pattern!r} in:\n{''.join(self.lines)}")

    def ready(self):
        match = self.until(LINE)
        self.data, self.admin = (match[1], int(match[2])), (match[3], int(match[4]))
        return match

    def signal(self, number):
        self.process.send_signal(number)

    def end(self):
        status = self.process.wait(30)
        self.lines += self.process.stderr
        return status

    def stop(self):
        self.signal(signal.SIGTERM)
        return self.end()

    def connect(self, address=None):
        return Client(self, address or self.data)

    def worker(self, slot):
        """A connection to that worker: the kernel spreads them."""
        for _ in range(200):
            client = self.connect()
            if client.ask("who")["slot"] == slot:
                return client
            client.close()
        raise AssertionError(slot)

    def controller(self):
        return self.connect(self.admin)


class Client:
    def __init__(self, service, address):
        self.service = service
        self.socket = socket.create_connection(address, timeout=20)
        self.reader = self.socket.makefile("rb")

    def send(self, line):
        self.service.asked += 1
        self.socket.sendall(line.encode() + b"\n")

    def answer(self):
        return json.loads(self.reader.readline() or "null")

    def ask(self, line):
        self.send(line)
        return self.answer()

    def until(self, line, holds):
        """Ask until the answer is right (pytest-timeout ends it)."""
        while not holds(answer := self.ask(line)):
            pass
        return answer

    def close(self):
        self.reader.close()
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def service(tmp_path):
    """Makes services on one folder; all are ended, and must leave no process."""
    made = []

    def make(settings=None, environment=None, sockets=(), ready=True):
        made.append(Service(tmp_path, settings or {}, environment or {}, sockets))
        if ready:
            made[-1].ready()
        return made[-1]

    yield make
    for one in made:
        if one.process.poll() is None:
            children = psutil.Process(one.process.pid).children()
            one.process.kill()
            one.process.wait()
            assert not psutil.wait_procs(children, 20)[1], "a process did not end"
        one.process.stderr.close()
