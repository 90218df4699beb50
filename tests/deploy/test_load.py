"""The load tests: a small run of every scenario, what makes a run fail, several workers, the report."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness.processes import environment, free_port
from harness.service import Gup
from harness.upstreams import Answer, ScriptedUpstream

from gup_load.figures import RUN_JSON, Counters, Durations, File, Limits, Run, judge
from gup_load.report import PAGE, charts_of, forget_reports, write_report
from gup_load.sources import NotThereError, Sources

ROOT = Path(__file__).parents[2]
LOCUSTFILE = ROOT / "deploy" / "load" / "locustfile.py"
STAND_IN = ROOT / "tests" / "demo" / "stand_in.py"
SCENARIOS = ("Morning", "PatchDay", "Revision", "Roaming", "Storm")
MANAGER = re.compile(r"simulated manager: serving on (\S+)")
READY = re.compile(r"gup: serving on ([^\s,]+), control plane on ([^\s,]+)")


def start(*arguments, **how):
    """A process that a test ends; nobody's settings of locust are read."""
    folder = how.pop("folder")
    env = environment(
        "load", {"HOME": str(folder), "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "deploy/load")))}
    )
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=env, cwd=folder, text=True, stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, **how,
    )  # fmt: skip


@contextlib.contextmanager
def running(ready, *arguments, folder):
    """A server, until the end of the block; gives what `ready` finds in its standard error."""
    with start(*arguments, folder=folder) as process:
        try:
            found = next(found for line in process.stderr if (found := ready.search(line)))
            yield found.groups()
        finally:
            process.terminate()
            process.stderr.read()


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    serve = ["-m", "gup", "simulate", "manager", "--listen", "127.0.0.1:0", "--wan-rate", "0"]
    serve += ["--publish-interval", "0", "--products", "9", "--full-size", "200kB"]
    with running(MANAGER, *serve, folder=tmp_path_factory.mktemp("manager")) as (url,):
        yield url


@pytest.fixture
def load(tmp_path, manager):
    """Run scenarios against `host` to their end: the exit status, what was said, and the run's figures."""

    def run(host, scenarios, users, *options):
        command = [
            "-m",
            "locust",
            "--locustfile",
            LOCUSTFILE,
            "--headless",
            "--only-summary",
            "--run-time",
            "60s",
        ]
        command += ["--host", host, "--manager", manager, "--report-dir", tmp_path / "report"]
        command += ["--users", users, "--spawn-rate", users, *options, *scenarios]
        with start(*command, folder=tmp_path) as process:
            said = process.stderr.read()
        kept = list((tmp_path / "report").glob("*.run.json"))
        assert len(kept) == 1, said
        return process.returncode, said, RUN_JSON.validate_json(kept[0].read_bytes())

    return run


def counted(run):
    return {row.name: row.count for row in run.responses}


# --- real runs


def test_a_small_run_of_all_scenarios(load, manager, tmp_path):
    with Gup(tmp_path / "cache", [manager]) as gup:
        status, said, run = load(gup.url, SCENARIOS, 20, "--admin", gup.admin_url, "--max-first-byte", "20s")
        clients = gup.status()["clients"]
    assert status == 0, said
    assert (run.finished, run.clients, run.errors, run.wrong_bodies) == (20, 20, 0, 0)
    assert run.fetches_per_file == 1.0
    assert {file.fetches for file in run.files} == {0, 1}
    responses = counted(run)
    assert run.requests == sum(responses.values())
    assert responses["full 206"] >= 8  # four roaming clients, two files each, broken off once or more
    assert responses["index 304"] >= 12  # a second look of the morning's, the new revision's
    assert min(responses["delta 200"], responses["index 200"]) > 0
    patches = [file for file in run.files if file.bodies and file.path.endswith("full.zip")]
    assert sum(file.bodies for file in patches) >= 4 + 4 + 8
    assert run.counters.sent_bytes >= run.received_bytes > run.counters.received_bytes > 0
    assert run.counters.filled_bytes == sum(file.length for file in run.files if file.fetches)
    assert clients
    assert all(verdict.sentence in said for verdict in run.verdicts)


@pytest.mark.parametrize(
    ("mode", "options", "missed"),
    [
        (
            "corrupt",
            [],
            ["clients got all", "packages were compared", "requests failed", "bodies were wrong"],
        ),
        ("forbid", [], ["clients got all", "packages were compared", "requests failed"]),
        ("twice", [], ["upstream fetches per file (2 of /content/"]),
        ("right", ["--max-first-byte", "0s"], ["of responses began within"]),
    ],
)
def test_what_makes_a_run_fail(load, manager, tmp_path, mode, options, missed):
    with running(READY, STAND_IN, mode, manager, folder=tmp_path) as (host, _):
        status, said, run = load(host, ["Revision"], 4, "--max-first-byte", "20s", *options)
    assert status == (1 if missed else 0), said
    sentences = [line.removeprefix("MISSED ") for line in said.splitlines() if line.startswith("MISSED ")]
    assert len(sentences) == len(missed)
    assert all(words in sentence for words, sentence in zip(missed, sentences, strict=True))
    assert run.wrong_bodies == (4 if mode == "corrupt" else 0)
    if mode == "corrupt":
        assert "4 times BODY" in said
        assert "other bytes than published" in said


@pytest.mark.long
def test_several_workers_are_one_run(load, manager, tmp_path):
    port = free_port()
    work = ["-m", "locust", "--locustfile", LOCUSTFILE, "--worker", "--master-port", port]
    with start(*work, folder=tmp_path) as one, start(*work, folder=tmp_path) as two:
        try:
            status, said, run = load(
                manager, ["Revision", "Storm"], 12, "--master", "--master-bind-host", "127.0.0.1",
                "--master-bind-port", port, "--expect-workers", 2, "--max-fetches-per-file", 100,
            )  # fmt: skip
        finally:
            endings = [worker.communicate(timeout=20)[1] for worker in (one, two)]
    assert status == 0, (said, *endings)
    assert (run.finished, run.clients) == (12, 12)
    assert [one.returncode, two.returncode] == [0, 0]
    bodies = sum(file.bodies for file in run.files)
    assert bodies == sum(file.fetches for file in run.files) == 12  # nothing caches here: each is a fetch


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--host is missing: it names gup, as in --host http://127.0.0.1:2967"),
        (["--max-error-ratio", "2"], "'2' is not right; it must be a number from 0 to 1"),
    ],
)
def test_a_mistake_is_told_in_one_sentence_before_anything_starts(tmp_path, options, words):
    with start(
        "-m", "locust", "--locustfile", LOCUSTFILE, "--headless", *options, folder=tmp_path
    ) as process:
        said = process.stderr.read()
    assert process.returncode == 2
    assert words in said
    assert "Traceback" not in said


def test_what_a_test_needs_and_can_not_have_is_named_with_the_remedy(tmp_path):
    nobody = f"http://127.0.0.1:{free_port()}"
    other = tmp_path / "other.json"
    other.write_text("{}")
    for sources, words in (
        (Sources("", "", ""), "with --manager URL, or a catalogue with --catalogue FILE"),
        (
            Sources(nobody, "", ""),
            f"no catalogue at {nobody}/simulation/catalog: .*refused.*; --manager must name",
        ),
        (
            Sources("", str(other), ""),
            f"no catalogue in {other}: not a catalogue: serial: Field required; docs/load.md",
        ),
        (Sources("", str(tmp_path / "none"), ""), "No such file"),
    ):
        with pytest.raises(NotThereError, match=words):
            sources.published()
    with pytest.raises(NotThereError, match=f"no metrics at {nobody}/metrics: .*; --admin must"):
        Sources("", "", nobody).counters()
    assert Sources("", "", "").counters() is Sources("", "", "").fetches() is None


def test_a_token_is_sent_where_one_is_named(tmp_path, monkeypatch):
    upstream = ScriptedUpstream()
    upstream.answer("/metrics", Answer(METRICS.encode()))
    with upstream:
        (tmp_path / "token").write_text("secret\n")
        monkeypatch.setenv("GUP_TOKEN_FILE", str(tmp_path / "token"))
        counters = Sources("", "", upstream.url).counters()
    assert upstream.requests("/metrics")[0].header("authorization") == "Bearer secret"
    assert counters == Counters(sent_bytes=70, received_bytes=11, filled_bytes=8)
    assert counters.since(Counters(20, 1, 0)) == Counters(50, 10, 8)
    assert counters.saved_bytes == 59


METRICS = """\
# TYPE gup_client_sent_bytes counter
gup_client_sent_bytes_total{source="cache"} 60
gup_client_sent_bytes_total{source="fill"} 10
# TYPE gup_upstream_received_bytes counter
gup_upstream_received_bytes_total{upstream="a",purpose="fill"} 5
gup_upstream_received_bytes_total{upstream="b",purpose="fill"} 3
gup_upstream_received_bytes_total{upstream="a",purpose="index"} 3
"""


COMMAND = ["-m", "gup_load", "--clients", 2, "--full-size", "50kB", "--max-first-byte", "20s", "--scenario"]


@pytest.mark.long
def test_the_command_starts_and_ends_everything(tmp_path):
    with start(*COMMAND, "Roaming", folder=tmp_path) as process:
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert "load test: Roaming passed" in said
    folder = tmp_path / "build" / "load"
    page = (folder / PAGE).read_text()
    assert 'id="Roaming"' in page
    assert f'href="{charts_of(folder, "Roaming").name}"' in page
    assert charts_of(folder, "Roaming").exists()


@pytest.mark.long
def test_the_command_is_interrupted(tmp_path):
    with start(*COMMAND, "Morning", folder=tmp_path) as process:
        next(line for line in process.stderr if "Morning: 2 clients" in line)
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert process.returncode == 130


# --- limits and report


NOBODY = Durations("all", 0, 0.0, 0.0, 0.0, 0.0)
ONE = File("/content/{AAAAAAAA-1}/1/full.zip", 1000, 3, 1)
RUN = Run(
    scenario="Storm", host="http://127.0.0.1:2967", started_at=1_700_000_000.0, seconds=2.0,
    clients=3, finished=3, requests=4, errors=0, wrong_bodies=0, received_bytes=3000,
    first_byte_seconds=0.5, first_byte=NOBODY, up_to_date=NOBODY, files=(ONE,), counters=None, complaints=(),
    responses=(Durations("full 200", 4, 0.0004, 0.25, 0.5, 1.5),),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "limits", "missed"),
    [
        ({}, {}, ""),
        ({"finished": 2}, {}, "2 of 3 clients got all that they wanted; limit: all"),
        ({"files": (replace(ONE, bodies=0),)}, {}, "0 packages were compared; limit: at least one"),
        ({"errors": 1}, {}, "1 of 4 requests failed (25.000%); limit: 0.000%"),
        ({"errors": 1}, {"error_ratio": 0.25}, ""),
        ({"wrong_bodies": 1}, {}, "1 bodies were wrong; limit: 0"),
        ({"wrong_bodies": 1}, {"wrong_bodies": 1}, ""),
        (
            {"files": (ONE, replace(ONE, path="/content/b", fetches=2))},
            {},
            "1.50 upstream fetches per file (2 of /content/b); limit: 1.00",
        ),
        ({"files": (replace(ONE, fetches=0),)}, {}, ""),  # it was stored before
        ({"files": (replace(ONE, fetches=None),)}, {}, ""),  # nobody knows
        (
            {"files": (replace(ONE, fetches=None),), "counters": Counters(3000, 2000, 1100)},
            {},
            "1.10 upstream fetches per file; limit: 1.00",
        ),
        ({"files": (replace(ONE, fetches=None),), "counters": Counters(3000, 2000, 1000)}, {}, ""),
        ({"first_byte_seconds": 5.1}, {}, "99% of responses began within 5.1 s; limit: 5 s"),
    ],
)
def test_limits(changes, limits, missed):
    verdicts = list(judge(replace(RUN, **changes), Limits(**limits)))
    assert [verdict.sentence for verdict in verdicts if verdict.missed] == ([missed] if missed else [])
    assert len(verdicts) == 6


def test_the_report_has_all_runs_of_a_folder_and_only_they_are_removed(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    saved = replace(RUN, counters=Counters(3000, 1000, 1000)).judged(Limits())
    failed = replace(
        RUN,
        scenario="Morning",
        started_at=1.0,
        wrong_bodies=1,
        complaints=((1, "BODY <x>: WrongBodyError('y')"),),
    ).judged(Limits())
    write_report(tmp_path, saved)
    write_report(tmp_path, saved)
    page = write_report(tmp_path, failed).read_text()
    assert page.index('id="Morning"') < page.index('id="Storm"')
    assert "66.7 %" in page
    assert "missed: 1 bodies were wrong; limit: 0" in page
    assert "BODY &lt;x&gt;" in page
    assert "{AAAAAAAA…}/1/full.zip" in page
    assert "&lt; 1 ms" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine.json", "morning.run.json", PAGE, "storm.run.json",
    ]  # fmt: skip
    forget_reports(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_gevent_has_not_reached_the_tests():
    assert "gevent" not in sys.modules
    assert "locust" not in sys.modules
