"""The licence of each Python package in FOLDER, for a copyright file: `licences.py FOLDER < template`."""  # noqa: INP001

import sys
from importlib.metadata import Distribution, distributions


def licence(package: Distribution) -> str:
    """The expression (PEP 639), or what older metadata have: a name, or classifiers."""
    meta = package.metadata
    old = meta["License"] or ""
    trove = [
        row.rpartition(" :: ")[2] for row in meta.get_all("Classifier", []) if row.startswith("License ::")
    ]
    return meta["License-Expression"] or ", ".join(trove) or old.partition("\n")[0] or "see its metadata"


found = {package.metadata["Name"]: package for package in distributions(path=[sys.argv[1]])}
rows = [
    f"  {name} {found[name].version}: {licence(found[name])}"
    for name in sorted(found, key=str.lower)
    if name != "gup"
]
sys.stdout.write(sys.stdin.read().replace("@PACKAGES@", "\n".join(rows)))
