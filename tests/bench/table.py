"""Figures as tables: kept as JSON, written as Markdown; knows no server."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Table:
    """One table of results. `notes` stand below it."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        assert len(cells) == len(self.columns), (cells, self.columns)
        self.rows.append(list(cells))

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|---" + "|---:" * (len(self.columns) - 1) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"


def verdict(value: float, wanted: float, *, most: bool = False) -> str:
    """A figure beside its goal: a minimum, or with `most` a maximum."""
    met = value <= wanted if most else value >= wanted
    return f"{value:.2f} ({'≤' if most else '≥'} {wanted:g}{'' if met else ', **missed**'})"


def save(folder: Path, part: str, tables: Sequence[Table], machine: dict[str, Any]) -> None:
    """Keep what a part found; the last run of each part counts."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"part": part, "machine": machine, "tables": [asdict(table) for table in tables]}
    (folder / f"{part}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def assemble(folder: Path, parts: Sequence[str]) -> str:
    """All results that there are, as one Markdown text."""
    text = []
    for part in parts:
        file = folder / f"{part}.json"
        if not file.exists():
            continue
        content = json.loads(file.read_text())
        machine = ", ".join(f"{name} {value}" for name, value in content["machine"].items())
        text.append(f"## {part}\n\n{machine}\n")
        text += [Table(**table).markdown() for table in content["tables"]]
    return "\n".join(text)
