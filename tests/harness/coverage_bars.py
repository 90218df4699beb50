"""The end of a run under coverage.py: its data combined, a table, and status 1 when a bar is not reached."""

import json
import sys
from pathlib import Path

from coverage import Coverage

PURE = (
    "gup/content/",
    *(f"gup/server/{name}.py" for name in ("conditions", "proxy_protocol", "ranges", "request")),
)
"""Decisions without I/O: nothing keeps a test from reaching each of their branches."""
LEAST_PURE, LEAST = 100.0, 90.0
"""Of lines and branches together, as coverage.py adds them up."""
_WORST = 10

Summary = dict[str, float]


def _percent(summaries: list[Summary]) -> tuple[float, float, float]:
    """Of branches, of lines, and of both that were run."""

    def share(covered: tuple[str, ...], all_: tuple[str, ...]) -> float:
        most = sum(summary[name] for summary in summaries for name in all_)
        return 100 * sum(summary[name] for summary in summaries for name in covered) / most if most else 100.0

    branches, lines = ("covered_branches", "num_branches"), ("covered_lines", "num_statements")
    parts = [((covered,), (all_,)) for covered, all_ in (branches, lines)]
    parts.append(tuple(zip(branches, lines, strict=True)))
    first, second, third = (share(*part) for part in parts)
    return first, second, third


def table(summaries: dict[str, Summary]) -> tuple[list[str], bool]:
    """The lines to show, and whether both bars are reached."""
    pure = [summary for name, summary in summaries.items() if name.startswith(PURE)]
    groups = [("pure packages", pure, LEAST_PURE), ("all of gup", list(summaries.values()), LEAST)]
    worst = sorted((_percent([summary]), name) for name, summary in summaries.items())[:_WORST]
    groups += [(name, [summaries[name]], 0.0) for _, name in worst]
    lines, enough = [f"{'coverage: % of':36} {'branches':>8} {'lines':>6} {'both':>6}  at least"], True
    for name, found, least in groups:
        shares = _percent(found)
        enough &= bool(found) and shares[2] >= least
        bar = f"  {least:8.0f}" if least else ""
        lines.append(f"{name:36} {shares[0]:8.2f} {shares[1]:6.2f} {shares[2]:6.2f}{bar}")
    return lines, enough


def main() -> int:
    measured = Coverage()
    measured.combine(strict=True)
    measured.save()
    report = Path(measured.config.data_file).with_name("report.json")
    measured.json_report(outfile=str(report))
    files = json.loads(report.read_text())["files"]
    lines, enough = table({name: found["summary"] for name, found in files.items()})
    for name, found in files.items():
        if name.startswith(PURE) and (found["missing_lines"] or found["missing_branches"]):
            lines.append(f"{name}: not run: {found['missing_lines']}, branches {found['missing_branches']}")
    if not enough:
        lines.append("coverage is below a bar; `coverage html` in this environment shows each line")
    print("\n".join(lines))  # noqa: T201 - what it is for
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
