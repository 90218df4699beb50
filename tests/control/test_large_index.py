"""A large store and many clients: what is done each second looks at none of them one by one."""

import pytest
from control.calls import limited

from gup.content.key import ContentKey, Kind
from gup.control.alarms import AlarmCollector
from gup.control.api.entries import Listing, labels_of, page_of
from gup.control.api.status import status
from gup.control.entry_table import EntryTable, Row
from gup.control.exposition import gauges
from gup.control.state import ControlState

ROWS, CLIENTS = 8_000, 8_000
MONIKERS = [f"{{{number:08X}-441F-4E8A-A897-804CD859100E}}" for number in range(50)]


def row(number: int) -> Row:
    stream, revision = MONIKERS[number % 50], f"26{number // 500:07d}"
    file = f"xdelta{number % 500:09d}_To_{revision}.dax"
    key = f"any/any/{stream}/{revision}/{file}"
    return Row(key, Kind.DELTA, 1000, 1.0, 1.0 + number)


@pytest.fixture
async def plane(world):
    """A plane that knows all of it, with a storm that stands."""
    world.now = 3_000_000.0
    made = ControlState(world.dependencies(), lambda: world.now)
    for number in range(ROWS):
        made.index.put(row(number))
    for number in range(CLIENTS):
        made.clients.see([f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"], world.now - number)
    stream = ("any", "any", MONIKERS[0])
    made.traffic.sent(ContentKey(*stream, "260000000", "full.zip"), 50)
    yield made
    made.index._dirty.clear()
    await made.database.stop()
    await made.index.close()


@pytest.fixture
def read(monkeypatch):
    """The rows that are read from the table, one by one."""
    rows, really = [], EntryTable._rows

    def counted(table, found):
        for one in really(table, found):
            rows.append(one)
            yield one

    monkeypatch.setattr(EntryTable, "_rows", counted)
    return rows


async def test_what_is_done_each_second_goes_through_no_rows(plane, read):
    """A storm stands, and the metrics are read; it took 0.3 s of the loop."""
    watch = AlarmCollector(plane)
    await watch.look()
    (storm,) = plane.traffic.storms()
    assert (storm.fulls, storm.delta_bytes) == (50, 1000)
    await plane.meter()
    await gauges(plane, plane.dependencies.totals())
    await status(plane)
    assert len(read) <= 1, "the row of the full package that the storm is about"


async def test_an_eviction_looks_at_no_rows_but_those_that_it_removes(plane, read, world):
    plane.index.complete = True
    world.settings = limited(world.settings, max_size=ROWS * 1000, keep_revisions=0)
    assert await plane.evictor.evict() == []
    assert len(read) <= 1
    world.settings = limited(world.settings, max_size=(ROWS - 70) * 1000)
    assert len(await plane.evictor.evict()) == 70
    assert len(read) < 4 * 70


@pytest.mark.parametrize("order", ["name", "-name", "key", "used"])
async def test_a_page_of_the_list_goes_through_no_rows_but_those_of_its_streams(plane, read, order):
    query = Listing.model_validate({"order": order, "limit": 10})
    page = await page_of(plane.index.rows, query, labels_of(plane), plane.clock())
    assert (len(page.entries), page.matching, page.cursor is None) == (10, ROWS, False)
    assert len(read) <= (ROWS / len(MONIKERS) if order.endswith("name") else 11)
