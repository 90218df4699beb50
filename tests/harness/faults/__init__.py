"""Faults and a clock put into a started service: the environment in which `sitecustomize.py` acts."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.service import REPOSITORY

_PATHS = {"PYTHONPATH": f"{Path(__file__).parent}:{REPOSITORY}"}


def planned(*rules: Mapping[str, Any]) -> dict[str, str]:
    """For `Gup(env=...)`. What a rule may say stands in `sitecustomize.py`."""
    return {**_PATHS, "GUP_TEST_FAULTS": json.dumps(rules, default=str)}


class WallClock:
    """Put `env` into `Gup(env=...)`; `set` what is added to the time of all its processes, in seconds."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(0.0)
        self.env = {**_PATHS, "GUP_TEST_CLOCK": str(file)}

    def set(self, offset_seconds: float) -> None:
        """In place: the service has mapped the file."""
        self._file.touch()
        with self._file.open("r+b") as file:
            file.write(struct.pack("=d", offset_seconds))
