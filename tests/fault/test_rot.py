"""Stored bytes that change behind gup's back: right bytes or an honest error, and little fetched again."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from harness.clients import Response, assert_problem
from harness.harm import flip, only, scribble
from harness.scripted import Answer, Gate, ScriptedUpstream
from harness.service import Gup
from harness.trees import BIG, content_path, zip_of
from harness.waiting import until

CHUNK = 1 << 20
OVERLAP = 64 * 1024
LENGTH = 4 * CHUNK + 4321
BODY = zip_of("rot", LENGTH)
GOOD = Answer(BODY, etag='"a"')
OFF = {"GUP_CACHE__SCRUB_RATE": "0"}


@contextmanager
def stored(
    tmp_path: Path, upstream: ScriptedUpstream, workers: int = 1, **settings: str
) -> Iterator[tuple[Gup, Path]]:
    """A service that has the body, stopped; and where the body lies."""
    upstream.answer(BIG, GOOD)
    env = {**OFF, **{f"GUP_CACHE__{name.upper()}": value for name, value in settings.items()}}
    with Gup(tmp_path / "cache", [upstream.url], workers=workers, env=env) as gup:
        assert gup.get(BIG).body == BODY
        gup.wait_stored("full.zip")
        gup.stop()
        yield gup, only((gup.cache_dir / "content").rglob("full.zip"))


@pytest.fixture
def upstream():
    with ScriptedUpstream() as scripted:
        yield scripted


def found(gup: Gup, where: str = "body") -> float:
    return gup.metric("gup_integrity_failures_total", where=where)


def repaired(gup: Gup) -> float:
    return gup.metric("gup_upstream_received_bytes_total", purpose="repair")


def resumed(gup: Gup, path: str, got: bytes, etag: str) -> Response:
    """The rest of a body, as a client asks for it that was cut."""
    return gup.get(path, {"Range": f"bytes={len(got)}-", "If-Range": etag})


def whole(gup: Gup, path: str) -> Response:
    """The body as clients get it that resume when they are cut."""
    answer = gup.get(path)
    for _ in range(5):
        if answer.complete:
            break
        rest = resumed(gup, path, answer.body, answer.etag)
        assert rest.status == 206, rest
        answer = replace(answer, body=answer.body + rest.body, complete=rest.complete)
    return answer


# --- bodies


def test_a_body_that_somebody_wrote_to_after_it_was_served_is_noticed(tmp_path, upstream):
    """Within a second or so, by the file's time; nobody has to ask for it."""
    with stored(tmp_path, upstream) as (gup, body):
        gup.start()
        assert gup.get(BIG).body == BODY
        scribble(body, 3 * CHUNK)
        gup.wait_metric(1, "gup_integrity_failures_total", where="body")
        until(lambda: repaired(gup) >= LENGTH - 3 * CHUNK, "the rest is fetched again")
        assert repaired(gup) <= LENGTH - 3 * CHUNK + OVERLAP
        assert [gup.get(BIG).body == BODY for _ in range(6)] == [True] * 6


def test_a_client_is_cut_at_the_damage_and_resumes(tmp_path, upstream):
    with stored(tmp_path, upstream) as (gup, body):
        flip(body, 4 * CHUNK + 5)
        gup.start()
        first = gup.get(BIG)
        assert (first.status, first.complete, first.reset) == (200, False, True)
        assert first.body == BODY[: len(first.body)]
        assert len(first.body) <= 4 * CHUNK
        again = whole(gup, BIG)
        assert (again.complete, again.etag, again.body == BODY) == (True, first.etag, True)


def _directory(body: Path) -> None:
    body.unlink()
    body.mkdir()
    (body / "in it").write_text("x")


def _link(body: Path) -> None:
    body.rename(body.with_name("elsewhere.zip"))
    body.symlink_to(body.with_name("elsewhere.zip"))


def _fifo(body: Path) -> None:
    """As unreadable as a file can be made for root, too: whoever opens it waits for ever."""
    body.unlink()
    os.mkfifo(body)


def _record(body: Path) -> Path:
    return body.with_name(f".{body.name}.gup")


HARMS = {
    "flipped": (lambda body: flip(body, 2 * CHUNK + 99), LENGTH - 2 * CHUNK, "body"),
    "truncated": (lambda body: os.truncate(body, 3 * CHUNK + 1), LENGTH - 3 * CHUNK, "body"),
    "too long": (lambda body: os.truncate(body, LENGTH + 1), (LENGTH - 1) % CHUNK + 1, "body"),
    "deleted": (Path.unlink, LENGTH, "body"),
    "directory": (_directory, LENGTH, "body"),
    "link": (_link, LENGTH, "body"),
    "fifo": (_fifo, LENGTH, "body"),
    "record": (lambda body: flip(_record(body), 200), LENGTH, "record"),
    "torn record": (lambda body: os.truncate(_record(body), 100), LENGTH, "record"),
}
"""What is done to a body or its record, how much of it is to be fetched again, and where that is counted."""


def test_whatever_became_of_it_the_bytes_are_right(tmp_path, upstream):
    paths = {name: content_path("full.zip", revision=f"26090100{n}") for n, name in enumerate(HARMS)}
    bodies = {name: zip_of(name, LENGTH) for name in HARMS}
    for name, path in paths.items():
        upstream.answer(path, Answer(bodies[name], etag=f'"{name.replace(" ", "-")}"'))
    with Gup(tmp_path / "cache", [upstream.url], env=OFF) as gup:
        tags = {name: gup.get(path).etag for name, path in paths.items()}
        until(
            lambda: len(list((gup.cache_dir / "content").rglob(".full.zip.gup"))) == len(paths), "all stored"
        )
        gup.stop()
        files = {name: _file(gup, path) for name, path in paths.items()}
        for name, (harm, _, _) in HARMS.items():
            harm(files[name])
        gup.start()
        for name, (_, fetched, _) in HARMS.items():
            answers = [whole(gup, paths[name]) for _ in range(3)]
            assert [(x.status, x.etag, x.body == bodies[name]) for x in answers] == [
                (200, tags[name], True)
            ] * 3
            assert 0 <= upstream.body_bytes(paths[name]) - LENGTH - fetched <= OVERLAP, name
        for name, file in files.items():
            until(lambda file=file: file.is_file() and _record(file).is_file(), f"{name} is stored")
            assert not file.is_symlink()
            assert file.read_bytes() == bodies[name]
        rest = sum(fetched for _, fetched, where in HARMS.values() if where == "body")
        assert rest <= repaired(gup) <= rest + len(HARMS) * OVERLAP
        for where in ("body", "record"):
            assert found(gup, where) == sum(place == where for _, _, place in HARMS.values())
        flipped = upstream.requests(paths["flipped"])[1]
        assert flipped.header("range") == f"bytes={2 * CHUNK - OVERLAP}-"
        assert flipped.header("if-range") == '"flipped"'


def _file(gup: Gup, path: str) -> Path:
    return only((gup.cache_dir / "content").rglob(f"{path.split('/')[-2]}/full.zip"))


def test_without_upstream_what_is_sound_is_served_and_the_rest_is_an_honest_error(tmp_path, upstream):
    with stored(tmp_path, upstream, error_ttl="100ms") as (gup, body):
        flip(body, 2 * CHUNK)
        upstream.answer(BIG, Answer(b"", 503))
        gup.start()
        whole = gup.get(BIG)
        assert (whole.status, whole.complete, whole.reset) == (200, False, True)
        assert whole.body == BODY[: len(whole.body)]
        assert len(whole.body) <= 2 * CHUNK
        sound = gup.get(BIG, {"Range": f"bytes={3 * CHUNK}-"})
        assert (sound.status, sound.body) == (206, BODY[3 * CHUNK :])
        assert_problem(gup.get(BIG, {"Range": f"bytes={2 * CHUNK}-{3 * CHUNK - 1}"}), 502)
        upstream.answer(BIG, GOOD)
        until(lambda: gup.get(BIG).body == BODY, "it is whole when upstream is back")
        assert LENGTH - 2 * CHUNK <= repaired(gup) <= LENGTH - 2 * CHUNK + OVERLAP


def test_other_bytes_upstream_are_never_mixed_in(tmp_path, upstream):
    other = zip_of("rot, another", LENGTH)
    with stored(tmp_path, upstream) as (gup, body):
        tag = json.loads(_record(body).read_bytes())["etag"]
        flip(body, 2 * CHUNK)
        upstream.answer(BIG, Answer(other, etag='"a"'))
        gup.start()
        first = gup.get(BIG)
        assert first.body == BODY[: len(first.body)]
        assert not first.complete
        until(lambda: gup.get(BIG).complete, "the new body")
        again = gup.get(BIG)
        assert again.body == other
        assert again.etag != tag


# --- what is under way


@pytest.mark.long
def test_rot_in_fills_that_were_killed(tmp_path, upstream):
    at, gate = 3 * CHUNK, Gate()
    harms = {"part": CHUNK + 7, "sums": 8, "state": 60}
    paths = {suffix: content_path("full.zip", revision=f"26090200{n}") for n, suffix in enumerate(harms)}
    for path in paths.values():
        upstream.answer(path, Answer(BODY, etag='"a"', gates=((at, gate),)), GOOD)
    with Gup(tmp_path / "cache", [upstream.url], env=OFF) as gup, contextlib.ExitStack() as clients:
        for path in paths.values():
            client = clients.enter_context(gup.connect())
            client.ask(path)
            client.head()
            assert client.read(at) == BODY[:at]
        gup.kill()
        gate.open()
        partial = gup.cache_dir / "partial"
        ids = {json.loads(file.read_bytes())["key"]: file.stem for file in partial.glob("*.state")}
        for suffix, path in paths.items():
            id_ = next(id_ for key, id_ in ids.items() if path.split("/")[-2] in key)
            flip(only(partial.glob(f"{id_}*.{suffix}")), harms[suffix])
        gup.start()
        for suffix, path in paths.items():
            answer = gup.get(path)
            assert (answer.status, answer.body == BODY) == (200, True), suffix
            kept = 0 if suffix == "state" else CHUNK
            assert upstream.requests(path)[1].body_bytes <= LENGTH - kept + 2 * 65536
        assert found(gup, "part") == 2
        assert found(gup, "state") == 1


# --- modes, the scrubber, the command


def test_a_reload_changes_the_mode_at_once(tmp_path, upstream):
    """Served hot and trusted before, the flipped byte is found by the first request after the reload."""
    upstream.answer(BIG, GOOD)
    settings = {"cache": {"verify": "scrub", "scrub_rate": "0"}, "upstream": [{"url": upstream.url}]}
    with Gup(tmp_path / "cache", workers=1, settings=settings) as gup:
        assert gup.get(BIG).body == BODY
        gup.wait_stored("full.zip")
        with gup.connect() as client:
            assert [client.get(BIG).body == BODY for _ in range(3)] == [True] * 3
            flip(only((gup.cache_dir / "content").rglob("full.zip")), 0)
            assert client.get(BIG).body != BODY, "what the scrub mode does not promise"
            settings["cache"]["verify"] = "first_use"
            gup.rewrite(settings)
            until(lambda: client.get(BIG).body == BODY, "the other mode")
            assert found(gup) == 1
            assert repaired(gup) == LENGTH


@pytest.mark.long
def test_the_scrubber_finds_what_nobody_asks_for(tmp_path, upstream):
    with stored(tmp_path, upstream, verify="scrub", scrub_rate="1GB/s", scrub_interval="1s") as (gup, body):
        flip(body, 3 * CHUNK)
        gup.start()
        until(lambda: body.exists() and body.read_bytes() == BODY, "it is whole")
        assert found(gup) == 1
        assert [gup.get(BIG).body == BODY for _ in range(4)] == [True] * 4
        until(
            lambda: gup.status()["scrub"]["mended"] == 0 and gup.status()["scrub"]["checked"], "a clean pass"
        )


def verify(*arguments: object) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "gup", "cache", "verify", "--json", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("GUP_")},
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else {"told": done.stderr}


def test_the_command_with_the_service_running(tmp_path, upstream):
    with stored(tmp_path, upstream, verify="scrub") as (gup, body):
        gup.start()
        token = gup.cache_dir / "run" / "admin-token"
        running = ("--admin", f"http://{gup.admin[0]}:{gup.admin[1]}", "--token-file", token)
        assert verify(*running)[0] == 0
        flip(body, CHUNK)
        status, told = verify(*running)
        assert (status, told["damaged"], told["found"][0]["where"]) == (1, 1, "body")
        status, told = verify(*running, "--repair")
        assert (status, told["damaged"], told["mended"]) == (0, 1, 1)
        assert LENGTH - CHUNK <= repaired(gup) <= LENGTH - CHUNK + OVERLAP
        assert gup.get(BIG).body == BODY
        assert verify(*running)[1]["found"] == []
        status, told = verify("--cache-dir", gup.cache_dir)
        assert status == 1
        assert "another gup uses the cache directory" in told["told"]


def test_the_command_with_the_service_stopped(tmp_path, upstream):
    """What is damaged is dropped; what is right before it is gone on with, by itself, at the next start."""
    with stored(tmp_path, upstream) as (gup, body):
        assert verify("--cache-dir", gup.cache_dir)[0] == 0
        tag = json.loads(_record(body).read_bytes())["etag"]
        flip(body, 3 * CHUNK)
        (gup.cache_dir / "partial" / "1.2.tmp").write_bytes(b"x")
        flip(gup.cache_dir / "index" / "cache.db", *range(100))
        status, told = verify("--cache-dir", gup.cache_dir)
        assert (status, sorted(row["where"] for row in told["found"])) == (1, ["body", "index", "stray"])
        assert told["found"][0]["detail"].endswith(": 3")
        status, told = verify("--cache-dir", gup.cache_dir, "--repair")
        assert (status, told["mended"]) == (0, 3)
        assert verify("--cache-dir", gup.cache_dir)[1]["found"] == []
        gup.start()
        gup.wait_stored("full.zip")
        answer = gup.get(BIG)
        assert (answer.body == BODY, answer.etag) == (True, tag)
        assert upstream.body_bytes(BIG) <= LENGTH + LENGTH - 3 * CHUNK + 65536
