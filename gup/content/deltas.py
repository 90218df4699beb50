"""Names of deltas and fulls: the revisions that a key names, and the path of a delta.

FIELD: the folder of a delta is the old revision in one source and the new one in another. So the folder is
taken from the traffic, and what a delta leads from and to is read from its file name alone.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from gup.content.key import ContentKey, Kind, delta_step

_REVISION = re.compile(r"[0-9]{9}")
_FULL = re.compile(r"full\..+", re.IGNORECASE | re.ASCII)


class Folder(StrEnum):
    """Which of a delta's two revisions names its folder."""

    FROM = "from"
    TO = "to"


@dataclass(frozen=True, slots=True)
class Named:
    """The revisions in a name. `from_revision` and `folder` are of deltas; None is another folder."""

    kind: Kind
    revision: str
    from_revision: str | None = None
    folder: Folder | None = None


def named(key: ContentKey) -> Named | None:
    """The revision that a body brings a client to, and a delta's other one; None for all other content.

    Only nine digits can be compared (FIELD: YYMMDDrrr).
    """
    step = delta_step(key.file)
    if step is not None:
        if not all(map(_REVISION.fullmatch, step)):
            return None
        folders = {step.to_revision: Folder.TO, step.from_revision: Folder.FROM}
        return Named(Kind.DELTA, step.to_revision, step.from_revision, folders.get(key.revision))
    if _FULL.fullmatch(key.file) and _REVISION.fullmatch(key.revision):
        return Named(Kind.FULL, key.revision)
    return None


def spelled_moniker(upstream_path: str) -> str:
    """The moniker of a content path as the client spelled it, percent-encoded; "" when there is none."""
    parts = upstream_path.split("/")
    return parts[2] if len(parts) == 5 and parts[1] == "content" else ""


def delta_path(moniker: str, from_revision: str, to_revision: str, folder: Folder) -> str:
    """The path of a delta, with the moniker as it is given."""
    under = from_revision if folder is Folder.FROM else to_revision
    return f"/content/{moniker}/{under}/xdelta{from_revision}_To_{to_revision}.dax"
