"""The documents: every command in them is run on a real gup, or named below with the reason why not.

A document's commands run one after the other in a folder of their own. `_here` maps standard ports and paths.
"""

import os
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.processes import end, environment, free_port, listens, until
from harness.service import REPOSITORY, toml
from harness.warm import TEMPLATE, Forked
from typer.main import get_command

from gup.cli.app import app
from gup.demo.content import FIRST_NEWEST, revision

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
LANGUAGES = {"sh", "toml", "json", "yaml", "ini", "text", "mermaid"}
"""Of fences: whatever is to be typed is `sh`, so that no command escapes."""
NOT_RUN = {
    r"make \w+": "runs this test too, or for minutes; its target is looked for below",
    r"locust ": "other machines; tests/deploy/test_load.py runs it on this one",
    r"pip install ": "takes minutes and a registry",
    r"apt install ": "installs in the system; tests/deploy/test_deb.py",
    r"deploy/install ": "fetches from a registry for a minute; its syntax is checked below",
    r"systemctl ": "needs the unit; tests/deploy/test_systemd.py",
    r"journalctl ": "needs the unit",
    r"install .*(/usr/lib|/etc)/": "writes to the system; the files are looked for below",
    r"cd deploy/container|.*docker compose ": "needs an engine; tests/deploy/test_container_files.py",
    r"curl .*https://gup.site.example": "another machine",
}


def fences(document: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block."""
    for found in re.finditer(r"^ *```(\S*)\n(.*?)^ *```$", document.read_text(), re.MULTILINE | re.DOTALL):
        yield found[1], found[2]


def commands(document: Path) -> list[str]:
    blocks = [text.replace("\\\n", " ") for language, text in fences(document) if language == "sh"]
    return [line for text in blocks for line in text.splitlines() if line.strip() and line[0] != "#"]


def why_not(command: str) -> str:
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command)), "")


def name(document: Path) -> str:
    return str(document.relative_to(REPOSITORY))


WITH_COMMANDS = [document for document in DOCUMENTS if commands(document)]
ALL = [(document, command) for document in WITH_COMMANDS for command in commands(document)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_fence_says_what_it_is(document):
    assert {language for language, _ in fences(document)} <= LANGUAGES
    assert document.read_text().count("```") == 2 * len(list(fences(document)))


def test_the_list_of_what_is_not_run_has_no_stale_row():
    assert {why_not(command) for _, command in ALL} - {""} == set(NOT_RUN.values())


@pytest.mark.parametrize(("document", "command"), [row for row in ALL if why_not(row[1])])
def test_what_is_not_run_is_well_formed_and_names_files_that_exist(document, command):
    subprocess.run(["/bin/bash", "-n", "-c", command], check=True)
    for word in shlex.split(command, comments=True):
        if re.match(r"(deploy|config|docs)/", word):
            assert (REPOSITORY / word).exists(), f"{name(document)}: {word}"
            if os.access(script := REPOSITORY / word, os.X_OK) and script.is_file():
                subprocess.run(["/bin/sh", "-n", str(script)], check=True)
    if target := re.match(r"make (\w+)", command):
        assert re.search(rf"^{target[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


def spans(document: Path) -> set[str]:
    """The gup commands in running text and in tables."""
    text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`((?:/opt/gup/bin/)?gup(?: [^`]*)?)`", text)
    return {one.replace("\\|", "|") for one in found}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_gup_command_in_the_text_is_one(document):
    """Each word up to the first argument is a command, and each flag one of its flags."""
    for line in spans(document) | {line for line in commands(document) if line.startswith("gup ")}:
        command = get_command(app)
        words = re.split(r"\s+", re.sub(r"[\[\]…']", " ", line.partition("  #")[0])).__iter__()
        next(words)
        known = {flag for one in command.params for flag in one.opts}
        for word in words:
            below = getattr(command, "commands", {})
            if word.startswith("--"):
                assert word in known | {"--help"}, f"{name(document)}: {line}: {word}"
            elif below and (names := [each for each in word.strip(",").split("|") if each]):
                assert set(names) <= set(below), f"{name(document)}: {line}: {word}"
                command = below[names[0]]
                known |= {flag for one in command.params for flag in one.opts}


# --- run


class Sandbox:
    """A folder, free ports, and a shell in it that has `gup`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.data, self.admin, self.manager = free_port(), free_port(), free_port()
        for made in ("bin", "etc", "home"):
            (folder / made).mkdir()
        gup = folder / "bin" / "gup"
        gup.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m gup "$@"\n')
        gup.chmod(0o755)
        self.env = {
            "PATH": f"{folder}/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(folder / "home"),
            "GUP_LISTEN__PORT": str(self.data),
            "GUP_LISTEN__ADMIN_PORT": str(self.admin),
        }
        self.running: list[subprocess.Popen[bytes] | Forked] = []

    def _here(self, command: str) -> str:
        moved = {
            "/260101001/full.zip": f"/{revision(FIRST_NEWEST)}/full.zip",
            "http://manager:8014": f"http://127.0.0.1:{self.manager}",
            "0.0.0.0:8014": f"127.0.0.1:{self.manager}",
            "127.0.0.1:8014": f"127.0.0.1:{self.manager}",
            "127.0.0.1:2967": f"127.0.0.1:{self.data}",
            "127.0.0.1:2968": f"127.0.0.1:{self.admin}",
            "/opt/gup/bin/gup": "gup",
            "/tmp/gup-cache": str(self.folder / "gup-cache"),
            "/var/lib/gup": str(self.folder / "cache"),
            "/etc/gup": str(self.folder / "etc"),
        }
        for there, here in moved.items():
            command = command.replace(there, here)
        return command

    def start(self, command: str, *listening: int, warm: bool = False) -> None:
        """`warm`: off the template. No document says this one, so it need not be what a shell starts."""
        path = self.folder / f"log{len(self.running)}"
        env = environment(self.mark, self.env)
        with path.open("wb") as log:
            shell = ["/bin/bash", "-c", f"exec {self._here(command)}"]
            self.running.append(
                TEMPLATE.start(self._here(command).split()[1:], env, self.folder, log.fileno())
                if warm
                else subprocess.Popen(
                    shell, cwd=self.folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )

        def ready() -> bool:
            assert self.running[-1].poll() is None, f"{command} ended: {path.read_text()[-2000:]}"
            return all(listens(("127.0.0.1", port)) for port in listening)

        until(ready, f"{command} listens", 60)

    def run(self, command: str) -> str:
        shell = ["/bin/bash", "-o", "pipefail", "-euc", self._here(command)]
        env = environment(self.mark, self.env)
        done = subprocess.run(
            shell,
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def close(self) -> None:
        for process in self.running:
            end(process, self.mark)


@pytest.fixture
def sandbox(tmp_path):
    made = Sandbox(tmp_path)
    yield made
    made.close()


SERVICE = re.compile(r"gup serve |gup simulate manager")


@pytest.mark.needs("curl", "openssl")
@pytest.mark.parametrize(
    "document", [one for one in WITH_COMMANDS if any(not why_not(c) for c in commands(one))], ids=name
)
def test_every_command_of_a_document_works(document, sandbox):
    lines = [line for line in commands(document) if not why_not(line)]
    if not any("gup simulate manager" in line for line in lines):
        sandbox.start(
            "gup simulate manager --listen 127.0.0.1:8014 --full-size 100kB --publish-interval 0s",
            sandbox.manager,
            warm=True,
        )
    if not any("gup serve" in line for line in lines):
        settings = {
            "cache": {"directory": str(sandbox.folder / "cache")},
            "upstream": {
                "url": f"http://127.0.0.1:{sandbox.manager}",
                "version": "14.3 RU2",
                "language": "French",
            },
            "listen": {"port": sandbox.data, "admin_port": sandbox.admin},
            "alarms": {"command": ["/bin/true"]},
        }
        for place in ("etc/gup.toml", "gup.toml"):
            (sandbox.folder / place).write_text(toml(settings))
        sandbox.env["GUP_CONFIG"] = str(sandbox.folder / "etc" / "gup.toml")
        upgraded = any("gup upgrade" in line for line in lines)  # only what an interpreter runs can be
        sandbox.start("gup serve", sandbox.data, sandbox.admin, warm=not upgraded)
        sandbox.run("curl -sSf -o /dev/null http://127.0.0.1:2967/content/ContentInfo.txt")
    for line in lines:
        if "gup simulate manager" in line:
            sandbox.start(line.partition("  #")[0], sandbox.manager)
        elif "gup serve" in line:
            sandbox.start(line.partition("  #")[0], sandbox.data, sandbox.admin)
        else:
            sandbox.run(line)
