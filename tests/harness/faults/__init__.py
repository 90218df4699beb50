"""Faults put into a started service: the environment that makes `sitecustomize.py` beside this file act."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.service import REPOSITORY


def planned(*rules: Mapping[str, Any]) -> dict[str, str]:
    """For `Gup(env=...)`. What a rule may say stands in `sitecustomize.py`."""
    paths = f"{Path(__file__).parent}:{REPOSITORY}"
    return {"PYTHONPATH": paths, "GUP_TEST_FAULTS": json.dumps(rules, default=str)}
