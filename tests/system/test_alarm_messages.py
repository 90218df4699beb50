"""Alarms that are sent: a real receiver that checks signatures, a real command, and restarts in between."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from harness.alarm_receiver import AlarmReceiver
from harness.content import DELTA
from harness.processes import command_line, environment, free_port, quiet_clock, until
from harness.service import REPOSITORY, Gup, toml
from harness.upstreams import Authority, Elsewhere, RawUpstream, ScriptedUpstream, WebProxy, ok

SECRET = "whsec_dGhlIGtleSBvZiBhIHRlc3QsIG9mIG5vIG90aGVyIHVzZS4="
OLD = "whsec_dGhlIGtleSBiZWZvcmUgdGhhdCBvbmUsIHN0aWxsIGtub3duLi4="
MESSAGES = "gup_alarm_messages_total"
BROKEN = {"nonsense": {"key": 1}}
"""Settings that can't be used: the alarm `reload-failed` begins and ends at once."""


@pytest.fixture
def receiver(tmp_path):
    with AlarmReceiver(tmp_path / "receiver", SECRET) as one:
        yield one


def to(receiver: AlarmReceiver, **more) -> dict:
    return {"alarms": {"webhook": receiver.url, "webhook_secret": SECRET, **more}}


def kill_controller(gup: Gup) -> None:
    def pids() -> set[int]:
        return {pid for pid in gup.children() if "gup.process.controller" in command_line(pid)}

    (before,) = pids()
    os.kill(before, signal.SIGKILL)
    until(lambda: pids() - {before} and gup.status()["ready"], "a new controller")


def gup_command(*words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "gup", *words]
    env = environment(uuid.uuid4().hex, {"PYTHONPATH": str(REPOSITORY)})
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def send_test(gup: Gup, *words: str) -> tuple[int, str]:
    token = gup.cache_dir / "run" / "admin-token"
    return gup_command("alarms", "test", "--admin", gup.admin_url, "--token-file", str(token), *words)


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.long
def test_an_alarm_is_told_once_when_it_begins_and_once_when_it_ends(serve, receiver):
    nowhere = Elsewhere(free_port())
    each = {"health_interval": "1s", "connect_timeout": "1s"}
    gup, _ = serve(before=nowhere, each=each, site={"name": "branch-7"}, **to(receiver))
    (raised,) = receiver.wait("raised", alarm="no-upstream")
    (shown,) = gup.alarms("no-upstream")
    assert raised["id"] == shown["id"]
    assert raised["message"] == f"{shown['id']}-raised"
    assert (raised["severity"], raised["site"], raised["subject"]) == ("critical", "branch-7", "")
    assert raised["text"].startswith("no upstream answers (u0)")
    assert "request its URL with curl" in raised["what_to_do"]
    (request,) = receiver.seen
    assert request["body"]["type"] == "alarm.raised"
    assert request["body"]["timestamp"] == raised["since"]
    assert request["headers"]["content-type"] == "application/json"
    with ScriptedUpstream(port=nowhere.port):
        (cleared,) = receiver.wait("cleared", alarm="no-upstream")
    assert (cleared["id"], cleared["since"]) == (raised["id"], raised["since"])
    gup.wait_metric(2, MESSAGES, to="webhook", outcome="accepted")
    assert gup.metric("gup_alarm_messages_waiting", to="webhook") == 0
    assert len(receiver.got()) == 2


@pytest.mark.long
def test_what_waits_survives_the_controller_and_the_service_and_comes_in_order(serve, tmp_path):
    receiver = AlarmReceiver(tmp_path / "receiver", SECRET)
    gup, _ = serve({DELTA: b"delta"}, **to(receiver))
    gup.reload(**BROKEN)
    (first,) = until(lambda: gup.alarms("reload-failed"), "the alarm")
    gup.wait_log("alarm messages are not accepted")
    kill_controller(gup)
    assert until(lambda: gup.alarms("reload-failed"), "the alarm is back")[0]["id"] == first["id"]
    gup.reload(**to(receiver))
    until(lambda: not gup.alarms("reload-failed"), "the alarm ends")
    gup.reload(**BROKEN)
    (second,) = until(lambda: gup.alarms("reload-failed"), "the next alarm")
    gup.reload(**to(receiver))
    until(lambda: not gup.alarms("reload-failed"), "it ends too")
    gup.wait_metric(4, "gup_alarm_messages_waiting", to="webhook")
    assert gup.serves(DELTA, b"delta")
    assert gup.stop() == 0
    kept = gup.cache_dir / "run" / "alarms.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert SECRET.removeprefix("whsec_") not in kept.read_text()
    with receiver:
        gup.start()
        told = receiver.wait(count=4)
        gup.wait_metric(0, "gup_alarm_messages_waiting", to="webhook")
        gup.stop()
        gup.start()
        gup.reload(**BROKEN)
        last = receiver.wait("raised", count=3)[-1]
    assert [(one["id"], one["state"]) for one in told] == [
        (alarm["id"], state) for alarm in (first, second) for state in ("raised", "cleared")
    ]
    assert last["id"] not in {one["id"] for one in told}
    assert len(receiver.got()) == 5


@pytest.mark.parametrize(
    "say",
    [
        "500",
        "302 {url}",
        *(pytest.param(say, marks=pytest.mark.long) for say in ("429 1", "404", "503 garbage")),
    ],
)
def test_what_is_not_accepted_is_sent_again_and_harms_nothing(serve, receiver, tmp_path, say):
    with AlarmReceiver(tmp_path / "other", SECRET) as other:
        receiver.say(say.format(url=other.url))
        gup, _ = serve({DELTA: b"delta"}, **to(receiver))
        gup.reload(**BROKEN)
        until(lambda: len(receiver.seen) >= 2, "it was tried again", 60)
        gup.serves(DELTA, b"delta")
        receiver.say("200")
        (raised,) = receiver.wait("raised")
        assert other.seen == []
    gup.wait_metric(1, MESSAGES, to="webhook", outcome="accepted")
    assert gup.metric(MESSAGES, to="webhook", outcome="failed") == len(receiver.seen) - 1
    assert {one["headers"]["webhook-id"] for one in receiver.seen} == {raised["message"]}
    gup.wait_log("alarm messages are accepted again")
    assert gup.log.count("alarm messages are not accepted") == 1
    assert f"127.0.0.1:{receiver.port} answered {say[:3]}" in gup.log
    assert SECRET not in gup.log


def test_a_receiver_that_is_gone_is_left_alone_until_a_reload(serve, receiver):
    receiver.say("410")
    gup, _ = serve({DELTA: b"delta"}, **to(receiver))
    gup.reload(**BROKEN)
    gup.wait_log("answered 410: no more messages are sent until a reload or restart")
    receiver.say("200")
    gup.serves(DELTA, b"delta")
    assert gup.metric("gup_alarm_messages_waiting", to="webhook") == 1
    assert len(receiver.seen) == 1
    gup.reload(**to(receiver))
    assert [one["state"] for one in receiver.wait(count=2)] == ["raised", "cleared"]


def test_a_slow_receiver_costs_its_timeout_and_nobody_else_anything(serve, receiver, tmp_path):
    receiver.say("hang")
    command = [program(tmp_path / "told", f"cat >> {tmp_path}/told.txt")]
    gup, _ = serve({DELTA: b"delta"}, **to(receiver, webhook_timeout="1s", command=command))
    gup.reload(**BROKEN)
    gup.wait_metric(1, MESSAGES, to="command", outcome="accepted")
    gup.wait_log("did not answer in time (alarms.webhook_timeout)")
    gup.serves(DELTA, b"delta")
    receiver.say("200")
    receiver.wait("raised")
    assert json.loads((tmp_path / "told.txt").read_text())["data"]["alarm"] == "reload-failed"


def test_the_secret_is_shown_nowhere_and_a_second_one_signs_too(serve, receiver):
    hidden = {"GUP_ALARMS__WEBHOOK_SECRET": f"{OLD} {SECRET}"}
    url = f"{receiver.url}?token=SESAME"
    gup, _ = serve({}, alarms={"webhook": url}, env=hidden)
    assert send_test(gup) == (0, "alarms.webhook: accepted\n")
    assert receiver.seen[0]["signed"]
    assert len(receiver.seen[0]["headers"]["webhook-signature"].split()) == 2
    assert receiver.seen[0]["path"] == "/hook?token=SESAME"
    told = json.dumps(gup.api("/api/v1/config")[1]["alarms"])
    env = environment(uuid.uuid4().hex, {**hidden, "PYTHONPATH": str(REPOSITORY)})
    command = [sys.executable, "-m", "gup", "config", "show", str(gup.folder / "gup.toml")]
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    receiver.stop()
    status, failed = send_test(gup)
    assert status == 1
    assert "alarms.webhook: NOT ACCEPTED: " in failed
    gup.stop()
    for text in (told, shown, failed, gup.log):
        assert not any(secret in text for secret in ("SESAME", OLD[9:], SECRET[9:]))
    assert f'webhook = "{receiver.url}?***"' in shown
    assert 'webhook_secret = "***"' in shown


def test_a_secret_s_file_is_read_again_on_reload(serve, receiver, tmp_path):
    file = tmp_path / "secret"
    file.write_text(f"{OLD}\n")
    settings = {"alarms": {"webhook": receiver.url, "webhook_secret_file": str(file)}}
    gup, _ = serve({}, **settings)
    assert send_test(gup)[0] == 0
    file.write_text(f"{SECRET}\n")
    gup.reload(**settings)
    assert send_test(gup)[0] == 0
    assert [one["signed"] for one in receiver.seen] == [False, True]
    file.write_text("whsec_short")
    gup.reload(**settings)
    until(lambda: gup.alarms("reload-failed"), "the alarm")
    assert send_test(gup)[0] == 0  # by the secret before


def test_messages_go_through_the_proxy_that_is_set(serve, receiver):
    with WebProxy("gup:SESAME") as proxy:
        gup, _ = serve({}, **to(receiver, webhook_proxy=proxy.url))
        assert send_test(gup) == (0, "alarms.webhook: accepted\n")
        assert [request.method for request in proxy.seen] == ["POST"]
        gup.reload(**to(receiver, webhook_proxy=proxy.url.replace("SESAME", "WRONG")))
        status, said = send_test(gup)
    assert status == 1
    assert "alarms.webhook_proxy" in said
    assert "WRONG" not in said + gup.log


def test_a_receiver_with_tls_must_have_a_certificate_that_is_trusted(serve, tmp_path):
    authority = Authority(tmp_path / "ca")
    with RawUpstream(lambda request: request.send(ok(b"")), authority.context()) as hook:
        there = {"webhook": hook.url, "webhook_secret": SECRET}
        gup, _ = serve({}, alarms=there)
        status, said = send_test(gup)
        assert status == 1
        assert "certificate" in said
        gup.reload(alarms={**there, "webhook_ca_file": str(authority.ca)})
        assert send_test(gup) == (0, "alarms.webhook: accepted\n")


def test_a_command_gets_the_message_and_leaves_nothing_behind(serve, tmp_path):
    text = f"""
env > {tmp_path}/env
ulimit -c > /dev/null
cat > {tmp_path}/message
sleep 1000 &
echo told: $ALARM_STATE of $ALARM_NAME, {"x" * 60} "$1"
"""
    command = [program(tmp_path / "tell", text), "two words; $(not run)"]
    gup, _ = serve({}, alarms={"command": command}, env={"GUP_ALARMS__WEBHOOK_SECRET": SECRET})
    gup.reload(**BROKEN)
    gup.wait_log(f"alarms.command wrote: told: raised of reload-failed, {'x' * 60} two words; $(not run)")
    message = json.loads((tmp_path / "message").read_text())["data"]
    variables = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert {name for name in variables if name.startswith("GUP_")} == set()
    assert (variables["ALARM_ID"], variables["ALARM_SEVERITY"]) == (message["id"], "warning")
    assert variables["ALARM_TEXT"] == message["text"]
    assert send_test(gup, "--json")[0] == 0
    family = psutil.Process(gup.process.pid).children(recursive=True)
    assert not [one for one in family if one.status() == psutil.STATUS_ZOMBIE]
    assert not [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "1000"]]


def test_a_daemon_that_a_command_starts_goes_on_and_holds_nothing_up(serve, tmp_path):
    pid = tmp_path / "pid"
    text = f"setsid sh -c 'echo $$ > {pid}; exec sleep 1000' &\nuntil test -s {pid}; do :; done"
    tell = program(tmp_path / "tell", text)
    gup, _ = serve({}, alarms={"command": [tell], "command_timeout": "20s"})
    began = time.monotonic()
    assert send_test(gup) == (0, "alarms.command: accepted\n")
    assert time.monotonic() - began < 15, "it waited for the daemon's output"
    daemon = psutil.Process(int(pid.read_text()))
    assert daemon.cmdline() == ["sleep", "1000"]
    assert gup.stop() == 0
    daemon.kill()


def test_a_command_that_fails_or_hangs_is_run_again(serve, tmp_path):
    say = tmp_path / "say"
    say.write_text("yes; exit 0")
    text = f"date +%s.%N >> {tmp_path}/runs\n. {say}"
    say.write_text("echo mail is down >&2; exit 75")
    settings = {"alarms": {"command": [program(tmp_path / "tell", text)], "command_timeout": "1s"}}
    gup, _ = serve({DELTA: b"delta"}, **settings)
    gup.reload(**BROKEN)
    gup.wait_log("tell ended with status 75: mail is down")
    say.write_text("yes; sleep 1000")
    assert "did not end within 1 s (alarms.command_timeout) and was killed: y" in send_test(gup)[1]
    gup.serves(DELTA, b"delta")
    say.write_text("yes | head -c 50000000")
    gup.wait_metric(1, MESSAGES, 60, to="command", outcome="accepted")
    assert len(gup.log) < 100_000
    assert gup.log.count("alarm messages are not accepted") == 1
    (tmp_path / "tell").unlink()
    assert "can't be run: No such file or directory" in send_test(gup)[1]


def test_a_service_that_stops_ends_a_command_that_runs(serve, tmp_path):
    text = f"echo $$ > {tmp_path}/pid; sleep 1000"
    gup, _ = serve({}, alarms={"command": [program(tmp_path / "tell", text)], "command_timeout": "1h"})
    gup.reload(**BROKEN)
    pid = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "it runs"))
    began = quiet_clock()
    assert gup.stop() == 0
    assert quiet_clock() - began < 15
    assert not psutil.pid_exists(pid)


def test_a_receiver_that_a_reload_removes_is_forgotten_and_a_new_one_hears_what_stands(serve, receiver):
    gup, _ = serve({}, before=Elsewhere(free_port()), each={"health_interval": "1s", "connect_timeout": "1s"})
    until(lambda: gup.alarms("no-upstream"), "the alarm")
    assert send_test(gup) == (
        1,
        f"gup: {gup.admin_url}: there is no receiver: set alarms.webhook or alarms.command\n",
    )
    upstream = {"upstream": [{"url": f"http://127.0.0.1:{free_port()}", "name": "u0"}]}
    gup.reload(**upstream, **to(receiver))
    receiver.wait("raised", alarm="no-upstream")
    gup.reload(**upstream)
    until(lambda: gup.metrics().series("gup_alarm_messages_waiting") == {}, "nothing waits for anybody")


@pytest.mark.parametrize(
    ("alarms", "sentence"),
    [
        ({"webhook": "http://a/b"}, "alarms.webhook_secret: missing"),
        (
            {"webhook": "ftp://a/b", "webhook_secret": SECRET},
            "alarms.webhook: the value (not shown) is not right",
        ),
        (
            {"webhook": "http://a/b", "webhook_secret": "whsec_c2hvcnQ="},
            "must be whsec_ and 24 to 64 random bytes",
        ),
        (
            {"webhook": "http://a/b", "webhook_secret_file": "/no/file"},
            "alarms.webhook_secret_file: '/no/file'",
        ),
        (
            {"webhook": "http://a/b", "webhook_secret": SECRET, "webhook_ca_file": "/no/ca"},
            "alarms.webhook_ca_file:",
        ),
        ({"command": ["mail", "x"]}, "must begin with the absolute path of a program"),
        ({"command": ["/etc/passwd"]}, "alarms.command: '/etc/passwd' is not a program that can be run"),
    ],
)
def test_a_mistake_is_told_before_the_start(tmp_path, alarms, sentence):
    file = tmp_path / "gup.toml"
    file.write_text(toml({"cache": {"directory": str(tmp_path / "cache")}, "alarms": alarms}))
    status, said = gup_command("config", "check", str(file))
    assert status == 2
    assert sentence in said
    assert "c2hvcnQ" not in said
