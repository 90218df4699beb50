"""Settings and metrics as text: the commented TOML reference, the pages in docs, the settings in force.

`python -m gup.cli.reference` writes config/gup.toml, docs/settings.md and docs/metrics.md; a test compares.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gup.config import Settings
from gup.config.loading import DELIMITER, PREFIX, SECRET_KEYS, mask_password, model_of
from gup.metrics import MAX_SHOWN, METRICS, Metric
from gup.units import format_duration, format_rate, format_size, parse_duration, parse_rate, parse_size

_WIDTH = 100
_FORMATS = {parse_size: format_size, parse_rate: format_rate, parse_duration: format_duration}
_QUANTITIES = {
    parse_size: "size",
    parse_rate: "rate",
    parse_duration: "duration",
}
_PLAIN = {bool: "true or false", int: "whole number", str: "text", Path: "path", dict: "table of texts"}
_EXAMPLES: dict[str, Any] = {
    "name": "headquarters",
    "url": "http://manager:8014",
    "time_zone": "Europe/Paris",
    "ca_file": "/etc/gup/manager-ca.pem",
    "health_path": "/content/ContentInfo.txt",
    "proxy": "http://user:password@proxy:8080",
    "days": ["mon", "tue", "wed", "thu", "fri"],
    "from": "07:30",
    "to": "18:00",
    "rate": 2_000_000,
    "file": "/etc/gup/ContentInfo.txt",
    "liveupdate": "http://liveupdate:7070",
    "admin_token_file": "/etc/gup/admin-token",
    "admin_read_token_file": "/etc/gup/read-token",
    "admin_cert_file": "/etc/gup/admin-cert.pem",
    "admin_key_file": "/etc/gup/admin-key.pem",
}
"""What the reference shows for a key without a default."""

UNITS = (
    "Sizes are a number with B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024), "
    "rates a size with /s, durations a number with ms, s, m, h or d."
)
_TOML_HEAD = (
    "Every setting of gup at its default. Written by `python -m gup.cli.reference` from the table in "
    f"gup/config/settings.py. {UNITS} "
    "Keys that begin with # have no default: what stands there is an example."
)
_PAGE_HEAD = f"""# Settings

<!-- Written by `python -m gup.cli.reference` from the table in gup/config/settings.py. Change it there. -->

Settings come from a TOML file (`gup serve --config FILE`), the environment, and flags. Flags win over the
environment, the environment wins over the file. The variable of a key is `{PREFIX}<SECTION>{DELIMITER}<KEY>`:
`GUP_CACHE__MAX_SIZE=5GB`. Lists are written with commas or as JSON: `GUP_CLIENTS__ALLOW=10.0.0.0/8,fc00::/7`.
`GUP_UPSTREAM=http://manager:8014` names upstreams by URL alone, `GUP_UPSTREAM__URL` and the like describe
one. A list that is given again replaces the other one whole.

An unknown key or a bad value stops the start. All mistakes are told at once, each with its key, the value and
what would be right; `upstream#2.url` is the second upstream's. `gup config check FILE` looks for them without
starting anything, `gup config show FILE` prints what is in force.

{UNITS}
"""

_METRICS_HEAD = f"""\
# Metrics

<!-- Written by `python -m gup.cli.reference` from the table in gup/metrics.py. Change it there. -->

`GET /metrics` on the control plane shows them to Prometheus ([monitoring.md](monitoring.md)), as text or,
when asked, as OpenMetrics. Units are bytes and seconds. Byte counters count bodies, without heads. Counters
are exact after a crash of any process and survive restarts. They begin at 0 for every value that a label can
have, but for those of streams, which appear when they have counted.

`product` and `language` are what the catalogue calls a stream, else its moniker and its variant's language.
The first {MAX_SHOWN} pairs are shown apart, the rest as `other`. No label holds an URL, a client or a
revision.

Bandwidth saved is `gup_client_sent_bytes_total` minus `gup_upstream_received_bytes_total`.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One key of a table: its type in words, its default (None without one) and its sentence."""

    key: str
    name: str
    type: str
    default: Any
    field: FieldInfo


def rows(table: type[BaseModel]) -> Iterator[Row]:
    """The keys of `table` that hold values; tables in it are not among them."""
    for name, field in table.model_fields.items():
        if model_of(field.annotation) is None:
            yield Row(field.alias or name, name, _type(field), _default(field), field)


def _default(field: FieldInfo) -> Any:
    if field.is_required() or field.default == "":
        return None
    if field.default_factory not in (None, dict, list):
        return None  # worked out by each machine, such as the host's name
    return field.get_default(call_default_factory=True)


def _type(field: FieldInfo) -> str:
    for known, word in _QUANTITIES.items():
        if _is_written(field, known):
            return word
    annotation: Any = field.annotation
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(f'"{value}"' for value in get_args(annotation))
    if get_origin(annotation) is list:
        return "list of texts"
    if get_origin(annotation) is dict:
        return "table of lists" if get_origin(get_args(annotation)[1]) is list else _PLAIN[dict]
    plain = annotation if annotation in _PLAIN else str  # the rest are kinds of text, or None besides
    return "path" if "Path" in str(annotation) else _PLAIN[plain]


def _is_written(field: FieldInfo, parse: Any) -> bool:
    return any(getattr(checked, "func", None) is parse for checked in field.metadata)


def written(field: FieldInfo, value: Any) -> str:
    """`value` as it is written in TOML, with its unit."""
    for parse, spelled in _FORMATS.items():
        if _is_written(field, parse):
            return _toml(spelled(value))
    return _toml(value)


def _toml(value: Any) -> str:
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


# --- the commented reference


def reference_toml() -> str:
    """The text of config/gup.toml."""
    lines = [f"# {line}" for line in wrap(_TOML_HEAD, _WIDTH)]
    for section, field in Settings.model_fields.items():
        lines += ["", "", *_section(section, field)]
    return "\n".join(lines) + "\n"


def _section(path: str, field: FieldInfo) -> Iterator[str]:
    table = model_of(field.annotation)
    assert table is not None
    several = get_origin(field.annotation) is list
    yield f"# {table.__doc__}"
    yield f"#[[{path}]]" if several else f"[{path}]"
    for row in rows(table):
        yield ""
        yield from (f"# {line}" for line in wrap(f"{row.field.description} ({row.type})", _WIDTH))
        absent = row.default is None
        value = _EXAMPLES[row.key] if absent and row.key in _EXAMPLES else row.default
        hidden = "#" if several or absent else ""
        yield f"{hidden}{row.key} = {written(row.field, value)}"
    for name, inner in table.model_fields.items():
        if model_of(inner.annotation) is not None:
            yield ""
            yield from _section(f"{path}.{name}", inner)


# --- the page


def reference_page() -> str:
    """The text of docs/settings.md."""
    text = [_PAGE_HEAD]
    for section, field in Settings.model_fields.items():
        text += list(_page_section(section, field))
    return "\n".join(text)


def _page_section(path: str, field: FieldInfo) -> Iterator[str]:
    table = model_of(field.annotation)
    assert table is not None
    several = get_origin(field.annotation) is list
    yield f"## `{'[[' if several else '['}{path}{']]' if several else ']'}`\n\n{table.__doc__}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for row in rows(table):
        default = f"`{written(row.field, row.default)}`" if row.default is not None else "none"
        if row.field.is_required():
            default = "required"
        yield f"| `{row.key}` | {row.type} | {default} | {row.field.description} |"
    yield ""
    for name, inner in table.model_fields.items():
        if model_of(inner.annotation) is not None:
            yield from _page_section(f"{path}.{name}", inner)


# --- the page of metrics


def metrics_page() -> str:
    """The text of docs/metrics.md."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    rows += [f"| `{row.name}` | {row.kind} | {_labels(row)} | {_meaning(row)} |" for row in METRICS]
    return "\n".join([_METRICS_HEAD, *rows, ""])


def _labels(metric: Metric) -> str:
    return "<br>".join(_each_label(metric)) or "none"


def _each_label(metric: Metric) -> Iterator[str]:
    if metric.upstream:
        yield "`upstream`: the settings' names"
    for label, values in metric.labels:
        yield f"`{label}`: {', '.join(values)}" if values else f"`{label}`"


def _meaning(metric: Metric) -> str:
    if metric.kind != "histogram":
        return metric.help
    return f"{metric.help} Buckets end at {', '.join(f'{edge:g}' for edge in metric.buckets)} s."


# --- settings in force


def settings_toml(settings: Settings) -> str:
    """`settings` as a TOML file that gives them again, but for secrets, which are masked."""
    lines: list[str] = []
    for section in Settings.model_fields:
        lines += _tables(section, getattr(settings, section))
    return "\n".join(lines).lstrip("\n") + "\n"


def _tables(path: str, value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        yield from ("", f"[[{path}]]" if isinstance(value, list) else f"[{path}]")
        for row in rows(type(item)):
            shown = _masked(row.key, getattr(item, row.name))
            if shown is not None:
                yield f"{row.key} = {written(row.field, shown)}"
        for name, field in type(item).model_fields.items():
            if model_of(field.annotation) is not None:
                yield from _tables(f"{path}.{name}", getattr(item, name))


def _masked(key: str, value: Any) -> Any:
    if key in SECRET_KEYS:
        return dict.fromkeys(value, "***")
    return mask_password(value) if key == "proxy" and value else value


def write_all(root: Path) -> None:
    """Write the three files below `root`."""
    (root / "config" / "gup.toml").write_text(reference_toml(), encoding="utf-8")
    (root / "docs" / "settings.md").write_text(reference_page(), encoding="utf-8")
    (root / "docs" / "metrics.md").write_text(metrics_page(), encoding="utf-8")


if __name__ == "__main__":
    write_all(Path())
