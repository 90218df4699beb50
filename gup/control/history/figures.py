"""Which counters the history follows, and under which names. Pure; one table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gup.control.exposition import parse_series
from gup.metrics import CODES_OF_RESULT

Sums = tuple[int, ...]
"""One number for each row of FIGURES, in their order."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A sum over the series of `metric` that carry `labels`. A dot in the name makes a member of a member."""

    name: str
    metric: str
    labels: Mapping[str, str] = field(default_factory=dict)


FIGURES: tuple[Figure, ...] = (
    Figure("client_sent_bytes", "gup_client_sent_bytes_total"),
    Figure("upstream_received_bytes", "gup_upstream_received_bytes_total"),
    Figure("upstream_wasted_bytes", "gup_upstream_wasted_bytes_total"),
    Figure("evicted_bytes", "gup_evicted_bytes_total"),
    Figure("integrity_failures", "gup_integrity_failures_total"),
    *(Figure(f"requests.{result}", "gup_requests_total", {"result": result}) for result in CODES_OF_RESULT),
    *(
        Figure(f"fills.{outcome}", "gup_fills_total", {"outcome": outcome})
        for outcome in ("committed", "failed", "unstorable")
    ),
)
NONE: Sums = (0,) * len(FIGURES)
SENT, RECEIVED = 0, 1
"""Positions in `Sums`."""


class Reader:
    """Sums the series up. Remembers which series belong to which figure: that never changes."""

    def __init__(self) -> None:
        self._figures_of: dict[str, tuple[int, ...]] = {}

    def sums(self, words: Mapping[str, int]) -> Sums:
        """The figures of `words`, which are counters by series name."""
        found = [0] * len(FIGURES)
        for name, value in words.items():
            if not value:
                continue
            figures = self._figures_of.get(name)
            if figures is None:
                figures = self._figures_of[name] = _figures_of(name)
            for position in figures:
                found[position] += value
        return tuple(found)


def _figures_of(name: str) -> tuple[int, ...]:
    metric, labels = parse_series(name)
    return tuple(
        position
        for position, figure in enumerate(FIGURES)
        if figure.metric == metric and figure.labels.items() <= labels.items()
    )


def shown(sums: Sums) -> dict[str, Any]:
    """The figures by name, as the API shows them; `saved_bytes` is sent minus received."""
    members: dict[str, Any] = {"saved_bytes": sums[SENT] - sums[RECEIVED]}
    for figure, value in zip(FIGURES, sums, strict=True):
        outer, _, inner = figure.name.partition(".")
        if inner:
            members.setdefault(outer, {})[inner] = value
        else:
            members[outer] = value
    return members


def by_name(sums: Sums) -> dict[str, int]:
    """The figures that are not 0, flat, as they are written down."""
    return {figure.name: value for figure, value in zip(FIGURES, sums, strict=True) if value}


def from_names(values: Mapping[str, int]) -> Sums:
    """What `by_name` gave; figures of another version are left out."""
    return tuple(int(values.get(figure.name, 0)) for figure in FIGURES)
