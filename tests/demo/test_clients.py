"""Simulated clients: their downloads, polls and figures."""

import asyncio
import json
import random
from collections import Counter
from copy import deepcopy

import pytest
from aiohttp import web

from gup.content.key import Kind
from gup.demo import clients as simulated
from gup.demo.clients import (
    MAX_COMPLAINTS,
    Client,
    Crowd,
    Download,
    Figures,
    Latencies,
    Outcome,
    Policy,
    cache_result,
    new_session,
)
from gup.demo.content import CATALOGUE_JSON, PublishedFile, PublishedStream, digest_of

BODY = random.Random(1).randbytes(300_000)
FILE = PublishedFile("/content/{A}/1/full.zip", Kind.FULL, len(BODY), digest_of(BODY))


class Server:
    """Answers GET /content/… by a script of handlers, one a request; the last one goes on."""

    def __init__(self, *script):
        self.script = list(script)
        self.asked = []

    async def answer(self, request):
        self.asked.append(request.headers.copy())
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return await step(request)


@pytest.fixture
async def serve():
    runners = []

    async def start(*script):
        server = Server(*script)
        application = web.Application()
        application.router.add_get("/content/{rest:.*}", server.answer)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
        await runner.setup()
        runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return server

    yield start
    for runner in runners:
        await runner.cleanup()


def with_body(body, status=200, **headers):
    async def step(_request):
        return web.Response(body=body, status=status, headers={"ETag": '"a"', **headers})

    return step


def with_status(status):
    return with_body(b"no", status=status)


async def cut_short(request):
    """Announces everything, sends a third, breaks the connection."""
    response = web.StreamResponse(headers={"ETag": '"a"'})
    response.content_length = len(BODY)
    await response.prepare(request)
    await response.write(BODY[:100_000])
    request.transport.close()
    return response


async def the_rest(request):
    start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    headers = {"ETag": '"a"', "Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"}
    return web.Response(status=206, body=BODY[start:], headers=headers)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(simulated, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(simulated, "_LONGEST_PAUSE_SECONDS", 0.002)


async def download(session, server, **options):
    figures = Figures()
    return await Download(session, server.url, FILE, figures, **options).run(), figures


async def test_right_bytes_are_right(session, serve):
    outcome, figures = await download(session, await serve(with_body(BODY)), client="me")
    assert outcome is Outcome.RIGHT
    assert (figures.received_bytes, figures.downloads[Kind.FULL], figures.wrong) == (len(BODY), 1, 0)
    assert figures.time_to_first_byte.count == 1


@pytest.mark.parametrize(
    "body",
    [BODY[:200_000] + bytes([BODY[200_000] ^ 1]) + BODY[200_001:], BODY[:-1], BODY + b"x", b""],
    ids=["one bit", "short", "long", "empty"],
)
async def test_wrong_bytes_are_found(session, serve, body):
    outcome, figures = await download(session, await serve(with_body(body)))
    assert outcome is Outcome.WRONG
    assert (figures.wrong, figures.downloads[Kind.FULL]) == (1, 0)
    assert FILE.path in figures.complaints[0]


async def test_a_cut_body_is_resumed_where_it_stopped(session, serve):
    server = await serve(cut_short, the_rest)
    outcome, figures = await download(session, server)
    assert outcome is Outcome.RIGHT
    assert (figures.resumes, figures.retries) == (1, 1)
    assert server.asked[1]["If-Range"] == '"a"'
    assert figures.received_bytes == len(BODY)


async def test_a_client_that_breaks_off_resumes_too(session, serve):
    server = await serve(with_body(BODY), the_rest)
    outcome, figures = await download(session, server, cut_after_bytes=50_000)
    assert outcome is Outcome.RIGHT
    assert (figures.resumes, figures.retries) == (1, 0)
    assert int(server.asked[1]["Range"].removeprefix("bytes=").removesuffix("-")) >= 50_000


async def test_a_changed_body_is_taken_from_the_start(session, serve):
    outcome, figures = await download(session, await serve(cut_short, with_body(BODY)))
    assert outcome is Outcome.RIGHT
    assert figures.resumes == 0


async def test_another_range_than_asked_for_is_wrong(session, serve):
    other = with_body(BODY[5:], status=206, **{"Content-Range": f"bytes 5-{len(BODY) - 1}/{len(BODY)}"})
    outcome, figures = await download(session, await serve(cut_short, other))
    assert outcome is Outcome.WRONG
    assert figures.wrong == 1


async def test_overload_is_waited_out(session, serve):
    outcome, figures = await download(
        session, await serve(with_status(503), with_status(502), with_body(BODY))
    )
    assert outcome is Outcome.RIGHT
    assert figures.retries == 2


async def test_absence_failure_and_no_answer_are_told_apart(session, serve):
    assert (await download(session, await serve(with_status(404))))[0] is Outcome.GONE
    outcome, figures = await download(session, await serve(with_status(403)))
    assert (outcome, figures.failed) == (Outcome.FAILED, 1)
    server = await serve(with_status(503))
    outcome, figures = await download(session, server)
    assert (outcome, figures.failed) == (Outcome.FAILED, 1)
    assert len(server.asked) == figures.requests == 8


async def test_an_unchanged_copy_is_not_sent_again(session, serve):
    server = await serve(with_body(b"", status=304))
    outcome, figures = await download(session, server, held_etag='"a"')
    assert (outcome, figures.not_modified, figures.received_bytes) == (Outcome.RIGHT, 1, 0)
    assert server.asked[0]["If-None-Match"] == '"a"'


async def with_crowd(manager_url, change=None, url=None, count=12, when=lambda _: False):
    """A crowd at work until `when` holds or nobody lacks anything; returns crowd and figures."""
    async with new_session(count) as session:
        policy = Policy(session, manager_url)
        await policy.refresh()
        crowd = Crowd(session, url or manager_url, policy, count=count, seed=1, poll_seconds=0.05)
        running = asyncio.create_task(crowd.run())
        if change is not None:
            await change(crowd, policy)
        await until(lambda: when(crowd.figures) or up_to_date(crowd, policy.catalogue))
        crowd.stop()
        await running
        return crowd, policy


async def until(condition):
    """The crowd tells nobody when it has what it wants, so the test looks."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the condition is a look at plain figures
            await asyncio.sleep(0.01)


def up_to_date(crowd, catalogue):
    newest = {stream.moniker: stream.newest for stream in catalogue.streams}
    return all(
        client.content_info_etag and all(newest[moniker] == held for moniker, held in client.held.items())
        for client in crowd._clients
    )


async def test_a_crowd_brings_itself_up_to_date(site, manager_url):
    crowd, _ = await with_crowd(manager_url, count=30)
    figures = crowd.figures
    assert (figures.wrong, figures.failed, figures.gone) == (0, 0, 0)
    assert figures.downloads[Kind.DELTA] > figures.downloads[Kind.FULL] > 0
    assert figures.downloads[Kind.INDEX] == 30
    assert deepcopy(site.counts).sent_bytes >= figures.received_bytes > 0


async def test_a_rung_crowd_polls_at_once(site, manager_url):
    async def herd(crowd, policy):
        await until(lambda: up_to_date(crowd, policy.catalogue))
        crowd.poll_seconds = 3600
        crowd.ring()
        await site.publish(4)
        await policy.refresh()
        crowd.ring()

    before = deepcopy(site.counts)
    crowd, policy = await with_crowd(manager_url, herd)
    assert up_to_date(crowd, policy.catalogue)
    assert policy.catalogue.serial == 2
    assert before.sent_bytes == 0


async def test_a_crowd_finds_one_wrong_byte(session, manager_url, serve):
    async def corrupting(request):
        async with session.get(manager_url + request.path) as response:
            body = bytearray(await response.read())
        if request.path.endswith(".dax"):
            body[-1] ^= 1
        return web.Response(body=bytes(body), headers={"ETag": '"a"'})

    server = await serve(corrupting)
    crowd, _ = await with_crowd(manager_url, url=server.url, when=lambda figures: figures.wrong)
    assert crowd.figures.wrong > 0
    assert all("other bytes" in complaint for complaint in crowd.figures.complaints)


async def test_clients_that_hang_are_given_up(manager_url, serve, monkeypatch):
    monkeypatch.setattr(simulated, "_FINISH_SECONDS", 0.1)
    arrived, released = asyncio.Event(), asyncio.Event()

    async def hang(_request):
        arrived.set()
        await released.wait()
        raise ConnectionResetError  # nobody is there to answer any more

    server = await serve(hang)
    crowd, _ = await with_crowd(manager_url, url=server.url, count=2, when=lambda _: arrived.is_set())
    released.set()
    assert crowd.figures.failed >= 1


async def test_what_clients_take_and_want(shelf, site):  # noqa: ARG001 - the site publishes
    catalogue = CATALOGUE_JSON.validate_json(shelf.catalogue_json)
    stream = catalogue.streams[0]
    crowd = [Client(number, random.Random(f"1/{number}")) for number in range(2000)]
    takers = [client for client in crowd if client.takes(stream)]
    assert 0.5 < len(takers) / len(crowd) < 0.7
    assert [client for client in crowd if client.takes(stream)] == takers
    wanted = Counter(file.kind if (file := client.wants(stream)) else None for client in takers)
    assert wanted[Kind.DELTA] > wanted[None] > wanted[Kind.FULL] > 0


async def test_clients_take_patches_of_their_own_language_only():
    client = Client(1, random.Random(3))
    stream = PublishedStream("{X}", "Client Patch", "Klingon", ("1", "2"), FILE, ())
    assert not client.takes(stream)
    stream = PublishedStream("{X}", "Client Patch", client.language, ("1", "2"), FILE, ())
    assert client.takes(stream)
    client.held["{X}"] = "1"
    assert client.wants(stream) == FILE
    client.held["{X}"] = "2"
    assert client.wants(stream) is None


def test_the_command_reports_and_fails_without_a_catalogue(capsys):
    status = simulated.simulate_clients(
        url="http://127.0.0.1:9", count=1, seconds=0.1, seed=1, json_output=True
    )
    assert status == 3
    assert "no catalogue" in capsys.readouterr().err


async def test_the_command_runs_its_clients(manager_url, capsys):
    status = await asyncio.to_thread(
        simulated.simulate_clients, url=manager_url, count=3, seconds=3, seed=1, json_output=True
    )
    document = json.loads(capsys.readouterr().out)
    assert (status, document["wrong"], document["failed"]) == (0, 0, 0)
    assert document["received_bytes"] > 0


def test_quantiles_are_within_a_step_of_the_truth():
    latencies = Latencies()
    chance = random.Random(7)
    durations = sorted(chance.lognormvariate(-6, 2) for _ in range(5000))
    for duration in durations:
        latencies.add(duration)
    assert latencies.count == 5000
    for share in (0.01, 0.5, 0.99, 1.0):
        truth = durations[max(1, round(share * 5000)) - 1]
        assert latencies.quantile(share) == pytest.approx(truth, rel=0.025)


def test_extremes_stay_in_bounds():
    latencies = Latencies()
    assert latencies.quantile(0.5) is None
    latencies.add(0.0)
    assert latencies.quantile(0.5) == pytest.approx(1e-5)
    latencies.add(1e9)
    assert 500 < latencies.quantile(1.0) < 700


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
        figures.complain(str(number))
    assert figures.complaints == [str(number) for number in range(MAX_COMPLAINTS)]


def test_hits_are_timed_apart():
    figures = Figures()
    figures.answered(0.001, "gup; hit")
    figures.answered(1.0, "gup; fwd=uri-miss; stored")
    assert figures.hit_time_to_first_byte.count == 1
    assert figures.time_to_first_byte.count == 2
