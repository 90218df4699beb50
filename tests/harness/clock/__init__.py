"""The wall clock of a started service, put ahead or back while it runs."""

import struct
from pathlib import Path

from harness.service import REPOSITORY


class WallClock:
    """Put `env` into `Gup(env=...)`; `set` what is added to the time of all its processes, in seconds."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.write_bytes(struct.pack("=d", 0.0))
        paths = f"{Path(__file__).parent}:{REPOSITORY}"
        self.env = {"PYTHONPATH": paths, "GUP_TEST_CLOCK": str(file)}

    def set(self, offset_seconds: float) -> None:
        with self._file.open("r+b") as file:
            file.write(struct.pack("=d", offset_seconds))
