"""Limits of the store: size, free space, age, revisions and pins; totals; readers of what is evicted."""

from pathlib import Path
from urllib.parse import quote

import pytest
from harness.scripted import Answer, ScriptedUpstream
from harness.service import Gup
from harness.trees import BIG, CONTENT_INFO, DELTA, INDEX, MONIKER, content_path, noise, zip_of
from harness.waiting import until

MB = 1_000_000
DELTAS = [content_path(f"xdelta2607{n:02}001_To_260801001.dax") for n in range(1, 31)]


def on_disk(gup: Gup) -> int:
    return sum(gup.bodies().values()) + sum(gup.parts().values())


def evict(gup: Gup) -> None:
    """Let the limits be enforced now."""
    status, answer = gup.api("/api/v1/evict", method="POST")
    assert status in (200, 202, 204), answer


def key_of(gup: Gup, file: str) -> str:
    (path,) = (path for path in gup.bodies() if path.rpartition("/")[2] == file)
    return path


def pin(gup: Gup, key: str, *, method: str = "PUT") -> None:
    status, answer = gup.api(f"/api/v1/content/{quote(key)}/pin", method=method)
    assert status in (200, 204), answer


def purge(gup: Gup, key: str) -> None:
    status, answer = gup.api(f"/api/v1/content/{quote(key)}", method="DELETE")
    assert status in (200, 204), answer


def name_of(path: str) -> str:
    return path.rpartition("/")[2]


def fill(gup: Gup, upstream: ScriptedUpstream, path: str, body: bytes) -> None:
    upstream.answer(path, Answer(body, etag='"x"'))
    response = gup.get(path)
    assert (response.status, response.complete, response.body == body) == (200, True, True)


def test_max_size_holds_under_load_and_the_pinned_stays(tmp_path):
    limit = 8 * MB
    settings = {"cache": {"max_size": limit}}
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup,
    ):
        fill(gup, upstream, DELTAS[0], noise("pinned", MB))
        gup.wait_stored(name_of(DELTAS[0]))
        until(lambda: gup.metric("gup_cache_entries") == 1, "the controller knows the entry")
        pin(gup, key_of(gup, name_of(DELTAS[0])))
        highest = 0
        for path in DELTAS[1:25]:
            fill(gup, upstream, path, noise(path, MB))
            highest = max(highest, on_disk(gup))
        gup.wait_stored(name_of(DELTAS[24]))
        until(lambda: on_disk(gup) <= limit, "the size is under its limit")
        # a body that is being committed may stand above the limit until room is made for it
        assert highest <= limit + 2 * MB
        assert gup.stored(name_of(DELTAS[0]))
        assert on_disk(gup) >= limit // 2, "evicted more than was needed"
        until(lambda: gup.metric("gup_cache_size_bytes") == on_disk(gup), "the total is right")
        metrics = gup.metrics()
        evicted = 25 - len(gup.bodies())
        assert metrics("gup_evictions_total", reason="size") == evicted
        assert metrics("gup_evicted_bytes_total", reason="size") == evicted * MB
        assert metrics("gup_cache_limit_bytes") == limit
        pin(gup, key_of(gup, name_of(DELTAS[0])), method="DELETE")


def test_the_least_recently_used_goes_first(tmp_path):
    settings = {"cache": {"max_size": 5 * MB}}
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup,
    ):
        for path in DELTAS[:4]:
            fill(gup, upstream, path, noise(path, MB))
            gup.wait_stored(name_of(path))
        used_before = _used_at(gup, DELTAS[0])
        until(
            lambda: gup.get(DELTAS[0]).status == 200 and _used_at(gup, DELTAS[0]) > used_before,
            "the controller knows of the use",
        )
        for path in DELTAS[4:8]:
            fill(gup, upstream, path, noise(path, MB))
            gup.wait_stored(name_of(path))
            gup.get(DELTAS[0])
        until(lambda: on_disk(gup) <= 5 * MB, "the size is under its limit")
        assert gup.stored(name_of(DELTAS[0]))
        assert not gup.stored(name_of(DELTAS[1]))


def _used_at(gup: Gup, path: str) -> float:
    status, answer = gup.api("/api/v1/content?limit=100")
    assert status == 200
    return sum(float(e["used_at"]) for e in answer["entries"] if e["key"].endswith(name_of(path)))


def test_min_free_keeps_nothing_but_still_serves(tmp_path):
    settings = {"cache": {"min_free": "4000000GB"}}
    body = zip_of("no room", 2 * MB)
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup,
    ):
        upstream.answer(BIG, Answer(body, etag='"x"'))
        for _ in range(3):
            response = gup.get(BIG)
            assert (response.status, response.complete, response.body == body) == (200, True, True)
        evict(gup)
        until(lambda: on_disk(gup) == 0, "nothing is kept")
        assert gup.metric("gup_disk_free_bytes") > 0


def test_a_body_over_max_size_is_passed_through(tmp_path):
    settings = {"cache": {"max_size": "1MB"}}
    body = zip_of("too large", 3 * MB)
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup,
    ):
        upstream.answer(BIG, Answer(body, etag='"x"'))
        response = gup.get(BIG)
        assert (response.status, response.complete, response.body == body) == (200, True, True)
        until(lambda: on_disk(gup) == 0, "nothing is kept")
        assert gup.metric("gup_fills_total", outcome="unstorable") >= 1


def test_what_nobody_uses_is_evicted_and_what_is_pinned_stays(tmp_path):
    settings = {"cache": {"max_unused": "1s"}}
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup,
    ):
        fill(gup, upstream, BIG, zip_of("unused", MB))
        fill(gup, upstream, DELTA, noise("pinned", 1000))
        for path in (BIG, DELTA):
            gup.wait_stored(name_of(path))
        until(lambda: gup.metric("gup_cache_entries") == 2, "the controller knows both")
        pin(gup, key_of(gup, name_of(DELTA)))

        def gone() -> bool:
            evict(gup)
            return not gup.stored("full.zip")

        until(gone, "the unused entry is evicted")
        assert gup.stored(name_of(DELTA))
        assert gup.metric("gup_evictions_total", reason="unused") == 1
        # asked for again, it is fetched again
        assert gup.get(BIG).body == zip_of("unused", MB)
        assert len(upstream.requests(BIG)) == 2


def test_keep_revisions_keeps_the_newest(tmp_path):
    revisions = [f"26080{n}001" for n in range(1, 7)]
    settings = {"cache": {"keep_revisions": 2}}
    with (
        ScriptedUpstream() as upstream,
        Gup(tmp_path / "cache", [upstream.url], settings=settings) as gup,
    ):
        upstream.answer(INDEX, Answer(CONTENT_INFO, etag='"i"'))
        gup.get(INDEX)
        for revision in (revisions[3], revisions[0], revisions[5], revisions[1], revisions[4], revisions[2]):
            fill(gup, upstream, content_path("full.zip", MONIKER, revision), zip_of(revision, 100_000))

        def kept() -> list[str]:
            return sorted(path.split("/")[3] for path in gup.bodies() if path.endswith("full.zip"))

        def settled() -> bool:
            evict(gup)
            return kept() == revisions[-2:]

        until(settled, "the two newest revisions are left")
        assert gup.stored("ContentInfo.txt")
        gup.wait_metric(4, "gup_evictions_total", reason="revision")


@pytest.mark.parametrize("end", [pytest.param("stop", marks=pytest.mark.long), "kill"])
def test_totals_are_right_after_a_restart(tmp_path, end):
    with ScriptedUpstream() as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        for number, path in enumerate(DELTAS[:10]):
            fill(gup, upstream, path, noise(path, 10_000 * (number + 1)))
            gup.wait_stored(name_of(path))
        size = sum(10_000 * (n + 1) for n in range(10))
        until(lambda: gup.metric("gup_cache_size_bytes") == size, "the total is right before")
        if end == "stop":
            assert gup.stop() == 0
        else:
            gup.kill()
        gup.start()
        until(lambda: gup.metric("gup_cache_size_bytes") == size, "the total is right after")
        assert gup.metric("gup_cache_entries") == 10
        assert on_disk(gup) == size


def test_totals_follow_what_happened_while_nobody_ran(tmp_path):
    """The records are the truth: a body removed by hand, an index thrown away."""
    with ScriptedUpstream() as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        for path in DELTAS[:5]:
            fill(gup, upstream, path, noise(path, 50_000))
            gup.wait_stored(name_of(path))
        gup.stop()
        root = tmp_path / "cache"
        next((root / "content").rglob(name_of(DELTAS[0]))).unlink()
        for path in sorted((root / "index").rglob("*"), reverse=True):
            _remove(path)
        gup.start()
        until(lambda: gup.metric("gup_cache_size_bytes") == 200_000, "the total is right")
        assert gup.metric("gup_cache_entries") == 4
        assert gup.get(DELTAS[1]).body == noise(DELTAS[1], 50_000)
        assert gup.get(DELTAS[0]).body == noise(DELTAS[0], 50_000)
        assert [len(upstream.requests(path)) for path in DELTAS[:5]] == [2, 1, 1, 1, 1]


def _remove(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()


def test_who_reads_an_evicted_entry_reads_it_to_its_end(tmp_path):
    body = zip_of("evicted", 20 * MB)
    with ScriptedUpstream() as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        fill(gup, upstream, BIG, body)
        gup.wait_stored("full.zip")
        until(lambda: gup.metric("gup_cache_entries") == 1, "the controller knows the entry")
        with gup.connect() as reader:
            reader.ask(BIG)
            head = reader.head()
            assert reader.read(MB) == body[:MB]
            purge(gup, key_of(gup, "full.zip"))
            assert gup.bodies() == {}
            rest = reader.read(19 * MB)
            assert rest == body[MB:]
        # the next one is another fetch, under the same name and the same validators upstream
        again = gup.get(BIG)
        assert again.body == body
        assert again.etag == head.etag
        assert len(upstream.requests(BIG)) == 2


def test_a_purged_entry_is_closed_everywhere(tmp_path):
    """No worker serves a purged body from its hot table, and no descriptor keeps the space."""
    with ScriptedUpstream() as upstream, Gup(tmp_path / "cache", [upstream.url]) as gup:
        fill(gup, upstream, DELTA, noise("old", 100_000))
        gup.wait_stored(name_of(DELTA))
        connections = [gup.connect() for _ in range(8)]
        try:
            for connection in connections * 3:
                assert connection.get(DELTA).body == noise("old", 100_000)
            until(lambda: gup.metric("gup_cache_entries") == 1, "the controller knows the entry")
            upstream.answer(DELTA, Answer(noise("new", 100_000), etag='"y"'))
            purge(gup, key_of(gup, name_of(DELTA)))
            for connection in connections:
                assert connection.get(DELTA).body == noise("new", 100_000)
        finally:
            for connection in connections:
                connection.close()
        assert len(upstream.requests(DELTA)) == 2
