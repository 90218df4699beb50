"""Output for people: tables that fit a terminal, and figures in words."""
# ruff: noqa: PLC0415 - rich takes a tenth of a second to import

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import typer

from gup.units import bytes_in_words, format_rate, time_in_words


def print_json(answer: object) -> None:
    typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))


def show_table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """Print rows under their heads; a head that begins with # is a column of numbers.

    Fitted to a terminal, whole in a pipe. Text from outside can neither mark up nor move the cursor. Without
    a row nothing is printed.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    found = [[Text(printable(str(cell))) for cell in row] for row in rows]
    if not found:
        return
    table = Table(box=None, title=title or None, title_justify="left", pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(
            Text(head.removeprefix("#")),
            justify="right" if head.startswith("#") else "left",
            overflow="fold",
            no_wrap=head.startswith("#"),
        )
    for row in found:
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        wide = console.options.update(max_width=100_000)
        console.width = Measurement.get(console, wide, table).maximum
    console.print(table)


def printable(text: str) -> str:
    """`text` with everything that could steer a terminal made visible."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def moment(at: float | None) -> str:
    """Unix time as a date and a time of day, on this machine's clock; "-" for none."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) if at else "-"


# A row of the API has other members in another version of gup: KeyError then.


def status_lines(status: Mapping[str, Any]) -> Iterator[str]:
    """The control plane's status, as lines."""
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


UPSTREAM_HEADS = ("upstream", "", "since", "last error")


def upstream_row(upstream: Mapping[str, Any]) -> tuple[str, ...]:
    state = str(upstream["state"])
    state = "up" if upstream["up"] and state == "unknown" else state if upstream["up"] else state.upper()
    return upstream["name"], state, moment(upstream["since"]), upstream["last_error"] or ""


FILL_HEADS = ("fill", "from", "#here", "#a second", "#left")


def fill_row(fill: Mapping[str, Any]) -> tuple[str, ...]:
    received, length = fill["received_bytes"], fill["length_bytes"]
    rate, left = fill["bytes_per_second"], fill["remaining_seconds"]
    share = "" if length is None else f" of {bytes_in_words(length)} ({received / length:.0%})"
    return (
        fill["key"] or fill["id"],
        fill["upstream"] or "",
        bytes_in_words(received) + share,
        bytes_in_words(rate) if rate is not None else "",
        time_in_words(left) if left is not None else "",
    )


ENTRY_HEADS = ("product", "revision", "kind", "#size", "#hits", "last used", "", "key")


def entry_row(entry: Mapping[str, Any]) -> tuple[str, ...]:
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
