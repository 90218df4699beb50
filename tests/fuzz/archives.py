"""Archives: bytes as they are, or with the checksums of headers, records and signature made right again.

Whoever makes an archive can make right checksums, and a fuzzer that can't guess them would stay outside.
"""

import contextlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fuzz import Check
from gup.cache.archive import ArchiveError, Import, Imported, summary
from gup.cache.integrity import check_entry, contents
from gup.cache.records import seal
from gup.cache.signature import sign, signer_of
from gup.cache.store import Store

RAW, MADE_RIGHT, SIGNED = b"r", b"m", b"s"
"""The first byte of an input."""
_BLOCK = tarfile.BLOCKSIZE
_MOST_READ_BYTES = 2 << 20
"""At once. A record may have 1.1 MB."""
_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


class _Stream(io.BytesIO):
    """Fails when much more is wanted at once than a member may have."""

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        assert 0 <= size <= _MOST_READ_BYTES, f"{size} bytes are read at once"
        return super().read(size)


class _Connection:
    """What can only be read from its beginning to its end, a piece at a time, as from a client."""

    def __init__(self, text: bytes) -> None:
        self._stream = io.BytesIO(text)

    def read(self, _size: int = -1) -> bytes:
        return self._stream.read(700)


@contextmanager
def target() -> Iterator[Check]:
    """An archive is refused, or what it brings is whole entries and nothing else, below the cache directory
    alone, the same from a file and from a connection; a changed archive does not have its signature.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield lambda given: _check(given, Path(folder))


def _check(given: bytes, folder: Path) -> None:
    mode, text = given[:1], given[1:]
    if mode in (MADE_RIGHT, SIGNED):
        text = made_right(text)
    with tempfile.TemporaryDirectory(dir=folder) as here:
        taken = [
            _import(cast("IO[bytes]", stream), Path(here, name))
            for name, stream in (("file", _Stream(text)), ("connection", _Connection(text)))
        ]
        assert taken[0][1:] == taken[1][1:], taken
        _look_at_signature(text, Path(here, "archive"), signed=mode == SIGNED)
        assert sorted(path.name for path in Path(here).iterdir()) == ["archive", "connection", "file"]
    assert not list(folder.iterdir())


def _import(stream: IO[bytes], root: Path) -> tuple[object, ...]:
    """What is said of it, in other words where it is read in another way, and what was taken."""
    store = Store(root)
    store.prepare()
    done, why = Imported(), ""
    try:
        done = Import(store, 1000.0, lambda _length: "", lambda _record: None).take(stream)
    except ArchiveError as error:
        why = str(error)
        assert why.isprintable()
    found = contents(store, 0.0)
    assert len(found.keys) == done.imported
    assert not found.strays
    for key in found.keys:
        assert check_entry(store, key) == []
    links = [path for path in root.rglob("*") if path.is_symlink()]
    assert not links
    assert not list(store.partial.iterdir())
    return (why, done.problem), bool(why), found.keys, done.present, done.complete, done.problem is None


def _look_at_signature(text: bytes, file: Path, *, signed: bool) -> None:
    file.write_bytes(text)
    try:
        summary(file)
        whole = True
    except ArchiveError:
        whole = False
    with file.open("rb") as archive, contextlib.suppress(ArchiveError):
        assert signer_of(archive) is None, "nobody signed it"
    if signed and whole and len(text) > 2 * _BLOCK:
        fingerprint = sign(file, _KEY)
        with file.open("rb") as archive:
            assert signer_of(archive) == fingerprint
        changed = bytearray(file.read_bytes())
        changed[len(text) // 2] ^= 1
        file.write_bytes(changed)
        with file.open("rb") as archive, contextlib.suppress(ArchiveError):
            assert signer_of(archive) != fingerprint


def made_right(text: bytes) -> bytes:
    """With right checksums in the headers, and in the records that are JSON objects."""
    right, at = bytearray(text), 0
    while at + _BLOCK <= len(right):
        header = right[at : at + _BLOCK]
        if not any(header):
            at += _BLOCK
            continue
        size = _number(bytes(header[124:136]))
        content = bytes(right[at + _BLOCK : at + _BLOCK + size])
        sealed = _sealed(content)
        if sealed is not None and len(sealed) <= len(content) + -len(content) % _BLOCK:
            padded = sealed.ljust(len(content) + -len(content) % _BLOCK, b"\0")
            right[at + _BLOCK : at + _BLOCK + len(padded)] = padded
            right[at + 124 : at + 136] = b"%011o\0" % len(sealed)
        right[at + 148 : at + 156] = b" " * 8
        right[at + 148 : at + 156] = b"%06o\0 " % sum(right[at : at + _BLOCK])
        at += _BLOCK + size + -size % _BLOCK
    return bytes(right)


def _number(field: bytes) -> int:
    try:
        return min(int(field.strip(b" \0") or b"0", 8), 1 << 30)
    except ValueError:
        return 0


def _sealed(content: bytes) -> bytes | None:
    try:
        fields = json.loads(content)
        if isinstance(fields, dict) and "sums" in fields:
            fields.pop("checksum", None)
            return seal(fields)
    except (ValueError, RecursionError):
        pass
    return None
