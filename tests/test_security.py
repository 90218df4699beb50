"""SECURITY.md names tests for what it says: they must be there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "SECURITY.md").read_text()


def test_the_tests_that_the_threat_model_names_are_collected():
    named = sorted(set(re.findall(r"`(tests/[^`]+)`", PAGE)))
    assert len(named) > 40
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
    ]
    done = subprocess.run(
        [*command, *named], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_what_somebody_can_not_do_is_shown_by_a_test():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if "|" in line
    ]
    assert {len(row) for row in rows} == {5}
    assert [row for row in rows[2:] if row[3] and "::" not in row[4]] == []
