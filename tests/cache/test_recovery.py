"""What writers that died left lying about in `partial/`."""

import os
import subprocess
import sys

import pytest

from gup.cache.recovery import writer_is_dead


@pytest.fixture(scope="module")
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("name", "dead"),
    [
        ("{dead}.123.full.zip.gup.tmp", True),
        ("{alive}.123.full.zip.gup.tmp", False),
        ("{dead}.123.full.zip.gup", False),
        ("x{dead}.123.full.zip.gup.tmp", False),
        ("0.123.full.zip.gup.tmp", False),
        (".tmp", False),
    ],
)
def test_a_temporary_file_tells_whether_its_writer_is_dead(tmp_path, dead_pid, name, dead):
    assert writer_is_dead(tmp_path / name.format(dead=dead_pid, alive=os.getpid())) is dead
