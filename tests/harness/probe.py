"""`python -m harness.probe HOST PORT PATH SECONDS`: how long hits take, from a process of its own.

Requests leave at fixed times over one kept connection; what a slow answer delays counts from when it should
have left, so that slow answers do not hide in fewer samples. Prints JSON: count, percentiles in
milliseconds.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.clients import RawConnection

PER_SECOND = 100


def probe(address: tuple[str, int], path: str, seconds: float) -> dict[str, float]:
    took = []
    with RawConnection(address) as client:
        began = time.perf_counter()
        for number in range(int(PER_SECOND * seconds)):
            due = began + number / PER_SECOND
            time.sleep(max(0.0, due - time.perf_counter()))
            due = max(due, time.perf_counter() - 1 / PER_SECOND)  # its own lateness is not the server's
            answer = client.get(path)
            assert (answer.status, answer.complete) == (200, True), answer.status
            took.append(time.perf_counter() - due)
    took.sort()
    return {
        "count": len(took),
        **{f"p{share}": 1000 * took[min(len(took) - 1, len(took) * share // 100)] for share in (50, 90, 99)},
    }


@contextmanager
def probing(address: tuple[str, int], path: str, seconds: float) -> Iterator[Callable[[], dict[str, float]]]:
    """A probe beside what the block does; the answer waits for its figures."""
    arguments = [sys.executable, "-m", "harness.probe", address[0], str(address[1]), path]
    with subprocess.Popen(
        [*arguments, str(seconds)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield lambda: json.loads(process.communicate(timeout=600)[0])
        finally:
            process.kill()


if __name__ == "__main__":
    host, port, path, seconds = sys.argv[1:]
    sys.stdout.write(json.dumps(probe((host, int(port)), path, float(seconds))))
