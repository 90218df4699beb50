"""Limits of the store: size, free space, age, revisions and pins; totals; readers of what is evicted."""

import shutil
import time
from urllib.parse import quote

from harness.content import BIG, CONTENT_INFO, DELTA, INDEX, MONIKER, content_path, name_of, noise, zip_of
from harness.processes import until
from harness.service import Gup
from harness.upstreams import ScriptedUpstream

MB = 1_000_000
DELTAS = [content_path(f"xdelta2607{n:02}001_To_260801001.dax") for n in range(1, 31)]


def on_disk(gup: Gup) -> int:
    return sum(gup.bodies().values()) + sum(gup.parts().values())


def change(gup: Gup, path: str, what: str = "", method: str = "PUT") -> None:
    """Call the API for the entry with this path's file name."""
    (key,) = (key for key in gup.bodies() if name_of(key) == name_of(path))
    status, answer = gup.api(f"/api/v1/content/{quote(key)}{what}", method)
    assert status in (200, 204), answer


def fill(gup: Gup, upstream: ScriptedUpstream, *paths: str, size: int = MB) -> None:
    for path in paths:
        body = zip_of(path, size) if path.endswith("zip") else noise(path, size)
        upstream.answer(path, body)
        gup.serves(path, body)
        gup.wait_stored(path)


def test_max_size_holds_under_load_and_the_pinned_stays(serve):
    limit = 8 * MB
    gup, upstream = serve(workers=1, cache={"max_size": limit})
    pinned, *others = DELTAS[:25]
    fill(gup, upstream, pinned)
    gup.wait_metric(1, "gup_cache_entries")
    change(gup, pinned, "/pin")
    highest = 0
    for path in others:
        fill(gup, upstream, path)
        highest = max(highest, on_disk(gup))
    until(lambda: on_disk(gup) <= limit, "the size is under its limit")
    # a body that is being committed may stand above the limit until room is made for it
    assert highest <= limit + 2 * MB
    assert gup.stored(pinned)
    assert on_disk(gup) >= limit // 2, "evicted more than was needed"
    until(lambda: gup.metric("gup_cache_size_bytes") == on_disk(gup), "the total is right")
    metrics, evicted = gup.metrics(), 25 - len(gup.bodies())
    assert metrics("gup_evictions_total", reason="size") == evicted
    assert metrics("gup_evicted_bytes_total", reason="size") == evicted * MB
    assert metrics("gup_cache_limit_bytes") == limit
    shown = gup.status()["limits"]["cache_size_bytes"]
    assert (shown["limit"], shown["used"]) == (limit, on_disk(gup))
    change(gup, pinned, "/pin", "DELETE")
    gup.reload(cache={"max_size": 2 * limit})
    gup.wait_metric(2 * limit, "gup_cache_limit_bytes")


def test_the_least_recently_used_goes_first(serve):
    gup, upstream = serve(workers=1, cache={"max_size": 5 * MB})
    fill(gup, upstream, *DELTAS[:4])

    def used_at() -> float:
        entries = gup.api("/api/v1/content?limit=100")[1]["entries"]
        return sum(float(e["used_at"]) for e in entries if name_of(e["key"]) == name_of(DELTAS[0]))

    def use() -> None:
        """Known to the controller too, which is told once a second: what is stored next is newer then."""
        before = used_at()
        until(lambda: gup.get(DELTAS[0]).status == 200 and used_at() > before, "the use is known")

    use()
    for path in DELTAS[4:8]:
        fill(gup, upstream, path)
        use()
    until(lambda: on_disk(gup) <= 5 * MB, "the size is under its limit")
    assert (gup.stored(DELTAS[0]), gup.stored(DELTAS[1])) == (True, False)


def test_what_nobody_uses_is_evicted_and_what_is_pinned_stays(serve):
    gup, upstream = serve(workers=1, cache={"max_unused": "1s"})
    began = time.monotonic()
    fill(gup, upstream, DELTA, BIG)
    gup.wait_metric(2, "gup_cache_entries")
    change(gup, DELTA, "/pin")
    until(lambda: not gup.stored(BIG), "the unused entry is evicted", 20)
    assert time.monotonic() - began > 0.9
    assert gup.stored(DELTA)
    gup.wait_metric(1, "gup_evictions_total", reason="unused")
    assert gup.metric("gup_evicted_bytes_total", reason="unused") == MB
    gup.serves(BIG, zip_of(BIG, MB))  # asked for again, it is fetched again
    assert len(upstream.requests(BIG)) == 2


def test_keep_revisions_keeps_the_newest(serve):
    revisions = [f"26080{n}001" for n in range(1, 7)]
    gup, upstream = serve({INDEX: CONTENT_INFO}, workers=1, cache={"keep_revisions": 2})
    gup.get(INDEX)
    fulls = [content_path("full.zip", MONIKER, revisions[number]) for number in (3, 0, 5, 1, 4, 2)]
    for path in fulls:
        fill(gup, upstream, path, size=100_000)

    def newest_are_left() -> bool:
        assert gup.api("/api/v1/evict", "POST")[0] in (200, 202, 204)
        kept = sorted(path.split("/")[3] for path in gup.bodies() if path.endswith("full.zip"))
        return kept == revisions[-2:]

    until(newest_are_left, "the two newest revisions are left")
    assert gup.stored(INDEX)
    gup.wait_metric(4, "gup_evictions_total", reason="revision")


def test_totals_are_right_after_a_crash_and_follow_what_happened_while_nobody_ran(serve):
    """The records are the truth: a body removed by hand, an index thrown away."""
    gup, upstream = serve()
    fill(gup, upstream, *DELTAS[:5], size=50_000)
    gup.wait_metric(250_000, "gup_cache_size_bytes")
    gup.kill()
    gup.start()
    gup.wait_metric(250_000, "gup_cache_size_bytes")
    assert (gup.metric("gup_cache_entries"), on_disk(gup)) == (5, 250_000)
    gup.stop()
    next((gup.cache_dir / "content").rglob(name_of(DELTAS[0]))).unlink()
    shutil.rmtree(gup.cache_dir / "index")
    gup.start()
    gup.wait_metric(200_000, "gup_cache_size_bytes")
    assert gup.metric("gup_cache_entries") == 4
    for path in DELTAS[:5]:
        gup.serves(path, noise(path, 50_000))
    assert [len(upstream.requests(path)) for path in DELTAS[:5]] == [2, 1, 1, 1, 1]


def test_who_reads_a_purged_entry_reads_it_to_its_end_and_it_is_closed_everywhere(serve):
    """No worker serves a purged body from its hot cache, and no descriptor keeps the space."""
    gup, upstream = serve()
    fill(gup, upstream, BIG, size=20 * MB)
    fill(gup, upstream, DELTA, size=100_000)
    gup.wait_metric(2, "gup_cache_entries")
    reader, head = gup.begin(BIG, MB)
    connections = [gup.connect() for _ in range(8)]
    assert {client.get(DELTA).body == noise(DELTA, 100_000) for client in connections * 3} == {True}
    upstream.answer(DELTA, noise("new", 100_000))
    for path in (BIG, DELTA):
        change(gup, path, method="DELETE")
    assert gup.bodies() == {}
    assert {client.get(DELTA).body == noise("new", 100_000) for client in connections} == {True}
    assert reader.finish(head).body == zip_of(BIG, 20 * MB)
    # the next one is another fetch, under the same name and the same validators upstream
    assert gup.serves(BIG, zip_of(BIG, 20 * MB)).etag == head.etag
    assert len(upstream.requests(BIG)) == len(upstream.requests(DELTA)) == 2
