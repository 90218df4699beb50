"""Archives of entries: out of one store and into another, whole, damaged, cut off, and made by others."""

import asyncio
import io
import json
import re
import subprocess
import tarfile
import tracemalloc
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gup.cache.archive import FIRST, LAST, ArchiveError, Import, Imported, summary, written
from gup.cache.integrity import check_entry, contents
from gup.cache.locks import Claims
from gup.cache.records import ChunkSums, FillState, Head, Phase, Record, seal
from gup.cache.store import Store
from gup.content.key import ContentKey, Kind
from gup.content.routes import path_of

NOW = 2_000_000.0


def key(file="full.zip", revision="260101001"):
    return ContentKey("14.3 RU2", "Français", "{535CB6A4-441F-4E8A-A897-804CD859100E}", revision, file)


def store_at(folder: Path) -> Store:
    store = Store(folder)
    store.prepare()
    return store


def commit(store, name, body, *, pinned=False):
    part = store.part_path(name.id, 1)
    part.write_bytes(body)
    sums = ChunkSums()
    sums.add(body)
    head = Head(len(body), f'"{name.id[:8]}"', "application/zip", None, "manager", '"u"')
    record = Record.of(name, Kind.FULL, head, sums.finish(), 1000.0, 1, path_of(name))
    store.commit(replace(record, pinned=pinned))
    return record


@pytest.fixture
def source(tmp_path):
    """A store with a body of several chunks, a small one that is pinned, and one with a long name."""
    store = store_at(tmp_path / "source")
    for name, body, pinned in (
        (key(), bytes(range(256)) * 10_000, False),
        (key("xdelta260101001_To_260102001.dax"), b"delta" * 100, True),
        (key("n" * 180 + ".zip", "260102001"), b"x" * 512, False),
    ):
        commit(store, name, body, pinned=pinned)
    return store


def keys_of(store):
    return contents(store, 0.0).keys


def archive(store, keys=None) -> bytes:
    async def pieces() -> list[bytes]:
        made = written(store, keys if keys is not None else keys_of(store), "lyon", NOW)
        return [piece async for piece in made]

    return b"".join(asyncio.run(pieces()))


def importing(store: Store, taken: list | None = None, why: str = "") -> Import:
    return Import(store, NOW, lambda _length: why, (taken if taken is not None else []).append)


def take(text: bytes, store: Store, *, why: str = "", seekable: bool = True) -> Imported:
    taken: list = []
    done = importing(store, taken, why).take(io.BytesIO(text) if seekable else Stream(text))
    assert len(taken) == done.imported
    assert list(store.partial.glob("*")) == []
    return done


def test_every_entry_arrives_whole_with_its_record_and_without_its_pin(source, tmp_path):
    target = store_at(tmp_path / "target")
    done = take(archive(source), target)
    assert (done.imported, done.present, done.refused, done.complete) == (3, 0, [], True)
    assert done.imported_bytes == 2_560_000 + 500 + 512
    for name in keys_of(source):
        ours, theirs = target.load(name), source.load(name)
        assert check_entry(target, name) == []
        assert target.body_path(name).read_bytes() == source.body_path(name).read_bytes()
        assert ours == replace(theirs, pinned=False, generation=ours.generation, order=ours.order)


def test_an_archive_is_a_tar_that_tells_of_itself(source, tmp_path):
    file = tmp_path / "a.tar"
    file.write_bytes(archive(source))
    with tarfile.open(file) as found:
        names = found.getnames()
        assert json.load(found.extractfile(FIRST))["site"] == "lyon"
    assert (names[0], names[-1], len(names)) == (FIRST, LAST, 8)
    assert summary(file) == {"entries": 3, "bytes": 2_561_012, "left_out": [], "not_wanted": {}}
    file.write_bytes(file.read_bytes()[:-2048])
    with pytest.raises(ArchiveError, match="truncated"):
        summary(file)


def test_what_is_damaged_or_gone_is_left_out_and_named(source, tmp_path):
    body = source.body_path(key())
    with body.open("r+b") as damaged:
        damaged.seek(1_500_000)
        damaged.write(b"?")
    source.set_time(body, source.load(key()))
    text = archive(source, [*keys_of(source), key("gone.zip")])
    (tmp_path / "a.tar").write_bytes(text)
    left_out = summary(tmp_path / "a.tar")["left_out"]
    assert {(row["key"], row["why"]) for row in left_out} == {
        (key().text, "the body is damaged"),
        (key("gone.zip").text, "there is no such entry"),
    }
    assert take(text, store_at(tmp_path / "target")).imported == 2


def test_nothing_is_overwritten_sound_or_not(source, tmp_path):
    target = store_at(tmp_path / "target")
    commit(target, key(), b"another body")
    broken = key("xdelta260101001_To_260102001.dax")
    target.record_path(broken).parent.mkdir(parents=True, exist_ok=True)
    target.record_path(broken).write_text("no record")
    done = take(archive(source), target)
    assert (done.imported, done.present, done.refused) == (1, 2, [])
    assert target.body_path(key()).read_bytes() == b"another body"
    assert target.record_path(broken).read_text() == "no record"
    assert take(archive(source), target).present == 3


def test_without_room_or_while_it_is_fetched_an_entry_is_refused(source, tmp_path):
    target, text = store_at(tmp_path / "target"), archive(source)
    assert take(text, target, why="no room").refused[0] == {"name": key().text, "why": "no room"}
    claims = target.run / "claims"
    with closing(Claims(claims)) as target.claims, closing(Claims(claims)) as others:
        others.try_claim(key().claim_offset)
        done = take(text, target)
        assert (done.imported, done.refused) == (
            2,
            [{"name": key().text, "why": "it is being fetched; import it again later"}],
        )
        others.release(key().claim_offset)
        assert take(text, target).imported == 1
        assert not any(others.taken(name.claim_offset) for name in keys_of(target))


def test_an_unfinished_part_gives_way(source, tmp_path):
    target = store_at(tmp_path / "target")
    target.part_path(key().id, 7).write_bytes(b"half")
    target.save_state(FillState(key(), Kind.FULL, 7, Phase.STREAMING, source.load(key()).head))
    assert take(archive(source), target).imported == 3


def members(text):
    with tarfile.open(fileobj=io.BytesIO(text)) as found:
        return [(member, found.extractfile(member).read()) for member in found]


def tar_of(rows):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for member, content in rows:
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def renamed(member, name):
    changed = tarfile.TarInfo(name)
    changed.size = member.size
    return changed


def test_what_does_not_fit_its_record_is_refused_and_the_rest_taken(source, tmp_path):
    first, *rest = members(archive(source, [key()]))
    record, body = rest[:2]
    changed = bytearray(body[1])
    changed[2_000_000] ^= 1
    other = "content/" + key("other.zip").text
    cases = {
        "damaged: its bytes": [record, (body[0], bytes(changed))],
        "bytes long instead of": [record, (body[0], body[1][:-1])],
        "does not follow its record": [body],
        "another entry's name": [(renamed(record[0], "content/a/b/c/d/.e.gup"), record[1])],
        "a damaged record": [(record[0], record[1].replace(b"manager", b"manafer"))],
        "a body that does not follow its record": [record, (renamed(body[0], other), body[1])],
        "neither a record nor a body": [(renamed(body[0], "content/../../etc/x"[8:]), body[1])],
    }
    for number, (words, rows) in enumerate(cases.items()):
        target = store_at(tmp_path / str(number))
        done = take(tar_of([first, *rows, rest[-1]]), target)
        assert any(words in row["why"] for row in done.refused), (words, done.refused)
        assert (done.imported, done.complete) == (0, True)
        assert contents(target, 0.0).keys == []


def test_links_and_folders_are_refused(source, tmp_path):
    first, *_ = members(archive(source, []))
    link = tarfile.TarInfo("content/a/b/c/d/e")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    done = take(tar_of([first, (link, b"")]), store_at(tmp_path / "target"))
    assert done.refused == [{"name": "a/b/c/d/e", "why": "neither a record nor a body"}]
    assert (done.complete, "truncated" in done.problem) == (False, True)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1), st.booleans(), st.booleans())
def test_what_is_cut_off_or_spoilt_gives_whole_entries_only(source, tmp_path_factory, at, cut, seekable):
    text = archive(source)
    place = int(at * (len(text) - 1))
    spoilt = text[:place] if cut else text[:place] + bytes([text[place] ^ 0x55]) + text[place + 1 :]
    target = store_at(tmp_path_factory.mktemp("target"))
    try:
        done = take(spoilt, target, seekable=seekable)
    except ArchiveError:
        assert keys_of(target) == []
        return
    assert len(keys_of(target)) == done.imported
    assert all(check_entry(target, name) == [] for name in keys_of(target))
    assert done.complete or done.problem


class Stream:
    """A stream of any length that is not kept in memory: pieces, and zeros for numbers."""

    def __init__(self, *parts):
        self._parts = list(parts)
        self.read_bytes = 0

    def read(self, size):
        while self._parts:
            part = self._parts[0]
            piece = bytes(min(size, part)) if isinstance(part, int) else part[:size]
            self._parts[0] = part - len(piece) if isinstance(part, int) else part[size:]
            if piece:
                self.read_bytes += len(piece)
                return piece
            del self._parts[0]
        return b""


def header(name, size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


MANIFEST = b'{"format": 1, "gup": "1", "site": "s", "made_at": 1}'
BEGINNING = header(FIRST, len(MANIFEST)) + MANIFEST + bytes(-len(MANIFEST) % 512)
HUGE = 200 << 20


def extended(text: bytes, size: int | None = None) -> bytes:
    return header("x", size or len(text), tarfile.XHDTYPE) + text.ljust(512, b"\0")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([header("x", HUGE, tarfile.XHDTYPE), HUGE], "headers of more than"),
        ([header("x", HUGE, tarfile.GNUTYPE_LONGNAME), HUGE], "headers of more than"),
        ([header("x", 512, tarfile.GNUTYPE_SPARSE), HUGE], "sparse"),
        ([(header("x", 512, tarfile.XGLTYPE) + bytes(512)) * 2000], "header"),
        ([header("x", 0, tarfile.XHDTYPE) * 2000], "header"),
        # of a damaged extension, Python 3.11.2 tells that nothing follows
        ([extended(b"29 GNU.sparse.realsize=9999999\n", 30)], "damaged header|truncated"),
        (
            [extended(b"22 GNU.sparse.major=1\n"), header("y", 512), b"9" * 2000, HUGE],
            "truncated|sparse|header",
        ),
        ([extended(b"13 size=-500\n"), header("y", 512)], "damaged header|negative"),
        ([extended(b"\xff\xff\xff")], "damaged header|truncated"),
        ([header("content/a/b/c/d/e", 1 << 60), HUGE], "truncated"),
    ],
    ids=range(10),
)
def test_no_header_costs_memory_or_an_unknown_error(tmp_path, parts, words):
    stream = Stream(BEGINNING, *parts)
    target = store_at(tmp_path / "target")
    tracemalloc.start()
    done = importing(target).take(stream)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert re.search(words, done.problem)
    assert (done.imported, done.complete) == (0, False)
    assert most < 4 << 20


@pytest.mark.parametrize("name", ["content/a/b/c/d/.e.gup", "gup-archive.json"])
def test_a_member_of_200_mb_is_passed_over_and_not_kept(tmp_path, name):
    target = store_at(tmp_path / "target")
    start = [BEGINNING] if name != FIRST else []
    stream = Stream(*start, header(name, HUGE), HUGE, header(LAST, 0), 1024)
    tracemalloc.start()
    try:
        done = importing(target).take(stream)
        assert (done.complete, len(done.refused)) == (True, 1)
        assert "bytes long" in done.refused[0]["why"]
    except ArchiveError:
        assert name == FIRST
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 << 20


def test_refused_members_are_named_up_to_a_limit(tmp_path):
    many = header("content/\x1b[2J" + "x" * 60, 0) * 10_050
    done = importing(store_at(tmp_path / "target")).take(Stream(BEGINNING, many))
    assert len(done.refused) == 10_000
    assert "10000 members were refused" in done.problem
    assert all(row["name"].isprintable() for row in done.refused)


@pytest.mark.needs("tar")
@pytest.mark.parametrize("form", ["gnu", "pax", "ustar"])
def test_an_archive_that_tar_packed_anew_is_taken(source, tmp_path, form):
    (tmp_path / "a.tar").write_bytes(archive(source, [key(), key("xdelta260101001_To_260102001.dax")]))
    folder = tmp_path / "unpacked"
    folder.mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "a.tar", "-C", folder], check=True)
    names = subprocess.run(
        ["tar", "-tf", tmp_path / "a.tar"], check=True, capture_output=True
    ).stdout.decode()
    made = ["tar", "--format", form, "-cf", tmp_path / "b.tar", "-C", folder, "--no-recursion", "-T", "-"]
    subprocess.run(made, check=True, input=names.encode())
    target = store_at(tmp_path / "target")
    with (tmp_path / "b.tar").open("rb") as stream:
        done = importing(target).take(stream)
    assert (done.imported, done.refused, done.complete) == (2, [], True)
    assert summary(tmp_path / "b.tar")["entries"] == 2


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=3000), st.booleans(), st.booleans())
def test_arbitrary_bytes_are_no_archive_or_give_nothing(tmp_path, noise, begun, seekable):
    target = store_at(tmp_path / "target")
    try:
        done = take((BEGINNING if begun else b"") + noise, target, seekable=seekable)
    except ArchiveError:
        return
    assert (done.imported, done.complete) == (0, False)


def first(text: bytes) -> bytes:
    return tar_of([(tarfile.TarInfo(FIRST), text)])


NONE = {
    "nothing": (b"", "not an archive made by gup cache export"),
    "zeros": (b"\0" * 2000, "not an archive"),
    "a zip": (b"PK\3\4" * 500, "not an archive"),
    "a tar": (tar_of([(tarfile.TarInfo("a"), b"b")]), "not an archive"),
    "another format": (first(b'{"format": 9}'), "format 9; this gup reads format 1"),
    "odd format": (first(b'{"format": [[]], "gup": "1", "site": "s", "made_at": 1}'), "format an array of 1"),
    "an array": (first(b"[]"), "not an archive"),
    "NaN": (first(b'{"format": 1, "gup": "1", "site": "s", "made_at": NaN}'), "not an archive"),
    "no gup": (first(b'{"format": 1}'), "'gup': it is missing; export it again"),
    "no text": (
        first(b'{"format": 1, "gup": "1", "site": 5, "made_at": 1}'),
        "'site': Input should be a valid str",
    ),
    "float": (
        first(b'{"format": 1.0, "gup": "1", "site": "s", "made_at": []}'),
        "'format': Input should be a valid int",
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_archive_of_ours_is_told_with_cause_and_remedy(tmp_path, name):
    text, words = NONE[name]
    with pytest.raises(ArchiveError, match=re.escape(words)):
        take(text, store_at(tmp_path / "target"))


@pytest.mark.parametrize(
    ("name", "value"), [("length", 80.0), ("path", "@evil:80/x"), ("key", "../../../../x")]
)
def test_a_record_that_is_wrong_is_refused_by_name_and_the_rest_is_taken(source, tmp_path, name, value):
    first, record, *rest = members(archive(source))
    fields = json.loads(record[1])
    del fields["checksum"]
    bad = seal(fields | {name: value})
    target = store_at(tmp_path / "target")
    done = take(tar_of([first, (record[0], bad), *rest]), target)
    assert done.complete
    assert done.imported == 2
    why = {row["why"].partition(";")[0].partition(":")[0] for row in done.refused}
    assert why == {"a damaged record", "a body that does not follow its record"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
