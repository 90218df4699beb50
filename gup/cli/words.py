"""Figures in words for people: the status and lists of entries; pure text, asks nobody."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from gup.cli.tables import printable
from gup.units import bytes_in_words, format_rate, time_in_words


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
    if not status["reload"]["successful"]:
        yield "the last reload FAILED: the settings before it are in force; the log says why"
    for alarm in status["alarms"]:
        yield printable(
            f"{alarm['severity'].upper()} {alarm['name']}: {alarm['text']}. {alarm['what_to_do']}"
        )


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


UPSTREAM_HEADS = ("upstream", "", "since", "last error")


def upstream_row(upstream: Mapping[str, Any]) -> tuple[str, ...]:
    """Under UPSTREAM_HEADS. KeyError when it is that of another version."""
    state = str(upstream["state"])
    state = "up" if upstream["up"] and state == "unknown" else state if upstream["up"] else state.upper()
    return upstream["name"], state, moment(upstream["since"]), upstream["last_error"] or ""


FILL_HEADS = ("fill", "from", "#here", "#a second", "#left")


def fill_row(fill: Mapping[str, Any]) -> tuple[str, ...]:
    """Under FILL_HEADS. KeyError when it is that of another version."""
    rate, left = fill["bytes_per_second"], fill["remaining_seconds"]
    return (
        fill["key"] or fill["id"],
        fill["upstream"] or "",
        _progress(fill["received_bytes"], fill["length_bytes"]),
        bytes_in_words(rate) if rate is not None else "",
        time_in_words(left) if left is not None else "",
    )


ENTRY_HEADS = ("product", "revision", "kind", "#size", "#hits", "last used", "", "key")


def entry_row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Under ENTRY_HEADS. KeyError when it is that of another version."""
    return (
        entry["product"] if entry["product"] != entry["stream"] else "",
        entry["content_revision"] or entry["revision"],
        entry["kind"],
        bytes_in_words(entry["length_bytes"]),
        str(entry["hits"]),
        moment(entry["used_at"]),
        "pinned" if entry["pinned"] else "",
        entry["key"],
    )


def moment(at: float) -> str:
    """Unix time as a date and a time of day, on this machine's clock."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
