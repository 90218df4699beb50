"""The report *Content taken here*: by stream who stands where, what lags, and who. Pure."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gup.content.catalog import Label
from gup.control.reports.batch import StreamId
from gup.control.reports.queries import ClientState, RevisionCount, StreamState
from gup.control.streams import revision_time

LabelOf = Callable[[StreamId], Label | None]


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What there is to say of one stream. `known` are its revisions that were held, taken or asked for."""

    stream: StreamId
    held: str
    asked: str
    taken: str
    clients: int
    counts: tuple[RevisionCount, ...]

    @property
    def newest(self) -> str:
        """The newest revision that could be had or was wanted here."""
        return max(self.held, self.asked, self.taken)

    @property
    def known(self) -> list[str]:
        found = {self.held, self.asked, self.taken, *(count.revision for count in self.counts)}
        return sorted(found - {""})


def gather(
    states: Iterable[StreamState], counts: Iterable[RevisionCount], held: Mapping[StreamId, str]
) -> list[StreamReport]:
    """A report a stream, of those that clients asked for and those that are held."""
    by_stream: dict[StreamId, list[RevisionCount]] = defaultdict(list)
    for count in counts:
        by_stream[count.stream].append(count)
    found = {state.stream: state for state in states}
    reports = []
    for stream in sorted(found.keys() | held.keys()):
        state = found.get(stream) or StreamState(stream, 0, "", "")
        newest_first = sorted(by_stream[stream], key=lambda count: count.revision, reverse=True)
        reports.append(
            StreamReport(
                stream,
                held.get(stream, ""),
                state.newest_asked,
                state.newest_taken,
                state.clients,
                tuple(newest_first),
            )
        )
    return reports


def shown(
    report: StreamReport, behind: int, lagging: Iterable[ClientState], label_of: LabelOf
) -> dict[str, Any]:
    """The report as the API shows it; `behind` clients stand before the newest, of whom some are given."""
    known = report.known
    return labels(report.stream, label_of) | {
        "clients": report.clients,
        "current": report.clients - behind,
        "behind": behind,
        "newest_held": report.held or None,
        "newest_taken": report.taken or None,
        "newest_asked": report.asked or None,
        "lag_revisions": sum(revision > report.held for revision in known),
        "lag_seconds": _lag_seconds(report.held, report.newest),
        "revisions": [
            {
                "revision": count.revision,
                "clients": count.clients,
                "took": count.took,
                "first_taken_at": count.first_taken_at,
                "last_taken_at": count.last_taken_at,
            }
            for count in report.counts
        ],
        "lagging": [_lagging(client, report.newest, known) for client in lagging],
    }


def labels(stream: StreamId, label_of: LabelOf) -> dict[str, Any]:
    """What people call a stream: the catalogue's words, else the moniker and the variant."""
    label = label_of(stream)
    version, language, moniker = stream
    return {
        "product": label.product if label else moniker,
        "version": (label.version if label else "") or version,
        "language": (label.language if label else "") or language,
        "type": label.type if label else None,
        "moniker": moniker,
        "variant": {"version": version, "language": language},
    }


def _lagging(client: ClientState, newest: str, known: list[str]) -> dict[str, Any]:
    return {
        "address": client.name,
        "version": client.version or None,
        "language": client.language or None,
        "revision": client.revision or None,
        "lag_revisions": sum(revision > client.revision for revision in known),
        "lag_seconds": _lag_seconds(client.revision, newest),
        "taken_at": client.taken_at or None,
        "asked": client.asked or None,
        "asked_at": client.asked_at or None,
        "seen_at": client.seen_at,
    }


def _lag_seconds(revision: str, newest: str) -> float | None:
    """By the dates in the revisions, so in whole days; None where one has none."""
    there, here = revision_time(newest), revision_time(revision)
    return None if there is None or here is None else max(0.0, there - here)
