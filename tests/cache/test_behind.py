"""Writing beside reading: what is under way, when it is waited for, and where errors come out."""

import asyncio
import errno

import pytest

from gup.cache.part_file import WriteBehind

MB = 1 << 20


class Disk:
    """A writer and its disk in one: `let` lets writes end, one each."""

    def __init__(self):
        self.unwritten = 0
        self.writes = []
        self.under_way = 0
        self.error = None
        self.lets = asyncio.Semaphore(0)

    async def write(self):
        amount = self.unwritten
        assert not self.under_way, "one at a time"
        self.under_way += 1
        try:
            await self.lets.acquire()
        finally:
            self.under_way -= 1
        if self.error:
            raise self.error
        self.writes.append(amount)
        self.unwritten -= amount

    def let(self, times=1):
        for _ in range(times):
            self.lets.release()


async def turns(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_reading_goes_on_beside_a_write_and_what_came_meanwhile_is_the_next_one():
    disk = Disk()
    async with WriteBehind(disk, disk.write) as behind:
        for amount in (3, 4, 5):
            disk.unwritten += amount
            await behind.begin()
            await turns()
        assert disk.writes == []
        disk.let(2)
        await turns()
        assert disk.writes == [3, 9]


async def test_a_slow_disk_holds_the_reading_up():
    disk = Disk()
    async with WriteBehind(disk, disk.write) as behind:
        disk.unwritten = 2 * MB
        reading = asyncio.create_task(behind.begin())
        await turns()
        assert not reading.done()
        disk.let()
        await reading
        assert disk.writes == [2 * MB]


async def test_who_waits_has_it_written():
    disk = Disk()
    disk.let()
    async with WriteBehind(disk, disk.write) as behind:
        disk.unwritten = 1
        await behind.begin(wait=True)
        assert disk.writes == [1]


@pytest.mark.parametrize("asked", ["begin", "end"])
async def test_an_error_comes_out_at_the_next_step(asked):
    disk = Disk()
    disk.error = OSError(errno.EIO, "bad")
    reached = []

    async def fill():
        async with WriteBehind(disk, disk.write) as behind:
            disk.unwritten = 1
            await behind.begin()
            disk.let()
            await turns()
            reached.append("before")
            if asked == "begin":
                await behind.begin()
                reached.append("after")

    with pytest.raises(OSError, match="bad"):
        await fill()
    assert reached == ["before"]


async def test_nothing_is_under_way_when_the_block_was_left_by_another_error():
    disk = Disk()

    async def fill():
        async with WriteBehind(disk, disk.write) as behind:
            disk.unwritten = 1
            await behind.begin()
            await turns()
            raise LookupError("upstream broke off")

    filling = asyncio.create_task(fill())
    await turns()
    assert not filling.done(), "the write has not ended"
    disk.error = OSError(errno.EIO, "bad")
    disk.let()
    with pytest.raises(LookupError):
        await filling
    assert disk.under_way == 0


async def test_a_refused_write_wakes_a_reading_that_waits_for_the_upstream():
    disk, asked = Disk(), asyncio.Event()
    disk.error = OSError(errno.EIO, "refused")

    async def read():
        asked.set()
        await asyncio.Event().wait()

    async def fill():
        async with WriteBehind(disk, disk.write) as behind:
            disk.unwritten = 1
            await behind.begin()
            await behind.meanwhile(read)

    filling = asyncio.create_task(fill())
    await asked.wait()
    disk.let()
    with pytest.raises(OSError, match="refused"):
        await filling


async def test_a_refused_write_is_raised_before_the_next_reading():
    disk = Disk()
    disk.error = OSError(errno.EIO, "refused")
    disk.let()

    async def fill():
        async with WriteBehind(disk, disk.write) as behind:
            disk.unwritten = 1
            await behind.begin()
            await turns()
            await behind.meanwhile(asyncio.Event().wait)

    with pytest.raises(OSError, match="refused"):
        await fill()


async def test_a_reading_gives_what_it_read_and_its_own_end_of_time():
    async def late():
        raise TimeoutError("the upstream's")

    disk = Disk()
    disk.let()
    async with WriteBehind(disk, disk.write) as behind:
        disk.unwritten = 1
        await behind.begin()
        assert await behind.meanwhile(lambda: asyncio.sleep(0, "piece")) == "piece"
        with pytest.raises(TimeoutError, match="upstream's"):
            await behind.meanwhile(late)
