"""Looking at everything in a cache directory, and putting right what nobody uses."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.disks import flip

from gup.cache.integrity import Finding, check_entry, check_part, check_stray, contents, put_right
from gup.cache.part_file import survey
from gup.cache.records import CHUNK_BYTES, ChunkSums, FillState, Head, Phase, Record
from gup.cache.recovery import writer_is_dead
from gup.cache.store import Store
from gup.content.key import ContentKey, Kind
from gup.content.routes import path_of

KEY = ContentKey("14.3 RU2", "French", "{535CB6A4-441F-4E8A-A897-804CD859100E}", "260101001", "full.zip")
PATH = path_of(KEY)
BODY = bytes(range(251)) * (4 * CHUNK_BYTES // 251)


HEAD = Head(len(BODY), '"tag"', "application/zip", None, "manager", '"theirs"')


def sums_of(body: bytes) -> ChunkSums:
    sums = ChunkSums()
    sums.add(body)
    return sums


def commit(store: Store) -> Record:
    store.part_path(KEY.id, 1).write_bytes(BODY)
    record = Record.of(KEY, Kind.FULL, HEAD, sums_of(BODY).finish(), 1.0, 1, PATH)
    store.commit(record)
    return record


def begin(store: Store) -> None:
    """A part of which a leader has died."""
    body = BODY[: 2 * CHUNK_BYTES + 9]
    store.part_path(KEY.id, 5).write_bytes(body)
    store.sums_path(KEY.id, 5).write_bytes(
        b"".join(value.to_bytes(8, "little") for value in sums_of(body).done)
    )
    store.save_state(FillState(KEY, Kind.FULL, 5, Phase.STREAMING, HEAD, path=PATH))


def look(store: Store) -> list[Finding]:
    names = contents(store, 0.0)
    found = [finding for key in names.keys for finding in check_entry(store, key)]
    found += [finding for id_ in names.ids for finding in check_part(store, id_)]
    return found + [finding for path in names.strays for finding in check_stray(store, path)]


def test_what_gup_leaves_behind_by_itself_is_clean(store):
    commit(store)
    assert look(store) == []
    store.remove(KEY)
    begin(store)
    (store.partial / "claims").touch()
    assert look(store) == []
    assert contents(store, 0.0).keys == []


def replaced(path, by):
    path.unlink()
    by(path)


HARMS = {
    "flipped": (lambda body, _: flip(body, CHUNK_BYTES, 2 * CHUNK_BYTES), "2 of 4 chunks of 1 MiB are"),
    "truncated": (lambda body, _: os.truncate(body, CHUNK_BYTES), "missing or wrong: 1, 2, 3"),
    "too long": (lambda body, _: os.truncate(body, len(BODY) + 1), "extra bytes follow the right ones"),
    "gone": (lambda body, _: body.unlink(), "a record without its body: No such file or directory"),
    "folder": (lambda body, _: replaced(body, Path.mkdir), "there is a folder in its place"),
    "link": (lambda body, _: replaced(body, lambda at: at.symlink_to("/dev/zero")), "there is a link in"),
    "fifo": (lambda body, _: replaced(body, os.mkfifo), "there is not a regular file in its place"),
    "no record": (lambda _, record: record.unlink(), "a body without a record"),
    "bad record": (lambda _, record: flip(record, 40), "a damaged record"),
    "odd record": (lambda _, record: replaced(record, Path.mkdir), "it can't be read: Is a directory"),
    "record fifo": (lambda _, record: replaced(record, os.mkfifo), "it can't be read: It is a pipe"),
}


@pytest.mark.parametrize("name", HARMS)
def test_damage_is_named_and_put_right(store, name):
    harm, detail = HARMS[name]
    commit(store)
    harm(store.body_path(KEY), store.record_path(KEY))
    (found,) = look(store)
    assert (found.where, found.key) == ("record" if "record" in name else "body", KEY)
    assert detail in found.detail
    put_right(store, found, alone=True)
    assert look(store) == []
    assert not store.body_path(KEY).exists()
    assert not store.record_path(KEY).exists()


def test_an_interrupted_commit_is_finished(store):
    record = commit(store)
    store.body_path(KEY).rename(store.part_path(KEY.id, record.generation))
    for found in look(store):
        put_right(store, found, alone=True)
    assert look(store) == []
    assert store.body_path(KEY).read_bytes() == BODY


def test_another_time_alone_is_no_damage(store):
    commit(store)
    os.utime(store.body_path(KEY), (5, 5))
    assert look(store) == []


def test_right_chunks_at_the_beginning_stay_as_a_part(store):
    record = commit(store)
    flip(store.body_path(KEY), 2 * CHUNK_BYTES)
    put_right(store, look(store)[0], alone=True)
    state = store.load_state(KEY.id)
    assert state is not None
    assert (state.phase, state.head, state.path) == (Phase.STREAMING, record.head, PATH)
    salvage = survey(store.part_path(KEY.id, state.generation))
    assert (salvage.size, salvage.verified, salvage.whole) == (2 * CHUNK_BYTES, 2 * CHUNK_BYTES, True)


def test_while_a_service_runs_no_file_is_cut(store):
    commit(store)
    flip(store.body_path(KEY), 2 * CHUNK_BYTES)
    reader = store.open_whatever(KEY)
    put_right(store, look(store)[0], alone=False)
    assert os.fstat(reader.fd).st_size == len(BODY)
    assert store.load_state(KEY.id) is None
    begin(store)
    with store.part_path(KEY.id, 5).open("rb") as part:
        flip(store.part_path(KEY.id, 5), CHUNK_BYTES)
        put_right(store, look(store)[0], alone=False)
        assert os.fstat(part.fileno()).st_size == 2 * CHUNK_BYTES + 9
    assert look(store) == []


MIB = CHUNK_BYTES
PARTS = {
    "part": (lambda s: flip(s.part_path(KEY.id, 5), MIB), "part", "right only up to byte 1048576", MIB),
    "first chunk": (lambda s: flip(s.part_path(KEY.id, 5), 0), "part", "right only up to byte 0", 0),
    "sums": (lambda s: flip(s.sums_path(KEY.id, 5), 8), "part", "right only up to byte 1048576", MIB),
    "no state": (lambda s: s.drop_state(KEY.id), "part", "without its state", 0),
    "bad state": (lambda s: flip(s.state_path(KEY.id), 30), "state", "a damaged state", 0),
    "no part": (lambda s: s.drop_part(KEY.id, 5), "state", "a state without its part", 0),
    "two parts": (lambda s: s.part_path(KEY.id, 4).touch(), "part", "older generation", 2 * MIB),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_cut_to_what_is_right_of_them(store, name):
    harm, where, detail, left = PARTS[name]
    begin(store)
    harm(store)
    (found,) = look(store)
    assert found.where == where
    assert detail in found.detail
    put_right(store, found, alone=True)
    assert look(store) == []
    sizes = [path.stat().st_size for path in store.partial.glob("*.part")]
    assert sizes == ([left] if left else [])
    assert (store.load_state(KEY.id) is not None) == bool(left)


def test_a_temporary_file_tells_whether_its_writer_is_dead(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert writer_is_dead(tmp_path / f"{ended.pid}.123.full.zip.gup.tmp")
    for name in (f"{os.getpid()}.1.gup.tmp", f"{ended.pid}.1.gup", f"x{ended.pid}.1.tmp", "0.1.tmp", ".tmp"):
        assert not writer_is_dead(tmp_path / name), name


def test_nobodys_files_are_named_when_they_are_old_enough(store):
    commit(store)
    strays = [
        store.partial / "77.88.x.tmp",
        store.partial / f"{KEY.id}.9.sums",
        store.partial / "notes.txt",
        store.content / "notes.txt",
        store.body_path(KEY).with_name(".hidden"),
        store.content / "14.3 RU2" / "elsewhere",
    ]
    for path in strays[:-1]:
        path.write_bytes(b"x")
    strays[-1].symlink_to("/")
    assert sorted(contents(store, 0.0).strays) == sorted(strays)
    assert contents(store, 60.0).strays == []
    for path in strays:
        os.utime(path, (time.time() - 90,) * 2, follow_symlinks=False)
    found = [finding for path in contents(store, 60.0).strays for finding in check_stray(store, path)]
    assert {finding.where for finding in found} == {"stray"}
    for finding in found:
        put_right(store, finding, alone=False)
    assert look(store) == []
    assert store.load(KEY) is not None
