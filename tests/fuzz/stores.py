"""Files of the cache directory: one holds the given bytes when a worker, a controller and fsck read it.

The first byte names the file. Records and states are also given with a right checksum, as by another version
or by hand.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from harness.caches import Cut, working

from fuzz import Check
from fuzz.endpoints import upstream
from fuzz.records import sealed
from gup.cache.catalog_cache import FILE as CATALOGUES
from gup.cache.catalog_cache import read_kept
from gup.cache.disk import read_mark
from gup.cache.integrity import Finding, check_entry, check_part, check_stray, contents, put_right
from gup.cache.records import CHUNK_BYTES, ChunkSums, FillState, Head, Phase, Record
from gup.cache.store import Store, sound_chunks
from gup.cache.streams import Streams
from gup.client_names import read_key
from gup.content.key import ContentKey, Kind
from gup.content.routes import path_of
from gup.errors import Problem
from gup.jsonmodel import InvalidError

_MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
KEY = ContentKey("any", "any", _MONIKER, "260801001", "xdelta260731001_To_260801001.dax")
OTHER = ContentKey("any", "any", _MONIKER, "260802001", "xdelta260801001_To_260802001.dax")
BODY = bytes(range(256)) * 3
PART = bytes(CHUNK_BYTES) + BODY
AT = 1_785_574_800.0
FILES = {
    b"r": "a record",
    b"R": "a record with a right checksum",
    b"b": "a body",
    b"s": "a state",
    b"S": "a state with a right checksum",
    b"p": "the beginning of a part",
    b"u": "the sums of a part",
    b"c": "catalogues",
    b"n": "numbers of streams",
    b"d": "demotions",
    b"m": "the mark of the last sync",
    b"k": "the key of hashed names",
}


def _head(body: bytes, name: str) -> Head:
    return Head(len(body), f'"{name}"', "application/octet-stream", None, "u0", f'"{name}"')


def _sums(body: bytes) -> tuple[int, ...]:
    sums = ChunkSums()
    sums.add(body)
    return sums.finish()


RECORD = Record.of(KEY, Kind.DELTA, _head(BODY, "a"), _sums(BODY), AT, 7, path_of(KEY))
STATE = FillState(OTHER, Kind.DELTA, 9, Phase.STREAMING, _head(PART, "b"), path=path_of(OTHER))
_BODIES = {path_of(KEY).encode(): BODY, path_of(OTHER).encode(): PART}


def _answer(request: bytes) -> bytes:
    body = _BODIES.get(request.split(b" ")[1])
    if body is None:
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@contextmanager
def target() -> Iterator[Check]:
    """Whatever a file of the cache directory holds, it is read as what was stored or as damage: clients get
    the right bodies or an error, what fsck repairs is found clean, and nothing else is raised.
    """
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        yield lambda given: _check(given, Path(folder), runner)


def _check(given: bytes, folder: Path, runner: asyncio.Runner) -> None:
    which, text = given[:1], given[1:]
    if which in (b"R", b"S"):
        text = sealed(text)
    forged = which in (b"R", b"S")
    root = folder / "cache"
    try:
        store = _store(root, which, text)
        _look(store, forged=forged)
        _fsck(store, forged=forged)
    finally:
        shutil.rmtree(root)
    if which in b"mkc":  # no worker of a cache alone reads these
        return
    try:
        _store(root, which, text)
        runner.run(_serve(root, forged=forged, has_part=which in b"pusS"))
    finally:
        shutil.rmtree(root)


def _store(root: Path, which: bytes, text: bytes) -> Store:
    """An entry, a whole part where it matters, and the file in its place."""
    store = Store(root)
    store.prepare()
    body, record = store.body_path(KEY), store.record_path(KEY)
    body.parent.mkdir(parents=True)
    record.write_bytes(text if which in (b"r", b"R") else RECORD.encode())
    body.write_bytes(text if which == b"b" else BODY)
    os.utime(body, ns=(RECORD.generation, RECORD.generation))
    if which in b"pusS":
        _store_part(store, which, text)
    names = {b"c": CATALOGUES, b"n": "streams", b"d": "demotions", b"m": "synced", b"k": "address-key"}
    if which in names:
        (store.run / names[which]).write_bytes(text)
    return store


def _store_part(store: Store, which: bytes, text: bytes) -> None:
    part, sums = store.part_path(OTHER.id, 9), store.sums_path(OTHER.id, 9)
    with part.open("wb") as file:
        file.truncate(CHUNK_BYTES)
        file.write(text[:CHUNK_BYTES] if which == b"p" else b"")
        file.seek(CHUNK_BYTES)
        file.write(BODY)
    packed = b"".join(value.to_bytes(8, "little") for value in _sums(PART))
    sums.write_bytes(text if which == b"u" else packed)
    store.state_path(OTHER.id).write_bytes(text if which in (b"s", b"S") else STATE.encode())


def _look(store: Store, *, forged: bool) -> None:
    """As the controller looks."""
    for stored in store.scan():
        if stored.record is not None:
            assert stored.record.key == stored.key
            assert Record.decode(stored.record.encode()) == stored.record
    for part in store.parts():
        assert part.state is None or FillState.decode(part.state.encode()) == part.state
    try:
        record = store.load(KEY)
    except InvalidError as error:
        assert str(error).isprintable()
        record = None
    assert forged or record in (None, RECORD)
    if record is not None and not forged:
        file = store.open_body(record)
        if file is not None and sound_chunks(file.fd, record) == len(record.sums):
            assert os.pread(file.fd, len(BODY) + 1, 0) == BODY
    store.note_occupied()
    store.demotions.disk_is_bad()
    read_kept(store.run)
    read_mark(store.run).covers(RECORD)
    streams = Streams(store.run / "streams")
    assert streams.add(KEY) == streams.number(KEY)
    assert len(read_key(store.run / "address-key")) == 32


def _found(store: Store) -> list[Finding]:
    inside = contents(store, 0.0)
    return [
        *(finding for key in inside.keys for finding in check_entry(store, key)),
        *(finding for id_ in inside.ids for finding in check_part(store, id_)),
        *(finding for path in inside.strays for finding in check_stray(store, path)),
    ]


def _fsck(store: Store, *, forged: bool) -> None:
    for finding in _found(store):
        put_right(store, finding, alone=True)
    assert _found(store) == [], _found(store)
    assert forged or all(stored.record == RECORD for stored in store.scan())


async def _serve(root: Path, *, forged: bool, has_part: bool) -> None:
    async with upstream(_answer) as url, working(root, [url]) as worker:
        for key, right in ((KEY, BODY), (OTHER, PART))[: 1 + has_part]:
            with contextlib.suppress(Problem, Cut):
                body = await worker.get(unquote(path_of(key)))
                assert forged or body == right, f"{key.text}: {len(body)} bytes"
