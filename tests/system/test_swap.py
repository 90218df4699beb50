"""Change without stopping: other processes, another number of workers, another program; no request fails."""

import os
import re
import shutil
import signal
import tomllib
from pathlib import Path

import pytest
from harness.content import BIG, DELTA, INDEX, noise, zip_of
from harness.processes import command_line, until
from harness.service import toml
from harness.steady import Steady

import gup

LARGE = zip_of("swap", 2_000_000)
BODIES = {BIG: LARGE, DELTA: noise("d", 60_000), INDEX: noise("i", 3_000)}
REQUESTS = "gup_requests_total"
RATE = 1_000_000


def with_workers(service, count):
    """The settings that are in the file, with so many workers."""
    return tomllib.loads((service.folder / "gup.toml").read_text()) | {"workers": {"count": count}}


def started(serve, **more):
    """A service that has everything, with two workers by its settings file."""
    service, upstream = serve(BODIES, workers={"count": 2}, each={"health_interval": "0s"}, **more)
    for path, body in BODIES.items():
        service.serves(path, body)
    service.wait_stored(*BODIES)
    return service, upstream


def test_workers_come_and_go_and_another_program_takes_over_while_no_request_fails(serve):
    service, upstream = started(serve)
    before, asked, counted = service.status(), len(BODIES), [0.0]
    workers = [2, 4, 1]
    control = Steady(service.admin, {"/healthz": b"ok\n"}, lazy=10, new=1)
    clients = Steady(service.data, BODIES, busy=4, lazy=20, new=1, slow=20, large=BIG, rate=RATE)
    with control, clients:
        for count in workers[1:]:
            until(lambda: clients.began >= 20, "all downloads have begun")
            service.reload(**with_workers(service, count))
            service.wait_replaced(before, count)
            before = service.status()
            counted.append(service.metric(REQUESTS))
        service.signal(signal.SIGUSR2)
        service.wait_replaced(before, workers[-1])
        counted.append(service.metric(REQUESTS))
    assert clients.failures == []
    assert min(clients.done.values()) >= 20, clients.done
    assert (control.failures, control.done["lazy"] > 100) == ([], True)
    assert clients.closed == control.closed == 0, "connections go on in other processes"
    assert counted == sorted(counted), "a counter went back"
    until(lambda: len(service.status()["workers"]) == workers[-1], "the earlier processes have ended")
    assert service.metric(REQUESTS) == asked + clients.total, "each request is counted once"
    assert service.metric("gup_client_connections") == 0
    assert service.metric("gup_worker_restarts_total") == 0
    assert [len(upstream.requests(path)) for path in BODIES] == [1, 1, 1]
    assert service.stop() == 0


@pytest.fixture
def installed(tmp_path):
    """A copy of the program, of which a test changes files as an upgrade does; `{file: (old, new)}`."""
    folder = tmp_path / "installed"
    shutil.copytree(Path(gup.__file__).parent, folder / "gup", ignore=shutil.ignore_patterns("__pycache__"))
    originals: dict[Path, str] = {}

    def change(name, old, new):
        file = folder / "gup" / name
        text = originals.setdefault(file, file.read_text())
        assert old in text
        file.write_text(text.replace(old, new, 1))

    def restore():
        for file, text in originals.items():
            file.write_text(text)

    change.restore, change.folder = restore, folder
    return change


def test_a_program_that_can_not_take_over_leaves_the_old_one_serving(serve, installed):
    # changes of a second leave a compiled file that looks right
    environment = {"PYTHONPATH": str(installed.folder), "PYTHONDONTWRITEBYTECODE": "1"}
    service, _ = started(serve, env=environment)
    settings = tomllib.loads((service.folder / "gup.toml").read_text())
    before = service.status()
    with Steady(service.data, BODIES, lazy=10, new=1) as clients:

        def refused():
            code, answer = service.api("/api/v1/upgrade", "POST")
            assert (code, answer["upgraded"]) == (200, False)
            now = service.status()
            assert (now["pid"], now["workers"]) == (before["pid"], before["workers"])
            return "\n".join(answer["problems"])

        installed("server/ranges.py", "\nimport", "\ndef (:\nimport")
        assert re.search(r"SyntaxError: .*server/ranges.py", refused())
        installed.restore()
        (service.folder / "gup.toml").write_text(toml(settings | {"log": {"level": "loud"}}))
        assert "log.level" in refused()
        (service.folder / "gup.toml").write_text(toml(settings))
        installed("process/shared_memory.py", "PAGE_FORMAT = 1", "PAGE_FORMAT = 2")
        assert "restart the service instead" in refused()
        installed.restore()
        installed("process/worker.py", "        gc.freeze()", "        import os; os._exit(1)")
        assert service.api("/api/v1/upgrade", "POST")[1]["upgraded"]
        service.wait_log("new worker 0 does not start: the earlier processes go on serving")
        now = service.status()
        serving = [row["pid"] for row in now["workers"] if row["leaving"] and row["ready"]]
        assert (now["pid"], serving) == (before["pid"], [row["pid"] for row in before["workers"]])
        installed.restore()
        installed("__init__.py", "__version__ = ", '__version__ = "99" or ')
        service.signal(signal.SIGUSR2)
        assert service.wait_replaced(before, 2)["version"] == "99"
    assert clients.failures == []
    assert service.stop() == 0


@pytest.mark.parametrize("second", ["term", "kill the trial", "reload"])
def test_what_comes_in_the_middle_of_an_upgrade(serve, second):
    service, _ = started(serve)
    before = service.status()
    trials = lambda: [pid for pid in service.children() if "serve" in command_line(pid)]  # noqa: E731
    with Steady(service.data, BODIES, lazy=10, new=1, slow=4, large=BIG, rate=RATE) as clients:
        until(lambda: clients.began >= 4, "the downloads have begun")
        service.signal(signal.SIGUSR2)
        (trial,) = until(trials, "the new program is tried")
        if second == "kill the trial":
            os.kill(trial, signal.SIGKILL)
            service.wait_log("not upgraded: the new program ended with status -9")
            assert service.status()["pid"] == before["pid"]
            service.signal(signal.SIGUSR2)
            until(trials, "it is tried again")
            service.signal(signal.SIGUSR2)
            service.wait_log("not upgraded: an upgrade is under way already")
        elif second == "reload":
            for count in (4, 1, 3):
                (service.folder / "gup.toml").write_text(toml(with_workers(service, count)))
                service.signal(signal.SIGHUP)
        if second == "term":
            clients.stop()
            service.signal(signal.SIGTERM)
            assert service.wait() == 0
        else:
            service.wait_replaced(before, 3 if second == "reload" else 2)
    assert clients.failures == []
    assert service.stop() == 0
    assert "Traceback" not in service.log
