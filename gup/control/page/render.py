"""Turns a view into HTML by the templates beside this module; every value is escaped."""

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gup.units import bytes_in_words

QUICK = ("head", "alarms", "saved", "now", "fills", "upstreams")
SLOW = ("hour", "day", "days", "held", "clients", "service")
"""The parts of the page that change, each by its template; the element with this id holds it."""
SLOW_SECONDS = 5.0
"""How long the slow parts stand: they are large."""
_FOLDER = Path(__file__).parent
_FILES = {
    "page.css": ("static", "text/css"),
    "page.js": ("static", "text/javascript"),
    "icon.svg": ("static", "image/svg+xml"),
    "uPlot.iife.min.js": ("vendor", "text/javascript"),
    "uPlot.min.css": ("vendor", "text/css"),
}
"""Those under `vendor` come with the installation (hatch_build.py); without them there are no charts."""


class Asset(NamedTuple):
    """A file that the page uses; `tag` changes with its bytes."""

    body: bytes
    content_type: str
    tag: str


class Renderer:
    """Templates and files, read once: by the constructor, which blocks."""

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
            word.__name__: word for word in (size, rate, span, number, percent, iso, clock)
        }
        names = (name.removesuffix(".html") for name in environment.list_templates())
        self._templates = {name: environment.get_template(f"{name}.html") for name in names}
        self.assets: dict[str, Asset] = {}
        for name, (folder, content_type) in _FILES.items():
            if (path := _FOLDER / folder / name).is_file():
                body = path.read_bytes()
                self.assets[name] = Asset(body, content_type, _digest(body))
        self.missing = [name for name in _FILES if name not in self.assets]
        self.edition = _digest("".join(asset.tag for asset in self.assets.values()).encode())
        """Changes with any of the files."""

    def fragments(self, view: Mapping[str, Any], names: Iterable[str] = QUICK + SLOW) -> dict[str, str]:
        """Parts that change, by name."""
        macros = self._templates["macros"].make_module(dict(view))
        return {
            name: self._templates.get(name, self._templates["chart"]).render(view, m=macros, part=name)
            for name in names
        }

    def page(self, view: Mapping[str, Any]) -> str:
        """The whole document."""
        return self._templates["page"].render(
            view,
            m=self._templates["macros"].make_module(dict(view)),
            parts=self.fragments(view),
            urls={name: f"/assets/{name}?{asset.tag}" for name, asset in self.assets.items()},
            edition=self.edition,
        )


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


# --- figures as people read them


def size(count: float) -> str:
    """Bytes in steps of a thousand: `1.5 GB`."""
    return bytes_in_words(count).replace(" ", "\N{NO-BREAK SPACE}").replace("-", "\N{MINUS SIGN}")


def rate(bytes_per_second: float) -> str:
    """`1.5 MB/s`."""
    return f"{size(bytes_per_second)}/s"


def span(seconds: float) -> str:
    """A span of time in its largest unit: `3 h`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}\N{NO-BREAK SPACE}{unit}"
    return f"{max(seconds, 0):.0f}\N{NO-BREAK SPACE}s"


def number(count: float) -> str:
    """`12,345`."""
    return f"{count:,.0f}"


def percent(part: float) -> str:
    """A share of one as `93 %`; next to all and next to nothing keep a decimal."""
    hundredth = 100 * part
    decimals = 1 if 0 < abs(hundredth) < 10 or 99 < hundredth < 100 else 0
    shown = min(hundredth, 99.9) if hundredth < 100 else hundredth
    return f"{shown:.{decimals}f}\N{NO-BREAK SPACE}%".replace("-", "\N{MINUS SIGN}")


def iso(at: float) -> str:
    """A moment for `<time datetime>`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def clock(at: float, zone: tzinfo | None, form: str = "%Y-%m-%d %H:%M") -> str:
    """A moment on the site's clocks."""
    return datetime.fromtimestamp(at, zone).strftime(form)
