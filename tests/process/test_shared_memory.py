"""The page and the file of counters: exact over restarts, deaths, and while processes are replaced."""

import json
import os
import struct
import subprocess
import sys

import pytest
import xxhash

from gup.cache.scheduler import CLASSES
from gup.errors import StoreError
from gup.process import shared_memory as module
from gup.process.shared_memory import (
    CONFIG_OK,
    CONTROLLER,
    FILL_HELD,
    FIRST_WORKER,
    POLICY_EPOCH,
    STORE_EPOCH,
    SUPERVISOR,
    Page,
    Row,
    SharedFile,
)

HITS = 'gup_requests_total{code="200",result="hit"}'
RESTARTS = "gup_worker_restarts_total"


def received(upstream):
    return f'gup_upstream_received_bytes_total{{purpose="fill",upstream="{upstream}"}}'


@pytest.fixture
def path(tmp_path):
    return tmp_path / "shared"


@pytest.fixture
def create(path):
    """Makes the file anew, as at each start; the one before is closed."""
    made = []

    def close():
        while made:
            made.pop().close()

    def create(upstreams=("a",), workers=1):
        close()
        made.append(SharedFile.create(path, list(upstreams), workers))
        return made[0]

    create.end = close
    yield create
    close()


@pytest.fixture
def page():
    page = Page.create(12)
    yield page
    page.close()


def hit(shared, block=FIRST_WORKER, n=1):
    shared.counters(block).add("gup_requests_total", n, result="hit", code="200")


def test_blocks_do_not_overlap_and_are_summed(create):
    shared = create(["a", "b"], 3)
    assert set(shared.totals().values()) == {0}
    assert shared.installed_at == shared.started_at
    for block in (SUPERVISOR, CONTROLLER, *(FIRST_WORKER + slot for slot in range(3))):
        words = shared.counters(block).words
        for position in range(len(words)):
            words[position] = 10**block
    assert set(shared.totals().values()) == {111110}
    assert set(shared.since_start().values()) == {111110}


@pytest.mark.parametrize("workers", [1, 46, 1024])
def test_the_page_has_words_of_their_own_for_any_number_of_workers(workers):
    blocks = FIRST_WORKER + workers
    page = Page.create(blocks)
    assert page.words[CONFIG_OK] == 1
    before = list(page.words)
    for row in Row:
        words = page.row(row)
        assert len(words) == blocks
        assert set(words) == {0}, f"{row.name} shares a word with a row before it"
        for block in range(blocks):
            words[block] = 1000 * (row + 1) + block
    named = FILL_HELD + CLASSES
    assert list(page.words[:named]) == before[:named]
    assert page.capacity == blocks
    few = Page(os.dup(page.fd), 3)
    assert [list(few.row(row)) for row in Row] == [list(page.row(row)[:3]) for row in Row]
    few.clear(1)
    assert [page.row(row)[1] for row in Row] == [0] * len(Row)
    assert [page.row(row)[2] for row in Row] == [1000 * (row + 1) + 2 for row in Row]
    few.close()
    del words
    page.close()


def test_the_counters_of_a_page_of_another_size_are_kept(create, path):
    """As an earlier release laid it out: 320 words and one a block, and no word of it in the description."""
    first = create(workers=3)
    hit(first, FIRST_WORKER + 2, 7)
    create.end()
    content = path.read_bytes()
    length = struct.unpack("<8sQQQ", content[:32])[2]
    fields = json.loads(content[32 : 32 + length])
    words = content[-(-(32 + length) // 4096) * 4096 :]
    counts = words[8 * fields.pop("page_words") :]
    text = json.dumps(fields).encode()
    head = struct.pack("<8sQQQ", b"gupwords", 1, len(text), xxhash.xxh3_64_intdigest(text)) + text
    page = bytes(8 * (320 + fields["blocks"]))
    path.write_bytes(head.ljust(-(-len(head) // 4096) * 4096, b"\0") + page + counts)
    assert create(workers=60).totals()[HITS] == 7
    assert list(path.parent.iterdir()) == [path]


def test_no_process_counts_into_the_past(create):
    with pytest.raises(AssertionError):
        create().counters(0)


def test_the_counters_of_an_exited_process_stay_and_its_gauges_go(create):
    shared = create()
    worker = shared.counters(FIRST_WORKER)
    hit(shared, n=7)
    worker.set("gup_client_connections", 5)
    worker.observe("gup_fill_duration_seconds", 2.0)
    assert shared.totals()["gup_client_connections"] == 5
    shared.clear_gauges(FIRST_WORKER)
    assert shared.totals()[HITS] == 7
    hit(shared, n=3)  # its successor
    shared.clear_gauges(FIRST_WORKER)
    totals = shared.totals()
    assert (totals[HITS], totals["gup_client_connections"]) == (10, 0)
    assert totals['gup_fill_duration_seconds_bucket{le="5"}'] == 1
    assert totals["gup_fill_duration_seconds_sum"] == 2_000_000_000


def test_totals_go_on_after_a_restart_with_other_upstreams_and_workers(create, path):
    first = create(["a", "b"], 4)
    for slot in range(4):
        hit(first, FIRST_WORKER + slot)
    worker = first.counters(FIRST_WORKER + 3)
    worker.add("gup_upstream_received_bytes_total", 100, upstream="a", purpose="fill")
    worker.add("gup_upstream_received_bytes_total", 30, upstream="b", purpose="fill")
    worker.set("gup_client_connections", 9)
    installed_at = first.installed_at

    second = create(["b", "c", "c"], 1)
    totals = second.totals()
    assert [totals[received(name)] for name in "abc"] == [100, 30, 0]
    assert (totals[HITS], totals["gup_client_connections"]) == (4, 0)
    assert second.installed_at == installed_at < second.started_at
    hit(second)
    second.counters(CONTROLLER).add("gup_upstream_received_bytes_total", 5, upstream="b", purpose="fill")
    since = second.since_start()
    assert (since[HITS], since[received("b")]) == (1, 5)

    third = create()
    totals = third.totals()
    assert (totals[HITS], totals[received("a")], totals[received("b")]) == (5, 100, 35)
    assert set(third.since_start().values()) == {0}
    assert list(path.parent.iterdir()) == [path]


def test_a_metric_that_this_version_does_not_know_is_dropped(create, monkeypatch):
    monkeypatch.setattr(module, "layout", lambda _: ["gup_old_total", HITS, RESTARTS])
    words = create().counters(SUPERVISOR).words
    words[0], words[1] = 5, 6
    monkeypatch.undo()
    totals = create().totals()
    assert (totals[HITS], totals.get("gup_old_total")) == (6, None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"short",
        lambda text: b"x" + text[1:],
        lambda text: text[:40] + bytes([text[40] ^ 1]) + text[41:],
        lambda text: text[:-8],
        lambda text: text + bytes(4096),
    ],
)
def test_a_damaged_file_is_moved_aside(create, path, damage, caplog):
    hit(create())
    create.end()
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    assert create().totals()[HITS] == 0
    assert (path.parent / "shared.damaged").read_bytes() == damaged
    assert "shared.damaged" in caplog.text


class Killed(BaseException):
    pass


def test_a_crash_before_the_rename_keeps_the_old_totals(create, monkeypatch):
    hit(create(), n=3)

    def killed(_):
        raise Killed

    monkeypatch.setattr(module.os, "fsync", killed)
    with pytest.raises(Killed):
        create()
    monkeypatch.undo()
    assert create().totals()[HITS] == 3


def test_a_full_disk_counts_in_memory_and_keeps_the_old_file(create, monkeypatch, caplog):
    hit(create(), n=3)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    shared = create()
    assert "will be lost" in caplog.text
    monkeypatch.undo()
    hit(shared)
    assert shared.totals()[HITS] == 4
    assert create().totals()[HITS] == 3


def test_a_folder_that_is_missing_is_told(tmp_path):
    with pytest.raises(StoreError, match="counters can't be kept"):
        SharedFile.create(tmp_path / "none" / "shared", [], 1)
    (tmp_path / "shared").mkdir()
    with pytest.raises(StoreError, match="counters can't be read"):
        SharedFile.create(tmp_path / "shared", [], 1)


def test_the_counts_of_exited_processes_are_kept_from_files_of_earlier_versions(create):
    """They were moved into one of the two copies of the past; bit 31 of the first word tells which."""
    old = create()
    hit(old, n=3)
    old._copies[1][list(old.totals()).index(HITS)] = 10
    old._root[0] = 5 << 32 | 1 << 31
    assert create().totals()[HITS] == 13


CHILD = """
import sys
from gup.process.shared_memory import POLICY_EPOCH, Page, Row, SharedFile
shared, page = map(lambda type_, fd: type_(int(fd)), (SharedFile, Page), sys.argv[1:3])
block = int(sys.argv[3])
for _ in range(1000):
    page.raise_epoch(POLICY_EPOCH)
    with page.locked(70):
        page.words[70] += 1
    shared.counters(block).add("gup_worker_restarts_total")
page.row(Row.BEAT)[block] = 5
"""


def test_processes_share_epochs_locks_and_counters(create, page):
    shared = create(workers=2)
    fds = shared.fd, page.fd
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, *map(str, fds), str(block)], pass_fds=fds)
        for block in (3, 4)
    ]
    for _ in range(500):
        page.raise_epoch(POLICY_EPOCH)
        page.raise_epoch(STORE_EPOCH)
    assert [child.wait(30) for child in children] == [0, 0]
    assert [page.words[at] for at in (POLICY_EPOCH, STORE_EPOCH, 70)] == [2500, 500, 2000]
    assert shared.totals()[RESTARTS] == 2000
    assert list(page.row(Row.BEAT)[:6]) == [0, 0, 0, 5, 5, 0]


def test_what_replaced_processes_still_count_belongs_to_the_totals(create, path):
    """Three files, of which the first two still have processes when the third is made."""
    first = create(["a"], 2)
    hit(first, FIRST_WORKER, 3)
    first.counters(FIRST_WORKER).set("gup_client_connections", 5)
    second, of_first = SharedFile.succeed(path, first, ["a"], FIRST_WORKER + 6)
    hit(second, FIRST_WORKER + 5, 10)
    hit(first, FIRST_WORKER, 1)
    second.counters(FIRST_WORKER + 5).set("gup_client_connections", 1)
    of_first.move(second)
    assert (second.totals()[HITS], second.totals()["gup_client_connections"]) == (14, 6)
    assert second.since_start()[HITS] == 14
    assert (second.started_at, second.installed_at) == (first.started_at, first.installed_at)
    third, of_second = SharedFile.succeed(path, second, ["a"], FIRST_WORKER + 1)
    hit(first, FIRST_WORKER + 1, 100)
    hit(second, FIRST_WORKER + 5, 1000)
    first.counters(FIRST_WORKER).set("gup_client_connections", 2)
    for _ in range(2):
        of_first.move(third)
        of_second.move(third)
        assert (third.totals()[HITS], third.totals()["gup_client_connections"]) == (1114, 3)
    first.clear_gauges(FIRST_WORKER)
    second.clear_gauges(FIRST_WORKER + 5)
    of_second.move(third)
    of_first.move(third)
    assert (third.totals()[HITS], third.totals()["gup_client_connections"]) == (1114, 0)
    for file in (second, third):
        file.close()
    assert create().totals()[HITS] == 1114


def test_a_new_version_takes_over_the_series_that_it_knows(create, path, monkeypatch):
    monkeypatch.setattr(module, "layout", lambda _: ["gup_old_total", HITS])
    first = create()
    hit(first, n=3)
    monkeypatch.setattr(module, "layout", lambda _: [RESTARTS, HITS])
    second, earlier = SharedFile.succeed(path, first, [], FIRST_WORKER + 1)
    first.counters(FIRST_WORKER).words[0] = 7
    hit(first, n=2)
    second.counters(SUPERVISOR).add(RESTARTS)
    earlier.move(second)
    assert {HITS: 5, RESTARTS: 1}.items() <= second.totals().items()
    second.close()
