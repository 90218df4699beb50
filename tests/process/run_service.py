"""`gup serve` with fake children: settings from a JSON file, read again at a reload."""

import json
import os
import sys
from pathlib import Path

from gup.config import Settings
from gup.errors import SettingsError
from gup.process import child
from gup.process.supervisor import serve

HERE = Path(__file__).parent


def load():
    try:
        return Settings.model_validate(json.loads(Path(sys.argv[1]).read_text()))
    except ValueError as error:
        raise SettingsError([f"bad: {line}" for line in str(error).splitlines()[:2]]) from error


child.BEAT_SECONDS = float(os.environ.get("TEST_BEAT_SECONDS", child.BEAT_SECONDS))
child.READY_SECONDS = float(os.environ.get("TEST_READY_SECONDS", child.READY_SECONDS))
environment = os.environ | ({"LISTEN_PID": str(os.getpid())} if "LISTEN_FDS" in os.environ else {})
sys.exit(
    serve(
        load(),
        load,
        child_command=lambda _: [sys.executable, str(HERE / "fake_child.py")],
        environment=environment,
    )
)
