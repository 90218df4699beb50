"""What is wrong in a cache directory: everything in it is looked at, and what nobody uses can be put right.

Blocks on the disk. `check_entry`, `check_part` and `put_right` are sure only while nobody works on the key:
under its claim, or while no service runs.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gup.cache.chunks import read_aside
from gup.cache.part_file import survey
from gup.cache.records import CHUNK_BYTES, FillState, Phase, Record
from gup.cache.recovery import demoted
from gup.cache.store import Store, unlink
from gup.content.key import ContentKey


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `path` is below the cache directory; `where` the metric's label, or "stray".

    `key` is None for what belongs to no key that could be read; `id` names a part.
    """

    where: str
    path: str
    detail: str
    key: ContentKey | None = None
    id: str = ""


@dataclass(slots=True)
class Contents:
    """The names in a cache directory, by what they are. `strays` are files that gup did not put there, or
    that a process which died left; `ids` are those of parts and states.
    """

    keys: list[ContentKey] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    strays: list[Path] = field(default_factory=list)


def contents(store: Store, grace_seconds: float) -> Contents:
    """All names. A file changed within `grace_seconds` is no stray yet: somebody may be at work on it."""
    found = Contents()
    keys: set[ContentKey] = set()
    for path in _files(store.content):
        key = _key_of(store, path)
        if key is None:
            found.strays.append(path)
        else:
            keys.add(key)
    found.keys = sorted(keys, key=lambda key: key.text)
    ids: set[str] = set()
    for path in _files(store.partial):
        id_, _, rest = path.name.partition(".")
        if len(id_) == 32 and (rest == "state" or rest.endswith(".part")):
            ids.add(id_)
        elif path.name != "claims" and not (rest.endswith(".sums") and path.with_suffix(".part").exists()):
            found.strays.append(path)
    found.ids = sorted(ids)
    found.strays = [path for path in found.strays if _age_seconds(path) >= grace_seconds]
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Everything below but folders; one in a body's place counts as a file. Links are not followed."""
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        for name in (*names, *(name for name in folders if depth >= 4 or Path(place, name).is_symlink())):
            yield Path(place, name)
        if depth >= 4:
            folders.clear()


def _key_of(store: Store, path: Path) -> ContentKey | None:
    """The key that a body or a record belongs to, by its place."""
    parts = path.relative_to(store.content).parts
    name = parts[-1]
    if name.startswith(".") and name.endswith(".gup"):
        name = name[1:-4]
    try:
        return ContentKey.parse("/".join((*parts[:-1], name)))
    except ValueError:
        return None


def _age_seconds(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.lstat().st_mtime)
    except OSError:
        return -1.0  # gone


# --- entries


def check_entry(store: Store, key: ContentKey) -> list[Finding]:
    """What is wrong with a body and its record. Reads all of the body."""
    record_path, body_path = store.record_path(key), store.body_path(key)
    try:
        record = store.load(key)
    except ValueError as error:
        return [_finding(store, "record", record_path, f"a damaged record: {error}", key)]
    if record is None:
        if not os.path.lexists(body_path):
            return []
        return [_finding(store, "record", body_path, "a body without a record", key)]
    why = _wrong_with_body(store, record)
    return [_finding(store, "body", body_path, why, key)] if why else []


def _wrong_with_body(store: Store, record: Record) -> str:
    path = store.body_path(record.key)
    file = store.open_whatever(record.key)
    if file is None:
        return f"a record without its body: {_what_is(path)}"
    size = os.fstat(file.fd).st_size
    chunks = len(record.sums)
    bad = [chunk for chunk in range(chunks) if not read_aside(file.fd, record, chunk)]
    sized = "" if size == record.length else f"{size} bytes long instead of {record.length}; "
    if bad:
        named = ", ".join(map(str, bad[:10])) + (", …" if len(bad) > 10 else "")
        return f"{sized}{len(bad)} of {chunks} chunks of 1 MiB are missing or wrong: {named}"
    return sized + "what is too much follows the right bytes" if sized else ""


def _what_is(path: Path) -> str:
    """What stands in a body's place, for people."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        return error.strerror or str(error)
    if stat.S_ISREG(mode):
        return "the file can't be read"
    names: tuple[tuple[Callable[[int], bool], str], ...] = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a link"),
    )
    return f"there is {next((name for test, name in names if test(mode)), 'no plain file')} in its place"


# --- parts


def check_part(store: Store, id_: str) -> list[Finding]:
    """What is wrong with the parts and the state of one key."""
    try:
        state = store.load_state(id_)
    except ValueError as error:
        return [_finding(store, "state", store.state_path(id_), f"a damaged state: {error}", None, id_)]
    found = []
    generations = store.generations(id_)
    key = state.key if state is not None else None
    for generation in generations:
        part = store.part_path(id_, generation)
        if state is None:
            found.append(_finding(store, "part", part, "a part without its state", None, id_))
        elif generation != state.generation:
            found.append(_finding(store, "part", part, "a part of an older generation", key, id_))
        elif why := _wrong_with_part(store, id_, generation):
            found.append(_finding(store, "part", part, why, key, id_))
    if state is not None and state.phase is Phase.STREAMING and state.generation not in generations:
        found.append(_finding(store, "state", store.state_path(id_), "a state without its part", key, id_))
    return found


def _wrong_with_part(store: Store, id_: str, generation: int) -> str:
    try:
        salvage = survey(store.part_path(id_, generation), store.sums_path(id_, generation))
    except OSError as error:
        return f"it can't be read: {error.strerror}"
    return "" if salvage.whole else f"right up to byte {salvage.verified} of {salvage.size} only"


def check_stray(store: Store, path: Path) -> list[Finding]:
    """The finding for a stray name, if it is still there."""
    return [_finding(store, "stray", path, "nobody's file")] if os.path.lexists(path) else []


def _finding(
    store: Store, where: str, path: Path, detail: str, key: ContentKey | None = None, id_: str = ""
) -> Finding:
    return Finding(where, str(path.relative_to(store.root)), detail, key, id_)


# --- putting right


def put_right(store: Store, finding: Finding, *, alone: bool) -> None:
    """Drop what is damaged, so that it is fetched anew.

    `alone`: no service runs, so files may be cut: what is right at a beginning stays, as a part.
    """
    if finding.where == "body" and finding.key is not None:
        if (record := store.load(finding.key)) is not None and store.finish_commit(record):
            return
        if alone:
            _keep_beginning(store, finding.key)
        store.remove(finding.key)
    elif finding.where == "record" and finding.key is not None:
        store.remove(finding.key)
    elif finding.where in ("part", "state"):
        _mend_parts(store, finding.id, alone=alone)
    else:
        unlink(store.root / finding.path)


def _keep_beginning(store: Store, key: ContentKey) -> None:
    record = store.load(key)
    file = store.open_whatever(key)
    good = 0
    if record is not None and file is not None:
        while good < len(record.sums) and read_aside(file.fd, record, good):
            good += 1
    if record is not None and file is not None and 0 < good < len(record.sums):
        store.demote(record, file, good, demoted(record, time.time_ns()))


def _mend_parts(store: Store, id_: str, *, alone: bool) -> None:
    try:
        state: FillState | None = store.load_state(id_)
    except ValueError:
        state = None
    for generation in store.generations(id_):
        part, sums = store.part_path(id_, generation), store.sums_path(id_, generation)
        good = 0
        if alone and state is not None and state.generation == generation and part.is_file():
            good = survey(part, sums).verified
        if good:
            os.truncate(sums, 8 * (good // CHUNK_BYTES))
            os.truncate(part, good)
        else:
            store.drop_part(id_, generation)
    if state is None or state.generation not in store.generations(id_):
        store.drop_state(id_)
