"""A small body takes one step: two jobs in threads, two files, and nothing that another process polls."""

import asyncio

from harness.caches import path_of, read, route, working
from harness.content import noise
from harness.upstreams import Answer

from gup.cache.open_entries import Result
from gup.content.key import Variant

FILE = path_of("xdelta260801001_To_260801002.dax")
BODY = noise("small", 100_000)


async def jobs_of(worker, monkeypatch, work) -> int:
    """How many jobs `work` gives to threads."""
    jobs, submit = [], worker.dependencies.executor.submit

    def counted(*arguments):
        jobs.append(arguments)
        return submit(*arguments)

    monkeypatch.setattr(worker.dependencies.executor, "submit", counted)
    await work
    monkeypatch.undo()
    return len(jobs)


async def test_a_miss_is_two_jobs_and_leaves_body_and_record(tmp_path, upstream, monkeypatch, until):
    upstream.answer(FILE, Answer(BODY, etag='"a"'))
    async with working(tmp_path, [upstream.url]) as one:

        async def miss():
            opened = await one.open(FILE)
            assert (opened.result, opened.body.source) == (Result.MISS, "fill")
            assert one.dependencies.store.open_body(one.dependencies.store.load(opened.key)), (
                "stored before it is shown"
            )
            assert await read(opened.body) == BODY
            opened.body.leave()
            await until(lambda: not one.cache.fills, "the fill ends")

        assert await jobs_of(one, monkeypatch, miss()) == 2
        assert (await one.open(FILE)).result is Result.HIT
    kept = {path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "run"}
    assert kept == {"claims", route(FILE).file, f".{route(FILE).file}.gup"}


async def test_a_slow_one_opens_a_part_and_is_shown(tmp_path, upstream):
    upstream.answer(FILE, Answer(BODY, etag='"a"', piece_seconds=0.03))
    async with working(tmp_path, [upstream.url]) as one:
        opened = await one.open(FILE)
        assert opened.body.end() == len(BODY)
        assert opened.body.published < len(BODY)
        assert list((tmp_path / "partial").glob("*.part"))
        assert await read(opened.body) == BODY


async def test_one_404_is_asked_once_for_all_workers_and_makes_no_file(tmp_path, upstream):
    async with working(tmp_path, [upstream.url]) as one, working(tmp_path, [upstream.url]) as two:
        asked = await asyncio.gather(
            *(worker.cache.open(route(FILE), Variant()) for worker in (one, two, one)), return_exceptions=True
        )
        assert {problem.slug for problem in asked} == {"upstream-not-found"}
    assert len(upstream.requests(FILE)) == 1
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["claims"]
