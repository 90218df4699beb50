"""The page's content: a view of the control state, and its HTML, by the templates beside it."""

import asyncio
import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from decimal import Decimal
from functools import partial
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote
from zoneinfo import ZoneInfo

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gup.content.catalog import Stream
from gup.content.key import ABSENT, Kind
from gup.control.api import months, schemas, statistics
from gup.control.api.status import status
from gup.control.entry_table import Row
from gup.control.state import ControlState
from gup.control.stats import timeline
from gup.control.stats.history import DAY, HOUR, MINUTE, RECEIVED, SENT, SPANS, Point, added_up, within
from gup.units import bytes_in_words

_REST_FACTOR = 10
_DAYS = 30
_CHARTS = {"hour": (MINUTE, 5 * MINUTE, "%H:%M"), "day": (5 * MINUTE, HOUR, "%a %H:%M")}
_OFF_NOTE = "reports.addresses is off: clients are not counted by revision."
MAX_STREAMS = 40
MAX_REVISIONS = 10


class Kept:
    """The result of `find`, cached for some seconds, longer if it took long; concurrent callers share one."""

    def __init__(self, seconds: float, find: Callable[[], Awaitable[Any]]) -> None:
        self._seconds = seconds
        self._find = find
        self._found: tuple[float, Any] = (0.0, None)
        self._finding = asyncio.Lock()

    async def value(self) -> Any:
        async with self._finding:
            began = time.monotonic()
            if began > self._found[0]:
                found = await self._find()
                now = time.monotonic()
                self._found = now + max(self._seconds, _REST_FACTOR * (now - began)), found
            return self._found[1]


class Viewer:
    """Makes views of the control state; caches expensive parts for some seconds."""

    def __init__(self, state: ControlState) -> None:
        self._state = state
        self._kept: dict[str, Kept] = {
            "saved": Kept(2.0, self._saved),
            "charts": Kept(5.0, self._charts),
            "held": Kept(5.0, self._held),  # with 1e5 rows some 0.3 s of a thread
            "taken": Kept(10.0, state.reports.content),
            "restarts": Kept(10.0, state.reports.restarts),
            "seconds": Kept(2.0, self._seconds),
            "ages": Kept(60.0, self._ages),
            "sick": Kept(10.0, partial(statistics.sick, state, statistics.Form.model_validate({}))),
        }

    async def view(self) -> dict[str, Any]:
        state = self._state
        await state.meter()
        return {
            "now": state.clock(),
            "zone": self._zone(),
            "status": await status(state),
            "not_ready": state.not_ready(),
            "month": self._month(),
            "client_rate": state.history.clients.bytes_per_second(),
            "phase_names": PHASE_NAMES,
            "sizing": state.sizing.shown(),
        } | {name: await kept.value() for name, kept in self._kept.items()}

    def _month(self) -> str:
        """The last whole month of which there is a statement, else the present one."""
        state = self._state
        installed_at = state.dependencies.installed_at
        return months.chosen_month(None, state.clock(), installed_at, self._zone()).name

    def _zone(self) -> ZoneInfo | None:
        name = self._state.settings.site.time_zone
        return ZoneInfo(name) if name else None  # None: the machine's own

    async def _saved(self) -> schemas.Savings:
        """The savings, with those of the last thirty days on which anything was counted."""
        saved = await statistics.saved(self._state, statistics.Ledger.model_validate({"days": _DAYS}))
        today = clock(self._state.clock(), self._zone(), "%Y-%m-%d")
        days = [day for day in saved.days if day.day is not None and within(day.day, today, _DAYS)]
        return saved.model_copy(update={"days": days})

    async def _charts(self) -> dict[str, Any]:
        history, now = self._state.history, self._state.clock()
        return {
            span: _chart(await history.series(span), now, SPANS[span][1], *form)
            for span, form in _CHARTS.items()
        }

    async def _seconds(self) -> dict[str, Any]:
        return slowest(await self._state.timings.slowest(), self._state.settings.reports.slow)

    async def _ages(self) -> dict[str, Any]:
        """The site's clients by age of their revision: as counted last, and on each of thirty days."""
        now, zone = self._state.clock(), self._zone()
        with contextlib.suppress(OSError):
            found = await self._state.database.run(lambda db: timeline.shares(db, now - _DAYS * DAY, now))
            site = [share for share in found if share.stream is None]
            by_day = {clock(share.at, zone, "%Y-%m-%d"): share for share in site}
            days = [clock(now - back * DAY, zone, "%Y-%m-%d") for back in range(_DAYS - 1, -1, -1)]
            return {
                "note": _OFF_NOTE if self._state.reports.mode == "off" else None,
                "last": site[-1] if site else None,
                "days": [(day, by_day.get(day)) for day in dict.fromkeys(days)],
                "active_days": timeline.ACTIVE_SECONDS // DAY,
            }
        return {"note": "The disk refuses: these figures can't be read now.", "last": None}

    async def _held(self) -> dict[str, Any]:
        rows = [row async for part in self._state.index.rows.every() for row in part]
        return await asyncio.to_thread(holdings, rows, self._label)

    def _label(self, stream: Stream) -> tuple[str, str, str]:
        """Product, version and language: the catalogue's where it has them, else those of the key."""
        product, language = self._state.label(stream)
        label = self._state.dependencies.label_of(stream, "")
        version = label.version if label and stream[0] == "any" else stream[0]
        return product, version, "all languages" if language == "SymAllLanguages" else language


def figures(view: Mapping[str, Any]) -> dict[str, Any]:
    """The few figures of a view that scripts take live, as `/api/v1/events` sends them."""
    status, saved = view["status"], view["saved"]
    wan = status.limits["wan_rate_bytes_per_second"]
    return {
        "at": view["now"],
        "ready": status.ready,
        "client_bytes_per_second": view["client_rate"],
        "wan_bytes_per_second": wan.used,
        "wan_limit_bytes_per_second": wan.limit,
        "client_connections": status.clients.connections,
        "fills": len(status.fills),
        "fill_waiters": status.fill_waiters,
        "cache_size_bytes": status.cache.size_bytes,
        "saved_today_bytes": saved.today.saved_bytes,
        "saved_last_30_days_bytes": saved.last_30_days.saved_bytes,
        "saved_since_install_bytes": saved.since_install.saved_bytes,
    }


def _chart(points: list[Point], now: float, length: int, draw: int, step: int, form: str) -> dict[str, Any]:
    """A chart: `columns` of times, rates and limits (None: gup did not run), and its sums, peaks and rows."""
    drawn, rows = _by_time(points, draw), _by_time(points, step)
    times = [int(now) // draw * draw - back for back in range(length - draw, -1, -draw)]
    return {
        **_row(points),
        "client_peak": max((point.client_peak for point in points), default=0),
        "wan_peak": max((point.wan_peak for point in points), default=0),
        "columns": [times, *([drawn.get(at, {}).get(name) for at in times] for name in _DRAWN)],
        "rows": [{"at": at, **rows[at]} for at in sorted(rows, reverse=True)],
        "form": form,
    }


_DRAWN = ("client_rate", "wan_rate", "wan_limit")


def _by_time(points: list[Point], seconds: int) -> dict[int, dict[str, Any]]:
    buckets: dict[int, list[Point]] = defaultdict(list)
    for point in points:
        buckets[point.at // seconds * seconds].append(point)
    return {at: _row(found) for at, found in buckets.items()}


def _row(points: list[Point]) -> dict[str, Any]:
    total = added_up(point.sums for point in points)
    seconds = max(1.0, sum(point.covered_seconds for point in points))
    return {
        "sent_bytes": total[SENT],
        "received_bytes": total[RECEIVED],
        "client_rate": round(total[SENT] / seconds),
        "wan_rate": round(total[RECEIVED] / seconds),
        "wan_limit": (points[-1].wan_limit or None) if points else None,
    }


def holdings(rows: Iterable[Row], label: Callable[[Stream], tuple[str, str, str]]) -> dict[str, Any]:
    """The largest `streams`, and how many `more` there are; `label` gives product, version and language."""
    by_stream: dict[Stream, list[Row]] = defaultdict(list)
    for row in rows:
        by_stream[row.stream_id].append(row)
    sizes = {stream: sum(row.length_bytes for row in found) for stream, found in by_stream.items()}
    streams = [
        _stream(label(stream), by_stream[stream])
        for stream in nlargest(MAX_STREAMS, sizes, sizes.__getitem__)
    ]
    streams.sort(key=lambda one: (one["product"].casefold(), one["version"], one["language"]))
    return {"streams": streams, "more": len(sizes) - len(streams)}


def _stream(label: tuple[str, str, str], rows: Sequence[Row]) -> dict[str, Any]:
    """A stream: its newest revision, how many more there are, and sums over all of them."""
    by_revision: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        name = row.revision if row.revision != ABSENT else unquote(row.file)
        by_revision[row.content_revision or name].append(row)
    newest = sorted(by_revision, reverse=True)
    revisions = [{"name": name, **_sums(by_revision[name])} for name in newest[:MAX_REVISIONS]]
    return {
        **dict(zip(("product", "version", "language"), label, strict=True)),
        **_sums(rows),
        "stored_at": revisions[0]["stored_at"],
        "revisions": revisions,
        "more": len(newest) - len(revisions),
    }


def _sums(rows: Sequence[Row]) -> dict[str, Any]:
    deltas = sum(row.kind is Kind.DELTA for row in rows)
    return {
        "wholes": len(rows) - deltas,
        "deltas": deltas,
        "size_bytes": sum(row.length_bytes for row in rows),
        "hits": sum(row.hits for row in rows),
        "stored_at": max(row.stored_at for row in rows),
        "used_at": max(row.used_at for row in rows),
        "pinned": any(row.pinned for row in rows),
    }


PHASE_NAMES: Mapping[str, str] = {
    "download_queue": "download slot",
    "queue": "fill slot",
    "wan": "WAN rate",
    "head": "upstream's answer",
    "receiving": "receiving",
    "disk": "disk",
    "fill": "fill in another process",
    "rate": "client's rate",
    "client": "client takes no more",
    "sending": "sending",
}
_UNDER_WAY_SHOWN, _SLOWEST_SHOWN, _PARTS_SHOWN = 5, 8, 3


def slowest(found: schemas.Slowest, least_seconds: float) -> dict[str, Any]:
    """The longest `under_way` and the `slowest` ended ones, with their bars; the `phases` in any of them."""

    def shown(spells: Sequence[schemas.Spell], most: int) -> list[dict[str, Any]]:
        return [
            {
                **dict(spell),
                "bar": [(f"p-{phase}", part / spell.seconds) for phase, part in _in_order(spell.phases)],
                "parts": [
                    (phase, part)
                    for phase, part in nlargest(_PARTS_SHOWN, spell.phases.items(), key=itemgetter(1))
                    if part >= spell.seconds / 100
                ],
            }
            for spell in nlargest(most, spells, key=lambda spell: spell.seconds)
            if spell.seconds > 0
        ]

    under_way = shown(found.under_way, _UNDER_WAY_SHOWN)
    slow = shown(found.slowest, _SLOWEST_SHOWN)
    phases = {phase for spell in under_way + slow for phase in spell["phases"]}
    return {"under_way": under_way, "slowest": slow, "phases": phases, "least": least_seconds}


def _in_order(phases: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(phase, phases[phase]) for phase in PHASE_NAMES if phase in phases]


# --- as HTML

QUICK = ("head", "alarms", "site", "saved", "now", "budget", "fills", "seconds", "upstreams")
SLOW = ("hour", "day", "days", "held", "clients", "ages", "service", "sizing")
"""The parts of the page that change; each has its template, and the element with this id holds it."""
SLOW_SECONDS = 5.0
"""Interval of the slow parts, which are large."""
_FOLDER = Path(__file__).parent
_FILES = {
    "page.css": ("static", "text/css"),
    "page.js": ("static", "text/javascript"),
    "icon.svg": ("static", "image/svg+xml"),
    "uPlot.iife.min.js": ("vendor", "text/javascript"),
    "uPlot.min.css": ("vendor", "text/css"),
}
"""`vendor` files come with the installation (hatch_build.py); without them there are no charts."""


class Asset(NamedTuple):
    """A file that the page uses; `tag` changes with its bytes."""

    body: bytes
    content_type: str
    tag: str


class Renderer:
    """Templates and files, read once, by the constructor, which blocks."""

    def __init__(self) -> None:
        environment = Environment(
            loader=FileSystemLoader(_FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        environment.filters |= {
            word.__name__: word
            for word in (size, rate, span, number, percent, iso, clock, amount, seconds_in_words)
        }
        names = (name.removesuffix(".html") for name in environment.list_templates())
        self._templates = {name: environment.get_template(f"{name}.html") for name in names}
        self.statement_css = (_FOLDER / "static" / "statement.css").read_text()
        self.assets: dict[str, Asset] = {}
        for name, (folder, content_type) in _FILES.items():
            if (path := _FOLDER / folder / name).is_file():
                body = path.read_bytes()
                self.assets[name] = Asset(body, content_type, _digest(body))
        self.missing = [name for name in _FILES if name not in self.assets]
        self.edition = _digest("".join(asset.tag for asset in self.assets.values()).encode())
        """Changes with any of the files."""

    def fragments(self, view: Mapping[str, Any], names: Iterable[str] = QUICK + SLOW) -> dict[str, str]:
        macros = self._templates["macros"].make_module(dict(view))
        if view["status"].cluster is None:
            names = [name for name in names if name != "site"]
        if view["status"].budget is None:
            names = [name for name in names if name != "budget"]
        return {
            name: self._templates.get(name, self._templates["chart"]).render(view, m=macros, part=name)
            for name in names
        }

    def document(self, name: str, **values: Any) -> str:
        """A document that is not the page."""
        return self._templates[name].render(values)

    def page(self, view: Mapping[str, Any]) -> str:
        return self._templates["page"].render(
            view,
            m=self._templates["macros"].make_module(dict(view)),
            parts=self.fragments(view),
            urls={name: f"/assets/{name}?{asset.tag}" for name, asset in self.assets.items()},
            edition=self.edition,
        )


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


# --- figures for people


def size(count: float) -> str:
    """Bytes in steps of a thousand: `1.5 GB`."""
    return bytes_in_words(count).replace(" ", "\N{NO-BREAK SPACE}").replace("-", "\N{MINUS SIGN}")


def rate(bytes_per_second: float) -> str:
    return f"{size(bytes_per_second)}/s"


def span(seconds: float) -> str:
    """A time span in its largest unit: `3 h`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}\N{NO-BREAK SPACE}{unit}"
    return f"{max(seconds, 0):.0f}\N{NO-BREAK SPACE}s"


def seconds_in_words(seconds: float) -> str:
    """`850 ms`, `12.4 s`, `7 min 5 s`."""
    if seconds < 1:
        return f"{1000 * seconds:.0f}\N{NO-BREAK SPACE}ms"
    if seconds < 100:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    return f"{seconds // 60:.0f}\N{NO-BREAK SPACE}min {seconds % 60:.0f}\N{NO-BREAK SPACE}s"


def number(count: float) -> str:
    return f"{count:,.0f}"


def percent(part: float) -> str:
    """A share of one as `93 %`; values close to 0 % and 100 % keep a decimal."""
    hundredth = 100 * part
    decimals = 1 if 0 < abs(hundredth) < 10 or 99 < hundredth < 100 else 0
    shown = min(hundredth, 99.9) if hundredth < 100 else hundredth
    return f"{shown:.{decimals}f}\N{NO-BREAK SPACE}%".replace("-", "\N{MINUS SIGN}")


def amount(money: str) -> str:
    """An exact amount of money: `1,234.50`."""
    return f"{Decimal(money):,.2f}".replace("-", "\N{MINUS SIGN}")


def iso(at: float) -> str:
    """For `<time datetime>`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def clock(at: float, zone: tzinfo | None, form: str = "%Y-%m-%d %H:%M") -> str:
    return datetime.fromtimestamp(at, zone).strftime(form)
