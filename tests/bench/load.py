"""One run of wrk against one server: what came through, and what the server spent on it."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.measure import cpu_seconds
from bench.servers import Server, program

SCRIPTS = Path(__file__).parent / "wrk"
_TOLD = re.compile(r"^bench requests=(\d+) bytes=(\d+) micros=(\d+) errors=(\d+) p99=(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Run:
    """`sent_bytes` counts heads too, and answers that were under way at the end."""

    seconds: float
    requests: int
    sent_bytes: int
    errors: int
    p99_seconds: float
    cpu_seconds: float
    """Of all the server's processes."""

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def bytes_per_second(self) -> float:
        return self.sent_bytes / self.seconds

    def cpu_per_answer(self, answer_bytes: int) -> float:
        """CPU seconds for one answer of so many bytes; of large ones few are whole at the end of a run."""
        whole = self.requests if answer_bytes < 1 << 22 else self.sent_bytes / answer_bytes
        return self.cpu_seconds / max(whole, 1e-9)


def wrk(
    server: Server, target: str, connections: int, seconds: float, script: str = "plain", *words: str
) -> Run:
    """Load a server. AssertionError when answers were not as they should be."""
    command = [program("wrk"), "-t2", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "60s"]
    command += ["-s", str(SCRIPTS / f"{script}.lua"), f"http://127.0.0.1:{server.port}{target}", "--", *words]
    pids = server.pids()
    before = cpu_seconds(pids)
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SCRIPTS)
    spent = cpu_seconds(pids) - before
    told = _TOLD.search(done.stdout)
    assert told, done.stdout + done.stderr
    requests, size, micros, errors, p99 = (int(word) for word in told.groups())
    assert errors == 0, f"{server.name}: {errors} bad answers\n{done.stdout}"
    return Run(micros / 1e6, requests, size, errors, p99 / 1e6, spent)
