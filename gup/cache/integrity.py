"""Damage in a cache directory: checks everything in it, and repairs what is not in use.

Blocks on the disk. `check_entry`, `check_part` and `put_right` are reliable only under the key's claim, or
while no service runs.
"""

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gup.cache.part_file import survey
from gup.cache.records import CHUNK_BYTES, FillState, Phase, Record
from gup.cache.store import Store, read_aside, sound_chunks, unlink
from gup.content.key import ContentKey


@dataclass(frozen=True, slots=True)
class Finding:
    """One damaged or foreign file. `path` is below the cache directory; `where` the metric's label, or
    "stray".

    `key` is None where no key could be read; `id` names a part.
    """

    where: str
    path: str
    detail: str
    key: ContentKey | None = None
    id: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    """The content of a cache directory. `ids`: of parts and states; `strays`: foreign files, leftovers."""

    keys: list[ContentKey]
    ids: list[str]
    strays: list[Path]


def contents(store: Store, grace_seconds: float) -> Contents:
    """A file changed within `grace_seconds` is no stray yet: it may be in use."""
    keys: set[ContentKey] = set()
    ids: set[str] = set()
    strays: list[Path] = []
    for path in _files(store.content):
        *folders, name = path.relative_to(store.content).parts
        if name.startswith(".") and name.endswith(".gup"):
            name = name[1:-4]
        try:
            keys.add(ContentKey.parse("/".join((*folders, name))))
        except ValueError:
            strays.append(path)
    for path in _files(store.partial):
        id_, _, rest = path.name.partition(".")
        if len(id_) == 32 and (rest == "state" or rest.endswith(".part")):
            ids.add(id_)
        elif path.name != "claims" and not (rest.endswith(".sums") and path.with_suffix(".part").exists()):
            strays.append(path)
    old = [path for path in strays if _age_seconds(path) >= grace_seconds]
    return Contents(sorted(keys, key=lambda key: key.text), sorted(ids), old)


def _files(folder: Path) -> Iterator[Path]:
    """Everything below except folders; one in a body's place counts as a file. Links are not followed."""
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        for name in (*names, *(name for name in folders if depth >= 4 or Path(place, name).is_symlink())):
            yield Path(place, name)
        if depth >= 4:
            folders.clear()


def _age_seconds(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.lstat().st_mtime)
    except OSError:
        return -1.0  # gone


def check_entry(store: Store, key: ContentKey) -> list[Finding]:
    """Reads all of the body."""
    where, path, wrong = "record", store.body_path(key), ""
    try:
        record = store.load(key)
        if record is not None:
            where, wrong = "body", _wrong_with_body(store, record)
        elif os.path.lexists(path):
            wrong = "a body without a record"
    except ValueError as error:
        path, wrong = store.record_path(key), f"a damaged record: {error}"
    return [Finding(where, _name(store, path), wrong, key)] if wrong else []


def _name(store: Store, path: Path) -> str:
    return str(path.relative_to(store.root))


def _wrong_with_body(store: Store, record: Record) -> str:
    file = store.open_whatever(record.key)
    if file is None:
        return f"a record without its body: {_what_is(store.body_path(record.key))}"
    size, chunks = os.fstat(file.fd).st_size, len(record.sums)
    bad = [chunk for chunk in range(chunks) if not read_aside(file.fd, record, chunk)]
    sized = "" if size == record.length else f"{size} bytes long instead of {record.length}; "
    if bad:
        named = ", ".join(map(str, bad[:10])) + (", …" if len(bad) > 10 else "")
        return f"{sized}{len(bad)} of {chunks} chunks of 1 MiB are missing or wrong: {named}"
    return sized + "extra bytes follow the right ones" if sized else ""


def _what_is(path: Path) -> str:
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        return error.strerror or str(error)
    if stat.S_ISREG(mode):
        return "the file can't be read"
    what = "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "not a regular file"
    return f"there is {what} in its place"


def check_part(store: Store, id_: str) -> list[Finding]:
    state_name = _name(store, store.state_path(id_))
    try:
        state = store.load_state(id_)
    except ValueError as error:
        return [Finding("state", state_name, f"a damaged state: {error}", id=id_)]
    found, generations = [], store.generations(id_)
    key = state.key if state is not None else None
    for generation in generations:
        part, wrong = store.part_path(id_, generation), ""
        if state is None:
            wrong = "a part without its state"
        elif generation != state.generation:
            wrong = "a part of an older generation"
        else:
            try:
                salvage = survey(part)
                if not salvage.whole:
                    wrong = f"right only up to byte {salvage.verified} of {salvage.size}"
            except OSError as error:
                wrong = f"it can't be read: {error.strerror}"
        if wrong:
            found.append(Finding("part", _name(store, part), wrong, key, id_))
    if state is not None and state.phase is Phase.STREAMING and state.generation not in generations:
        found.append(Finding("state", state_name, "a state without its part", key, id_))
    return found


def check_stray(store: Store, path: Path) -> list[Finding]:
    detail = "a file that does not belong to the cache"
    return [Finding("stray", _name(store, path), detail)] if os.path.lexists(path) else []


def put_right(store: Store, finding: Finding, *, alone: bool) -> None:
    """Drop what is damaged, so that it is fetched again.

    `alone`: no service runs, so files may be cut: a sound beginning stays, as a part.
    """
    if finding.key is not None and finding.where in ("body", "record"):
        if finding.where == "body" and _is_kept(store, finding.key, alone=alone):
            return
        store.remove(finding.key)
    elif finding.where in ("part", "state"):
        _mend_parts(store, finding.id, alone=alone)
    else:
        unlink(store.root / finding.path)


def _is_kept(store: Store, key: ContentKey, *, alone: bool) -> bool:
    """Whether the entry is complete after all, by finishing its interrupted commit, or has become a part."""
    record, file = store.load(key), store.open_whatever(key)
    if record is None or file is None:
        return record is not None and store.finish_commit(record)
    good = sound_chunks(file.fd, record) if alone else 0
    if not 0 < good < len(record.sums):
        return False
    state = FillState(record.key, record.kind, time.time_ns(), Phase.STREAMING, record.head)
    state = replace(state, path=record.asked_path, pinned=record.pinned, stored_at=record.stored_at)
    store.demote(record, file, good * CHUNK_BYTES, state)
    return True


def _mend_parts(store: Store, id_: str, *, alone: bool) -> None:
    try:
        state = store.load_state(id_)
    except ValueError:
        state = None
    for generation in store.generations(id_):
        part, good = store.part_path(id_, generation), 0
        if alone and state is not None and state.generation == generation and part.is_file():
            good = survey(part).verified
        if good:
            os.truncate(store.sums_path(id_, generation), 8 * (good // CHUNK_BYTES))
            os.truncate(part, good)
        else:
            store.drop_part(id_, generation)
    if state is None or state.generation not in store.generations(id_):
        store.drop_state(id_)
