"""Files replaced atomically, and ranges locked: what callers rely on."""

import errno
import os
import subprocess
import sys

import pytest

from gup import files


def test_a_replaced_file_is_whole_private_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "state"
    path.write_text("old")
    (tmp_path / "state.new").write_text("left by a process that died, and readable by all")
    (tmp_path / "state.new").chmod(0o644)
    files.replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state"
    path.write_text("old")

    def full(_fd, _content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        files.replace_file(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_descriptor_of_a_replaced_file_is_the_new_file(tmp_path):
    fd = files.replaced_file(tmp_path / "state", b"new")
    assert os.fstat(fd).st_ino == (tmp_path / "state").stat().st_ino
    os.close(fd)


HOLDER = """
import os, sys
from gup import files
files.lock_range(os.open(sys.argv[1], os.O_RDWR), 1 << 61, 8, wait=False)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_range_is_locked_against_other_processes_until_its_holder_dies(tmp_path):
    path = tmp_path / "locks"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    command = [sys.executable, "-c", HOLDER, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert files.is_range_locked(fd, (1 << 61) + 7)
        assert not files.is_range_locked(fd, (1 << 61) + 8)
        with pytest.raises(BlockingIOError):
            files.lock_range(fd, 1 << 61, wait=False)
        files.lock_range(fd, 0, wait=False)
        holder.kill()
        files.lock_range(fd, 1 << 61, wait=True)
        files.unlock_range(fd, 1 << 61)
    os.close(fd)
