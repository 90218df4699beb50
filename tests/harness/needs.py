"""What a test needs beyond Python: `@pytest.mark.needs("nginx", "root")`. One table says what each need is.

Where one is missing, the test is skipped, and the run ends with how many tests each would add; with CI=true
such a test fails. `tests/conftest.py` hands the hooks to pytest.
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_CAPABILITIES = {"net_admin": 12, "sys_admin": 21}


def _may(*capabilities: str) -> bool:
    """Whether this process has them: root in a container often has not."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("\nCapEff:")[2].split(None, 1)[0], 16)
    return all(effective >> _CAPABILITIES[name] & 1 for name in capabilities)


def _can_loop() -> bool:
    return _may("sys_admin") and Path("/dev/loop-control").exists()


def _can_trace() -> bool:
    """Whether strace attaches to a process that it did not start: a kernel may keep it from that."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as traced:
        command = ["strace", "-o", os.devnull, "-p", str(traced.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
            attached = b"attached" in tracer.stderr.readline()
            tracer.terminate()
            tracer.communicate()
        traced.kill()
    return attached


def _can_boot() -> bool:
    return _may("sys_admin", "net_admin") and "cgroup2" in Path("/proc/filesystems").read_text()


def _makes_environments() -> bool:
    """Debian's own Python, whatever else is installed: the package is built for that."""
    command = ["/usr/bin/python3", "-c", "import ensurepip"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@dataclass(frozen=True, slots=True)
class Need:
    """Programs that must be there and what must hold besides; `remedy` says how to come by it."""

    remedy: str
    programs: tuple[str, ...] = ()
    holds: Callable[[], bool] = lambda: True

    def missing(self) -> bool:
        return any(shutil.which(name, path=_PATH) is None for name in self.programs) or not self.holds()


def _package(name: str, *programs: str, **more: Callable[[], bool]) -> Need:
    return Need(f"apt-get install {name}", programs or (name,), **more)


NEEDS = {
    "aria2": _package("aria2", "aria2c"),
    "btrfs": _package("btrfs-progs", "mkfs.btrfs"),
    "chromium": _package("chromium chromium-driver", "chromium", "chromedriver"),
    "curl": _package("curl"),
    "deb": _package("dpkg-dev python3-venv", "dpkg-shlibdeps", "strip", holds=_makes_environments),
    "docker-compose": _package("docker-compose"),
    "ext4": _package("e2fsprogs", "mkfs.ext4"),
    "faketime": _package("faketime"),
    "groff": _package("groff"),
    "haproxy": _package("haproxy"),
    "lintian": _package("lintian"),
    "loop": Need("root and loop devices", (), _can_loop),
    "machine": Need(
        "root that may boot systemd in namespaces", ("unshare", "nsenter", "systemctl"), _can_boot
    ),
    "mount": Need("root that may mount", ("mount", "umount"), lambda: _may("sys_admin")),
    "network": Need("root that may make network namespaces", (), lambda: _may("sys_admin", "net_admin")),
    "nginx": _package("nginx"),
    "openssl": _package("openssl"),
    "prometheus": _package("prometheus", "prometheus", "promtool"),
    "redis": _package("redis-server"),
    "sandbox": Need("root that may mount", ("unshare", "setpriv", "mount"), lambda: _may("sys_admin")),
    "strace": _package("strace", holds=_can_trace),
    "systemd": _package("systemd", "systemd-analyze", "systemd-sysusers", "systemd-socket-activate"),
    "tar": _package("tar"),
    "wrk": _package("wrk"),
    "xfs": _package("xfsprogs", "mkfs.xfs"),
}

_declared: set[str] | None = None
"""What the running test says that it needs; None outside of pytest. Changed by `pytest_runtest_setup`."""


def program(name: str) -> str:
    """Where a program of the table is. AssertionError when the running test does not say that it needs it."""
    owners = {need for need, row in NEEDS.items() if name in row.programs}
    assert _declared is None or owners & _declared, f'mark the test: @pytest.mark.needs("{min(owners)}")'
    found = shutil.which(name, path=_PATH)
    assert found, f"{name} is not here: {NEEDS[owners.pop()].remedy}"
    return found


@cache
def _missing(need: str) -> bool:
    return NEEDS[need].missing()


_REASON = "needs "


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _declared  # noqa: PLW0603 - one test runs at a time
    _declared = {need for mark in item.iter_markers("needs") for need in mark.args}
    if unknown := _declared - set(NEEDS):
        pytest.fail(f"not in the table of harness/needs.py: {', '.join(sorted(unknown))}", pytrace=False)
    if missing := sorted(filter(_missing, _declared)):
        if os.environ.get("CI") == "true":
            told = "; ".join(f"{need} ({NEEDS[need].remedy})" for need in missing)
            pytest.fail(f"{_REASON}{told}", pytrace=False)
        pytest.skip(_REASON + " ".join(missing))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests were not run for want of what, and what would bring it."""
    if hasattr(terminalreporter.config, "workerinput"):
        return  # a process of pytest-xdist: its parent has all reports
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])]
    begin = f"Skipped: {_REASON}"
    missing = [reason.removeprefix(begin).split() for reason in reasons if reason.startswith(begin)]
    tests = Counter(need for needs in missing for need in needs)
    for need, count in sorted(tests.items()):
        who = "1 test, needs" if count == 1 else f"{count} tests, need"
        terminalreporter.write_line(f"not run here: {who} {need} ({NEEDS[need].remedy})")
