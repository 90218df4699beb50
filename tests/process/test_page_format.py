"""What processes of two versions share while one replaces the other has a number, which changes with it."""

import contextlib
import json
import os

import xxhash

from gup.cache import memory_files
from gup.cache.budget_gate import CHEAP, BudgetGate
from gup.cache.fair_shares import FairShares, Shared, shares_file
from gup.cache.locks import Occupied
from gup.cache.negative_cache import NegativeCache
from gup.cache.scheduler import CLASSES, Backlog, Class
from gup.config import WanBudget
from gup.content.key import ContentKey
from gup.errors import PROBLEMS, Problem
from gup.process import shared_memory
from gup.process.shared_memory import FIRST_WORKER, PAGE_FORMAT, Page, Row
from gup.upstream.bandwidth import Share, Turns, Wan
from gup.upstream.health import Health, State

DIGESTS = {5: "84ddb6fe95c5534d"}
"""By PAGE_FORMAT. When the test fails because the page or the meaning of its words has changed, raise
PAGE_FORMAT and put the new digest here: else `gup upgrade` lets two versions write a page that they read
differently."""
NOW_NS = 10**15


async def write_as_its_owners_do(page, folder):
    mine, words = FIRST_WORKER + 1, page.words
    alive = [True] * page.capacity
    key = ContentKey("14.3", "english", "{MONIKER}", "260101001", "full.zip")
    failures = words[shared_memory.FAILURES :][: shared_memory.FAILURES_WORDS]
    for number, slug in enumerate(PROBLEMS):  # a row holds the place in this table
        NegativeCache(failures, contextlib.nullcontext).put(key, f"/{number}", Problem(slug, "Why."), 5.0)
    occupied = words[shared_memory.OCCUPIED :][: shared_memory.OCCUPIED_WORDS]
    Occupied(occupied.cast("B")).note(key.claim_offset)
    words[shared_memory.UPSTREAM_HEALTH] = Health(State.DOWN, marks=5, since=7, tried=9).encode()
    gate = BudgetGate(
        words[shared_memory.BUDGET_STATE : shared_memory.OUTBREAK_UNTIL + 1], WanBudget, lambda: 0, None, None
    )
    gate.publish(CHEAP, 500, 700, 1_785_574_800)
    gate.set_outbreak(1_785_574_801.5)
    backlog = Backlog(
        page.row(Row.FILL_BACKLOG), words[shared_memory.FILL_HELD :][:2], mine, alive.__getitem__
    )
    for class_ in [*Class][:CLASSES]:
        backlog.change(class_, 1 + class_)
    backlog.held(1, 0.25)
    turns = Turns(page.row(Row.WAN_TURNS), mine, alive.__getitem__)
    wan = Wan(words, shared_memory.WAN_CLOCK, turns, lambda: 1_000_000, folder / "wan")
    await wan.pay(1000, Share(Class.FULL))
    wan.close()
    turns.ask(77)


def shares_of_clients():
    """The size and the content of the file beside the page, with a client in each kind of count."""
    fd = shares_file(2)
    shares = FairShares(fd, 1)
    for kind, count in zip(Shared, shares.counts, strict=True):
        if kind is Shared.MISSES:
            count.add_within("192.0.2.1", 4242)
        else:
            count.add("192.0.2.1")
    shares.close()
    size = os.fstat(fd).st_size
    content = os.pread(fd, size, 0)
    os.close(fd)
    return size, xxhash.xxh3_64_hexdigest(content)


def members(row):
    return [(name, getattr(row, name)) for name, *_ in row._fields_]


async def test_another_layout_of_the_page_has_another_number(tmp_path, monkeypatch):
    monkeypatch.setattr("time.monotonic_ns", lambda: NOW_NS)
    monkeypatch.setattr("time.time", lambda: NOW_NS / 1e9)
    with contextlib.closing(Page.create(FIRST_WORKER + 3)) as page:
        await write_as_its_owners_do(page, tmp_path)
        written = [(at, word) for at, word in enumerate(page.words) if word]
    names = {name: value for name, value in vars(shared_memory).items() if name.isupper()}
    fields = [(name, field.offset, field.size) for name, field in members(memory_files.Row)]
    layout = {
        "written": written,
        "rows": {row.name: row for row in Row},
        "words": {name: at for name, at in names.items() if isinstance(at, int) and name != "PAGE_FORMAT"},
        "memory files": [memory_files.ROW_WORDS, fields],
        "shares of clients": shares_of_clients(),
    }
    digest = xxhash.xxh3_64_hexdigest(json.dumps(layout, sort_keys=True).encode())
    assert DIGESTS.get(PAGE_FORMAT) == digest, layout
