"""The simulated management server, over HTTP and as a process."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from gup.content.key import Kind
from gup.demo.content import (
    CATALOGUE_JSON,
    CATALOGUE_PATH,
    COUNTS_JSON,
    COUNTS_PATH,
    PUBLISH_PATH,
    digest_of,
)
from gup.demo.manager import Link, ListenError, Listening, Site, simulate_manager
from gup.errors import SettingsError


async def catalogue_of(session, url):
    async with session.get(url + CATALOGUE_PATH) as response:
        return CATALOGUE_JSON.validate_json(await response.read())


async def counts_of(session, url):
    async with session.get(url + COUNTS_PATH) as response:
        return COUNTS_JSON.validate_json(await response.read())


async def test_every_file_of_the_catalogue_is_served_right_and_counted_once(session, manager_url):
    catalogue = await catalogue_of(session, manager_url)
    offered = [file for stream in catalogue.streams for file in (stream.full, *stream.deltas)]
    for file in [*offered, catalogue.content_info]:
        async with session.get(manager_url + file.path) as response:
            body = await response.read()
            assert response.status == 200
            assert (len(body), digest_of(body)) == (file.length, file.digest)
            assert response.headers["ETag"].startswith('"')
            assert "Last-Modified" in response.headers
    counts = await counts_of(session, manager_url)
    assert counts.sent_bytes == sum(file.length for file in offered) + catalogue.content_info.length
    assert counts.requests == len(offered) + 1
    assert counts.sending == 0
    assert {counts.files[file.path].fetches for file in offered} == {1}
    assert counts.files[catalogue.content_info.path].kind is Kind.INDEX


async def test_range_head_condition_and_absence(session, manager_url):
    full = (await catalogue_of(session, manager_url)).streams[0].full
    url = manager_url + full.path
    async with session.head(url) as response:
        etag = response.headers["ETag"]
        assert response.content_length == full.length
    async with session.get(url, headers={"Range": "bytes=100-", "If-Range": etag}) as response:
        tail = await response.read()
        assert response.status == 206
        assert response.headers["Content-Range"] == f"bytes 100-{full.length - 1}/{full.length}"
    async with session.get(url) as response:
        assert (await response.read())[100:] == tail
    async with session.get(url, headers={"If-None-Match": etag}) as response:
        assert (response.status, await response.read()) == (304, b"")
    async with session.get(url, headers={"Range": f"bytes={full.length}-"}) as response:
        assert response.status == 416
        assert response.headers["Content-Range"] == f"bytes */{full.length}"
    async with session.get(manager_url + "/content/nothing") as response:
        assert response.status == 404
        absent = await response.read()
    counts = await counts_of(session, manager_url)
    row = counts.files[full.path]
    assert (row.fetches, row.not_modified, row.other_requests) == (2, 1, 2)
    assert row.sent_bytes == 2 * full.length - 100
    assert counts.sent_bytes == row.sent_bytes + len(absent)
    assert counts.not_found == 1


async def test_publishing_on_request_moves_the_streams_in_turn(session, manager_url):
    before = await catalogue_of(session, manager_url)
    for at in range(len(before.streams)):
        async with session.post(manager_url + PUBLISH_PATH, params={"streams": "1"}) as response:
            after = CATALOGUE_JSON.validate_json(await response.read())
        moved = [new.newest != old.newest for new, old in zip(after.streams, before.streams, strict=True)]
        assert moved == [number <= at for number in range(len(moved))]
    async with session.post(manager_url + PUBLISH_PATH, params={"streams": "-1"}) as response:
        assert response.status == 400


async def test_withdrawn_files_keep_their_verdict_in_the_counts(session, site, manager_url):
    full = (await catalogue_of(session, manager_url)).streams[0].full
    for _ in range(2):
        async with session.get(manager_url + full.path) as response:
            await response.read()
    while (await counts_of(session, manager_url)).withdrawn_files == 0:
        await site.publish(4)
    counts = await counts_of(session, manager_url)
    assert full.path not in counts.files
    assert counts.withdrawn_fetched_again == 1
    assert counts.sent_bytes == 2 * full.length


async def test_all_connections_share_the_wan(session, shelf):
    rate = 1_000_000
    site = Site(shelf, Link(rate))
    await site.publish(2)
    async with Listening(site, "127.0.0.1:0") as listening:
        deltas = (await catalogue_of(session, listening.url)).streams[0].deltas

        async def fetch(file):
            async with session.get(listening.url + file.path) as response:
                return len(await response.read())

        begin = time.monotonic()
        total = sum(await asyncio.gather(*map(fetch, deltas)))
        elapsed = time.monotonic() - begin
    assert total / elapsed < rate * 1.1
    assert total / elapsed > rate * 0.4


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


GOOD = {
    "listen": "127.0.0.1:0",
    "seed": 1,
    "wan_rate_bytes_per_second": 0,
    "publish_interval_seconds": 0,
    "products": 1,
    "full_bytes": 1000,
}


@pytest.mark.parametrize(
    "change",
    [
        {"listen": "8014"},
        {"listen": "host:port"},
        {"listen": "127.0.0.1:70000"},
        {"products": 0},
        {"full_bytes": 0},
        {"wan_rate_bytes_per_second": -1},
        {"publish_interval_seconds": -1},
    ],
)
def test_arguments_out_of_range_are_told(change):
    with pytest.raises(SettingsError):
        simulate_manager(**GOOD | change)


def test_an_address_that_is_taken_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"127.0.0.1:{port}"):
            simulate_manager(**GOOD | {"listen": f"127.0.0.1:{port}"})
    assert list(tmp_path.iterdir()) == []
