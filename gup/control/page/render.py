"""Turns a view into HTML by the templates beside this module. Knows no plane; every value is escaped."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from gup.control.page import words

QUICK = ("head", "alarms", "saved", "now", "fills", "upstreams")
SLOW = ("hour", "day", "days", "held", "clients", "service")
"""The parts of the page that change, each by its template; the element with this id holds it."""
SLOW_SECONDS = 5.0
"""So long the slow ones stand: they are large."""
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: use its own files, and ask its own server."""


_FOLDER = Path(__file__).parent / "templates"


class Renderer:
    """The templates, read and compiled once: by the constructor, which blocks."""

    def __init__(self) -> None:
        texts = {path.name: path.read_text(encoding="utf-8") for path in _FOLDER.glob("*.html")}
        self._templates = Environment(
            loader=DictLoader(texts),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._templates.filters |= {
            "size": words.size,
            "rate": words.rate,
            "span": words.span,
            "number": words.number,
            "percent": words.percent,
            "iso": words.iso,
            "clock": words.clock,
        }
        for name in texts:
            self._templates.get_template(name)

    def fragments(self, view: Mapping[str, Any], names: Iterable[str] = QUICK + SLOW) -> dict[str, str]:
        """Parts that change, by name."""
        return {name: self._render(f"{name}.html", view) for name in names}

    def page(self, view: Mapping[str, Any], *, assets: Mapping[str, str], edition: str) -> str:
        """The whole document. `assets` are the URLs of its files by name; `edition` tells one set of files
        from another.
        """
        parts = self.fragments(view)
        return self._render("page.html", {**view, "parts": parts, "assets": assets, "edition": edition})

    def _render(self, template: str, view: Mapping[str, Any]) -> str:
        return self._templates.get_template(template).render(view)
