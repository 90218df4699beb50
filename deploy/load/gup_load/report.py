"""The report: one page about all runs in a folder, each kept there as JSON."""

import re
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gup.units import bytes_in_words
from gup_load.figures import RUN_JSON, Run

PAGE = "report.html"
_RUN = ".run.json"


def forget_reports(folder: Path) -> None:
    """Remove what `write_report` and locust wrote there before, and nothing else."""
    for pattern in ("*" + _RUN, "*-over-time.html", "*-locust.json", PAGE):
        for path in folder.glob(pattern):
            path.unlink()


def write_report(folder: Path, run: Run) -> Path:
    """Keep the run in `folder`, in place of an earlier one of its scenarios, and write the page about all."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{_slug(run)}{_RUN}").write_bytes(RUN_JSON.dump_json(run, indent=1))
    runs = [RUN_JSON.validate_json(path.read_bytes()) for path in folder.glob("*" + _RUN)]
    page = folder / PAGE
    page.write_text(_page(folder, sorted(runs, key=lambda one: one.started_at)), encoding="utf-8")
    return page


def charts_of(folder: Path, scenario: str) -> Path:
    """Where locust's own page about a scenario is, with its charts over time."""
    return folder / f"{scenario.lower()}-over-time.html"


def raw_of(folder: Path, scenario: str) -> Path:
    """Where locust's own figures of a scenario are."""
    return folder / f"{scenario.lower()}-locust.json"


def _slug(run: Run) -> str:
    return run.scenario.lower().replace(" ", "-")


def _page(folder: Path, runs: list[Run]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"size": bytes_in_words, "time": _time, "when": _when, "file": _short}
    charts = {run.scenario: path.name for run in runs if (path := charts_of(folder, _slug(run))).exists()}
    return environment.get_template("report.html.j2").render(runs=runs, charts=charts)


def _time(seconds: float) -> str:
    if seconds < 0.001:
        return "< 1 ms"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _when(unix_seconds: float) -> str:
    return f"{datetime.fromtimestamp(unix_seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _short(path: str) -> str:
    """The path with its moniker cut to its beginning."""
    return re.sub(r"\{([^}]{8})[^}]*\}", r"{\1…}", path).removeprefix("/content/")
