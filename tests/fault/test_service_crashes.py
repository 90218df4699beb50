"""The whole service killed at some point and started again: what was committed is served, nothing stays."""

import contextlib
import os
import random
import time

import pytest
from fault.invariants import violations
from harness.clients import Ended
from harness.content import BIG, INDEX, content_path, noise, zip_of
from harness.faults import planned
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer

SEED = os.environ.get("GUP_TEST_SEED", "1")
LENGTH = 2_500_000
CHANGES = ["fopen", "open", "pwrite", "write", "fsync", "rename", "unlink", "mkdir", "ftruncate"]


def fetched(gup: Gup, path: str) -> bytes | None:
    """The body, or None when the connection broke: a wrong byte in a whole answer never passes."""
    try:
        response = gup.get(path)
    except (OSError, Ended):
        return None
    return response.body if response.status == 200 and response.complete else None


def assert_well_after_start(gup: Gup, bodies: dict[str, bytes]) -> None:
    """Served right, and nothing is left once the controller has looked."""
    for path, body in bodies.items():
        until(lambda path=path, body=body: fetched(gup, path) == body, f"{path} is served", 20)
        gup.wait_stored(path)
    gup.wait_metric(0, "gup_fills_in_progress")
    gup.wait_metric(len(bodies), "gup_cache_entries")
    until(lambda: not list((gup.cache_dir / "partial").glob("*.tmp")), "what dead writers left is gone")
    assert gup.stop() == 0
    assert violations(gup.cache_dir) == []


def test_the_service_dies_between_a_body_and_its_record(serve, tmp_path):
    """Each other step of a fill: `test_crash_points`, and `test_the_service_dies_anywhere`."""
    body, died = zip_of("service", LENGTH), tmp_path / "died"
    fault = {"call": "rename", "path": ".full.zip.gup", "do": "kill-service", "nth": 1, "once": str(died)}
    gup, _ = serve({BIG: body}, env=planned(fault))
    assert fetched(gup, BIG) in (None, body)
    until(died.exists, "it has died")
    gup.kill()
    gup.start()
    assert_well_after_start(gup, {BIG: body})


def start_again(gup: Gup, deaths: int) -> None:
    """Start until it serves: a start makes changes too, so it may die in one, `deaths` times at most."""
    gup.kill()
    for _ in range(deaths):
        with contextlib.suppress(AssertionError):
            gup.start()
            return
    gup.start()


@pytest.mark.long
@pytest.mark.parametrize("round_", range(24))
def test_the_service_dies_anywhere(serve, tmp_path, round_):
    """Random: which process dies, at which of its changes, alone or with all others; then once more."""
    chance = random.Random(f"{SEED} {round_}")
    paths = [content_path("full.zip", revision=f"26080{n}001") for n in range(1, 5)]
    bodies = {path: zip_of(path, LENGTH) for path in paths} | {INDEX: noise("index", 5000)}
    cuts = [chance.choice([None, 700_000]) for _ in bodies]
    answers = {
        path: Answer(body, etag='"a"', cut_after=cut)
        for (path, body), cut in zip(bodies.items(), cuts, strict=True)
    }
    flags = [tmp_path / f"died{number}" for number in range(3)]
    faults = [
        {
            "call": CHANGES,
            "path": "*",
            "do": chance.choice(["kill", "kill-after", "kill-service"]),
            "nth": chance.randrange(20, 400),
            "process": chance.choice(["worker", "worker", "controller"]),
            "once": str(flag),
        }
        for flag in flags
    ]
    cache = {"keep_revisions": 0, "error_ttl": "100ms", "index_ttl": "100ms"}
    gup, _ = serve(answers, each={"health_interval": "0s"}, cache=cache, env=planned(*faults), start=False)
    start_again(gup, len(flags))
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and not all(flag.exists() for flag in flags):
        for path, body in bodies.items():
            assert fetched(gup, path) in (None, body)
            if gup.process.poll() is not None:
                start_again(gup, len(flags))
        if chance.random() < 0.3:
            with contextlib.suppress(OSError, Ended):  # the controller may be the one that died
                gup.api(f"/api/v1/content/{chance.choice(sorted(gup.bodies()) or ['none'])}", "DELETE")
    gup.kill()
    for flag in flags:
        flag.touch()  # no more deaths
    gup.start()
    assert_well_after_start(gup, bodies)
