"""What a request for a body is given: the body, and how the request came to it; opens nothing."""

from dataclasses import dataclass
from enum import StrEnum

from gup.cache.body import Body
from gup.cache.entry import Entry
from gup.content.key import ContentKey, Kind


class Result(StrEnum):
    """How a request came to its body: label `result` of the metrics."""

    HIT = "hit"
    MISS = "miss"
    COLLAPSED = "collapsed"
    REVALIDATED = "revalidated"
    STALE = "stale"
    BYPASS = "bypass"


@dataclass(slots=True)
class Opened:
    """A body to read, and how the request came to it. `ranges`: whether spans of it may be served."""

    body: Body
    result: Result
    key: ContentKey
    kind: Kind
    age_seconds: int = 0
    ranges: bool = True
    entry: Entry | None = None
