"""SECURITY.md names tests for what it says: they must be there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "SECURITY.md").read_text()
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def test_the_tests_that_the_threat_model_names_are_there():
    named = sorted(set(re.findall(r"`(tests/[^`]+)`", PAGE)))
    assert len(named) > 40
    for name in named:
        path, _, test = name.partition("::")
        assert (ROOT / path).exists(), name
        if test:
            tree = ast.parse((ROOT / path).read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, FUNCTION)}
            assert test.partition("[")[0] in functions, name


def test_what_somebody_can_not_do_is_shown_by_a_test():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if "|" in line
    ]
    assert {len(row) for row in rows} == {5}
    assert [row for row in rows[2:] if row[3] and "::" not in row[4]] == []
