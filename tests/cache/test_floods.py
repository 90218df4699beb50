"""What one client asks for in floods: asked of upstream once, remembered, and bounded for each address."""

import asyncio

import pytest
from harness.caches import path_of, route, working
from harness.content import noise
from harness.upstreams import Answer, Gate

from gup.content.key import Variant
from gup.errors import Problem

FILE = path_of("full.dax")
BODY = noise("flood", 5000)
NAMES = [path_of("full.dax", f"2608{number:05}") for number in range(40)]


def head(worker, path: str, client: str = "10.0.0.1", passed: tuple[str, ...] = ()):
    return worker.cache.head(route(path), Variant(), passed, client)


async def test_heads_of_one_missing_key_are_one_request(tmp_path, upstream):
    gate = Gate()
    upstream.answer(FILE, Answer(BODY, etag='"a"', head_gate=gate))
    upstream.answer(NAMES[0], Answer(BODY))
    async with working(tmp_path, [upstream.url]) as one:
        asking = [asyncio.create_task(head(one, FILE)) for _ in range(50)]
        await asyncio.to_thread(gate.wait_reached)
        await head(one, NAMES[0])  # looked for on disk after all of those
        gate.open()
        heads = await asyncio.gather(*asking)
        assert {found[0].length for found in heads} == {len(BODY)}
        assert len(upstream.requests(FILE, method="HEAD")) == 1
        await asyncio.gather(*(head(one, FILE, passed=("other",)) for _ in range(3)))
    assert len(upstream.requests(FILE, method="HEAD")) == 4, "other gups may be waiting for this one"
    assert upstream.requests(FILE) == []


@pytest.mark.parametrize(
    ("answer", "slug"),
    [(Answer(b"", 404), "upstream-not-found"), (Answer(b"", 500), "upstream-error")],
)
async def test_the_failure_of_a_head_is_remembered_in_all_processes(tmp_path, upstream, answer, slug):
    upstream.answer(FILE, answer)
    async with working(tmp_path, [upstream.url]) as one, working(tmp_path, [upstream.url]) as two:
        for worker in (one, two, one):
            with pytest.raises(Problem) as told:
                await head(worker, FILE)
            assert told.value.slug == slug
        with pytest.raises(Problem):
            await two.open(FILE)
        assert len(upstream.requests(FILE, method="HEAD")) == 1
        assert upstream.requests(FILE) == []
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["claims"]


async def test_a_client_that_leaves_takes_no_head_from_the_others(tmp_path, upstream):
    upstream.answer(FILE, Answer(BODY, etag='"a"'))
    async with working(tmp_path, [upstream.url]) as one:
        first, second = (asyncio.create_task(head(one, FILE)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second)[0].length == len(BODY)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_address_has_so_many_misses_a_second_and_what_is_stored_is_served(
    tmp_path, upstream, until, method
):
    upstream.answer(FILE, Answer(BODY, etag='"a"'))
    async with working(tmp_path, [upstream.url], clients={"max_misses_per_address": 5}) as one:
        assert await one.get(FILE) == BODY
        await until(lambda: not one.cache.fills, "the fill ends")
        one.cache._entries.clear()
        now = one.dependencies.clock()
        one.dependencies.clock = lambda: now

        async def ask(path: str, client: str) -> str:
            try:
                if method == "HEAD":
                    await head(one, path, client)
                else:
                    (await one.cache.open(route(path), Variant(), (), client)).body.leave()
            except Problem as problem:
                return problem.slug
            return "ok"

        told = [await ask(path, "10.0.0.1") for path in NAMES]
        assert told == ["upstream-not-found"] * 5 + ["overloaded"] * 35
        assert await ask(FILE, "10.0.0.1") == "ok", "it is here"
        assert await ask(NAMES[0], "10.0.0.1") == "upstream-not-found", "it is known"
        assert await ask(NAMES[20], "10.0.0.2") == "upstream-not-found", "another address"
        now += 1.0
        assert await ask(NAMES[21], "10.0.0.1") == "upstream-not-found", "another second"
