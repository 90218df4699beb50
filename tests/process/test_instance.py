"""Two services never share one cache directory."""

import fcntl
import os
import subprocess
import sys

import pytest

from gup.errors import StoreError
from gup.process.instance import Instance, holders

HOLDER = """
import sys
from pathlib import Path
from gup.process.instance import Instance
instance = Instance(Path(sys.argv[1]))
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


class Clock:
    def __init__(self):
        self.now = 0.0
        self.at = {}

    def sleep(self, seconds):
        self.now += seconds
        for when in [when for when in self.at if when <= self.now]:
            self.at.pop(when)()

    def __call__(self):
        return self.now


def test_the_holder_is_named_after_the_wait(run, holder):
    clock = Clock()
    with pytest.raises(StoreError, match=rf"uses the cache directory {run.parent} \(pid {holder.pid}\)"):
        Instance(run, 5.0, clock, clock.sleep)
    assert 5.0 <= clock.now < 5.1
    assert (run / "instance.lock").read_text() == f"{holder.pid}\n"


def test_it_waits_for_the_holder_to_go(run, holder):
    clock = Clock()
    clock.at[3.0] = lambda: (holder.kill(), holder.wait())
    instance = Instance(run, 5.0, clock, clock.sleep)
    assert 3.0 <= clock.now < 3.1
    assert (run / "instance.lock").read_text() == f"{os.getpid()}\n"
    assert holders(run) == []
    instance.close()


def test_a_child_that_outlives_its_supervisor_holds_the_directory(run):
    first = Instance(run)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        pass_fds=[first.children_fd],
        stdin=subprocess.PIPE,
    ) as child:
        first.close()
        clock = Clock()
        with pytest.raises(StoreError, match=rf"\(pid {child.pid}\)"):
            Instance(run, 1.0, clock, clock.sleep)
        child.stdin.close()
        child.wait(10)
        Instance(run, 1.0, clock, clock.sleep).close()


def test_children_hold_their_lock_shared(run):
    instance = Instance(run)
    other = os.open(run / "children.lock", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
    instance.close()


def test_a_refusal_leaves_no_descriptor(run, holder):
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count
    with pytest.raises(StoreError):
        Instance(run, 0.0)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - a count
    assert holder.poll() is None


def test_a_folder_that_is_missing_is_told(tmp_path):
    with pytest.raises(StoreError, match=r"can't be locked: .*none"):
        Instance(tmp_path / "none", 0.0)
