"""Turns counted words and parts into the figures of `/api/v1/status`. Pure; asks nobody."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from gup.cache.store import Part
from gup.control.exposition import parse_series
from gup.metrics import CODES_OF_RESULT

_FROM_STORE = ("hit", "revalidated", "stale")
_SERVED = (*_FROM_STORE, "miss", "collapsed", "bypass")


def totals_of(words: Mapping[str, int]) -> dict[str, Any]:
    """What was sent, received and saved, and requests by result, from series and their values.

    Saved is sent minus received and may be below zero: what was fetched and not asked for again has cost.
    The hit ratio counts requests for content that were answered from the store; None before the first one.
    """
    sums: Counter[str] = Counter()
    results: Counter[str] = Counter()
    for name, value in words.items():
        if value:
            base, labels = parse_series(name)
            sums[base] += value
            if base == "gup_requests_total":
                results[labels["result"]] += value
    served = sum(results[result] for result in _SERVED)
    sent = sums["gup_client_sent_bytes_total"]
    received = sums["gup_upstream_received_bytes_total"]
    return {
        "client_sent_bytes": sent,
        "upstream_received_bytes": received,
        "saved_bytes": sent - received,
        "requests": {result: results[result] for result in CODES_OF_RESULT},
        "requests_total": sum(results.values()),
        "hit_ratio": sum(results[result] for result in _FROM_STORE) / served if served else None,
        "fills": sums["gup_fills_total"],
        "evictions": sums["gup_evictions_total"],
        "evicted_bytes": sums["gup_evicted_bytes_total"],
        "integrity_failures": sums["gup_integrity_failures_total"],
    }


def fill_of(part: Part) -> dict[str, Any]:
    """A fill under way: key, how much of it is here, and of how much (None while the length is unknown)."""
    state = part.state
    head = state.head if state else None
    return {
        "key": state.key.text if state else None,
        "id": part.id,
        "phase": str(state.phase) if state else None,
        "received_bytes": part.size_bytes,
        "length_bytes": head.length if head else None,
        "upstream": head.upstream if head else None,
    }
