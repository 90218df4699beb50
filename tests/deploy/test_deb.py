"""The Debian package: built by one command, then installed, upgraded, removed and purged on a machine."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from deploy.deployed import ROOT, run
from harness.content import make_tree
from harness.machine import machine
from harness.processes import until

pytestmark = [pytest.mark.needs("deb", "machine"), pytest.mark.timeout(400)]

UPSTREAM = '\n[[upstream]]\nurl = "http://127.0.0.1:8014"\n'


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """`make deb` in a copy of the repository, once for all processes that test; compressed in a hurry."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "deb"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("build/*.deb")):
            copy_of_the_repository(folder)
            hurry = {"DPKG_DEB_COMPRESSOR_TYPE": "gzip", "DPKG_DEB_COMPRESSOR_LEVEL": "1"}
            run("make", "deb", cwd=folder, env=os.environ | hurry, timeout=300)
    (found,) = folder.glob("build/*.deb")
    return found


def copy_of_the_repository(folder):
    asked = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, run(*asked, cwd=ROOT).split("\0")):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def newer(package, folder):
    """The same with another version of gup in it."""
    run("dpkg-deb", "--raw-extract", package, folder)
    control = folder / "DEBIAN/control"
    control.write_text(control.read_text().replace("\nVersion: 0.", "\nVersion: 9."))
    (init,) = folder.glob("usr/lib/gup/lib/python3*/site-packages/gup/__init__.py")
    init.write_text(init.read_text().replace('__version__ = "0.', '__version__ = "9.'))
    run("/usr/bin/python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-f", init)
    target = folder.with_suffix(".deb")
    run("dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", folder, target)
    return target


def test_the_package_holds_what_a_debian_service_has(package, tmp_path):
    run("dpkg-deb", "--extract", package, tmp_path / "root")
    for name in ("usr/bin/gup", "usr/lib/gup/bin/gup", "etc/gup/gup.toml",
                 "lib/systemd/system/gup.service",
                 "lib/systemd/system/gup.socket", "usr/lib/sysusers.d/gup.conf",
                 "usr/share/man/man1/gup.1.gz",
                 "usr/share/man/man1/gup-why.1.gz", "usr/share/bash-completion/completions/gup",
                 "usr/share/zsh/vendor-completions/_gup", "usr/share/fish/vendor_completions.d/gup.fish",
                 "usr/share/doc/gup/copyright", "usr/share/doc/gup/changelog.gz"):  # fmt: skip
        path = tmp_path / "root" / name
        assert path.is_symlink() or path.is_file(), name
    assert run("dpkg-deb", "--info", package, "conffiles") == "/etc/gup/gup.toml\n"
    copyright_ = (tmp_path / "root/usr/share/doc/gup/copyright").read_text()
    assert "\n  aiohttp 3." in copyright_
    unit = (tmp_path / "root/lib/systemd/system/gup.service").read_text()
    assert "\nExecStart=/usr/bin/gup serve --config /etc/gup/gup.toml\n" in unit
    assert "/opt/" not in unit
    depends = run("dpkg-deb", "--field", package, "Depends")
    for name in ("python3 (>= 3.", "python3 (<< 3.", "libc6 (>= ", "systemd (>= "):
        assert name in depends


def test_nothing_in_the_package_remembers_where_it_was_built(package, tmp_path):
    run("dpkg-deb", "--extract", package, tmp_path / "root")
    assert run("grep", "-rlF", package.parents[1], tmp_path / "root", status=1) == ""
    binaries = tmp_path / "root/usr/lib/gup/bin"
    assert (binaries / "gup").read_text().splitlines()[0] == "#!/usr/lib/gup/bin/python"
    assert {path.name for path in binaries.iterdir() if not path.name.startswith("python")} == {"gup"}


@pytest.mark.long
@pytest.mark.needs("lintian")
def test_lintian_finds_nothing(package):
    said = run("lintian", package, timeout=200)
    assert [line for line in said.splitlines() if "root privileges" not in line] == []


def requests(here):
    """How many the gup that runs has answered."""
    status = json.loads(here.run("gup", "status", "--json", "--config", "/etc/gup/gup.toml"))
    return status["totals"]["since_start"]["requests_total"]


@contextlib.contextmanager
def beside(here, *module, **how):
    """A Python program whose sockets are in the machine's network."""
    with subprocess.Popen([*here.in_its_network, sys.executable, "-m", *module], **how) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def visited(here, tree):
    """Clients of gup; ends them for what they found."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT / "tests"}
    with beside(here, "deploy.visitors", tree.root, **pipes) as process:
        yield lambda: json.loads(process.communicate(timeout=100)[0])


def service(here, *names):
    return here.run("systemctl", "show", "--value", f"--property={','.join(names)}", "gup.service").split()


def test_it_is_installed_started_and_upgraded_while_clients_are_served(package, tmp_path, request):
    shown = request.getfixturevalue("figures")
    tree = make_tree(tmp_path / "tree", 10_000_000)
    upgrade = newer(package, tmp_path / "newer")
    with machine(tmp_path / "machine") as here:
        said = here.run("dpkg", "--install", here.put(package))
        assert "name the management server in /etc/gup/gup.toml" in said
        assert here.run("stat", "--format=%a %U %G", "/etc/gup/gup.toml") == "640 root gup\n"
        assert here.run("systemctl", "is-enabled", "gup.service", status=1) == "disabled\n"
        installed = here.changes()

        settings = here.root / "etc/gup/gup.toml"
        settings.write_text(settings.read_text() + UPSTREAM)
        serve = ("http.server", "8014", "--bind=127.0.0.1", "--directory", tree.root)
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with beside(here, *serve, **silent):
            until(lambda: ":8014" in here.run("ss", "-tln"), "the upstream listens")
            here.run("systemctl", "enable", "--now", "gup.socket", "gup.service")
            with visited(here, tree) as found:
                until(lambda: requests(here) > 200, "clients are served")
                before = service(here, "MainPID", "User")
                assert here.run("dpkg", "--verify", "gup") == "??5?????? c /etc/gup/gup.toml\n"
                said = here.run("dpkg", "--install", here.put(upgrade))
                after = service(here, "MainPID", "User", "ActiveState")
                until(lambda: requests(here) > 200, "clients are served by the new one")
                counts = found()
        assert [*before, "active"] == after, "another program in the same process"
        assert "Setting up gup (9." in said
        assert "\ngup 9." in said
        assert settings.read_text().endswith(UPSTREAM)
        assert counts["failures"] == []
        assert counts["requests"] > 400
        assert counts["slow"] > 1
        shown(f"upgraded under load: {counts}")

        log = here.run("journalctl", "--unit=gup", "--no-pager", "--output=cat")
        assert " error " not in log
        assert "Traceback" not in log
        assert "refuses to sync" not in log, "the unit leaves gup what it reads"
        assert "Deactivated successfully" not in log
        assert not {path for path in here.changes() - installed if path.startswith("/usr/lib/gup/")}


def test_it_outlives_wrong_settings_and_is_removed_and_purged(package, tmp_path):
    with machine(tmp_path / "machine") as here:
        here.run("dpkg", "--install", here.put(package))
        settings = here.root / "etc/gup/gup.toml"
        settings.write_text(settings.read_text() + UPSTREAM)
        here.run("systemctl", "enable", "--now", "gup.socket", "gup.service")

        before, right = service(here, "MainPID"), settings.read_text()
        settings.write_text(right + "urrl = 1\n")
        said = here.run("/var/lib/dpkg/info/gup.postinst", "configure", "0.0.1")
        assert "urrl" in said
        assert "not upgraded: correct /etc/gup/gup.toml" in said
        assert service(here, "MainPID") == before, "it goes on with the settings that it has"
        settings.write_text(right)
        (module,) = here.root.glob("usr/lib/gup/lib/python3*/site-packages/gup/process/shared_memory.py")
        shutil.rmtree(module.parent / "__pycache__")
        module.write_text(module.read_text().replace("PAGE_FORMAT = ", "PAGE_FORMAT = 1000 + "))
        said = here.run("/var/lib/dpkg/info/gup.postinst", "configure", "0.0.1")
        assert "can't take over from a running gup" in said
        until(lambda: service(here, "MainPID", "ActiveState")[1:] == ["active"], "it is restarted")
        assert service(here, "MainPID") != before

        here.run("dpkg", "--remove", "gup")
        assert service(here, "ActiveState") == ["inactive"]
        assert here.run("pgrep", "--uid", "gup", status=1) == ""
        assert (here.root / "var/lib/gup").is_dir()
        assert settings.exists(), "settings and state stay until the purge"
        here.run("dpkg", "--install", here.put(package))
        here.run("systemctl", "start", "gup.socket", "gup.service")
        assert service(here, "ActiveState") == ["active"], "with the settings that were left"

        here.run("dpkg", "--purge", "gup")
        left = {path for path in here.changes() if re.search(r"\bgup\b", path)}
        assert left == set()
