"""The shared file: exact over restarts, deaths and a supervisor killed within a fold."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gup.cache.backlog import CLASSES
from gup.errors import StoreError
from gup.metrics import BY_NAME
from gup.process import shared_memory as module
from gup.process.shared_memory import (
    CONFIG_OK,
    CONTROLLER,
    FILL_HELD,
    FIRST_WORKER,
    POLICY_EPOCH,
    SUPERVISOR,
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


def hit(shared, block, n=1):
    shared.counters(block).add("gup_requests_total", n, result="hit", code="200")


def test_a_new_file_counts_from_zero(path):
    shared = SharedFile.create(path, ["a"], 2)
    assert set(shared.totals().values()) == {0}
    assert shared.installed_at == shared.started_at
    assert shared.page.words[CONFIG_OK] == 1
    assert all(set(shared.page.row(row)) == {0} for row in Row)
    shared.close()


def test_blocks_do_not_overlap_and_are_summed(path):
    shared = SharedFile.create(path, ["a", "b"], 3)
    blocks = [SUPERVISOR, CONTROLLER, *(FIRST_WORKER + slot for slot in range(3))]
    for block in blocks:
        words = shared.counters(block).words
        for position in range(len(words)):
            words[position] = 10**block
    for block in blocks:
        shared.page.beat(block)
    assert set(shared.totals().values()) == {111110}
    assert set(shared.since_start().values()) == {111110}
    shared.close()


@pytest.mark.parametrize("workers", [1, 43, 45, 46, 64, 125, 128, 1024])
def test_the_page_has_words_of_their_own_for_any_number_of_workers(path, workers):
    shared = SharedFile.create(path, ["a"], workers)
    page, blocks = shared.page, FIRST_WORKER + workers
    before = list(page.words)
    for row in Row:
        words = page.row(row)
        assert len(words) == blocks
        assert set(words) == {0}, f"{row.name} shares a word with a row before it"
        for block in range(blocks):
            words[block] = 1000 * (row + 1) + block
    page.beat(FIRST_WORKER + workers - 1)
    page.forget_beat(FIRST_WORKER + workers - 1)
    assert page.last_beat(FIRST_WORKER + workers - 2) == 1000 + FIRST_WORKER + workers - 2
    named = FILL_HELD + CLASSES
    assert list(page.words[:named]) == before[:named]
    hit(shared, FIRST_WORKER + workers - 1, 3)
    shared.fold(FIRST_WORKER + workers - 1)
    assert shared.totals()[HITS] == 3
    shared.close()


def test_the_counters_of_a_page_of_another_size_are_kept(path, monkeypatch):
    """As an earlier release laid it out: 320 words and one a block, and no word of it in the description."""
    description = module._Description
    monkeypatch.setattr(module, "page_words", lambda blocks: 320 + blocks)
    monkeypatch.setattr(
        description,
        "encode",
        lambda self: _encoded({name: getattr(self, name) for name in self.__slots__ if name != "page_words"}),
    )
    first = SharedFile.create(path, ["a"], 3)
    hit(first, FIRST_WORKER + 2, 7)
    first.close()
    monkeypatch.undo()
    second = SharedFile.create(path, ["a"], 60)
    assert second.totals()[HITS] == 7
    second.close()
    assert list(path.parent.iterdir()) == [path]


def _encoded(fields):
    text = json.dumps(fields).encode()
    return module._PREFIX.pack(b"gupwords", 1, len(text), xxhash.xxh3_64_intdigest(text)) + text


def test_no_process_counts_into_the_past(path):
    shared = SharedFile.create(path, [], 1)
    with pytest.raises(AssertionError):
        shared.counters(0)
    with pytest.raises(AssertionError):
        shared.fold(0)
    shared.close()


def test_a_fold_keeps_counters_and_drops_gauges(path):
    shared = SharedFile.create(path, ["a"], 1)
    worker = shared.counters(FIRST_WORKER + 0)
    hit(shared, FIRST_WORKER + 0, 7)
    worker.set("gup_client_connections", 5)
    worker.observe("gup_fill_duration_seconds", 2.0)
    assert shared.totals()["gup_client_connections"] == 5
    shared.fold(FIRST_WORKER + 0)
    assert set(worker.words) == {0}
    hit(shared, FIRST_WORKER + 0, 3)
    shared.fold(FIRST_WORKER + 0)
    totals = shared.totals()
    assert totals[HITS] == 10
    assert totals["gup_client_connections"] == 0
    assert totals['gup_fill_duration_seconds_bucket{le="5"}'] == 1
    assert totals["gup_fill_duration_seconds_sum"] == 2_000_000_000
    shared.close()


def test_totals_go_on_after_a_restart_with_other_upstreams_and_workers(path):
    first = SharedFile.create(path, ["a", "b"], 4)
    for slot in range(4):
        hit(first, FIRST_WORKER + slot)
    worker = first.counters(FIRST_WORKER + 3)
    worker.add("gup_upstream_received_bytes_total", 100, upstream="a", purpose="fill")
    worker.add("gup_upstream_received_bytes_total", 30, upstream="b", purpose="fill")
    worker.set("gup_client_connections", 9)
    installed_at = first.installed_at
    first.close()

    second = SharedFile.create(path, ["b", "c", "c"], 1)
    totals = second.totals()
    assert (totals[HITS], totals[received("a")], totals[received("b")]) == (4, 100, 30)
    assert totals[received("c")] == 0
    assert totals["gup_client_connections"] == 0
    assert second.installed_at == installed_at
    assert second.started_at > installed_at
    hit(second, FIRST_WORKER + 0)
    second.counters(CONTROLLER).add("gup_upstream_received_bytes_total", 5, upstream="b", purpose="fill")
    since = second.since_start()
    assert (since[HITS], since[received("b")]) == (1, 5)
    second.close()

    third = SharedFile.create(path, ["a"], 1)
    totals = third.totals()
    assert (totals[HITS], totals[received("a")], totals[received("b")]) == (5, 100, 35)
    assert set(third.since_start().values()) == {0}
    third.close()
    assert list(path.parent.iterdir()) == [path]


def test_a_metric_that_this_version_does_not_know_is_dropped(path, monkeypatch):
    monkeypatch.setattr(module, "layout", lambda _: ["gup_old_total", HITS, RESTARTS])
    first = SharedFile.create(path, [], 1)
    first.counters(SUPERVISOR).words[0] = 5
    first.counters(SUPERVISOR).words[1] = 6
    first.close()
    monkeypatch.undo()
    second = SharedFile.create(path, [], 1)
    assert second.totals()[HITS] == 6
    assert "gup_old_total" not in second.totals()
    second.close()


@pytest.mark.parametrize("kind", ["counter", "gauge", "histogram"])
def test_each_series_kind_is_known(kind):
    for metric in BY_NAME.values():
        if metric.kind == kind:
            suffix = "_bucket" if kind == "histogram" else ""
            assert module._kind(f'{metric.name}{suffix}{{a="b"}}') == kind
    assert module._kind("gup_fill_duration_seconds_sum") == "histogram"
    assert module._kind("gup_nothing_total") is None


def _flip_description(text):
    return text[:40] + bytes([text[40] ^ 1]) + text[41:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"short",
        lambda text: b"x" + text[1:],
        _flip_description,
        lambda text: text[:-8],
        lambda text: text[:100],
        lambda text: text + bytes(4096),
    ],
)
def test_a_damaged_file_is_moved_aside(path, damage, caplog):
    shared = SharedFile.create(path, ["a"], 1)
    hit(shared, FIRST_WORKER + 0)
    shared.close()
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    shared = SharedFile.create(path, ["a"], 1)
    assert shared.totals()[HITS] == 0
    assert (path.parent / "shared.damaged").read_bytes() == damaged
    assert "shared.damaged" in caplog.text
    shared.close()


def test_a_crash_before_the_rename_keeps_the_old_totals(path, monkeypatch):
    shared = SharedFile.create(path, [], 1)
    hit(shared, FIRST_WORKER + 0, 3)
    shared.close()

    class Killed(BaseException):
        pass

    def killed(_):
        raise Killed

    monkeypatch.setattr(module.os, "fsync", killed)
    with pytest.raises(Killed):
        SharedFile.create(path, [], 1)
    monkeypatch.undo()
    shared = SharedFile.create(path, [], 1)
    assert shared.totals()[HITS] == 3
    shared.close()


def test_a_full_disk_counts_in_memory_and_keeps_the_old_file(path, monkeypatch, caplog):
    shared = SharedFile.create(path, [], 1)
    hit(shared, FIRST_WORKER + 0, 3)
    shared.close()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    shared = SharedFile.create(path, [], 1)
    assert "will be lost" in caplog.text
    monkeypatch.undo()
    hit(shared, FIRST_WORKER + 0)
    assert shared.totals()[HITS] == 4
    shared.close()
    shared = SharedFile.create(path, [], 1)
    assert shared.totals()[HITS] == 3
    shared.close()


def test_a_folder_that_is_missing_is_told(tmp_path):
    with pytest.raises(StoreError, match="counters can't be kept"):
        SharedFile.create(tmp_path / "none" / "shared", [], 1)
    (tmp_path / "shared").mkdir()
    with pytest.raises(StoreError, match="counters can't be read"):
        SharedFile.create(tmp_path / "shared", [], 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lives=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 1000), st.integers(0, 4), st.booleans()), max_size=8
    )
)
def test_a_supervisor_killed_within_a_fold_loses_and_doubles_nothing(tmp_path_factory, lives):
    path = tmp_path_factory.mktemp("run") / "shared"
    shared = SharedFile.create(path, ["a"], 2)
    counted = 0
    for block, amount, stores, attach in lives:
        hit(shared, block + 1, amount)
        counted += amount
        fold = shared._fold_steps(block + 1)
        for _ in range(stores):
            next(fold)
        fold.close()
        assert shared.totals()[HITS] == counted
        if stores < 4:  # killed: the next life finds the file as it is
            if attach:
                again = SharedFile(os.dup(shared.fd))
                assert again.totals()[HITS] == counted
                again.close()
            shared.close()
            shared = SharedFile.create(path, ["a"], 2)
        assert shared.totals()[HITS] == counted
    shared.close()


def test_readers_never_see_a_counter_go_back_or_double(path):
    shared = SharedFile.create(path, [], 1)
    reader = SharedFile(os.dup(shared.fd))
    block = FIRST_WORKER + 0
    counted = [0]
    wrong = []
    reads = [0]
    stop = threading.Event()

    def read():
        last = 0
        while not stop.is_set():
            value = reader.totals()[HITS]
            if not last <= value <= counted[0]:
                wrong.append((last, value, counted[0]))
            last = value
            reads[0] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(100):
            for _ in range(20):
                counted[0] += 1  # announced first, so a reader may never see more
                hit(shared, block)
            shared.fold(block)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert wrong == []
    assert reads[0] > 0
    assert shared.totals()[HITS] == 2000
    reader.close()
    shared.close()


CHILD = """
import sys
from gup.process.shared_memory import SharedFile
shared = SharedFile(int(sys.argv[1]))
block = int(sys.argv[2])
for _ in range(2000):
    shared.page.raise_policy()
    with shared.page.locked(70):
        shared.page.words[70] += 1
    shared.counters(block).add("gup_worker_restarts_total")
shared.page.beat(block)
"""


def test_processes_share_epochs_locks_and_counters(path):
    shared = SharedFile.create(path, [], 2)
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(shared.fd), str(block)], pass_fds=[shared.fd])
        for block in (3, 4)
    ]
    for _ in range(500):
        shared.page.raise_policy()
        shared.page.raise_store()
    for child in children:
        assert child.wait(30) == 0
    assert shared.page.policy_epoch == 4500
    assert shared.page.words[POLICY_EPOCH] == 4500
    assert shared.page.store_epoch == 500
    assert shared.page.words[70] == 4000
    assert shared.totals()[RESTARTS] == 4000
    assert shared.page.last_beat(3) > 0
    shared.page.forget_beat(3)
    assert shared.page.last_beat(3) == 0
    assert shared.page.last_beat(4) > 0
    shared.close()


def test_closing_leaves_no_descriptor(path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    shared = SharedFile.create(path, ["a"], 1)
    counters = shared.counters(1)
    shared.close()
    with pytest.raises(ValueError, match="released"):
        counters.words[0] = 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_description_is_json_that_a_person_can_read(path):
    shared = SharedFile.create(path, ["a"], 1)
    shared.close()
    text = path.read_bytes()
    assert HITS in json.loads(text[32 : text.index(b"\0", 32)])["series"]
