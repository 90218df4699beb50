"""Bodies in memory files: what the table of all processes promises, and a fill that goes on there."""

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from harness.caches import Cut, path_of, read, route, working
from harness.content import noise
from harness.processes import quiet_clock
from harness.upstreams import Answer, Gate

from gup.cache.body import GrowingBody
from gup.cache.disk import Room
from gup.cache.memory_files import ROW_WORDS, STEP_BYTES, MemoryFile, MemoryFiles, MemoryFull
from gup.cache.open_entries import Result
from gup.cache.part_file import PartWriter
from gup.cache.records import CHUNK_BYTES, FillState, Head, Phase
from gup.content.key import ContentKey, Kind, Variant

FILE = path_of("xdelta260731001.dax")
BODY = noise("memory", 3 * CHUNK_BYTES + 1000)
MB = 1 << 20


def key_of(number: int) -> ContentKey:
    return route(path_of(f"xdelta26073100{number}.dax")).key(Variant())


def state_of(key: ContentKey, generation: int, length: int | None) -> FillState:
    head = Head(
        length=length,
        etag='"e"',
        content_type="application/octet-stream",
        last_modified=None,
        upstream="u",
        upstream_etag=None,
    )
    path = path_of(key.file)
    return FillState(key, Kind.DELTA, generation, Phase.STREAMING, head=head, path=path)


class Table:
    """The words of a table, and processes that share them."""

    def __init__(self, rows: int = 4, limit: int = 10 * MB, grace: float = 60.0) -> None:
        self.words = memoryview(bytearray(8 * (1 + rows * ROW_WORDS))).cast("Q")
        self.limit, self.grace = limit, grace
        self.opened: list[MemoryFiles] = []

    def process(self) -> MemoryFiles:
        files = MemoryFiles(self.words, nullcontext, lambda: self.limit, lambda: self.grace)
        self.opened.append(files)
        return files


@pytest.fixture
async def table():
    made = Table()
    yield made
    for files in made.opened:
        files.close()


def kept(
    files: MemoryFiles, number: int, size: int, *, expires: float | None = None, store: float = 1e6
) -> MemoryFile:
    """A finished body of this size."""
    key = key_of(number)
    own = files.begin(key, number + 1, size)
    os.pwrite(own.file.fd, BODY[:size], 0)
    own.announce(state_of(key, number + 1, size))
    own.finish(size, expires_seconds=expires, store_seconds=store)
    return own


async def test_another_process_finds_what_is_finished_and_reads_it(table):
    one, two = table.process(), table.process()
    key = key_of(0)
    own = one.begin(key, 1, 1000)
    assert two.find(key).state_fd == 0
    os.pwrite(own.file.fd, BODY[:1000], 0)
    own.announce(state_of(key, 1, 1000))
    assert two.finished(key) is None, "it is not known to be right yet"
    file, state = two.open(two.find(key))
    assert (os.pread(file.fd, 2000, 0), state.head.etag) == (BODY[:1000], '"e"')
    own.finish(1000, expires_seconds=None, store_seconds=0.0)
    body = two.finished(key)
    assert two.finished(key) is body, "all who come late share one descriptor"
    assert await read(body.reader()) == BODY[:1000]
    assert (body.source, body.end()) == ("bypass", 1000)


async def test_what_is_told_of_a_body_can_not_be_changed(table):
    files = table.process()
    kept(files, 0, 1000)
    row = files.find(key_of(0))
    fd = os.open(f"/proc/self/fd/{row.state_fd}", os.O_RDWR)
    try:
        with pytest.raises(OSError, match="not permitted"):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


async def test_the_limit_holds_and_the_least_recently_used_goes_first(table):
    one, two = table.process(), table.process()
    for number in range(3):
        kept(one, number, 3 * MB)
    assert one.finished(key_of(0)) is not None  # the oldest, just used
    two.begin(key_of(5), 9, 3 * MB)
    assert [one.finished(key_of(n)) is not None for n in range(3)] == [True, False, True]
    with pytest.raises(MemoryFull):
        two.begin(key_of(6), 9, 8 * MB)
    assert [one.finished(key_of(n)) is not None for n in range(3)] == [True, False, True], "in vain: nothing"
    with pytest.raises(MemoryFull, match="more than"):
        two.begin(key_of(6), 9, 11 * MB)
    two.begin(key_of(7), 9, 7 * MB)
    assert [one.finished(key_of(n)) for n in range(3)] == [None] * 3


async def test_there_is_a_row_for_as_many_as_the_table_has(table):
    files = table.process()
    for number in range(4):
        kept(files, number, 1000)
    kept(files, 4, 1000)
    assert [files.find(key_of(n)) is not None for n in range(5)] == [False, True, True, True, True]


async def test_what_grows_reserves_step_by_step_and_nothing_that_grows_makes_room(table):
    files = table.process()
    own = files.begin(key_of(0), 1, STEP_BYTES)
    own.keep(STEP_BYTES)
    other = files.begin(key_of(1), 1, 1000)
    own.keep(STEP_BYTES + 1)
    with pytest.raises(MemoryFull):
        own.keep(2 * STEP_BYTES + 1)
    other.drop()
    with pytest.raises(MemoryFull):
        own.keep(2 * STEP_BYTES + 1)
    table.limit = 16 * MB
    own.keep(2 * STEP_BYTES + 1)


async def test_index_files_go_when_they_expire(table, until):
    files = table.process()
    kept(files, 0, 1000, expires=0.05)
    assert files.finished(key_of(0)) is not None
    await until(lambda: files.finished(key_of(0)) is None, "it expires")
    await until(lambda: not files.own, "its owner lets go of it")


async def test_one_of_all_processes_tries_to_store_at_a_time(table):
    one, two = table.process(), table.process()
    kept(one, 0, 1000, store=0.0)
    assert [files.store_is_due(key_of(0), 60.0) for files in (two, one, two)] == [True, False, False]
    assert two.drop(key_of(0)) == 1000
    assert not one.store_is_due(key_of(0), 0.0)


@pytest.mark.parametrize("reaped", [True, False])
async def test_what_a_dead_process_left_is_removed_by_whoever_sees_it(table, tmp_path, reaped):
    """Also before its parent has waited for it: an ordinary user may not look at its descriptors then."""
    process = await asyncio.to_thread(_other_process, table, tmp_path / "words")
    with process as other:
        files = table.process()
        body = files.finished(key_of(0))
        assert await read(body.reader()) == BODY[:1000]
        assert files.find(key_of(1)).pid == other.pid
        other.kill()
        await asyncio.to_thread(os.waitid, os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        if reaped:
            await asyncio.to_thread(other.wait)
        assert files.find(key_of(1)) is None
    assert await read(body.reader()) == BODY[:1000], "who has it open reads on"
    files.begin(key_of(2), 1, 10 * MB)  # all that the dead process had reserved is free


def _other_process(table, words):
    """A process with a finished body and one that grows; the table as it has left it."""
    words.write_bytes(bytes(table.words.cast("B")))
    script = f"""
        import asyncio, mmap, os, sys, time
        from contextlib import nullcontext
        sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
        import test_memory_files as tests
        async def main():
            fd = os.open({str(words)!r}, os.O_RDWR)
            shared = memoryview(mmap.mmap(fd, 0)).cast("Q")
            files = tests.MemoryFiles(shared, nullcontext, lambda: 10 << 20, float)
            tests.kept(files, 0, 1000)
            own = files.begin(tests.key_of(1), 1, 9 << 20)
            own.announce(tests.state_of(tests.key_of(1), 1, 9 << 20))
            print("there", flush=True)
            sys.stdin.read()
        asyncio.run(main())
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"there\n"
    table.words.cast("B")[:] = words.read_bytes()
    return other


async def test_a_number_that_was_given_anew_is_no_body(table, tmp_path):
    files = table.process()
    own = kept(files, 0, 1000)
    other = tmp_path / "other"
    other.write_bytes(b"another file")
    fd = os.open(other, os.O_RDONLY)
    os.dup2(fd, own.file.fd)
    os.close(fd)
    assert files.finished(key_of(0)) is None


async def test_who_reads_what_is_gone_has_a_time_of_grace(table, until):
    files = table.process()
    kept(files, 0, 1000)
    body = files.finished(key_of(0))
    reader, table.grace = body.reader(), 0.3
    files.drop(key_of(0))
    assert reader.available(0, 10) == 10
    await until(lambda: reader.available(0, 10) == -1, "it is cut")
    reader.leave()
    await until(lambda: not files._held, "and forgotten")


# --- a part that goes over


def writer_of(tmp_path, executor) -> PartWriter:
    return PartWriter(tmp_path / "part", Room(None, executor, None), len(BODY))


async def test_a_part_goes_over_byte_for_byte_and_goes_on(tmp_path, executor, table):
    writer = writer_of(tmp_path, executor)
    writer.take(BODY[: 2 * CHUNK_BYTES + 500])
    await writer.write_sure()
    memory = table.process().begin(key_of(0), 1, len(BODY))
    writer.move(memory.file)
    assert os.pread(memory.file.fd, len(BODY), 0) == BODY[: writer.written]
    writer.take(BODY[2 * CHUNK_BYTES + 500 :])
    await writer.write_all(lambda _sums: None)
    assert os.pread(memory.file.fd, len(BODY) + 1, 0) == BODY
    assert (tmp_path / "part").stat().st_size < len(BODY)


@pytest.mark.parametrize("at", [5, CHUNK_BYTES + 5, 2 * CHUNK_BYTES + 5])
@pytest.mark.parametrize("lost", [b"\0\0\0\0", None])
async def test_a_part_that_is_not_what_arrived_does_not_go_over(tmp_path, executor, table, at, lost):
    writer = writer_of(tmp_path, executor)
    writer.take(BODY[: 2 * CHUNK_BYTES + 50_000])
    await writer.write_sure()
    with (tmp_path / "part").open("r+b") as part:
        if lost is None:
            part.truncate(at)
        else:
            os.pwrite(part.fileno(), lost, at)
    memory = table.process().begin(key_of(0), 1, len(BODY))
    with pytest.raises(OSError, match="differ from those written"):
        writer.move(memory.file)


async def test_readers_wait_while_a_part_is_compared():
    body = GrowingBody(state_of(key_of(0), 1, 1000).head, 1, None, time.monotonic())
    body.publish(100)
    reader, woken = body.reader(), asyncio.Event()
    body.hold_back()
    assert reader.available(0, 10) == 0
    reader.wait(0, woken.set)
    body.fail()
    assert woken.is_set()
    assert reader.available(0, 10) == -1


# --- fills


def refuse(monkeypatch, until_bytes: int = 0) -> dict[str, bool]:
    """The disk refuses from so many bytes on, while `on`."""
    original, switch = PartWriter._append, {"on": True}

    def append(self, file, piece):
        if switch["on"] and not self._in_memory and self._in_file >= until_bytes:
            raise OSError(28, "No space left on device")
        original(self, file, piece)

    monkeypatch.setattr(PartWriter, "_append", append)
    monkeypatch.setattr("gup.cache.disk._PATIENCE_SECONDS", 0.02)
    monkeypatch.setattr("gup.cache.disk._SHORT_PATIENCE_SECONDS", 0.02)
    return switch


@pytest.mark.parametrize("until_bytes", [0, CHUNK_BYTES, 2 * CHUNK_BYTES])
@pytest.mark.parametrize("chunked", [False, True])
async def test_readers_in_two_processes_go_on_over_one_download(
    tmp_path, upstream, monkeypatch, until, until_bytes, chunked
):
    refuse(monkeypatch, until_bytes)
    gate = Gate()
    upstream.answer(FILE, Answer(BODY, etag='"a"', chunked=chunked, gates=((600_000, gate),)))
    async with working(tmp_path, [upstream.url]) as one, working(tmp_path, [upstream.url]) as two:
        first, second = await one.open(FILE), await two.open(FILE)
        gate.open()
        assert await asyncio.gather(read(first.body), read(second.body)) == [BODY, BODY]
        await until(lambda: not one.cache.fills and not two.cache.fills, "the fills end")
        assert [w.counted("gup_fills_total", outcome="unstorable") for w in (one, two)] == [1, 0]
        for worker in (one, two):
            late = await worker.open(FILE)
            assert (late.result, late.body.source) == (Result.BYPASS, "bypass")
            assert await read(late.body) == BODY
            assert late.body.head.etag == first.body.head.etag
            late.body.leave()
        assert len(upstream.requests(FILE)) == 1


async def test_a_mismatch_cuts_the_readers(tmp_path, upstream, monkeypatch, until):
    refuse(monkeypatch, 2 * CHUNK_BYTES)
    gate = Gate()
    upstream.answer(FILE, Answer(BODY, etag='"a"', gates=((CHUNK_BYTES + 300_000, gate),)))
    async with working(tmp_path, [upstream.url]) as one:
        opened = await one.open(FILE)
        await until(lambda: opened.body.published > CHUNK_BYTES, "some of it is here")
        (part,) = (tmp_path / "partial").glob("*.part")
        with part.open("r+b") as file:
            os.pwrite(file.fileno(), b"\0" * 8, 100)
        gate.open()
        with pytest.raises(Cut) as cut:
            await read(opened.body, CHUNK_BYTES)
        assert BODY[CHUNK_BYTES:].startswith(cut.value.args[0])
        await until(lambda: not one.cache.fills, "the fill ends")
        assert one.counted("gup_fills_total", outcome="failed") == 1
        assert one.dependencies.memory.find(opened.key) is None


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(24, "Too many open files")]
)
async def test_a_follower_that_can_not_open_the_file_holds_nothing_up(tmp_path, upstream, monkeypatch, error):
    """What is not to be seen is passed through; for a descriptor it waits."""
    refuse(monkeypatch)
    gate, tries, original = Gate(), [], MemoryFiles.open
    upstream.answer(FILE, Answer(BODY, etag='"a"', gates=((2 * MB, gate),)), Answer(BODY, etag='"a"'))

    def fails(self, row):
        tries.append(row)
        if len(tries) < 3 or isinstance(error, PermissionError):
            raise type(error)(*error.args)
        return original(self, row)

    monkeypatch.setattr(MemoryFiles, "open", fails)
    async with working(tmp_path, [upstream.url]) as one, working(tmp_path, [upstream.url]) as two:
        first = await one.open(FILE)
        second = await two.open(FILE)
        assert tries
        gate.open()
        assert await asyncio.gather(read(first.body), read(second.body)) == [BODY, BODY]
        second.body.leave()
        assert len(upstream.requests(FILE)) == (2 if isinstance(error, PermissionError) else 1)


async def test_of_unknown_length_its_readers_are_cut_at_the_limit_and_then_passed_through(
    tmp_path, upstream, monkeypatch
):
    refuse(monkeypatch)
    body, gate = noise("long", 12 * MB), Gate()
    upstream.answer(FILE, Answer(body, chunked=True, gates=((2 * MB, gate),)), Answer(body, chunked=True))
    async with working(tmp_path, [upstream.url], fill={"memory": "6MB"}) as one:
        opened = await one.open(FILE)
        gate.open()
        with pytest.raises(Cut) as cut:
            await read(opened.body)
        assert body.startswith(cut.value.args[0])
        opened.body.leave()
        again = await one.open(FILE)
        assert again.result is Result.BYPASS
        assert await read(again.body) == body
        again.body.leave()


async def test_an_index_file_in_memory_is_asked_for_again_when_it_is_stale(tmp_path, upstream, monkeypatch):
    refuse(monkeypatch)
    index = "/content/ContentInfo.txt"
    upstream.answer(index, Answer(b"one" * 100, etag='"1"'), Answer(b"two" * 100, etag='"2"'))
    async with working(tmp_path, [upstream.url], cache={"index_ttl": "200ms", "error_ttl": "50ms"}) as one:
        assert await one.get(index) == b"one" * 100
        began = quiet_clock()
        while await one.get(index) == b"one" * 100:
            assert quiet_clock() - began < 5
            await asyncio.sleep(0.01)
        assert await one.get(index) == b"two" * 100


async def test_nothing_is_kept_open_when_it_is_over(tmp_path, upstream, monkeypatch, until):
    refuse(monkeypatch)
    upstream.answer(FILE, Answer(BODY, etag='"a"'))

    def memory_files() -> int:
        gc.collect()
        links = []
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
            try:
                links.append(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115
            except OSError:
                continue
        return sum("memfd:gup-" in link for link in links)

    before = memory_files()
    async with working(tmp_path, [upstream.url]) as one:
        assert await one.get(FILE) == BODY
        await until(lambda: not one.cache.fills, "the fill ends")
        assert memory_files() == before + 2
        one.dependencies.memory.drop(route(FILE).key(Variant()))
        await until(lambda: memory_files() == before, "its memory is given back")
