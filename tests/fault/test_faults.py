"""The harness's own faults: each is injected into a process of its own, which tells what it saw."""

import signal
import subprocess
import sys

import pytest
from harness.faulty import faults, matched


@pytest.fixture
def run(tmp_path):
    """Run Python with rules; the finished process. `log` and `flag` are files in its folder."""

    def runner(code, *rules):
        (tmp_path / "store").mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", f"import os\n{code}"],
            env=faults(*rules, log=tmp_path / "log"),
            cwd=tmp_path / "store",
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    return runner


WRITES = """
fd = os.open('a.part', os.O_CREAT | os.O_RDWR)
for piece in (b'one', b'two', b'three'):
    try:
        os.pwrite(fd, piece, os.fstat(fd).st_size)
    except OSError as error:
        print(error.errno, error.filename)
print(os.fstat(fd).st_size)
"""


def test_only_the_nth_call_fails_and_is_logged(run, tmp_path):
    done = run(WRITES, {"call": "pwrite", "path": "store/*.part", "nth": 2, "do": "ENOSPC"})
    assert done.stdout.splitlines() == [f"28 {tmp_path}/store/a.part", "8"], done
    assert [(m.number, m.do) for m in matched(tmp_path / "log")] == [(1, "-"), (2, "ENOSPC"), (3, "-")]


def test_a_flag_file_switches_a_rule_on(run, tmp_path):
    rule = {"call": "pwrite", "path": "*.part", "do": "EIO", "while": str(tmp_path / "flag")}
    assert run(WRITES, rule).stdout == "11\n"
    (tmp_path / "flag").touch()
    assert run(WRITES, rule).stdout.count("5 ") == 3


@pytest.mark.parametrize(("do", "left"), [("kill", 3), ("kill-after", 6)])
def test_killed_before_or_after_the_call_and_only_once(run, tmp_path, do, left):
    rule = {"call": "pwrite", "path": "*.part", "nth": 2, "do": do, "once": str(tmp_path / "done")}
    assert run(WRITES, rule).returncode == -signal.SIGKILL
    assert (tmp_path / "store" / "a.part").stat().st_size == left
    assert run(WRITES, rule).stdout == f"{left + 11}\n"


def test_a_write_can_be_torn(run, tmp_path):
    run("os.write(os.open('b', os.O_CREAT | os.O_WRONLY), b'12345678')", {"call": "write", "do": "short"})
    assert (tmp_path / "store" / "b").read_bytes() == b"1234"


def test_renames_and_opens_of_pathlib_are_seen(run):
    rules = ({"call": "rename", "path": "c", "do": "EROFS"}, {"call": "open", "path": "e", "do": "EMFILE"})
    code = """
from pathlib import Path
Path('d').write_text('x')
for work in (lambda: Path('d').rename('c'), lambda: Path('e').write_text('x')):
    try:
        work()
    except OSError as error:
        print(error.errno)
"""
    assert run(code, *rules).stdout == "30\n24\n"
