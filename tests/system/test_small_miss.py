"""What a small body that nobody has costs: system calls of the worker, as strace counts them."""

import re
import signal
import subprocess

import pytest
from harness.content import content_path, noise
from harness.needs import program
from harness.processes import until

MISSES = 40
MOST = {"openat": 3, "rename": 2, "futex": 30, "mkdir": 0, "unlink": 0, "getdents64": 0, "newfstatat": 3}
MOST |= {"fcntl": 6, "fsync": 0, "fdatasync": 0, "syncfs": 0, "statfs": 2}
"""Calls a miss. Other work of the process, and taking turns for the interpreter, are among them."""


@pytest.mark.alone
@pytest.mark.needs("strace")
def test_a_small_miss_costs_few_system_calls(serve, tmp_path):
    paths = [content_path(f"xdelta2607{n:05d}_To_260801001.dax") for n in range(MISSES + 1)]
    body, counts = noise("small", 100_000), tmp_path / "counts"
    gup, _ = serve(dict.fromkeys(paths, body), workers=1)
    client = gup.connect()
    assert client.get(paths[0]).body == body
    trace = [program("strace"), *["-f", "-c", "-S", "name", "-o"], str(counts), "-p", str(gup.workers()[0])]
    with subprocess.Popen(trace, stderr=subprocess.PIPE) as tracer:
        assert b"attached" in tracer.stderr.readline()
        assert {client.get(path).body for path in paths[1:]} == {body}
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=20)
    assert all("hit" in gup.get(path).header("cache-status") for path in paths)
    until(lambda: len(gup.bodies()) == len(paths), "all are stored")
    assert not gup.parts()
    calls = {
        fields[-1]: int(fields[3])
        for line in counts.read_text().splitlines()
        if re.fullmatch(r"[\d.]+", (fields := line.split() or [""])[0]) and fields[-1] != "total"
    }
    assert calls["pwrite64"] == MISSES
    for call, most in MOST.items():
        assert calls.get(call, 0) <= most * MISSES + (5 if most else 0), calls
