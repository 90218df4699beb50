"""`make bench`: runs the parts asked for, prints their tables, keeps them in build/bench."""

import argparse
import importlib
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from harness.service import REPOSITORY

from bench.measure import Chosen, save
from bench.rig import disk_kind
from bench.servers import CORES, PACKAGES, program, versions

PARTS = ("warm", "herd", "scale", "cold", "several")


def machine() -> dict[str, str]:
    """On what it was measured."""
    model = next(
        (x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ""
    )
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cores": f"{CORES} of {os.cpu_count()}, {model.partition(':')[2].strip()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "caches of cold keys on": disk_kind(),
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "gup": told.stdout.strip() or "unknown",
        **versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    cells = "only cells whose name begins so, with or without @connections: '10 MB@8, ranges@64'"
    parser.add_argument("--cells", type=Chosen, default=Chosen(""), help=cells)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "build" / "bench")
    asked = parser.parse_args()
    for name in PACKAGES:
        program(name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # what is mounted is unmounted
    for part in PARTS if asked.part == "all" else [asked.part]:
        began = time.monotonic()
        sys.stdout.write(f"--- {part}\n")
        with tempfile.TemporaryDirectory(prefix="gup-bench-") as folder:
            tables = importlib.import_module(f"bench.{part}").run(
                Path(folder), asked.rounds, asked.seconds, asked.cells
            )
        name = "-".join([part, *re.findall(r"[\w@]+", asked.cells.words)])
        save(asked.results, name, tables, machine())
        sys.stdout.write("\n" + "\n".join(table.markdown() for table in tables))
        sys.stdout.write(f"\n--- {part} took {time.monotonic() - began:.0f} s\n")


if __name__ == "__main__":
    main()
