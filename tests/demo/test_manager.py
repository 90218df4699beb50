"""The simulated management server: its link, over HTTP, and as a process."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import aiohttp
import pytest
import xxhash
from harness.processes import quiet_clock
from harness.virtual_time import in_virtual_time

from gup.content.key import Kind
from gup.demo import content
from gup.demo.content import CATALOGUE_JSON, CATALOGUE_PATH, CONTENT_INFO_PATH, COUNTS_PATH, PUBLISH_PATH
from gup.demo.manager import (
    KEEP_PUBLICATIONS,
    PIECE_BYTES,
    Faults,
    Link,
    ListenError,
    Manager,
    simulate_manager,
)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_each_piece_waits_for_the_ones_before_it_and_idle_time_is_not_saved_up():
    clock = Clock()
    link = Link(1000, clock)
    assert link.reserve(1000) == pytest.approx(1.0)
    assert link.reserve(500) == pytest.approx(1.5)
    clock.now += 1.5
    assert link.reserve(100) == pytest.approx(0.1)
    clock.now += 3600
    assert link.reserve(1000) == pytest.approx(1.0, abs=0.011)
    assert Link(0, clock).reserve(10**9) == 0.0


@in_virtual_time
async def test_all_connections_together_get_the_rate_and_each_its_share():
    rate, link = 4_000_000, Link(4_000_000, time.monotonic)
    begin = time.monotonic()
    passed = [0] * 5

    async def connection(at):
        while time.monotonic() - begin < 0.5:
            await link.pass_through(PIECE_BYTES)
            passed[at] += PIECE_BYTES

    await asyncio.gather(*map(connection, range(5)))
    elapsed = time.monotonic() - begin
    # Never faster, but for the slack.
    assert rate * elapsed * 0.95 <= sum(passed) <= rate * (elapsed + 0.02) + 5 * PIECE_BYTES
    assert max(passed) - min(passed) <= 2 * PIECE_BYTES


async def got(session, url, **headers):
    async with session.get(url, headers=headers) as response:
        return response, await response.read()


async def test_every_file_of_the_catalogue_is_served_right_and_counted_once(session, manager, manager_url):
    _, told = await got(session, manager_url + CATALOGUE_PATH)
    catalogue = CATALOGUE_JSON.validate_json(told)
    assert catalogue == manager.catalogue
    offered = [file for stream in catalogue.streams for file in (stream.full, *stream.deltas)]
    for file in [*offered, catalogue.content_info]:
        response, body = await got(session, manager_url + file.path)
        assert response.status == 200
        assert (len(body), xxhash.xxh3_128_hexdigest(body)) == (file.length, file.digest)
        assert response.headers["ETag"] == file.etag
        assert "Last-Modified" in response.headers
    counts = manager.counts
    assert counts.sent_bytes == sum(file.length for file in offered) + catalogue.content_info.length
    assert (counts.requests, counts.sending, counts.refetched) == (len(offered) + 1, 0, 0)
    assert {counts.files[file.path].fetches for file in offered} == {1}
    assert counts.files[catalogue.content_info.path].kind is Kind.INDEX
    response, _ = await got(session, manager_url + COUNTS_PATH)
    assert (await response.json())["sent_bytes"] == counts.sent_bytes


async def test_range_head_condition_and_absence(session, manager, manager_url):
    full = manager.catalogue.streams[0].full
    url = manager_url + full.path
    async with session.head(url) as response:
        assert response.content_length == full.length
    response, tail = await got(session, url, **{"Range": "bytes=100-", "If-Range": full.etag})
    assert response.status == 206
    assert response.headers["Content-Range"] == f"bytes 100-{full.length - 1}/{full.length}"
    assert (await got(session, manager_url + full.path.lower()))[1][100:] == tail
    response, body = await got(session, url, **{"If-None-Match": full.etag})
    assert (response.status, body) == (304, b"")
    response, _ = await got(session, url, Range=f"bytes={full.length}-")
    assert (response.status, response.headers["Content-Range"]) == (416, f"bytes */{full.length}")
    response, absent = await got(session, manager_url + "/content/nothing")
    assert response.status == 404
    counts, row = manager.counts, manager.counts.files[full.path]
    assert (row.fetches, row.not_modified) == (2, 1)
    assert row.sent_bytes == 2 * full.length - 100
    assert counts.sent_bytes == row.sent_bytes + len(absent)
    assert (counts.not_found, counts.refetched) == (1, 1)


async def test_publishing_on_request_moves_the_streams_in_turn(session, manager, manager_url):
    before = manager.catalogue
    for at in range(len(before.streams)):
        async with session.post(manager_url + PUBLISH_PATH, params={"streams": "1"}) as response:
            after = CATALOGUE_JSON.validate_json(await response.read())
        moved = [new.newest != old.newest for new, old in zip(after.streams, before.streams, strict=True)]
        assert moved == [number <= at for number in range(len(moved))]
        assert after.serial == before.serial + at + 1
    assert after.streams[0].delta_from(before.streams[0].newest) is not None
    assert after.streams[0].delta_from(after.streams[0].revisions[0]) is None
    async with session.post(manager_url + PUBLISH_PATH, params={"streams": "-1"}) as response:
        assert response.status == 400


async def test_old_publications_are_withdrawn_and_leave_the_disk_but_not_the_verdict(
    session, manager, manager_url, tmp_path
):
    full = manager.catalogue.streams[0].full
    for _ in range(2):
        await got(session, manager_url + full.path)
    for _ in range(KEEP_PUBLICATIONS - 1):
        await manager.publish()
    most = sum(path.is_file() for path in tmp_path.rglob("*"))
    assert full.path in manager.counts.files
    await manager.publish()
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == most
    assert full.path not in manager.counts.files
    assert (await got(session, manager_url + full.path))[0].status == 404
    assert manager.counts.refetched == 1


async def test_all_connections_share_the_wan(session, tmp_path):
    rate = 1_000_000
    manager = Manager(tmp_path / "manager", 1, content.streams(1, 60_000), Link(rate))
    await manager.publish()
    async with manager.listening("127.0.0.1", 0) as url:
        begin = time.monotonic()
        deltas = manager.catalogue.streams[0].deltas[:2]
        bodies = await asyncio.gather(*(got(session, url + delta.path) for delta in deltas))
        elapsed = time.monotonic() - begin
    assert rate * 0.4 < sum(len(body) for _, body in bodies) / elapsed < rate * 1.1


async def test_the_index_does_not_wait_for_the_fulls_of_a_full_link(session, tmp_path):
    manager = Manager(tmp_path / "manager", 1, content.streams(1, 400_000), Link(100_000))
    await manager.publish()
    async with manager.listening("127.0.0.1", 0) as url, asyncio.TaskGroup() as tasks:
        full = manager.catalogue.streams[0].full
        fulls = [tasks.create_task(got(session, url + full.path)) for _ in range(24)]
        while manager.counts.sending < len(fulls) or not manager.counts.sent_bytes:  # noqa: ASYNC110 - figures
            await asyncio.sleep(0.01)
        begin = quiet_clock()
        _, index = await got(session, url + CONTENT_INFO_PATH)
        assert index
        assert quiet_clock() - begin < 2, "24 pieces take 3.9 s"
        for task in fulls:
            task.cancel()


async def test_faults_happen_to_a_share_of_the_requests_and_are_counted(session, tmp_path):
    faults = Faults(errors=0.25, cuts=0.25, wrong=0.25, delay_seconds=0.001)
    manager = Manager(tmp_path / "manager", 1, content.streams(1, 60_000), Link(0), faults)
    await manager.publish()
    found = Counter()
    async with manager.listening("127.0.0.1", 0) as url:
        full = manager.catalogue.streams[0].full
        for _ in range(200):
            try:
                response, body = await got(session, url + full.path)
            except aiohttp.ClientError:
                found["cut"] += 1
                continue
            right = xxhash.xxh3_128_hexdigest(body) == full.digest
            assert right or response.status == 503 or len(body) == full.length
            found["right" if right else response.status] += 1
    assert found.total() == 200
    assert all(20 < found[what] < 100 for what in (503, 200, "cut", "right"))
    # of a body that was to be cut and changed only the cut is seen
    assert manager.counts.faults >= found[503] + found["cut"] + found[200]


async def test_sizes_are_those_that_were_asked_for(tmp_path):
    manager = Manager(tmp_path / "manager", 1, content.streams(2, 50_000, 1000), Link(0))
    await manager.publish()
    deltas = [delta.length for stream in manager.catalogue.streams for delta in stream.deltas]
    assert all(500 <= length <= 1500 for length in deltas)
    assert len(set(deltas)) > 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_process_says_where_it_listens_and_stops_when_told(number, tmp_path):
    arguments = ["--listen", "127.0.0.1:0", "--wan-rate", "0", "--publish-interval", "200ms"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gup", "simulate", "manager", *arguments, "--full-size", "10kB"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    with process:
        try:
            line = process.stderr.readline()
            assert line.startswith("simulated manager: serving on http://127.0.0.1:")
            process.send_signal(number)
            assert process.wait(10) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_is_taken_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"127.0.0.1:{port}"):
            simulate_manager("127.0.0.1", port, seed=1, wan_rate_bytes_per_second=0,
                             publish_interval_seconds=0, products=1, full_bytes=1000)  # fmt: skip
    assert list(tmp_path.iterdir()) == []
