"""Content trees on disk as a manager would offer them: seeded random bytes, never repeated between files."""

import io
import os
import random
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
OTHER_MONIKER = "{07B590B3-9282-482F-BBAA-6D515D385869}"
REVISION = "260801001"
NEXT_REVISION = "260802001"
BIG_BYTES = 20_000_000
MODIFIED_AT = 1_785_574_800.0
"""1 August 2026: well before any test, so that the date is a strong validator (RFC 9110 8.8.2.2)."""

CONTENT_INFO = (
    f"{MONIKER}: SEPC Virus Definitions Win32 14.3 RU2 - MicroDefsB.CurDefs - SymAllLanguages\r\n"
    f"{OTHER_MONIKER}: SEPC Virus Definitions Win64 14.3 RU2 - MicroDefsB.CurDefs - SymAllLanguages\r\n"
).encode()


@lru_cache(maxsize=8)
def noise(seed: str, length: int) -> bytes:
    """`length` bytes that depend on the seed alone."""
    return random.Random(seed).randbytes(length)


@lru_cache(maxsize=4)
def zip_of(seed: str, length: int) -> bytes:
    """A real ZIP of exactly `length` bytes: one stored member of noise."""
    overhead = len(_zip(b""))
    return _zip(noise(seed, length - overhead))


def _zip(member: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("definitions.dat", (2026, 8, 1, 0, 0, 0)), member)
    return file.getvalue()


def content_path(file: str, moniker: str = MONIKER, revision: str = REVISION) -> str:
    return f"/content/{moniker}/{revision}/{file}"


def name_of(path: str) -> str:
    """The file's name."""
    return path.rpartition("/")[2]


BIG = content_path("full.zip")
DELTA = content_path(f"xdelta{REVISION}_To_{NEXT_REVISION}.dax")
INDEX = "/content/ContentInfo.txt"


@dataclass(frozen=True, slots=True)
class Tree:
    """A folder with content. `put` adds files; paths are URL paths."""

    root: Path

    def put(self, path: str, body: bytes, modified_at: float = MODIFIED_AT) -> bytes:
        file = self.file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(body)
        os.utime(file, (modified_at, modified_at))
        return body

    def file(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def body(self, path: str) -> bytes:
        return self.file(path).read_bytes()


def make_tree(root: Path, big_bytes: int = BIG_BYTES) -> Tree:
    """One full of `big_bytes`, four deltas of 40 to 200 kB, the index file."""
    tree = Tree(root)
    tree.put(BIG, zip_of("big", big_bytes))
    tree.put(DELTA, noise("delta", 200_000))
    for number in range(3):
        name = f"xdelta2607{28 + number}001_To_{REVISION}.dax"
        tree.put(content_path(name), noise(name, 40_000 * (number + 1)))
    tree.put(INDEX, CONTENT_INFO)
    return tree
