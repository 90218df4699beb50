"""Bodies that end with their connection: passed on, without an end that nobody knows, and never stored."""

import pytest
from harness.caches import Cut, path_of, read, route, working
from harness.content import noise, zip_of
from harness.upstreams import Over, RawUpstream, Request, ok

from gup.cache.catalog_cache import read_catalogue
from gup.cache.open_entries import Result
from gup.content.key import Variant
from gup.errors import Problem
from gup.upstream.download import fetch_catalogue
from gup.upstream.exchange import UpstreamFailure

SLUG = "upstream-unsure-end"
SMALL, LARGE = noise("small", 2000), noise("large", 3_000_000)
CASES = {
    "delta": (path_of("xdelta260801001_To_260801002.dax"), LARGE),
    "small delta": (path_of("xdelta260801001_To_260801002.dax"), SMALL),
    "full": (path_of("full.zip"), zip_of("unsure", 3_000_000)),
    "full.dax": (path_of("full.dax"), LARGE),
    "index": ("/content/ContentInfo.txt", SMALL),
}


def until_it_closes(body: bytes, told: int | None = None, *, ranges: bool = True):
    """Answers of HTTP/1.0: only a HEAD tells a length, if `told`; a GET that is asked for a range has one."""

    def answer(talk: Request) -> None:
        wanted = talk.header("range") or ""
        if talk.method == "HEAD":
            length = f"Content-Length: {told}\r\n" if told is not None else ""
            talk.send(f"HTTP/1.0 200 OK\r\n{length}\r\n".encode())
        elif wanted and ranges and told is not None:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            span = f"Content-Range: bytes {start}-{told - 1}/{told}\r\nContent-Length: {told - start}"
            talk.send(f"HTTP/1.0 206 Part\r\n{span}\r\n\r\n".encode() + WHOLE[start:told])
        else:
            talk.send(b"HTTP/1.0 200 OK\r\n\r\n" + body)
        raise Over

    return answer


WHOLE = LARGE


def methods(upstream: RawUpstream) -> list[str]:
    """Of all requests. A HEAD sent again counts once: aiohttp does that when the connection ends too soon."""
    seen = [request.method for request in upstream.seen]
    return [method for number, method in enumerate(seen) if seen[:number][-1:] != ["HEAD"] or method == "GET"]


@pytest.mark.parametrize(("path", "body"), CASES.values(), ids=CASES.keys())
async def test_all_that_came_is_passed_on_and_nothing_is_stored(tmp_path, until, path, body):
    with RawUpstream(until_it_closes(body)) as upstream:
        async with working(tmp_path, [upstream.url], cache={"error_ttl": "50ms"}) as one:
            for asked in (1, 2):
                opened = await one.open(path)
                assert opened.body.end() is None
                with pytest.raises(Cut) as cut:
                    await read(opened.body)
                assert cut.value.args[0] == body
                opened.body.leave()
                await until(lambda: not one.cache.fills, "the fill ends")
                gets = [request.method for request in upstream.seen if request.method == "GET"]
                assert len(gets) == asked, "each request that comes later asks anew, once"
                assert {row["problem"] for row in one.told if row["type"] == "failed"} == {SLUG}
                await until(lambda: not one.failed(path), "the failure has passed")
    assert not [found for found in (tmp_path / "content").rglob("*") if found.is_file()]
    assert not list((tmp_path / "partial").glob("*.part"))


@pytest.mark.parametrize(("path", "body"), CASES.values(), ids=CASES.keys())
async def test_a_head_that_tells_the_same_length_confirms_the_end(tmp_path, until, path, body):
    with RawUpstream(until_it_closes(body, len(body))) as upstream:
        async with working(tmp_path, [upstream.url]) as one:
            assert await one.get(path) == body
            await until(lambda: not one.cache.fills, "the fill ends")
            stored = await one.open(path)
            assert (stored.result, stored.body.head.length) == (Result.HIT, len(body))
            stored.body.leave()
    assert methods(upstream) == ["GET", "HEAD"]


async def test_a_body_that_stops_at_half_is_gone_on_with_when_a_head_tells_its_length(tmp_path, until):
    path = CASES["full.dax"][0]
    with RawUpstream(until_it_closes(LARGE[:1_500_000], len(LARGE))) as upstream:
        async with working(tmp_path, [upstream.url]) as one:
            assert await one.get(path) == LARGE
            await until(lambda: not one.cache.fills, "the fill ends")
            assert (await one.open(path)).result is Result.HIT
    assert methods(upstream) == ["GET", "HEAD", "GET"]


async def test_more_than_a_head_tells_is_refused(tmp_path):
    with RawUpstream(until_it_closes(LARGE, len(LARGE) - 1)) as upstream:
        async with working(tmp_path, [upstream.url]) as one:
            opened = await one.open(CASES["full.dax"][0])
            with pytest.raises(Cut) as cut:
                await read(opened.body)
            assert len(cut.value.args[0]) <= len(LARGE) - 4096, "the end is withheld: it was found wrong"
            opened.body.leave()


async def test_a_stale_index_is_better_than_one_of_unsure_end(tmp_path, until):
    index = "/content/ContentInfo.txt"
    with RawUpstream(lambda talk: talk.send(ok(b"first"))) as upstream:
        async with working(tmp_path, [upstream.url], cache={"index_ttl": "50ms"}) as one:
            assert await one.get(index) == b"first"
            await until(lambda: not one.cache.fills, "the fill ends")
            upstream.reply = until_it_closes(b"second")
            first = await one.open(index)
            await until(
                lambda: one.dependencies.wall_clock() - first.entry.record.validated_at > 0.1, "it is stale"
            )
            opened = await one.open(index)
            assert opened.result is Result.STALE
            assert await read(opened.body) == b"first"


async def test_what_is_passed_through_shows_the_same_doubt(tmp_path):
    """Too large to be stored: passed through to one client after the other."""
    path = CASES["full.dax"][0]
    with RawUpstream(until_it_closes(LARGE)) as upstream:
        async with working(tmp_path, [upstream.url], cache={"max_size": "1MB"}) as one:
            opened = await one.open(path)
            with pytest.raises(Cut) as cut:
                await read(opened.body)
            assert cut.value.args[0] == LARGE
            opened.body.leave()
            alone = await one.cache.pass_through.whole(route(path), opened.key.variant, ())
            with pytest.raises(Cut) as cut:
                await read(alone.body)
            assert cut.value.args[0] == LARGE
            alone.body.leave()


async def test_a_catalogue_of_unsure_end_is_not_believed(tmp_path):
    with RawUpstream(until_it_closes(SMALL)) as upstream:
        async with working(tmp_path, [upstream.url]) as one:
            with pytest.raises(UpstreamFailure, match="to confirm the end"):
                await fetch_catalogue(one.dependencies.pool, "u0", None, None)
            with pytest.raises(Problem, match="broke off"):
                await read_catalogue(one.cache.open, Variant())
            upstream.reply = until_it_closes(SMALL, len(SMALL))
            assert (await fetch_catalogue(one.dependencies.pool, "u0", None, None)).text == SMALL
