"""What must hold of a cache directory when nobody works on it: each violation as one sentence. Reads only."""

from collections.abc import Iterator
from pathlib import Path

from gup.cache.records import CHUNK_BYTES, FillState, Record, chunk_sum
from gup.cache.store import Store
from gup.content.key import ContentKey


def violations(root: Path) -> list[str]:
    """Everything that is wrong below `root`; empty when all is well."""
    store = Store(root)
    return [*_content(store), *_partial(store), *_elsewhere(store)]


def bodies_of(root: Path) -> dict[str, bytes]:
    """Every committed body by its key's text."""
    content = root / "content"
    found = (path for path in content.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(content)): path.read_bytes() for path in found}


def _content(store: Store) -> Iterator[str]:
    for path in sorted(store.content.rglob("*")):
        name = path.relative_to(store.content)
        if path.is_dir():
            if not any(path.iterdir()):
                yield f"an empty folder: {name}"
        elif path.name.startswith("."):
            if not (path.name.endswith(".gup") and path.with_name(path.name[1:-4]).is_file()):
                yield f"a record without its body, or no record: {name}"
        else:
            yield from _body(store, path, str(name))


def _body(store: Store, path: Path, name: str) -> Iterator[str]:
    try:
        record = store.load(ContentKey.parse(name))
    except ValueError as error:
        yield f"the record of {name}: {error}"
        return
    if record is None:
        yield f"a body without its record: {name}"
        return
    if not record.fits(path.stat()):
        yield f"the record is of another body: {name}"
    yield from _sums(path.read_bytes(), record, name)


def _sums(body: bytes, record: Record, name: str) -> Iterator[str]:
    for number, expected in enumerate(record.sums):
        if chunk_sum(body[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]) != expected:
            yield f"chunk {number} of {name} does not agree with its sum"


def _partial(store: Store) -> Iterator[str]:
    for path in sorted(store.partial.iterdir()):
        id_, _, rest = path.name.partition(".")
        if path.name == "claims":
            continue
        try:
            state = store.load_state(id_) if len(id_) == 32 else None
        except ValueError as error:
            yield f"the state of {id_}: {error}"
            continue
        if path.suffix == ".part":
            if state is None or state.head is None or rest != f"{state.generation}.part":
                yield f"a part that nobody can go on with: {path.name}"
        elif path.suffix == ".sums":
            if not path.with_suffix(".part").exists():
                yield f"sums without their part: {path.name}"
        elif path.suffix == ".state":
            if state is None or not _has_use(store, state):
                yield f"a state that says nothing: {path.name}"
        else:
            yield f"a file of no use: {path.name}"


def _has_use(store: Store, state: FillState) -> bool:
    return store.part_path(state.key.id, state.generation).exists()


def _elsewhere(store: Store) -> Iterator[str]:
    known = {"content", "partial", "index", "reports", "run"}
    for path in sorted(store.root.iterdir()):
        if path.name not in known:
            yield f"foreign: {path.name}"
    for path in sorted(store.run.glob("*.new")):
        yield f"a temporary file: run/{path.name}"
