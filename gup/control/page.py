"""The page for people: one HTML document made from the status. No template engine, no outside resource.

It is whole without script. With script, its `<main>` is fetched anew every few seconds and put in place of
the old one, so that there is one rendering only; a failed fetch leaves the last figures and says so.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--dim:#777;--good:#197a3e;--bad:#b3261e;--bar:#2f6fd0}
@media(prefers-color-scheme:dark){:root{--dim:#aaa;--good:#5fca87;--bad:#ff8a80;--bar:#7aa9f0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1.5rem;font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}
.dim{color:var(--dim)}.good{color:var(--good)}.bad{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;margin:1.25rem 0}
.card{border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem}
.card b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums}
.table{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .75rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--dim)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
td.k{overflow-wrap:anywhere}progress{width:8rem;accent-color:var(--bar)}
"""
_SCRIPT = """
const seconds = 5;
async function refresh() {
  try {
    const answer = await fetch("/", {cache: "no-store"});
    if (!answer.ok) throw new Error(answer.status);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.querySelector("main").replaceWith(fresh.querySelector("main"));
  } catch (error) {
    const note = document.getElementById("note");
    note.textContent = "gup does not answer; these figures are old";
    note.className = "bad";
  }
  setTimeout(refresh, seconds * 1000);
}
setTimeout(refresh, seconds * 1000);
"""


def content_security_policy(nonce: str) -> str:
    """What the page may do: its own style and script, and asking its own server."""
    return (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def render(status: Mapping[str, Any], newest: Sequence[Mapping[str, Any]], now: float, nonce: str) -> str:
    """The page for a status (as `/api/v1/status` has it) and the newest entries."""
    site = escape(str(status["site"]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>gup · {site}</title><style nonce="{nonce}">{_STYLE}</style></head><body><main>'
        f"{_head(status, site)}{_saved(status)}{_fills(status)}{_upstreams(status)}{_workers(status, now)}"
        f"{_entries(newest, now)}{_failures(status, now)}"
        f'</main><script nonce="{nonce}">{_SCRIPT}</script></body></html>'
    )


def size(count: float) -> str:
    """Bytes for people, in steps of a thousand: `1.5 GB`."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(amount) < 999.5:
            return f"{amount:.0f} {unit}" if unit == "B" or abs(amount) >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def ago(seconds: float) -> str:
    """A span of time for people, in its largest unit: `3 h`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], empty: str) -> str:
    """A table. Cells are HTML; a head that begins with # is a column of numbers, one with @ of keys."""
    heads = list(head)
    kind = {"#": ' class="n"', "@": ' class="k"'}
    classes = [kind.get(text[0], "") for text in heads]
    body = "".join(
        "<tr>" + "".join(f"<td{cls}>{cell}</td>" for cls, cell in zip(classes, row, strict=True)) + "</tr>"
        for row in rows
    )
    if not body:
        return f'<p class="dim">{empty}</p>'
    titles = "".join(f"<th{cls}>{text.lstrip('#@')}</th>" for cls, text in zip(classes, heads, strict=True))
    return f'<div class="table"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _head(status: Mapping[str, Any], site: str) -> str:
    ready = '<span class="good">ready</span>' if status["ready"] else '<span class="bad">not ready</span>'
    reload_failed = (
        "" if status["reload"]["successful"] else ' · <span class="bad">the last reload was refused</span>'
    )
    return (
        f'<h1>gup <span class="dim">·</span> {site}</h1><p class="dim">{ready} · version '
        f"{escape(str(status['version']))} · up {ago(status['uptime_seconds'])}{reload_failed} "
        '<span id="note"></span></p>'
    )


def _card(title: str, figure: str, below: str) -> str:
    note = '<span class="dim">'
    return f'<div class="card">{note}{title}</span><b>{figure}</b>{note}{below}</span></div>'


def _saved(status: Mapping[str, Any]) -> str:
    total, recent = status["totals"]["since_install"], status["totals"]["since_start"]
    cache, clients, rate = status["cache"], status["clients"], status["wan_rate_bytes_per_second"]
    ratio = recent["hit_ratio"]
    return (
        '<div class="cards">'
        + "".join(
            (
                _card(
                    "WAN bytes saved",
                    size(total["saved_bytes"]),
                    f"{size(recent['saved_bytes'])} since start",
                ),
                _card(
                    "Sent to clients",
                    size(total["client_sent_bytes"]),
                    f"{recent['requests_total']} requests",
                ),
                _card(
                    "Received from upstream",
                    size(total["upstream_received_bytes"]),
                    f"limit {size(rate)}/s" if rate else "no limit",
                ),
                _card(
                    "Answered from the store",
                    "none yet" if ratio is None else f"{100 * ratio:.1f} %",
                    "of requests served",
                ),
                _card(
                    "Cache",
                    size(cache["size_bytes"]),
                    f"of {size(cache['limit_bytes'])}, {cache['entries']} entries; "
                    f"{size(cache['free_bytes'])} free",
                ),
                _card("Clients", str(clients["seen"]["1d"]), f"in a day, {clients['connections']} connected"),
            )
        )
        + "</div>"
    )


def _fills(status: Mapping[str, Any]) -> str:
    def row(fill: Mapping[str, Any]) -> tuple[str, str, str, str]:
        length, received = fill["length_bytes"], fill["received_bytes"]
        bar = f'<progress max="{length}" value="{min(received, length)}"></progress>' if length else ""
        of = f" of {size(length)}" if length else ""
        return (
            escape(fill["key"] or fill["id"]),
            escape(fill["upstream"] or ""),
            bar,
            f"{size(received)}{of}",
        )

    rows = [row(fill) for fill in status["fills"]]
    return "<h2>Fills under way</h2>" + _table(("@Content", "Upstream", "Progress", "#Here"), rows, "None.")


def _upstreams(status: Mapping[str, Any]) -> str:
    rows = [
        (
            escape(upstream["name"]),
            escape(upstream["url"] or ""),
            '<span class="good">up</span>' if upstream["up"] else '<span class="bad">down</span>',
        )
        for upstream in status["upstreams"]
    ]
    return "<h2>Upstreams</h2>" + _table(("Name", "@URL", "State"), rows, "None is configured.")


def _workers(status: Mapping[str, Any], now: float) -> str:
    rows = [
        (
            escape(str(worker.get("slot", ""))),
            escape(str(worker.get("pid", ""))),
            ago(now - float(worker["up_since"])) if worker.get("up_since") else "",
            "ready" if worker.get("ready") else "starting",
        )
        for worker in status["workers"]
    ]
    return "<h2>Workers</h2>" + _table(("#Slot", "#Process", "#Up", "State"), rows, "None.")


def _entries(newest: Sequence[Mapping[str, Any]], now: float) -> str:
    rows = [
        (
            escape(row["key"]) + (" (pinned)" if row["pinned"] else ""),
            escape(row["kind"]),
            size(row["length_bytes"]),
            str(row["hits"]),
            ago(now - row["stored_at"]),
        )
        for row in newest
    ]
    return "<h2>Newest entries</h2>" + _table(
        ("@Content", "Kind", "#Length", "#Uses", "#Age"), rows, "The store is empty."
    )


def _failures(status: Mapping[str, Any], now: float) -> str:
    rows = [
        (ago(now - past["at"]) + " ago", escape(past["key"]), escape(past["problem"]), escape(past["detail"]))
        for past in status["failures"][:10]
    ]
    if not rows:
        return f'<p class="dim">{_stamp(now)}</p>'
    return "<h2>Fills that failed</h2>" + _table(("When", "@Content", "Problem", "Detail"), rows, "")


def _stamp(now: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
