"""The file by which workers learn what the controller read of the catalogues; fetches and decides nothing.

`run/catalogs.json` holds the last good catalogue of each upstream, replaced atomically by the controller
alone. It outlives restarts: the rules bind before any manager has answered.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gup.content.catalog import Listed
from gup.fsutil import replace_file

FILE = "catalogs.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Kept:
    """One upstream's catalogue. `rows` is None when none was ever read from `source`, a URL or a path.

    `problem` is why the last try failed, None when it did not. Times are Unix seconds. The validators are
    upstream's own.
    """

    source: str
    rows: Mapping[str, Listed] | None = field(default=None, repr=False)
    read_at: float | None = None
    problem: str | None = None
    etag: str | None = None
    last_modified: str | None = None

    def to_json(self) -> dict[str, Any]:
        rows = None
        if self.rows is not None:
            rows = [[row.moniker, row.product, row.language, row.version] for row in self.rows.values()]
        return {name: getattr(self, name) for name in self.__slots__} | {"rows": rows}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Kept":
        """KeyError, TypeError or ValueError when `fields` are none."""
        rows = None
        if fields["rows"] is not None:
            listed = [Listed(*(str(text) for text in row)) for row in fields["rows"]]
            rows = {row.moniker.upper(): row for row in listed}
        read_at = fields["read_at"]
        texts = {name: fields[name] for name in ("problem", "etag", "last_modified")}
        return cls(
            source=str(fields["source"]),
            rows=rows,
            read_at=None if read_at is None else float(read_at),
            **{name: None if text is None else str(text) for name, text in texts.items()},
        )


def read_kept(run: Path) -> dict[str, Kept]:
    """What is kept, by the upstream's name; empty when there is nothing, or it can't be read. Blocks."""
    try:
        document = json.loads((run / FILE).read_bytes())
        if document["format"] != _FORMAT:
            return {}
        return {str(name): Kept.from_json(fields) for name, fields in document["upstreams"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_kept(run: Path, kept: Mapping[str, Kept]) -> None:
    """Replace the file, durably. OSError when the disk refuses: the old one stays. Blocks."""
    document = {"format": _FORMAT, "upstreams": {name: one.to_json() for name, one in kept.items()}}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    replace_file(run / FILE, text.encode())
