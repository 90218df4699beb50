"""A service with injected faults: its environment, and the faults' log (rules: faults/sitecustomize.py)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.service import REPOSITORY

_FOLDER = Path(__file__).parent / "faults"


def faults(*rules: dict[str, object], log: Path | None = None) -> dict[str, str]:
    """What `Gup(env=…)` needs to start a service with these rules. They stand in faults/sitecustomize.py."""
    found = {"PYTHONPATH": f"{_FOLDER}:{REPOSITORY}", "GUP_TEST_FAULTS": json.dumps(rules)}
    return found | ({"GUP_TEST_FAULTS_LOG": str(log)} if log else {})


@dataclass(frozen=True, slots=True)
class Matched:
    """A call that a rule matched. `do` is "-" when the rule took no effect."""

    pid: int
    role: str
    call: str
    path: str
    number: int
    do: str


def matched(log: Path) -> Sequence[Matched]:
    """The log so far, in order."""
    if not log.exists():
        return []
    rows = [line.split(" ") for line in log.read_text().splitlines()]
    return [Matched(int(r[0]), r[1], r[2], " ".join(r[3:-2]), int(r[-2]), r[-1]) for r in rows]
