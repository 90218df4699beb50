"""Turns the dashboards into the files that Grafana is provisioned with."""

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from gup_dashboards.fleet import fleet
from gup_dashboards.site import site

DASHBOARDS = {"site.json": site, "fleet.json": fleet}


def write_all(folder: Path) -> None:
    """Write every dashboard below `folder`; panels are numbered in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in DASHBOARDS.items():
        built = make().build()
        for number, panel in enumerate(built.panels or [], 1):
            panel.id_val = number
        text = JSONEncoder(sort_keys=True, indent=2).encode(built)
        (folder / name).write_text(text + "\n")
