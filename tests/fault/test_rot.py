"""Stored bytes that change behind gup's back: right bytes or an honest error, and little fetched again."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from harness.clients import Response, assert_problem
from harness.commands import command
from harness.content import BIG, content_path, zip_of
from harness.disks import flip, only, scribble, to_directory, to_fifo, to_link
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer

CHUNK = 1 << 20
OVERLAP = 64 * 1024
LENGTH = 4 * CHUNK + 4321
BODY = zip_of("rot", LENGTH)
GOOD = Answer(BODY, etag='"a"')


@pytest.fixture
def stored(serve):
    """A service that has the body, stopped; its upstream; and where the body lies."""

    def start(**cache: str):
        gup, upstream = serve({BIG: GOOD}, workers=1, cache={"scrub_rate": "0", **cache})
        gup.serves(BIG, BODY)
        gup.wait_stored(BIG)
        gup.stop()
        return gup, upstream, only((gup.cache_dir / "content").rglob("full.zip"))

    return start


def found(gup: Gup, where: str = "body") -> float:
    return gup.metric("gup_integrity_failures_total", where=where)


def repaired(gup: Gup, bytes_: int) -> bool:
    """Whether so much, and at most an overlap more, was fetched again."""
    return 0 <= gup.metric("gup_upstream_received_bytes_total", purpose="repair") - bytes_ <= OVERLAP


def whole(gup: Gup, path: str) -> Response:
    """The body as clients get it that resume when they are cut: a reset loses what they have not read yet."""
    answer = gup.get(path)
    for _ in range(100):
        if answer.complete:
            break
        rest = gup.get(path, {"Range": f"bytes={len(answer.body)}-", "If-Range": answer.etag})
        assert rest.status == 206, rest
        answer = replace(answer, body=answer.body + rest.body, complete=rest.complete)
    return answer


def record_of(body: Path) -> Path:
    return body.with_name(f".{body.name}.gup")


# --- bodies


def test_a_body_that_somebody_wrote_to_after_it_was_served_is_noticed(stored):
    """Within a second or so, by the file's time; nobody has to ask for it."""
    gup, _, body = stored()
    gup.start()
    gup.serves(BIG, BODY)
    scribble(body, 3 * CHUNK)
    gup.wait_metric(1, "gup_integrity_failures_total", where="body")
    until(lambda: repaired(gup, LENGTH - 3 * CHUNK), "the rest is fetched again")
    for _ in range(6):
        gup.serves(BIG, BODY)


def cut_at_damage(gup: Gup, most: int) -> Response:
    """The answer, which begins right and ends before the damage, with a reset."""
    answer = gup.get(BIG)
    assert (answer.status, answer.complete, answer.reset) == (200, False, True)
    assert answer.body == BODY[: len(answer.body)]
    assert len(answer.body) <= most
    return answer


HARMS = {
    "flipped": (lambda body: flip(body, 2 * CHUNK + 99), LENGTH - 2 * CHUNK, "body"),
    "truncated": (lambda body: os.truncate(body, 3 * CHUNK + 1), LENGTH - 3 * CHUNK, "body"),
    "too long": (lambda body: os.truncate(body, LENGTH + 1), (LENGTH - 1) % CHUNK + 1, "body"),
    "deleted": (Path.unlink, LENGTH, "body"),
    "directory": (to_directory, LENGTH, "body"),
    "link": (to_link, LENGTH, "body"),
    "fifo": (to_fifo, LENGTH, "body"),
    "record": (lambda body: flip(record_of(body), 200), LENGTH, "record"),
    "directory for a record": (lambda body: to_directory(record_of(body)), LENGTH, "record"),
    "torn record": (lambda body: os.truncate(record_of(body), 100), LENGTH, "record"),
}
"""What is done to a body or its record, how much of it is to be fetched again, and where that is counted."""


def test_whatever_became_of_it_the_bytes_are_right(serve):
    paths = {name: content_path("full.zip", revision=f"26090100{n}") for n, name in enumerate(HARMS)}
    bodies = {name: zip_of(name, LENGTH) for name in HARMS}
    answers = {path: Answer(bodies[name], etag=f'"{name.replace(" ", "-")}"') for name, path in paths.items()}
    gup, upstream = serve(answers, cache={"scrub_rate": "0"})
    content = gup.cache_dir / "content"
    tags = {name: gup.get(path).etag for name, path in paths.items()}
    until(lambda: len(list(content.rglob(".full.zip.gup"))) == len(paths), "all are stored")
    gup.stop()
    files = {name: only(content.rglob(f"{path.split('/')[-2]}/full.zip")) for name, path in paths.items()}
    for name, (harm, _, _) in HARMS.items():
        harm(files[name])
    gup.start()
    for name, (_, fetched, _) in HARMS.items():
        answers = [whole(gup, paths[name]) for _ in range(3)]
        assert {(x.status, x.etag, x.body == bodies[name]) for x in answers} == {(200, tags[name], True)}, (
            name
        )
        assert 0 <= upstream.body_bytes(paths[name]) - LENGTH - fetched <= OVERLAP, name
    for name, file in files.items():
        until(lambda file=file: file.is_file() and record_of(file).is_file(), f"{name} is stored")
        assert not file.is_symlink()
        assert file.read_bytes() == bodies[name]
    rest = sum(fetched for _, fetched, where in HARMS.values() if where == "body")
    received = gup.metric("gup_upstream_received_bytes_total", purpose="repair")
    assert rest <= received <= rest + len(HARMS) * OVERLAP
    for where in ("body", "record"):
        assert found(gup, where) == sum(place == where for _, _, place in HARMS.values())
    flipped = upstream.requests(paths["flipped"])[1]
    assert flipped.header("range") == f"bytes={2 * CHUNK - OVERLAP}-"
    assert flipped.header("if-range") == '"flipped"'


def test_without_upstream_what_is_sound_is_served_and_the_rest_is_an_honest_error(stored):
    gup, upstream, body = stored(error_ttl="100ms")
    flip(body, 2 * CHUNK)
    upstream.answer(BIG, Answer(b"", 503))
    gup.start()
    cut_at_damage(gup, 2 * CHUNK)
    sound = gup.get(BIG, {"Range": f"bytes={3 * CHUNK}-"})
    assert (sound.status, sound.body) == (206, BODY[3 * CHUNK :])
    assert_problem(gup.get(BIG, {"Range": f"bytes={2 * CHUNK}-{3 * CHUNK - 1}"}), 502)
    upstream.answer(BIG, GOOD)
    until(lambda: gup.get(BIG).body == BODY, "it is whole when upstream is back")
    assert repaired(gup, LENGTH - 2 * CHUNK)


# --- modes, the scrubber, the command


def test_a_reload_changes_the_mode_at_once(serve):
    """Served hot and trusted before, the flipped byte is found by the first request after the reload."""
    gup, _ = serve({BIG: GOOD}, workers=1, cache={"verify": "scrub", "scrub_rate": "0"})
    gup.serves(BIG, BODY)
    gup.wait_stored(BIG)
    client = gup.connect()
    assert [client.get(BIG).body == BODY for _ in range(3)] == [True] * 3
    flip(only((gup.cache_dir / "content").rglob("full.zip")), 0)
    assert client.get(BIG).body != BODY, "what the scrub mode does not promise"
    gup.rewrite({"cache": {"verify": "first_use", "scrub_rate": "0"}})
    until(lambda: client.get(BIG).body == BODY, "the other mode")
    assert found(gup) == 1
    assert repaired(gup, LENGTH)


def is_whole(body: Path) -> bool:
    """It is moved away while it is mended."""
    with contextlib.suppress(FileNotFoundError):
        return body.read_bytes() == BODY
    return False


def test_the_scrubber_finds_what_nobody_asks_for(stored):
    gup, _, body = stored(verify="scrub", scrub_rate="1GB/s", scrub_interval="1s")
    flip(body, 3 * CHUNK)
    gup.start()
    until(lambda: is_whole(body), "it is whole")
    assert found(gup) == 1
    gup.serves(BIG, BODY)
    until(lambda: (s := gup.status()["scrub"])["mended"] == 0 and s["checked"], "a clean pass")


def verify(*arguments: object) -> tuple[int, dict]:
    done = command("cache", "verify", "--json", *arguments)
    return done.returncode, json.loads(done.stdout) if done.stdout else {"told": done.stderr}


def test_the_command_with_the_service_running(stored):
    gup, _, body = stored(verify="scrub")
    gup.start()
    token = gup.cache_dir / "run" / "admin-token"
    running = ("--admin", f"http://{gup.admin[0]}:{gup.admin[1]}", "--token-file", token)
    assert verify(*running)[0] == 0
    flip(body, CHUNK)
    status, told = verify(*running)
    assert (status, told["damaged"], told["found"][0]["where"]) == (1, 1, "body")
    status, told = verify(*running, "--repair")
    assert (status, told["damaged"], told["mended"]) == (0, 1, 1)
    assert repaired(gup, LENGTH - CHUNK)
    gup.serves(BIG, BODY)
    assert verify(*running)[1]["found"] == []
    status, told = verify("--cache-dir", gup.cache_dir)
    assert (status, "another gup uses the cache directory" in told["told"]) == (1, True)


def test_the_command_with_the_service_stopped(stored):
    """What is damaged is dropped; what is right before it is gone on with, by itself, at the next start."""
    gup, upstream, body = stored()
    directory = ("--cache-dir", gup.cache_dir)
    assert verify(*directory)[0] == 0
    tag = json.loads(record_of(body).read_bytes())["etag"]
    flip(body, 3 * CHUNK)
    (gup.cache_dir / "partial" / "1.2.tmp").write_bytes(b"x")
    flip(gup.cache_dir / "index" / "cache.db", *range(100))
    status, told = verify(*directory)
    assert (status, sorted(row["where"] for row in told["found"])) == (1, ["body", "index", "stray"])
    assert told["found"][0]["detail"].endswith(": 3")
    status, told = verify(*directory, "--repair")
    assert (status, told["mended"]) == (0, 3)
    assert verify(*directory)[1]["found"] == []
    gup.start()
    gup.wait_stored(BIG)
    assert gup.serves(BIG, BODY).etag == tag
    assert upstream.body_bytes(BIG) <= LENGTH + LENGTH - 3 * CHUNK + OVERLAP
