import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gup.demo import run
from gup.demo.run import INTERRUPTED, Plan, demo, timeline
from gup.demo.screen import FETCHED_TWICE, FIGURES_DISAGREE, NOT_STARTED, RIGHT, WRONG_BYTE

STAND_IN = str(Path(__file__).with_name("stand_in.py"))
PLAN = Plan(clients=10, seconds=2.0, wan_rate_bytes_per_second=0, workers=1, keep=False, seed=1)


def play(mode, *, json_output=False):
    def stand_in(_plan, url, _directory):
        return [sys.executable, STAND_IN, mode, url]

    return demo(PLAN, json_output=json_output, command=stand_in)


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(run.tempfile, "tempdir", str(tmp_path))
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before
    assert list(tmp_path.iterdir()) == []


def test_a_right_run(capsys):
    assert play("right", json_output=True) == RIGHT
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == 0
    assert (document["fetches_per_file_min"], document["fetches_per_file_max"]) == (1, 1)
    assert document["own_figures_agree"] is True
    assert document["own"]["upstream_received_bytes"] == document["wan_bytes"]
    assert document["saved_bytes"] == document["received_bytes"] - document["wan_bytes"]
    assert document["downloads"]["delta"] > 0
    assert document["wrong"] == document["failed"] == document["files_fetched_twice"] == 0
    assert document["median_time_to_first_byte_seconds"] <= document["p99_time_to_first_byte_seconds"]


@pytest.mark.parametrize(
    ("mode", "status", "words"),
    [
        ("corrupt", WRONG_BYTE, "other bytes than published"),
        ("twice", FETCHED_TWICE, "max 2 of"),
        pytest.param("boast", FIGURES_DISAGREE, "THEY DISAGREE", marks=pytest.mark.long),
    ],
)
def test_what_is_wrong_is_told_in_plain_lines_and_in_the_status(mode, status, words, capsys, monkeypatch):
    monkeypatch.setattr("gup.demo.run._SETTLE_SECONDS", 0.5)
    assert play(mode) == status
    out = capsys.readouterr().out
    assert words in re.sub(r"\s*│\n│\s+│\s*", " ", out)
    assert "the herd" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("refuse", "no upstream is good enough"),
        ("crash", "not ready for this"),
        ("die", "this is the end"),
    ],
)
def test_a_gup_that_does_not_stay_up_is_told(mode, words, capsys):
    assert play(mode) == NOT_STARTED
    err = capsys.readouterr().err
    assert "gup serve" in err
    assert words in err


def test_a_gup_that_does_not_start_or_says_nothing_is_given_up(capsys, monkeypatch):
    assert demo(PLAN, json_output=False, command=lambda *_: ["/nowhere/gup"]) == NOT_STARTED
    assert "can't be started" in capsys.readouterr().err
    monkeypatch.setattr(run, "_READY_SECONDS", 0.5)
    silent = [sys.executable, "-c", "import signal; signal.pause()"]
    assert demo(PLAN, json_output=False, command=lambda *_: silent) == NOT_STARTED
    assert "was not ready after 0.5 s" in capsys.readouterr().err


def test_settings_of_the_caller_do_not_reach_the_children(tmp_path, monkeypatch):
    monkeypatch.setenv("GUP_WAN__RATE", "1kB/s")
    monkeypatch.setenv("GUP_RULES__MODE", "off")
    environment = run.environment(tmp_path)
    assert environment["GUP_WAN__RATE"] == "0"
    assert "GUP_RULES__MODE" not in environment
    assert environment["PATH"] == os.environ["PATH"]


def test_the_real_commands_name_the_real_thing(tmp_path):
    command = run.gup_command(PLAN, "http://127.0.0.1:1", tmp_path)
    assert command[:4] == [sys.executable, "-m", "gup", "serve"]
    assert "http://127.0.0.1:1" in command


PROGRAM = """
import sys
from gup.demo.run import Plan, demo
keep, seconds, stand_in = sys.argv[1] == "keep", float(sys.argv[2]), sys.argv[3]
plan = Plan(clients=4, seconds=seconds, wan_rate_bytes_per_second=0, workers=1, keep=keep, seed=1)
command = lambda _plan, url, _directory: [sys.executable, stand_in, "right", url]
sys.exit(demo(plan, json_output=False, command=command))
"""


@pytest.mark.parametrize(
    ("number", "keep", "seconds", "wait_for", "status"),
    [
        (signal.SIGINT, "once", "60", "clients start", INTERRUPTED),
        (signal.SIGTERM, "keep", "1", "runs until Ctrl-C", RIGHT),
        pytest.param(signal.SIGHUP, "keep", "1", "runs until", RIGHT, marks=pytest.mark.long),
    ],
)
def test_a_signal_ends_everything_in_order(number, keep, seconds, wait_for, status, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM, keep, seconds, STAND_IN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as process:
        try:
            if keep == "keep":
                assert process.stdout.readline().startswith("page http://127.0.0.1:"), "before the show"
            assert any(wait_for in line for line in process.stdout)
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(number)
            assert process.wait(20) == status
            assert process.stderr.read() == ""
        finally:
            process.kill()
    assert len(children) == 1
    assert not any(child.is_running() for child in children)


def test_the_timeline_fits_the_time_and_has_one_herd():
    for seconds in (1.0, 30.0, 600.0):
        moments, counts = zip(*timeline(seconds), strict=True)
        assert list(moments) == sorted(moments)
        assert all(0 < moment < seconds for moment in moments)
        assert sorted(counts)[-2:] == [1, run.PRODUCTS]


def test_fulls_shrink_with_the_link():
    assert Plan(200, 30.0, 10_000_000, 2, False, 1).full_bytes == 4_000_000
    assert Plan(200, 30.0, 1_000_000, 2, False, 1).full_bytes == 400_000
    assert Plan(200, 30.0, 0, 2, False, 1).full_bytes == 4_000_000
    assert Plan(200, 1.0, 1_000, 2, False, 1).full_bytes == 50_000
