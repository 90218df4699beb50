"""Writes the dashboards' JSON files; `make dashboards` calls it. Talks to no Grafana."""

import sys
from pathlib import Path

from gup_dashboards.build import write_all

if __name__ == "__main__":
    write_all(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "dashboards")
