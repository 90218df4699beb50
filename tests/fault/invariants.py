"""What must hold of a cache directory when nobody works on it: each violation as one sentence. Reads only."""

from collections.abc import Iterator
from pathlib import Path

from harness.internals import CHUNK_BYTES, ContentKey, Store, chunk_sum

_KNOWN = {"content", "partial", "index", "reports", "run"}


def violations(root: Path) -> list[str]:
    """Everything that is wrong below `root`; empty when all is well."""
    store = Store(root)
    foreign = [f"foreign: {path.name}" for path in root.iterdir() if path.name not in _KNOWN]
    foreign += [f"a temporary file: run/{path.name}" for path in store.run.glob("*.new")]
    return [*_content(store), *_partial(store), *foreign]


def bodies_of(root: Path) -> dict[str, bytes]:
    """Every committed body by its key's text."""
    content = root / "content"
    found = (path for path in content.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(content)): path.read_bytes() for path in found}


def _content(store: Store) -> Iterator[str]:
    for path in sorted(store.content.rglob("*")):
        name = str(path.relative_to(store.content))
        if path.is_dir():
            if not any(path.iterdir()):
                yield f"an empty folder: {name}"
        elif path.name.startswith("."):
            if not (path.name.endswith(".gup") and path.with_name(path.name[1:-4]).is_file()):
                yield f"a record without its body, or no record: {name}"
        else:
            yield from _body(store, path, name)


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
    body = path.read_bytes()
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
        part = state is not None and store.part_path(state.key.id, state.generation)
        useful = {
            ".part": state is not None and state.head is not None and rest == f"{state.generation}.part",
            ".sums": path.with_suffix(".part").exists(),
            ".state": part and part.exists(),
        }
        if not useful.get(path.suffix, False):
            yield f"a file of no use: partial/{path.name}"
