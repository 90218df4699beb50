"""A real HAProxy with the configuration of deploy/haproxy, before gups of a test."""

import re
import socket
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from deploy.deployed import DEPLOY
from harness.needs import program
from harness.processes import end, environment, free_port, until
from harness.service import Gup

CONFIG = DEPLOY / "haproxy" / "haproxy.cfg"


class HAProxy:
    """All is as shipped but for the addresses and what only root may set."""

    def __init__(self, folder: Path, gups: Sequence[Gup]) -> None:
        folder.mkdir()
        self._mark, self.address = uuid.uuid4().hex, ("127.0.0.1", free_port())
        self._socket, self._log = folder / "admin.sock", folder / "log"
        text = CONFIG.read_text().replace(":2967\n    default", f"127.0.0.1:{self.address[1]}\n    default")
        text = text.replace("/run/haproxy/admin.sock", str(self._socket))
        text = re.sub(r"\n    (log /dev/log|user|group) .*", "", text)
        for number, gup in enumerate(gups, 1):
            text = text.replace(f"10.0.0.1{number}:2967", f"127.0.0.1:{gup.data[1]} port {gup.admin[1]}")
        text = re.sub(r"\n    server gup\d 10\..*", "", text)
        file = folder / "haproxy.cfg"
        file.write_text(text)
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                [program("haproxy"), "-W", "-db", "-f", str(file)],
                env=environment(self._mark, {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        try:
            until(lambda: self.up() == len(gups) or self._process.poll() is not None, "all gups are up")
            assert self._process.poll() is None, self._log.read_text()
        except BaseException:
            end(self._process, self._mark)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end(self._process, self._mark)

    def up(self) -> int:
        """How many gups are in use. They are UP before the first check too, and DOWN at a first good one."""
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(self._socket))
                sock.sendall(b"show stat\n")
                text = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
        except OSError:
            return 0
        return len(re.findall(r"^gups,gup\d.*,UP,.*,L7OK,", text, re.MULTILINE))
