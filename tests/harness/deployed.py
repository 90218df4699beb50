"""Where the files of deploy/ are, and the programs that judge them."""

import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def run(*command, status=0, **more):
    """What the command says, both streams together; it must end with this status."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
        check=False,
        **more,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def load(path):
    return yaml.safe_load(path.read_text())


def rules():
    """Every rule of every group, alerts and recorded ones."""
    files = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
    assert files
    return [rule for file in files for group in load(file)["groups"] for rule in group["rules"]]


def alerts():
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}
