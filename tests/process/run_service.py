"""`gup serve` with fake children: settings from a JSON file, read again at a reload."""

import json
import os
import sys
from pathlib import Path

from gup.config import Settings
from gup.errors import SettingsError
from gup.process import child, supervisor

HERE = Path(__file__).parent


def load():
    try:
        return Settings.model_validate(json.loads(Path(sys.argv[1]).read_text()))
    except ValueError as error:
        raise SettingsError([f"bad: {line}" for line in str(error).splitlines()[:2]]) from error


SHORTER = {child: ("BEAT", "READY", "CLOSING"), supervisor: ("PAST_DRAIN", "LOCK")}
for module, names in SHORTER.items():
    for name in (f"{name}_SECONDS" for name in names):
        setattr(module, name, float(os.environ.get(f"TEST_{name}", getattr(module, name))))
environment = os.environ | ({"LISTEN_PID": str(os.getpid())} if "LISTEN_FDS" in os.environ else {})
sys.exit(
    supervisor.serve(
        load(),
        load,
        child_command=lambda _: [sys.executable, str(HERE / "fake_child.py")],
        environment=environment,
    )
)
