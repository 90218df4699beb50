"""Two services never share one cache directory."""

import os
import subprocess
import sys
import threading
import time

import pytest

from gup.errors import StoreError
from gup.process.instance_lock import InstanceLock, holders

HOLDER = """
import sys
from pathlib import Path
from gup.process.instance_lock import InstanceLock
lock = InstanceLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def holder(run):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_after_the_wait_the_holder_is_named(run, holder):
    began = time.monotonic()
    with pytest.raises(StoreError, match=rf"uses the cache directory {run.parent} \(pid {holder.pid}\)"):
        InstanceLock(run, 0.2)
    assert time.monotonic() - began >= 0.2
    assert (run / "instance.lock").read_text() == f"{holder.pid}\n"


def test_it_waits_for_the_holder_to_exit(run, holder):
    threading.Timer(0.2, holder.kill).start()
    began = time.monotonic()
    lock = InstanceLock(run, 20.0)
    assert 0.15 < time.monotonic() - began < 15
    holder.wait()
    assert (run / "instance.lock").read_text() == f"{os.getpid()}\n"
    assert holders(run) == []
    lock.close()


def test_a_child_that_outlives_its_supervisor_holds_the_directory(run):
    first = InstanceLock(run)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        pass_fds=[first.children_fd],
        stdin=subprocess.PIPE,
    ) as child:
        first.close()
        with pytest.raises(StoreError, match=rf"\(pid {child.pid}\)"):
            InstanceLock(run, 0.0)
        child.stdin.close()
        child.wait(10)
        InstanceLock(run, 0.0).close()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"can't be locked: .*none"):
        InstanceLock(tmp_path / "none", 0.0)
