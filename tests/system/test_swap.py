"""Change without stopping: other processes, another number of workers, another program; no request fails."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import threading
import tomllib
from pathlib import Path

import pytest
from harness.clients import End, body_digest
from harness.content import BIG, DELTA, INDEX, noise, zip_of
from harness.needs import program
from harness.processes import command_line, open_files, until
from harness.service import REPOSITORY, toml
from harness.steady import Steady
from harness.upstreams import Answer, Gate

LARGE = zip_of("swap", 2_000_000)
BODIES = {BIG: LARGE, DELTA: noise("d", 60_000), INDEX: noise("i", 3_000)}
REQUESTS = "gup_requests_total"
RATE = 1_000_000


OWN = {"PYTHONDONTWRITEBYTECODE": "1"}
"""Has the harness start interpreters: a service that runs another program must be one itself. And a changed
file leaves no compiled one: after another change within the same second that would look right."""


def with_workers(service, count):
    """The settings that are in the file, with so many workers."""
    return tomllib.loads((service.folder / "gup.toml").read_text()) | {"workers": {"count": count}}


def started(serve, env=OWN, **more):
    """A service that has everything, with two workers by its settings file."""
    service, upstream = serve(BODIES, workers={"count": 2}, env=env, each={"health_interval": "0s"}, **more)
    for path, body in BODIES.items():
        service.serves(path, body)
    service.wait_stored(*BODIES)
    return service, upstream


def test_workers_come_and_go_while_no_request_fails(serve):
    service, upstream = started(serve, env={})
    before, asked, counted = service.status(), len(BODIES), [0.0]
    workers = [2, 3, 1]
    control = Steady(service.admin, {"/healthz": b"ok\n"}, lazy=10, new=1)
    clients = Steady(service.data, BODIES, busy=1, lazy=20, new=1, slow=20, large=BIG, rate=RATE)
    with control, clients:
        for count in workers[1:]:
            until(lambda: clients.began >= 20, "all downloads have begun")
            service.reload(**with_workers(service, count))
            service.wait_replaced(before, count)
            before = service.status()
            counted.append(service.metric(REQUESTS))
    assert clients.failures == []
    assert min(clients.done.values()) >= 20, clients.done
    assert (control.failures, control.done["lazy"] > 50) == ([], True)
    assert clients.closed == control.closed == 0, "connections go on in other processes"
    all_is_counted(service, counted, asked + clients.total, workers[-1])
    assert [len(upstream.requests(path)) for path in BODIES] == [1, 1, 1]
    assert service.stop() == 0


def all_is_counted(service, counted, requests, workers):
    """Each request once, and no counter went back between; the earlier processes leave nothing."""
    assert counted == sorted(counted), "a counter went back"
    until(lambda: len(service.status()["workers"]) == workers, "the earlier processes have ended")
    assert service.metric(REQUESTS) == requests
    assert service.metric("gup_client_connections") == 0


@pytest.fixture
def installed(tmp_path):
    """A copy of the program, of which a test changes files as an upgrade does; `{file: (old, new)}`."""
    folder = tmp_path / "installed"
    shutil.copytree(REPOSITORY / "gup", folder / "gup", ignore=shutil.ignore_patterns("*.pyc.*"))
    originals: dict[Path, str] = {}

    def write(file, text):
        (folder / "new").write_text(text)
        (folder / "new").rename(file)  # a process that starts meanwhile reads the one or the other

    def change(name, old, new):
        file = folder / "gup" / name
        text = originals.setdefault(file, file.read_text())
        assert old in text
        write(file, text.replace(old, new, 1))

    def restore():
        for file, text in originals.items():
            write(file, text)

    change.restore, change.folder = restore, folder
    return change


@pytest.mark.long
def test_a_program_that_can_not_take_over_leaves_the_old_one_serving(serve, installed):
    """And one that can takes over from it, while no request fails."""
    service, upstream = started(serve, env=OWN | {"PYTHONPATH": str(installed.folder)})
    settings = tomllib.loads((service.folder / "gup.toml").read_text())
    before, asked, counted = service.status(), len(BODIES), [0.0]
    control = Steady(service.admin, {"/healthz": b"ok\n"}, lazy=10, new=1)
    clients = Steady(service.data, BODIES, busy=1, lazy=10, new=1, slow=4, large=BIG, rate=RATE)
    with control, clients:

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
        installed("process/shared_memory.py", "PAGE_FORMAT = ", "PAGE_FORMAT = 1000 + ")
        assert "restart the service instead" in refused()
        installed.restore()
        installed("process/worker.py", "        gc.freeze()", "        import os; os._exit(1)")
        assert service.api("/api/v1/upgrade", "POST")[1]["upgraded"]
        service.wait_log("new worker 0 does not start: the earlier processes go on serving")
        now = service.status()
        serving = [row["pid"] for row in now["workers"] if row["leaving"] and row["ready"]]
        assert (now["pid"], serving) == (before["pid"], [row["pid"] for row in before["workers"]])
        installed.restore()
        counted.append(service.metric(REQUESTS))
        installed("__init__.py", "__version__ = ", '__version__ = "99" or ')
        service.signal(signal.SIGUSR2)
        assert service.wait_replaced(before, 2)["version"] == "99"
        counted.append(service.metric(REQUESTS))
    assert (clients.failures, control.failures) == ([], [])
    assert min(clients.done.values()) >= 4, clients.done
    assert clients.closed == control.closed == 0, "connections go on in other processes"
    all_is_counted(service, counted, asked + clients.total, 2)
    assert [len(upstream.requests(path)) for path in BODIES] == [1, 1, 1]
    assert service.stop() == 0


@pytest.mark.parametrize(
    "second", ["term", *(pytest.param(name, marks=pytest.mark.long) for name in ("kill the trial", "reload"))]
)
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


@pytest.mark.long
def test_reloads_that_come_before_the_first_process_is_ready(serve):
    """While the program is loaded, while it waits for the cache directory, while its workers start."""
    service, _ = serve(BODIES, workers={"count": 2}, env=OWN, start=False)
    run = service.cache_dir / "run"
    run.mkdir(parents=True)
    lock = os.open(run / "instance.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    service.launch()
    until(lambda: signal.SIGHUP in blocked(service.process.pid), "it has begun")
    service.signal(signal.SIGHUP)
    service.wait_log("another gup uses the cache directory")
    (service.folder / "gup.toml").write_text(toml(with_workers(service, 4)))
    service.signal(signal.SIGHUP)
    os.close(lock)
    reloaded = "settings reloaded: workers.count"
    service.wait_log(reloaded)
    first = service.workers()
    for pid in first:
        os.kill(pid, signal.SIGSTOP)
    service.rewrite(with_workers(service, 1))
    until(lambda: service.log.count(reloaded) == 2, "they are reloaded again")
    for pid in first:
        os.kill(pid, signal.SIGCONT)
    service.wait_ready()
    service.serves(DELTA, BODIES[DELTA])
    until(lambda: len(service.status()["workers"]) == 1, "the earlier processes have ended")
    assert service.workers()[0] not in first
    assert service.stop() == 0


def blocked(pid):
    """The signals that the process blocks."""
    mask = int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
    return {number for number in signal.Signals if mask >> (number - 1) & 1}


@pytest.mark.parametrize(
    "victim", ["starting", *(pytest.param(name, marks=pytest.mark.long) for name in ("ready", "controller"))]
)
def test_a_new_process_that_is_killed_while_the_earlier_ones_serve_is_started_again(serve, victim):
    service, _ = started(serve, env={})
    before, earlier = service.status(), service.children()
    new = lambda: [pid for pid in service.children() if pid not in earlier]  # noqa: E731
    ready = lambda: [row["pid"] for row in service.status()["workers"] if row["ready"]]  # noqa: E731
    with Steady(service.data, BODIES, busy=1, lazy=10, new=1, slow=4, large=BIG, rate=RATE) as clients:
        until(lambda: clients.began >= 4, "the downloads have begun")
        service.rewrite(with_workers(service, 3))
        killed, other, _ = until(lambda: len(new()) == 3 and new(), "new workers start")
        os.kill(other, signal.SIGSTOP)
        if victim == "ready":
            until(lambda: killed in ready(), "one of them is ready")
        elif victim == "controller":
            os.kill(other, signal.SIGCONT)
            (killed,) = until(lambda: new()[3:], "the new controller starts")
        os.kill(killed, signal.SIGKILL)
        service.wait_log(f"pid {killed}, was ended by SIGKILL")
        if victim != "controller":
            assert service.status()["pid"] == before["pid"], "the earlier ones serve"
            os.kill(other, signal.SIGCONT)
        service.wait_replaced(before, 3)
    assert clients.failures == []
    until(lambda: len(service.status()["workers"]) == 3, "the earlier processes have ended")
    assert killed not in service.children()
    assert service.stop() == 0


@pytest.mark.long
def test_a_herd_over_an_upgrade_fetches_the_file_once(serve):
    """Half of the body is here when others take over; clients of both kinds of workers want it."""
    gate = Gate()
    body = zip_of("herd", 1_000_000)
    answers = {BIG: (Answer(body, gates=((len(body) // 2, gate),)),)}
    service, upstream = serve(answers, workers={"count": 2}, env=OWN, each={"read_timeout": "1m"})
    swarm, before = service.swarm(), service.status()
    early = swarm.add(30, BIG)
    gate.wait_reached()
    service.signal(signal.SIGUSR2)
    now = service.wait_replaced(before, 2)
    leaving = {row["pid"] for row in now["workers"] if row["leaving"]}
    assert leaving == {row["pid"] for row in before["workers"]}, "the earlier ones end their responses"
    late = swarm.add(30, BIG)
    until(lambda: all(client.body_bytes for client in late), "they have the first half")
    gate.open()
    swarm.wait()
    assert {(client.end, client.digest) for client in early + late} == {(End.COMPLETE, body_digest(body))}
    assert len(upstream.requests(BIG)) == 1
    until(lambda: len(service.status()["workers"]) == 2, "the earlier ones have ended")
    service.wait_stored(BIG)
    assert service.metric("gup_client_downloads_in_progress") == 0


def test_connections_that_wait_to_be_accepted_are_served_when_their_worker_leaves(serve):
    """They are in the kernel's queue of a stopped worker's socket, which a single worker takes over."""
    service, _ = started(serve, env={})
    before = service.status()
    stopped = service.workers()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    clients = [service.connect() for _ in range(40)]
    for client in clients:
        client.ask(DELTA)
    (service.folder / "gup.toml").write_text(toml(with_workers(service, 1)))
    service.signal(signal.SIGHUP)
    answers = [client.response() for client in clients]
    assert {(answer.status, answer.body == BODIES[DELTA]) for answer in answers} == {(200, True)}
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    service.wait_replaced(before, 1)
    until(lambda: len(service.status()["workers"]) == 1, "the earlier ones have ended")


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(600)
@pytest.mark.needs("wrk", "curl", "aria2")
@pytest.mark.parametrize("upgrades", [False, True], ids=["reloads", "upgrades"])
def test_twenty_changes_under_two_hundred_downloads_and_wrk(serve, tmp_path, upgrades):
    service, upstream = started(serve, clients={"max_connections_per_address": 0})
    before, wrk = service.status(), tmp_path / "wrk.lua"
    wrk.write_text(WRK)
    target = f"http://127.0.0.1:{service.data[1]}"
    loaded = [program("wrk"), "-t1", "-c40", "-d600s", "-s", str(wrk), target + DELTA]
    clients = Steady(service.data, BODIES, lazy=50, new=2, slow=200, large=BIG, rate=200_000)
    control = Steady(service.admin, {"/healthz": b"ok\n"}, lazy=10, new=1)
    tools = Tools(target + BIG, tmp_path, LARGE)
    with control, clients, tools, subprocess.Popen(loaded, stdout=subprocess.PIPE, text=True) as load:
        until(lambda: clients.began >= 200, "all downloads have begun")
        counted, descriptors = [service.metric(REQUESTS)], len(open_files(service.process.pid))
        for number in range(20):
            count = (2, 4, 1)[(number + 1) % 3]
            if upgrades:
                (service.folder / "gup.toml").write_text(toml(with_workers(service, count)))
                service.signal(signal.SIGUSR2)
            else:
                service.reload(**with_workers(service, count))
            before = service.wait_replaced(before, count)
            counted.append(service.metric(REQUESTS))
        load.send_signal(signal.SIGINT)  # it ends what it has begun, and tells
        told = load.communicate()[0]
    found = re.search(r"gup (\d+) answers, (\d+) wrong, errors (\d+) (\d+) (\d+) (\d+)", told)
    print(clients.done, control.done, tools.done, found and found[0])  # noqa: T201 - the figures
    assert (clients.failures, control.failures, tools.failures) == ([], [], [])
    assert min(tools.done.values()) > 5, tools.done
    assert found, told
    assert int(found[1]) > 1000
    assert found.groups()[1:] == ("0", "0", "0", "0", "0"), "wrong answers; connect, read, write, time-out"
    assert min(clients.done[kind] for kind in ("lazy", "new", "slow")) >= 200, clients.done
    assert clients.closed == control.closed == 0
    assert counted == sorted(counted), "a counter went back"
    until(lambda: len(service.status()["workers"]) == count, "the earlier processes have ended", 60)
    assert len(open_files(service.process.pid)) <= descriptors + 4, "two sockets, two workers more"
    assert service.metric("gup_worker_restarts_total") == 0
    assert service.metric("gup_client_connections") == 0
    assert [len(upstream.requests(path)) for path in (BIG, DELTA)] == [1, 1], "the index is revalidated"
    assert service.stop() == 0


WRK = """
local threads = {}
function setup(thread) table.insert(threads, thread) end
function init() wrong = 0 end
function response(status, headers, body)
  if status ~= 200 or #body ~= 60000 then wrong = wrong + 1 end
end
function done(summary)
  local wrong, errors = 0, summary.errors
  for _, thread in ipairs(threads) do wrong = wrong + thread:get("wrong") end
  print(string.format("gup %d answers, %d wrong, errors %d %d %d %d", summary.requests, wrong,
    errors.connect, errors.read, errors.write, errors.timeout))
end
"""


class Tools:
    """curl and aria2c, which download again and again, without a retry of theirs."""

    def __init__(self, url, folder, body):
        self._stopping, self.failures, self.done = False, [], {"curl": 0, "aria2c": 0}
        into = ["-d", str(folder), "-o", "aria2c"]
        commands = {
            "curl": [program("curl"), "-sSfg", "--limit-rate", "2M", "-o", str(folder / "curl"), url],
            "aria2c": [program("aria2c"), "-q", "-x4", "-s4", "-k1M", "--max-tries=1", *into, url],
        }
        self._threads = [
            threading.Thread(target=self._run, args=(name, command, folder / name, body))
            for name, command in commands.items()
        ]

    def _run(self, name, command, file, body):
        while not self._stopping:
            file.unlink(missing_ok=True)
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode or file.read_bytes() != body:
                self.failures.append(f"{name}: status {done.returncode}, {done.stderr[-200:]!r}")
            else:
                self.done[name] += 1

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stopping = True
        for thread in self._threads:
            thread.join()
