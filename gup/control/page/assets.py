"""The page's files as they are served: read once at the start, named by what is in them. Makes none."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent
_FILES = {
    "page.css": ("static", "text/css"),
    "page.js": ("static", "text/javascript"),
    "icon.svg": ("static", "image/svg+xml"),
    "uPlot.iife.min.js": ("vendor", "text/javascript"),
    "uPlot.min.css": ("vendor", "text/css"),
}
"""Those under `vendor` come with the installation (hatch_build.py)."""


@dataclass(frozen=True, slots=True)
class Asset:
    """A file's bytes and type; `tag` changes with the bytes."""

    body: bytes
    content_type: str
    tag: str


class Assets:
    """All files that are there. Without the chart library the page shows its tables only."""

    def __init__(self) -> None:
        self.files: dict[str, Asset] = {}
        for name, (folder, content_type) in _FILES.items():
            try:
                body = (_FOLDER / folder / name).read_bytes()
            except FileNotFoundError:
                assert folder == "vendor", name
                continue
            self.files[name] = Asset(body, content_type, hashlib.sha256(body).hexdigest()[:16])
        self.urls = {name: f"/assets/{name}?{asset.tag}" for name, asset in self.files.items()}
        tags = "".join(asset.tag for asset in self.files.values())
        self.edition = hashlib.sha256(tags.encode()).hexdigest()[:16]

    @property
    def missing(self) -> list[str]:
        """Files that the installation should have brought and did not."""
        return [name for name in _FILES if name not in self.files]
