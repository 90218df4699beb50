"""Figures in words for people: the status and lists of entries; pure text, asks nobody."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from gup.units import bytes_in_words, format_rate, time_in_words

__all__ = ["ENTRY_HEAD", "bytes_in_words", "entry_line", "status_lines", "time_in_words"]


def status_lines(status: Mapping[str, Any]) -> Iterator[str]:
    """The control plane's status as lines. KeyError when it is that of another version."""
    cache, clients = status["cache"], status["clients"]
    ready = "ready" if status["ready"] else "not ready"
    up = time_in_words(status["uptime_seconds"])
    yield f"gup {status['version']} at {status['site']}: {ready}, up {up}"
    for since, words in (("since_install", "since install"), ("since_start", "since start")):
        yield f"{words}: {_totals(status['totals'][since])}"
    yield (
        f"cache: {cache['entries']} entries, {bytes_in_words(cache['size_bytes'])} of "
        f"{bytes_in_words(cache['limit_bytes'])}, {bytes_in_words(cache['free_bytes'])} free on disk"
    )
    rate = status["wan_rate_bytes_per_second"]
    yield f"WAN: {format_rate(rate) if rate else 'unlimited'}"
    yield f"clients: {clients['connections']} connections"
    for upstream in status["upstreams"]:
        yield f"upstream {upstream['name']}: {'up' if upstream['up'] else 'DOWN'}"
    for fill in status["fills"]:
        yield f"fill {fill['key'] or fill['id']}: {_progress(fill['received_bytes'], fill['length_bytes'])}"
    if not status["reload"]["successful"]:
        yield "the last reload FAILED: the settings before it are in force; the log says why"
    for alarm in status["alarms"]:
        yield f"{alarm['severity'].upper()} {alarm['name']}: {alarm['text']}. {alarm['what_to_do']}"


def _totals(totals: Mapping[str, Any]) -> str:
    sent, received = totals["client_sent_bytes"], totals["upstream_received_bytes"]
    saved, ratio = totals["saved_bytes"], totals["hit_ratio"]
    share = f" ({saved / sent:.1%})" if sent else ""
    hits = f", {ratio:.1%} hits" if ratio is not None else ""
    return (
        f"{bytes_in_words(sent)} to clients, {bytes_in_words(received)} over the WAN, "
        f"{bytes_in_words(saved)} saved{share}{hits}"
    )


def _progress(received: int, length: int | None) -> str:
    if length is None:
        return bytes_in_words(received)
    return f"{bytes_in_words(received)} of {bytes_in_words(length)} ({received / length:.0%})"


ENTRY_HEAD = f"{'size':>9}  {'kind':<5}  {'hits':>7}  {'last used':<16}  {'':<6}  key"


def entry_line(entry: Mapping[str, Any]) -> str:
    """One entry, under ENTRY_HEAD. KeyError when it is that of another version."""
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["used_at"]))
    return (
        f"{bytes_in_words(entry['length_bytes']):>9}  {entry['kind']:<5}  {entry['hits']:>7}  {used}  "
        f"{'pinned' if entry['pinned'] else '':<6}  {entry['key']}"
    )
