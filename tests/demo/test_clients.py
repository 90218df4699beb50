"""Simulated clients: their downloads, polls and figures."""

import asyncio
import json
import random
from collections import Counter

import pytest
import xxhash
from aiohttp import web
from harness.upstreams import Answer, Gate, ScriptedUpstream

from gup.content.key import Kind
from gup.demo import clients as simulated
from gup.demo.clients import (
    MAX_COMPLAINTS,
    Crowd,
    Download,
    Figures,
    Latencies,
)
from gup.demo.content import CONTENT_INFO_PATH, PublishedFile, PublishedStream
from gup.demo.machine import Client, cache_result

BODY = random.Random(1).randbytes(300_000)
PATH = "/content/{A}/1/full.zip"
FILE = PublishedFile(PATH, Kind.FULL, len(BODY), xxhash.xxh3_128_hexdigest(BODY), 0.0)
RIGHT = Answer(BODY, etag='"a"')
CUT = Answer(BODY, etag='"a"', close_at=100_000)


@pytest.fixture
def upstream():
    with ScriptedUpstream() as upstream:
        yield upstream


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(simulated, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(simulated, "_LONGEST_PAUSE_SECONDS", 0.002)


async def download(session, upstream, *answers, **options):
    """Whether it was right, and the figures."""
    figures = Figures()
    upstream.answer(PATH, *answers)
    return await Download(session, upstream.url, FILE, figures, **options).run(), figures


async def test_right_bytes_are_right(session, upstream):
    right, figures = await download(session, upstream, RIGHT, client="me")
    assert right
    assert (figures.received_bytes, figures.downloads[Kind.FULL], figures.wrong) == (len(BODY), 1, 0)
    assert figures.time_to_first_byte.quantile(1.0) is not None
    assert upstream.requests(PATH)[0].header("user-agent") == "me"


@pytest.mark.parametrize(
    "body",
    [BODY[:200_000] + bytes([BODY[200_000] ^ 1]) + BODY[200_001:], BODY[:-1], BODY + b"x", b""],
    ids=["one bit", "short", "long", "empty"],
)
async def test_wrong_bytes_are_found(session, upstream, body):
    right, figures = await download(session, upstream, Answer(body))
    assert not right
    assert (figures.wrong, figures.downloads[Kind.FULL]) == (1, 0)
    assert FILE.path in figures.complaints[0]


async def test_a_cut_body_is_resumed_where_it_stopped(session, upstream):
    right, figures = await download(session, upstream, CUT, RIGHT)
    assert right
    assert (figures.resumes, figures.retries, figures.received_bytes) == (1, 1, len(BODY))
    assert upstream.requests(PATH)[1].header("if-range") == '"a"'


async def test_a_client_that_breaks_off_resumes_too(session, upstream):
    right, figures = await download(session, upstream, RIGHT, cut_after_bytes=50_000)
    assert right
    assert (figures.resumes, figures.retries) == (1, 0)
    asked = upstream.requests(PATH)[1].header("range")
    assert int(asked.removeprefix("bytes=").removesuffix("-")) >= 50_000


@pytest.mark.parametrize(
    ("answers", "right", "counted"),
    [
        (
            [CUT, Answer(BODY, etag='"b"')],
            True,
            {"resumes": 0, "retries": 1},
        ),  # a changed body: from its start
        ([CUT, Answer(BODY, etag='"a"', range_shift=5)], False, {"wrong": 1}),  # not the range asked for
        ([Answer(status=503), Answer(status=502), RIGHT], True, {"retries": 2}),
        ([Answer(status=404)], False, {"gone": 1, "failed": 0, "requests": 1}),
        ([Answer(status=403)], False, {"failed": 1, "requests": 1}),
        ([Answer(status=503)], False, {"failed": 1, "requests": 8}),
    ],
)
async def test_how_else_a_download_goes(session, upstream, answers, right, counted):
    found, figures = await download(session, upstream, *answers)
    assert found is right
    assert {name: getattr(figures, name) for name in counted} == counted


async def test_an_unchanged_copy_is_not_sent_again(session, upstream):
    right, figures = await download(session, upstream, RIGHT, held_etag='"a"')
    assert (right, figures.not_modified, figures.received_bytes) == (True, 1, 0)


async def with_crowd(manager, url, change=None, count=12, when=lambda _: False):
    """A crowd at work until `when` holds or nobody lacks anything."""
    crowd = Crowd(url, manager.catalogue, count=count, seed=1, poll_seconds=0.05)
    running = asyncio.create_task(crowd.run())
    if change is not None:
        await change(crowd)
    await until(lambda: when(crowd.figures) or up_to_date(crowd))
    crowd.stop()
    await running
    return crowd


async def until(condition):
    """The crowd tells nobody when it has what it wants, so the test looks."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the condition is a look at plain figures
            await asyncio.sleep(0.01)


def up_to_date(crowd):
    newest = {stream.moniker: stream.newest for stream in crowd.catalogue.streams}
    return all(
        client.content_info_etag and all(newest[moniker] == held for moniker, held in client.held.items())
        for client in crowd._clients
    )


async def test_a_crowd_brings_itself_up_to_date(manager, manager_url):
    figures = (await with_crowd(manager, manager_url, count=30)).figures
    assert figures.right
    assert figures.gone == 0
    assert figures.downloads[Kind.DELTA] > figures.downloads[Kind.FULL] > 0
    assert figures.downloads[Kind.INDEX] == 30
    assert manager.counts.sent_bytes >= figures.received_bytes > 0


async def test_each_client_of_a_cache_on_this_machine_has_an_address_of_its_own(manager):
    peers = set()

    async def seen(request):
        peers.add(request.remote)
        return web.Response(body=b"")

    application = web.Application()
    application.router.add_get("/{rest:.*}", seen)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    crowd = Crowd(f"http://127.0.0.1:{port}", manager.catalogue, count=300, seed=1, poll_seconds=0.05)
    running = asyncio.create_task(crowd.run())
    await until(lambda: len(peers) == 300)
    crowd.stop()
    await running
    await runner.cleanup()
    assert "127.0.0.1" not in peers


async def test_a_rung_crowd_polls_at_once(manager, manager_url):
    async def herd(crowd):
        await until(lambda: up_to_date(crowd))
        crowd.poll_seconds = 3600
        crowd.ring()
        await manager.publish()
        crowd.catalogue = manager.catalogue
        assert not up_to_date(crowd)
        crowd.ring()

    crowd = await with_crowd(manager, manager_url, herd)
    assert up_to_date(crowd)
    assert crowd.catalogue.serial == 2


async def test_a_crowd_finds_one_wrong_byte(manager, manager_url, tmp_path):
    for stream in manager.catalogue.streams:
        for delta in stream.deltas:
            file = tmp_path / "manager" / delta.path[1:]
            body = file.read_bytes()
            file.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    crowd = await with_crowd(manager, manager_url, when=lambda figures: figures.wrong)
    assert crowd.figures.wrong > 0
    assert not crowd.figures.right
    assert all("other bytes" in complaint for complaint in crowd.figures.complaints)


async def test_clients_that_hang_are_given_up(manager, upstream, monkeypatch):
    monkeypatch.setattr(simulated, "_FINISH_SECONDS", 0.1)
    gate = Gate()
    upstream.answer(CONTENT_INFO_PATH, Answer(b"", head_gate=gate))
    crowd = await with_crowd(manager, upstream.url, count=2, when=lambda _: gate.is_reached)
    gate.open()
    assert crowd.figures.failed >= 1


async def test_what_clients_take_and_want(manager):
    stream = manager.catalogue.streams[0]
    crowd = [Client(number, random.Random(f"1/{number}")) for number in range(2000)]
    takers = [client for client in crowd if client.takes(stream)]
    assert 0.5 < len(takers) / len(crowd) < 0.7
    assert [client for client in crowd if client.takes(stream)] == takers
    wanted = Counter(file.kind if (file := client.wants(stream)) else None for client in takers)
    assert wanted[Kind.DELTA] > wanted[None] > wanted[Kind.FULL] > 0


def test_clients_take_patches_of_their_own_language_only():
    client = Client(1, random.Random(3))
    stream = PublishedStream("{X}", "Client Patch", "Klingon", ("1", "2"), FILE, ())
    assert not client.takes(stream)
    stream = PublishedStream("{X}", "Client Patch", client.language, ("1", "2"), FILE, ())
    assert client.takes(stream)
    client.held["{X}"] = "1"
    assert client.wants(stream) == FILE
    client.held["{X}"] = "2"
    assert client.wants(stream) is None


def test_the_command_fails_without_a_catalogue(capsys):
    url = "http://127.0.0.1:9"
    assert simulated.simulate_clients(url, url, count=1, seconds=0.1, seed=1, json_output=True) == 3
    err = capsys.readouterr().err
    assert f"no catalogue at {url}/simulation/catalog" in err
    assert "--manager URL" in err


async def test_the_command_runs_its_clients(manager_url, capsys):
    def simulate():
        return simulated.simulate_clients(
            manager_url, manager_url, count=3, seconds=1.5, seed=1, json_output=True
        )

    status = await asyncio.to_thread(simulate)
    document = json.loads(capsys.readouterr().out)
    assert (status, document["wrong"], document["failed"]) == (0, 0, 0)
    assert document["received_bytes"] > 0
    assert document["downloads"]["index"] > 0


def test_the_summary_is_for_people():
    figures = Figures(requests=1200, received_bytes=3_000_000, not_modified=7, resumes=2)
    figures.downloads[Kind.DELTA] = 1000
    figures.answered(0.01, "gup; hit")
    figures.complain("failed", "/content/a: gave up")
    lines = list(figures.lines(30, 2.5))
    for line in (
        "clients       30 for 2.5 s",
        "requests      1,200; answers by cache result: 1 hit",
        "received      3.0 MB",
        "downloads     1,000 delta",
        "not modified  7",
        "resumed       2",
        "wrong         0 bodies that differ from what was published",
        "failed        1 downloads that were given up",
        "/content/a: gave up",
    ):
        assert line in lines
    assert "Nothing was downloaded" in list(Figures().lines(1, 1))[-1]


def test_quantiles_are_within_a_step_of_the_truth():
    latencies = Latencies()
    assert latencies.quantile(0.5) is None
    chance = random.Random(7)
    durations = sorted(chance.lognormvariate(-6, 2) for _ in range(5000))
    for duration in durations:
        latencies.add(duration)
    for share in (0.01, 0.5, 0.99, 1.0):
        truth = durations[max(1, round(share * 5000)) - 1]
        assert latencies.quantile(share) == pytest.approx(truth, rel=0.025)
    latencies.add(0.0)
    assert latencies.quantile(0.0) == pytest.approx(1e-5, rel=0.02)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (None, "none"),
        ("", "none"),
        ("gup; hit", "hit"),
        ("gup; hit; fwd=stale", "hit"),
        ("gup; fwd=uri-miss; stored", "miss"),
        ("gup; fwd=uri-miss; collapsed", "collapsed"),
    ],
)
def test_cache_status_is_read(value, word):
    assert cache_result(value) == word


def test_complaints_are_bounded():
    figures = Figures()
    for number in range(100):
        assert not figures.complain("failed", str(number))
    assert figures.complaints == [str(number) for number in range(MAX_COMPLAINTS)]
    assert figures.failed == 100
