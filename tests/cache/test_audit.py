"""Looking at everything in a cache directory, and putting right what nobody uses."""

import os
import time

import pytest
from harness.harm import flip

from gup.cache.integrity import Finding, check_entry, check_part, check_stray, contents, put_right
from gup.cache.part_file import survey
from gup.cache.records import CHUNK_BYTES, ChunkSums, FillState, Head, Phase, Record
from gup.cache.store import Store
from gup.content.key import ContentKey, Kind
from gup.content.routes import path_of

KEY = ContentKey("14.3 RU2", "French", "{535CB6A4-441F-4E8A-A897-804CD859100E}", "260101001", "full.zip")
PATH = path_of(KEY)
BODY = bytes(range(251)) * (4 * CHUNK_BYTES // 251)


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path)
    made.prepare()
    return made


def commit(store: Store, key: ContentKey = KEY) -> Record:
    part = store.part_path(key.id, 1)
    part.write_bytes(BODY)
    sums = ChunkSums()
    sums.add(BODY)
    head = Head(len(BODY), '"tag"', "application/zip", None, "manager", '"theirs"')
    record = Record.of(key, Kind.FULL, head, sums.finish(), 1.0, 1, PATH)
    store.commit(record)
    return record


def begin(store: Store, phase: Phase = Phase.STREAMING, size: int = 2 * CHUNK_BYTES + 9) -> None:
    """A part of which a leader has died."""
    store.part_path(KEY.id, 5).write_bytes(BODY[:size])
    sums = ChunkSums()
    sums.add(BODY[:size])
    packed = b"".join(value.to_bytes(8, "little") for value in sums.done)
    store.sums_path(KEY.id, 5).write_bytes(packed)
    head = Head(len(BODY), '"tag"', "application/zip", None, "manager", '"theirs"')
    store.save_state(FillState(KEY, Kind.FULL, 5, phase, head, path=PATH))


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


@pytest.mark.parametrize(
    ("harm", "where", "detail"),
    [
        (
            lambda body, _: flip(body, CHUNK_BYTES, 2 * CHUNK_BYTES),
            "body",
            "2 of 4 chunks of 1 MiB are missing or wrong: 1, 2",
        ),
        (
            lambda body, _: os.truncate(body, CHUNK_BYTES),
            "body",
            "3 of 4 chunks of 1 MiB are missing or wrong: 1, 2, 3",
        ),
        (
            lambda body, _: os.truncate(body, len(BODY) + 1),
            "body",
            "what is too much follows the right bytes",
        ),
        (lambda body, _: body.unlink(), "body", "a record without its body: No such file or directory"),
        (lambda body, _: (body.unlink(), body.mkdir()), "body", "there is a folder in its place"),
        (
            lambda body, _: (body.unlink(), body.symlink_to("/dev/zero")),
            "body",
            "there is a link in its place",
        ),
        (lambda body, _: (body.unlink(), os.mkfifo(body)), "body", "there is no plain file in its place"),
        (lambda _, record: record.unlink(), "record", "a body without a record"),
        (lambda _, record: flip(record, 40), "record", "a damaged record"),
        (lambda _, record: (record.unlink(), record.mkdir()), "record", "it can't be read: Is a directory"),
        (lambda _, record: (record.unlink(), os.mkfifo(record)), "record", "It is a pipe"),
    ],
    ids=[
        "flipped",
        "truncated",
        "too long",
        "gone",
        "folder",
        "link",
        "fifo",
        "no record",
        "bad record",
        "odd record",
        "record fifo",
    ],
)
def test_damage_is_named_and_put_right(store, harm, where, detail):
    record = commit(store)
    harm(store.body_path(KEY), store.record_path(KEY))
    (found,) = look(store)
    assert (found.where, found.key) == (where, KEY)
    assert detail in found.detail
    put_right(store, found, alone=True)
    assert look(store) == []
    assert not store.body_path(KEY).exists()
    assert not store.record_path(KEY).exists()
    assert record.path == PATH


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
    salvage = survey(store.part_path(KEY.id, state.generation), store.sums_path(KEY.id, state.generation))
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


@pytest.mark.parametrize(
    ("harm", "where", "detail", "left"),
    [
        (
            lambda s: flip(s.part_path(KEY.id, 5), CHUNK_BYTES),
            "part",
            "right up to byte 1048576",
            CHUNK_BYTES,
        ),
        (lambda s: flip(s.part_path(KEY.id, 5), 0), "part", "right up to byte 0", 0),
        (lambda s: flip(s.sums_path(KEY.id, 5), 8), "part", "right up to byte 1048576", CHUNK_BYTES),
        (lambda s: s.drop_state(KEY.id), "part", "without its state", 0),
        (lambda s: flip(s.state_path(KEY.id), 30), "state", "a damaged state", 0),
        (lambda s: s.drop_part(KEY.id, 5), "state", "a state without its part", 0),
        (lambda s: s.part_path(KEY.id, 4).touch(), "part", "older generation", 2 * CHUNK_BYTES),
    ],
    ids=["part", "first chunk", "sums", "no state", "bad state", "no part", "two parts"],
)
def test_parts_are_cut_to_what_is_right_of_them(store, harm, where, detail, left):
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
