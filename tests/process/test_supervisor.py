"""The supervisor with real processes, killed, hung, reloaded and stopped."""

import os
import signal
import socket
import time

import pytest
from harness.processes import quiet_clock

from gup.config import Settings
from gup.process.supervisor import differing, reloadable

HITS = 'gup_requests_total{code="200",result="hit"}'
RESTARTS = "gup_worker_restarts_total"


def test_a_killed_worker_is_replaced_within_a_second_and_its_counts_are_kept(service):
    """The best of three counts."""
    running, took = service(), []
    clients = [running.worker(slot) for slot in (0, 1)]
    with running.controller() as controller:
        while not took or (min(took) >= 1 and len(took) < 3):
            for _ in range(50):
                clients[0].ask("who")
            pid = clients[0].ask("who")["pid"]
            os.kill(pid, signal.SIGKILL)
            killed = quiet_clock()
            assert clients[0].answer() is None
            clients[0].close()
            clients[0] = running.worker(0)
            took.append(quiet_clock() - killed)
            own = clients[0].ask("who")
            assert own["pid"] != pid
            assert own["generation"] == len(took) + 1
            totals = controller.ask("totals")
            assert totals[HITS] == running.asked  # each was counted before it was answered
            assert totals[RESTARTS] == len(took)
            rows = controller.until("workers", lambda rows: len(rows) == 2 and all(r["ready"] for r in rows))
            assert [(row["slot"], row["pid"] == pid) for row in rows] == [(0, False), (1, False)]
    assert min(took) < 1
    assert clients[1].ask("who")["generation"] == 1
    for client in clients:
        client.close()
    running.until(rf"worker 0, pid {pid}, was ended by SIGKILL")


def test_a_killed_controller_is_replaced_and_events_outlive_it(service):
    running = service()
    with running.connect() as client:
        with running.controller() as controller:
            os.kill(controller.ask("who")["pid"], signal.SIGKILL)
            assert controller.answer() is None
        assert client.ask("event") == {"sent": 4}
    with running.controller() as controller:
        assert controller.ask("events") == {"got": "used"}
        assert controller.ask("who")["generation"] == 2
        assert controller.ask("totals")[RESTARTS] == 0


def test_a_worker_that_hangs_or_leaves_its_control_channel_is_killed_and_replaced(service):
    running = service({"workers": {"count": 1}}, {"TEST_BEAT_SECONDS": "1", "TEST_CLOSING_SECONDS": "0.2"})
    reasons = {
        "close control": "it closed its control channel but did not exit",
        "hang": "it sent no heartbeat for 1 s",
    }
    for generation, (command, reason) in enumerate(reasons.items(), 2):
        with running.connect() as client:
            pid = client.ask("who")["pid"]
            client.ask(command)
            running.until(rf"worker 0, pid {pid}, is killed: {reason}")
            running.until(rf"worker 0, pid {pid}, was ended by SIGKILL")
        with running.connect() as client:
            assert client.ask("who")["generation"] == generation
    assert running.stop() == 0


def test_a_worker_that_is_never_ready_is_killed_and_started_again(service):
    environment = {"TEST_READY_SECONDS": "0.5", "FAKE_NEVER_READY": "worker"}
    running = service({"workers": {"count": 1}}, environment, ready=False)
    running.until("worker 0, pid .* is killed: it was not ready within 0.5 s")
    running.until("worker 0 started")


def test_sigterm_drains_and_ends_with_0(service):
    running = service()
    client = running.connect()
    client.ask("who")
    running.signal(signal.SIGTERM)
    running.until("draining")
    while True:  # until the workers have closed their ends too
        try:
            running.connect().close()
        except ConnectionRefusedError:
            break
        except ConnectionResetError:
            continue
    assert client.ask("who")["role"] == "worker"  # what is under way goes on
    with running.controller() as controller:
        assert controller.ask("who")["role"] == "controller"
    client.close()
    assert running.end() == 0
    log = "".join(running.lines)
    assert log.index("has drained") < log.index("controller, pid")
    assert "Traceback" not in log


def test_a_second_signal_ends_at_once(service):
    running = service(environment={"FAKE_NEVER_DRAINS": "1"})
    running.signal(signal.SIGINT)
    running.until("draining")
    running.signal(signal.SIGTERM)
    assert running.end() == 0
    assert "came again" in "".join(running.lines)


def test_workers_that_never_drain_are_killed(service):
    listen = {"address": "127.0.0.1", "port": 0, "admin_port": 0, "drain_timeout": 0}
    running = service({"listen": listen}, {"FAKE_NEVER_DRAINS": "1", "TEST_PAST_DRAIN_SECONDS": "0.5"})
    started = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - started > 0.4
    assert "draining took too long" in "".join(running.lines)


def test_a_second_instance_on_the_directory_is_refused_by_name(service):
    first = service()
    second = service(environment={"TEST_LOCK_SECONDS": "0.2"}, ready=False)
    assert second.end() == 1
    said = second.lines[-1]
    assert f"another gup uses the cache directory {first.folder / 'cache'}" in said
    assert str(first.process.pid) in said
    assert len(second.lines) == 2
    with first.connect() as client:
        assert client.ask("who")["generation"] == 1


def test_a_second_instance_says_at_once_for_whom_it_waits_and_serves_when_that_one_has_ended(service):
    first = service()
    second = service(environment={"TEST_LOCK_SECONDS": "20"}, ready=False)
    second.until(rf"another gup uses .* \(pid {first.process.pid}.*: waiting 20 s for it to end")
    assert first.stop() == 0
    second.ready()
    assert second.stop() == 0


def test_what_can_not_be_opened_is_told_in_one_line(service, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        running = service({"listen": {"address": "127.0.0.1", "port": port, "admin_port": 0}}, ready=False)
        assert running.end() == 1
    assert f"can't listen on 127.0.0.1:{port}: Address already in use" in running.lines[0]
    assert len(running.lines) == 1
    running = service({"cache": {"directory": str(tmp_path / "settings.json")}}, ready=False)
    assert running.end() == 1
    assert "the cache directory can't be used" in running.lines[0]


def test_systemd_passes_sockets_for_both_planes_and_children_get_none_of_its_variables(service):
    """What is told to systemd stands in tests/deploy/test_systemd.py, with a real gup."""
    with socket.create_server(("127.0.0.1", 0)) as data, socket.create_server(("127.0.0.1", 0)) as admin:
        running = service(environment={"LISTEN_FDS": "2"}, sockets=[data, admin])
        assert running.data == data.getsockname()
        assert running.admin == admin.getsockname()
        with running.connect() as client, running.controller() as controller:
            assert not {"LISTEN_FDS", "LISTEN_PID"} & set(client.ask("environment"))
            assert controller.ask("who")["role"] == "controller"


def test_a_reload_reaches_every_child_and_what_needs_a_restart_is_said_and_keeps_its_value(service):
    running = service()
    with running.controller() as controller:
        before = controller.ask("page")
        running.write(upstream=[{"url": "http://three:80"}], site={"name": "else"}, wan={"rate": "3MB/s"})
        running.signal(signal.SIGHUP)
        running.until(r"site\.name: takes effect at the next start")
        running.until("upstream: takes effect at the next start")
        settings = controller.until("messages", lambda messages: messages)[0]["settings"]
        assert settings["site"]["name"] != "else"
        assert [row["name"] for row in settings["upstream"]] == ["one:80", "two:80"]
        page = controller.until("page", lambda page: page["policy"] > before["policy"])
        assert page["words"][3] == 1
        for slot in (0, 1):
            with running.worker(slot) as worker:
                messages = worker.until("messages", lambda messages: messages)
                assert [message["settings"]["wan"]["rate"] for message in messages] == [3_000_000]
    with running.worker(0) as worker:
        os.kill(worker.ask("who")["pid"], signal.SIGKILL)
    with running.worker(0) as worker:
        assert worker.ask("settings")["rate"] == 3_000_000
    assert running.stop() == 0


def test_more_workers_than_there_is_room_for_are_refused_and_nothing_changes(service):
    running = service({"workers": {"count": 1}})
    running.write(workers={"count": 900}, wan={"rate": "2MB/s"})
    running.signal(signal.SIGHUP)
    running.until("settings not reloaded: workers.count: 900 are too many to change to at run time")
    with running.controller() as controller:
        assert controller.ask("messages") == []
        assert [row["slot"] for row in controller.ask("workers")] == [0]
    assert running.stop() == 0


def test_a_bad_reload_changes_nothing_but_the_metric(service):
    running = service()
    with running.controller() as controller:
        before = controller.ask("page")
        running.write(wan={"rate": "much"})
        running.signal(signal.SIGHUP)
        running.until("settings not reloaded: bad: ")
        page = controller.until("page", lambda page: page["words"][3] == 0)
        assert page["policy"] == before["policy"]
        assert controller.ask("messages") == []
        running.write(wan={"rate": "1MB/s"})
        assert controller.ask("reload") == {"sent": True}
        messages = controller.until("messages", lambda messages: len(messages) == 2)
        assert messages[0]["settings"]["wan"]["rate"] == 1_000_000
        assert messages[1] == {"problems": [], "changed": ["wan.rate"], "waiting": []}
        assert controller.ask("page")["words"][3] == 1


# --- what a reload can change


def settings(**changes):
    return Settings.model_validate({"upstream": [{"url": "http://a"}]} | changes)


def test_most_settings_take_effect():
    new = settings(
        wan={"rate": "1MB/s"},
        listen={"idle_timeout": "1s"},
        cache={"max_size": "1GB"},
        upstream=[{"url": "https://b", "name": "a", "priority": 3}],
        log={"level": "debug"},
    )
    assert reloadable(settings(), new) == (new, [])


def test_what_differs_is_named_as_people_write_it():
    new = settings(
        wan={"rate": "1MB/s", "schedule": [{"days": ["mon"], "from": "08:00", "to": "09:00", "rate": "0"}]},
        upstream=[{"url": "http://a", "priority": 3}],
        log={"level": "debug"},
    )
    assert differing(settings(), new) == ["upstream", "wan.rate", "wan.schedule", "log.level"]
    assert differing(new, new) == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"listen": {"address": "::"}}, "listen.address"),
        ({"listen": {"port": 1}}, "listen.port"),
        ({"listen": {"admin_address": "::1"}}, "listen.admin_address"),
        ({"listen": {"admin_port": 1}}, "listen.admin_port"),
        ({"listen": {"backlog": 1}}, "listen.backlog"),
        ({"cache": {"directory": "/elsewhere"}}, "cache.directory"),
        ({"site": {"name": "elsewhere"}}, "site.name"),
        ({"upstream": []}, "upstream"),
        ({"upstream": [{"url": "http://a"}, {"url": "http://b"}]}, "upstream"),
    ],
)
def test_what_is_made_once_keeps_its_value(changes, key):
    old = settings()
    found, late = reloadable(old, settings(**changes, wan={"rate": "5MB/s"}))
    assert late == [key]
    assert found == old.model_copy(update={"wan": found.wan})
    assert found.wan.rate == 5_000_000


def test_tokens_and_certificates_change_but_not_whether_they_are_needed():
    token, other = {"admin_token_file": "/token"}, {"admin_token_file": "/other"}
    beyond = settings(listen={"admin_address": "::"} | token)
    new = settings(listen={"admin_address": "::"} | other)
    assert reloadable(beyond, new) == (new, [])
    assert reloadable(beyond, settings()) == (
        beyond,
        ["listen.admin_address", "listen.admin_token_file"],
    )
    tls = {"admin_cert_file": "/cert", "admin_key_file": "/key"}
    assert reloadable(settings(listen=tls), settings()) == (settings(listen=tls), ["listen.admin_cert_file"])
    assert reloadable(settings(), settings(listen=tls)) == (settings(), ["listen.admin_cert_file"])
    renewed = settings(listen=tls | {"admin_cert_file": "/cert2"})
    assert reloadable(settings(listen=tls), renewed) == (renewed, [])
