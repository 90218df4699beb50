"""Brings the page's chart library into the package while that is built; nothing else is changed.

uPlot is a JavaScript library. A build requirement carries its released, minified files; they are taken from
there without importing that package, and only when they are, byte for byte, what uPlot released.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CARRIER = "youplot"
FOLDER = Path("gup", "control", "page", "vendor")
FILES = {
    "uPlot.iife.min.js": (
        "youplot/vendor/uplot.iife.min.js",
        "2d27e8ad3d228164525ce213f9dc716f39b4e3aee0cc773fb3491c96cf4921a2",
    ),
    "uPlot.min.css": (
        "youplot/vendor/uplot.min.css",
        "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    ),
}
"""Of uPlot 1.6.31: names here, names in the carrier, and SHA-256 as released."""


class ChartLibrary(BuildHookInterface[Any]):
    """Run by hatchling for wheels, source distributions and editable installations alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - the hook's form
        folder = Path(self.root, FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (source, digest) in FILES.items():
            if not _is_right(folder / name, digest):
                _copy(source, folder / name, digest)
            build_data["artifacts"].append(f"/{(FOLDER / name).as_posix()}")


def _copy(source: str, target: Path, digest: str) -> None:
    try:
        found = Path(str(distribution(CARRIER).locate_file(source)))
    except PackageNotFoundError as error:
        raise SystemExit(
            f"{target.name} is missing and {CARRIER} is not installed to take it from; build with isolation, "
            f"or install the requirements of [build-system] in pyproject.toml first"
        ) from error
    if not _is_right(found, digest):
        raise SystemExit(f"{found} is not the released {target.name}: its SHA-256 is not {digest}")
    new = target.with_name(f".{target.name}.new")
    new.write_bytes(found.read_bytes())
    new.replace(target)


def _is_right(file: Path, digest: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest
