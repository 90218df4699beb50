"""The end of a run under coverage.py: its data combined, a table, and status 1 when a bar is not reached."""

import json
import sys
from pathlib import Path

from coverage import Coverage

PURE = ("gup/content/", "gup/server/conditions.py", "gup/server/ranges.py", "gup/server/request.py")
"""Decisions without I/O: nothing keeps a test from reaching each of their branches."""
LEAST_PURE, LEAST = 100.0, 90.0
_WORST = 10

Summary = dict[str, float]


def _percent(summaries: list[Summary]) -> tuple[float, float]:
    """Of lines and of branches that were run."""

    def share(covered: str, all_: str) -> float:
        most = sum(summary[all_] for summary in summaries)
        return 100 * sum(summary[covered] for summary in summaries) / most if most else 100.0

    return share("covered_lines", "num_statements"), share("covered_branches", "num_branches")


def table(summaries: dict[str, Summary]) -> tuple[list[str], bool]:
    """The lines to show, and whether both bars are reached, by lines and by branches."""
    pure = [summary for name, summary in summaries.items() if name.startswith(PURE)]
    groups = [("pure packages", pure, LEAST_PURE), ("all of gup", list(summaries.values()), LEAST)]
    worst = sorted((_percent([summary])[::-1], name) for name, summary in summaries.items())[:_WORST]
    groups += [(name, [summaries[name]], 0.0) for _, name in worst]
    lines, enough = [f"{'coverage: % of':36} {'lines':>6} {'branches':>8}  at least"], True
    for name, found, least in groups:
        shares = _percent(found)
        enough &= bool(found) and min(shares) >= least
        lines.append(f"{name:36} {shares[0]:6.2f} {shares[1]:8.2f}" + (f"  {least:8.0f}" if least else ""))
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
