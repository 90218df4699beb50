"""Purges while the file is being fetched: what was fetched before is served to nobody who asks after it."""

from urllib.parse import quote, urlencode

import pytest
from harness.content import MONIKER, content_path, zip_of
from harness.processes import until
from harness.upstreams import Answer, Gate

MB = 1_000_000
OLD, NEW = zip_of("old", 4 * MB), zip_of("new", 4 * MB)
FILE = content_path("full.zip")
NAME = f"any/any{FILE.removeprefix('/content')}"
TWO = {"workers": {"count": 2}}
HOWS = {
    "key": lambda gup: gup.api(f"/api/v1/content/{quote(NAME)}", "DELETE"),
    "revision": lambda gup: purge(gup, revision=FILE.split("/")[3]),
    "stream": lambda gup: purge(gup, stream=MONIKER),
    "pattern": lambda gup: purge(gup, pattern="*"),
    "product": lambda gup: purge(gup, product=MONIKER),
}


def purge(gup, **filters):
    return gup.api(f"/api/v1/content?{urlencode(filters)}", "DELETE")


def purged(gup, how="key"):
    status, answer = HOWS[how](gup)
    assert status == 200, answer
    return answer


@pytest.mark.parametrize("how", HOWS)
def test_a_purge_in_mid_fill_is_not_undone_by_it(serve, how):
    """Clients of both workers that read the old body get it to the end; who asks afterwards gets the new."""
    gate = Gate()
    gup, upstream = serve(
        {FILE: [Answer(OLD, etag='"a"', gates=((2 * MB, gate),)), Answer(NEW, etag='"b"')]}, **TWO
    )
    one, two = gup.workers()
    readers = [gup.begin(FILE, MB, pid=pid) for pid in (one, two, one)]
    gate.wait_reached()
    purged(gup, how)
    for pid in (two, one):
        assert gup.connect_to(pid).get(FILE).body == NEW
    gate.open()
    for connection, response in readers:
        assert connection.finish(response).body == OLD
    for pid in (one, two):
        assert gup.connect_to(pid).get(FILE).body == NEW
    assert len(upstream.requests(FILE)) == 2
    gup.wait_stored(FILE)
    gup.stop()
    gup.start()
    gup.serves(FILE, NEW)
    assert len(upstream.requests(FILE)) == 2


@pytest.mark.parametrize("how", ["key", "pattern"])
def test_what_a_killed_service_left_of_a_purged_fill_is_not_taken_up(serve, how):
    gate = Gate()
    gup, upstream = serve(
        {FILE: [Answer(OLD, etag='"a"', gates=((2 * MB, gate),)), Answer(OLD, etag='"a"')]}, **TWO
    )
    gup.begin(FILE, MB)
    gate.wait_reached()
    purged(gup, how)
    gup.kill()
    gate.open()
    upstream.answer(FILE, Answer(NEW, etag='"a"'))
    gup.start()
    gup.serves(FILE, NEW)
    until(lambda: gup.parts() == {}, "nothing is left of it")


def test_a_part_on_disk_is_purged(serve):
    gate = Gate()
    gup, _ = serve({FILE: [Answer(OLD, etag='"a"', gates=((2 * MB, gate),)), Answer(NEW, etag='"a"')]}, **TWO)
    gup.begin(FILE, MB)
    gate.wait_reached()
    gup.kill()
    gate.open()
    gup.start()
    purged(gup, "pattern")
    gup.serves(FILE, NEW)
