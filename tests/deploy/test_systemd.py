"""The unit as systemd's own tools judge it, and what a real gup says to systemd."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from deploy.deployed import DEPLOY, run
from harness.clients import RawConnection, fetch
from harness.needs import program
from harness.processes import MARK, end, environment, free_port, listens, marked, until
from harness.service import Gup

UNITS = DEPLOY / "systemd"
EXPOSURE = "15"
"""In tenths: systemd's own services lie between 10 and 96."""


@pytest.fixture
def units(tmp_path):
    """The units with a program that is there."""
    gup = str(Path(sys.executable).with_name("gup")).replace(" ", "\\x20")
    for file in ("gup.service", "gup.socket"):
        text = (UNITS / file).read_text().replace("/opt/gup/bin/gup", gup)
        (tmp_path / file).write_text(text)
    return tmp_path


@pytest.mark.needs("systemd")
def test_systemd_verifies_the_units(units):
    assert run(program("systemd-analyze"), "verify", units / "gup.service", units / "gup.socket") == ""


@pytest.mark.needs("systemd")
def test_the_unit_is_hardened():
    said = run(
        *(program("systemd-analyze"), "security", "--no-pager", "--offline=yes", f"--threshold={EXPOSURE}"),
        UNITS / "gup.service",
    )
    assert "Overall exposure level for gup.service" in said


def test_the_unit_gives_what_gup_needs():
    text = (UNITS / "gup.service").read_text()
    for line in ("Type=notify", "User=gup", "ProtectSystem=strict", "StateDirectory=gup", "WatchdogSec=30",
                 "CapabilityBoundingSet=", "NoNewPrivileges=yes"):  # fmt: skip
        assert f"\n{line}\n" in text, line


@pytest.mark.needs("systemd")
def test_the_user_is_made(tmp_path):
    (tmp_path / "etc").mkdir()
    run(program("systemd-sysusers"), f"--root={tmp_path}", UNITS / "gup.sysusers")
    entry = (tmp_path / "etc" / "passwd").read_text()
    assert entry.startswith("gup:")
    assert entry.strip().endswith("/var/lib/gup:/usr/sbin/nologin")


def test_a_real_gup_tells_systemd_how_it_stands(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        told = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "900000"}

        def heard(word):
            while not (text := systemd.recv(4096).decode()).startswith(word):
                pass
            return text

        settings = {"upstream": [{"url": "http://127.0.0.1:9"}]}
        with Gup(tmp_path / "cache", workers=1, settings=settings, env=told, start=False) as gup:
            gup.launch()
            ready = heard("READY=1")
            gup.wait_ready()
            assert f"STATUS=serving on {gup.url}" in ready
            assert fetch(gup.admin, "/healthz").status == 200
            assert gup.get("/nothing").status == 404, "READY came when clients were answered"
            passed = [psutil.Process(pid).environ() for pid in gup.children()]
            assert not any("NOTIFY_SOCKET" in environ for environ in passed), "children tell systemd nothing"
            heard("WATCHDOG=1")
            gup.signal(signal.SIGHUP)
            heard("RELOADING=1\nMONOTONIC_USEC=")
            heard("READY=1")
            before = gup.status()
            gup.signal(signal.SIGUSR2)
            heard("RELOADING=1\nMONOTONIC_USEC=")
            heard("READY=1")  # at once: the earlier workers serve
            assert f"STATUS=serving on {gup.url}" in heard("READY=1")
            gup.wait_replaced(before, 1)
            heard("WATCHDOG=1")
            passed = [psutil.Process(pid).environ() for pid in gup.children()]
            assert not any({"NOTIFY_SOCKET", "_GUP_HANDOVER"} & set(environ) for environ in passed)
            gup.signal(signal.SIGTERM)
            heard("STOPPING=1")
            assert gup.wait() == 0


@pytest.mark.needs("systemd")
def test_a_gup_started_for_a_socket_of_systemd_serves_on_it(tmp_path):
    """systemd-socket-activate listens, and becomes gup when the first client connects."""
    data, mark = free_port(), tmp_path.name + str(os.getpid())
    command = [
        program("systemd-socket-activate"),
        f"--listen=127.0.0.1:{data}",
        "--fdname=data",
        f"--setenv={MARK}",
    ]
    serve = ["-m", "gup", "serve", "--upstream", "http://127.0.0.1:9", "--admin", "127.0.0.1:0"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, sys.executable, *serve, "--cache-dir", str(tmp_path / "cache"), "--workers", "2"],
            env=environment(mark),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        until(lambda: f"Listening on 127.0.0.1:{data}" in log.read_text(), "systemd's side listens")
        answer = fetch(("127.0.0.1", data), "/nothing", timeout_seconds=30)
        assert answer.status == 404
        assert f"serving on http://127.0.0.1:{data}" in until(
            lambda: "gup: serving" in log.read_text() and log.read_text(), "the ready line", 20
        )
        with RawConnection(("127.0.0.1", data)) as kept:
            assert kept.get("/nothing").status == 404
            before = set(marked(mark)) - {process.pid}
            process.send_signal(signal.SIGUSR2)
            until(lambda: log.read_text().count("gup: serving") == 2, "the upgraded gup serves", 60)
            until(lambda: before.isdisjoint(marked(mark)), "the earlier processes have ended")
            assert kept.get("/nothing").status == 404, "the same connection, another worker"
        assert fetch(("127.0.0.1", data), "/nothing").status == 404
        process.terminate()
        assert process.wait(20) == 0
        assert not listens(("127.0.0.1", data))
    finally:
        end(process, mark)
