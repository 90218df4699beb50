"""What locust runs: `locust -f deploy/load/locustfile.py --host http://GUP:2967 Storm`; see docs/load.md."""

from gup_load.scenarios import Morning, PatchDay, Revision, Roaming, Storm

__all__ = ["Morning", "PatchDay", "Revision", "Roaming", "Storm"]
