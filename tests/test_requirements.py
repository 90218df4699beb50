"""The lock files: they hold what pyproject.toml asks for, no more and no less, and pip can insist on them."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from harness.processes import free_port
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUN = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["cluster"]
DEVELOP = RUN + PROJECT["project"]["optional-dependencies"]["dev"]
BUILD = [*PROJECT["build-system"]["requires"], "setuptools"]
FUZZ = RUN + PROJECT["project"]["optional-dependencies"]["fuzz"]
ASKED = {"run": RUN, "build": BUILD, "dev": DEVELOP, "fuzz": FUZZ}
FILES = {name: (ROOT / "requirements" / f"{name}.txt").read_text() for name in ASKED}
HASH = re.compile(r" --hash=sha256:[0-9a-f]{64}\b")


def locked(name):
    """Each package of a lock file, by its name: its version and marker, and its hashes."""
    whole = re.sub(r"\\\n", "", re.sub(r"^ *#.*\n", "", FILES[name], flags=re.MULTILINE))
    rows = [(Requirement(line.partition(" --hash")[0]), HASH.findall(line)) for line in whole.splitlines()]
    assert len({row.name for row, _ in rows}) == len(rows)
    return {canonicalize_name(row.name): (row, hashes) for row, hashes in rows}


def needed(requirements):
    """The names of what these need, and what that needs, on this machine; read from what is installed."""
    found, todo = set(), [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in found:
                found.add((name, wanted))
                todo += [(Requirement(text), wanted) for text in distribution(name).requires or ()]
    return {name for name, _ in found}


@pytest.mark.parametrize("name", ASKED)
def test_a_lock_file_has_a_version_that_fits_for_everything_that_is_asked_for(name):
    rows = locked(name)
    for requirement in map(Requirement, ASKED[name]):
        row, _ = rows[canonicalize_name(requirement.name)]
        (pin,) = row.specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement}: run `make lock`"


@pytest.mark.parametrize("name", ["run", "build", "dev"])
def test_a_lock_file_holds_what_that_needs_and_nothing_else(name):
    here = {found for found, (row, _) in locked(name).items() if not row.marker or row.marker.evaluate()}
    assert here == needed(ASKED[name]), "run `make lock`"


@pytest.mark.parametrize("name", ASKED)
def test_every_package_has_its_hashes_and_no_file_names_an_index(name):
    assert [found for found, (_, hashes) in locked(name).items() if not hashes] == []
    assert not re.search(r"^ *-(?!-hash=)|://", FILES[name], re.MULTILINE), "no option, no address"


def test_what_runs_and_what_builds_is_tested_in_the_versions_that_are_shipped():
    tested = locked("dev")
    for name in ("run", "build"):
        for package, (row, hashes) in locked(name).items():
            assert (str(tested[package][0].specifier), tested[package][1]) == (str(row.specifier), hashes)


def test_a_range_has_an_upper_bound_where_the_page_says_why_and_only_there():
    page = (ROOT / "docs" / "dependencies.md").read_text()
    section = page.partition("## Ranges with an upper bound")[2].partition("\n## ")[0]
    bounded = [text for text in map(Requirement, RUN) if any("<" in one.operator for one in text.specifier)]
    assert [text.name for text in bounded] == re.findall(r"^- `([^`]+)`: ", section, re.MULTILINE)


def test_what_is_installed_here_is_what_the_lock_file_says():
    rows = locked("dev").items()
    pins = {name: row.specifier for name, (row, _) in rows if not row.marker or row.marker.evaluate()}
    assert {name for name, pin in pins.items() if not pin.contains(distribution(name).version)} == set()


WRONG = {"id": "GHSA-0000-0000-0000", "summary": "All bytes are wrong.", "affected": []}
EXCEPTED = {"id": "GHSA-1111-1111-1111", "aliases": ["CVE-2025-69872"], "summary": "Pickle.", "affected": []}


class Advisories(http.server.BaseHTTPRequestHandler):
    """As osv.dev answers: nothing known, but of `vulnerable`, and what is known of diskcache."""

    vulnerable = ""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = asked["package"]["name"]
        rows = [EXCEPTED] if name == "diskcache" else [WRONG] if name == self.vulnerable else []
        body = json.dumps({"vulns": rows} if rows else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def advisories(monkeypatch):
    """`advisories(name)`: the address of a service that knows something bad of this package."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Advisories)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def knows(name):
        monkeypatch.setattr(Advisories, "vulnerable", name)
        return f"http://127.0.0.1:{server.server_port}/v1/query"

    yield knows
    server.shutdown()
    thread.join()
    server.server_close()


def audit(url, folder):
    """The status, and what was said."""
    env = os.environ | {
        "VENV": sys.prefix,
        "OSV_URL": url,
        "XDG_CACHE_HOME": str(folder),
        "PIP_CACHE_DIR": str(folder),
    }
    done = subprocess.run(
        [ROOT / ".ci" / "audit"], env=env, capture_output=True, text=True, timeout=100, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.needs("curl")
def test_an_audit_passes_when_nothing_is_known(tmp_path, advisories):
    status, said = audit(advisories(""), tmp_path)
    assert "No known vulnerabilities found" in said
    assert status == 0


@pytest.mark.needs("curl")
def test_an_audit_fails_for_a_known_vulnerability(tmp_path, advisories):
    status, said = audit(advisories("aiohttp"), tmp_path)
    assert "GHSA-0000-0000-0000" in said
    assert status == 1


@pytest.mark.needs("curl")
def test_an_audit_says_that_the_service_does_not_answer(tmp_path):
    url = f"http://127.0.0.1:{free_port()}/v1/query"
    assert audit(url, tmp_path) == (
        0,
        f"audit: not checked for known vulnerabilities: {url} does not answer\n",
    )
