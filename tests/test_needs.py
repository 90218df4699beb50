"""The marker `needs`: what a run tells of tests that can't run here, and that CI lets none of them pass."""

import re
import subprocess
import sys
from pathlib import Path

from harness.needs import NEEDS
from harness.processes import environment

ROOT = Path(__file__).parents[1]
CONFTEST = """
from harness.needs import NEEDS, Need, pytest_runtest_setup, pytest_terminal_summary

NEEDS["here"] = Need("nothing")
NEEDS["far"] = Need("apt-get install far", ("no-such-program",))
NEEDS["away"] = Need("another machine", (), lambda: False)
"""
TESTS = """
import pytest

@pytest.mark.needs("here")
def test_that_runs(): pass

@pytest.mark.needs("far")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_that_needs_one_thing(number): raise AssertionError("it ran")

@pytest.mark.needs("far", "here")
@pytest.mark.needs("away")
def test_that_needs_more(): raise AssertionError("it ran")
"""
PART_OF_A_RUN = """
def pytest_configure(config):
    config.workerinput = {}  # what pytest-xdist gives its processes
"""
WRONG = """
import pytest
from harness.needs import program

@pytest.mark.needs("unheard of")
def test_unknown(): pass

@pytest.mark.needs("here")
def test_undeclared(): program("no-such-program")
"""


def run(folder: Path, tests: str, *arguments: str, ci: str = "") -> tuple[int, str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = needs\n")
    (folder / "part_of_a_run.py").write_text(PART_OF_A_RUN)
    (folder / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, folder]
    plain = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": f"{ROOT / 'tests'}:{folder}"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment("needs", {"CI": ci, **plain}),
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.decode()


def test_what_is_missing_is_told_at_the_end_of_a_run(tmp_path):
    """A process of pytest-xdist has a part of a run and tells nothing itself."""
    status, said = run(tmp_path, TESTS, "-p", "part_of_a_run")
    assert (status, "1 passed, 4 skipped" in said, "not run here" in said) == (0, True, False), said
    status, said = run(tmp_path, TESTS)
    assert (status, "1 passed, 4 skipped" in said) == (0, True), said
    assert re.findall("^not run here.*", said, re.MULTILINE) == [
        "not run here: 1 test, needs away (another machine)",
        "not run here: 4 tests, need far (apt-get install far)",
    ]


def test_in_ci_and_where_a_marker_is_wrong_they_fail_and_name_the_remedy(tmp_path):
    status, said = run(tmp_path, TESTS + WRONG, ci="true")
    assert (status, "1 failed, 1 passed, 5 errors" in said) == (1, True), said
    assert len(re.findall(r"^needs far \(apt-get install far\)$", said, re.MULTILINE)) == 3
    assert "needs away (another machine); far (apt-get install far)" in said
    assert "not in the table of harness/needs.py: unheard of" in said
    assert 'mark the test: @pytest.mark.needs("far")' in said


def test_the_ci_installs_every_package_of_the_table():
    (listed,) = re.findall('^packages="(.*)"$', (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    remedies = [need.remedy.removeprefix("apt-get install ") for need in NEEDS.values()]
    packages = {name for remedy in remedies if not remedy.startswith("root") for name in remedy.split()}
    assert packages <= set(listed.split())
