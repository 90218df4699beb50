"""Brings the page's chart library into the package while that is built, and says so in an SBOM.

uPlot is a JavaScript library. A build requirement carries its released, minified files; they are taken from
there without importing that package, and only when they are, byte for byte, what uPlot released. The SBOM
(CycloneDX, in the wheel's .dist-info/sboms, see PEP 770) names what the wheel contains besides gup; what gup
requires is in the wheel's metadata.
"""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CARRIER = "youplot"
UPLOT = "1.6.31"
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
"""Of uPlot's release: names here, names in the carrier, and SHA-256 as released."""
SBOM = Path("build", "gup.cdx.json")


class ChartLibrary(BuildHookInterface[Any]):
    """Run by hatchling for wheels, source distributions and editable installations alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - the hook's form
        folder = Path(self.root, FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (source, digest) in FILES.items():
            if not _is_right(folder / name, digest):
                _copy(source, folder / name, digest)
            build_data["artifacts"].append(f"/{(FOLDER / name).as_posix()}")
        if self.target_name == "wheel":
            path = Path(self.root, SBOM)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(bill_of_materials(self.metadata.version), indent=2) + "\n")
            build_data["sbom_files"].append(SBOM.as_posix())


def bill_of_materials(version: str) -> dict[str, Any]:
    """CycloneDX 1.6, without a time and a serial number: one source makes one wheel, to the byte."""
    gup = {
        "type": "application",
        "bom-ref": f"pkg:pypi/gup@{version}",
        "name": "gup",
        "version": version,
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "purl": f"pkg:pypi/gup@{version}",
    }
    uplot = {
        "type": "library",
        "bom-ref": f"pkg:npm/uplot@{UPLOT}",
        "name": "uplot",
        "version": UPLOT,
        "licenses": [{"license": {"id": "MIT"}}],
        "copyright": "Copyright (c) 2022 Leon Sorokin",
        "purl": f"pkg:npm/uplot@{UPLOT}",
        "externalReferences": [{"type": "vcs", "url": "https://github.com/leeoniya/uPlot"}],
        "components": [
            {
                "type": "file",
                "bom-ref": name,
                "name": (FOLDER / name).as_posix(),
                "hashes": [{"alg": "SHA-256", "content": digest}],
            }
            for name, (_, digest) in FILES.items()
        ],
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": gup},
        "components": [uplot],
        "dependencies": [
            {"ref": gup["bom-ref"], "dependsOn": [uplot["bom-ref"]]},
            {"ref": uplot["bom-ref"], "dependsOn": []},
        ],
    }


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
