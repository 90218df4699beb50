"""Settings and metrics as text: the commented TOML reference, the pages in docs, the settings in force.

`python -m gup.cli.reference` writes config/gup.toml, docs/settings.md and docs/metrics.md; a test compares.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gup.config import Settings
from gup.config.loading import DELIMITER, PREFIX, masked, model_of
from gup.metrics import MAX_SHOWN, METRICS
from gup.units import (
    format_duration,
    format_rate,
    format_share,
    format_size,
    parse_duration,
    parse_rate,
    parse_share,
    parse_size,
)

_WIDTH = 100
_QUANTITIES: dict[Any, tuple[str, Callable[[Any], str]]] = {
    parse_size: ("size", format_size),
    parse_rate: ("rate", format_rate),
    parse_duration: ("duration", format_duration),
    parse_share: ("percentage", format_share),
}
_PLAIN: dict[Any, str] = {bool: "true or false", int: "whole number"}
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
    "webhook": "https://alerts.example/gup",
    "webhook_secret": "whsec_YW4gZXhhbXBsZSwgbWFrZSBhIGtleSBvZiB5b3VyIG93bg==",
    "webhook_secret_file": "/etc/gup/webhook-secret",
    "webhook_proxy": "http://user:password@proxy:8080",
    "webhook_ca_file": "/etc/gup/alerts-ca.pem",
    "admin_token_file": "/etc/gup/admin-token",
    "admin_read_token_file": "/etc/gup/read-token",
    "admin_cert_file": "/etc/gup/admin-cert.pem",
    "admin_key_file": "/etc/gup/admin-key.pem",
    "[cluster].url": "redis://valkey:6379",
    "[cluster].ca_file": "/etc/gup/valkey-ca.pem",
    "password_file": "/etc/gup/valkey-password",
    "secret_file": "/etc/gup/cluster-secret",
    "sentinel_name": "gup",
    "site": "lyon",
    "node": "gup-1",
    "address": "http://10.0.0.5:2969",
    "price_per_gb": "0.08",
    "currency": "EUR",
}
"""Values that the reference shows for keys without a default."""

UNITS = (
    "Sizes are a number with B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024), "
    "rates a size with /s, durations a number with ms, s, m, h or d."
)
_TOML_HEAD = (
    "Every setting of gup at its default. Written by `python -m gup.cli.reference` from the table in "
    f"gup/config/settings.py. {UNITS} "
    "Keys that begin with # have no default: the value shown is an example."
)
_PAGE_HEAD = f"""# Settings

<!-- Written by `python -m gup.cli.reference` from the table in gup/config/settings.py. Change it there. -->

Settings come from a TOML file (`gup serve --config FILE`), the environment, and flags. Flags win over the
environment, the environment wins over the file. The variable of a key is `{PREFIX}<SECTION>{DELIMITER}<KEY>`:
`GUP_CACHE__MAX_SIZE=5GB`. Lists are written with commas or as JSON: `GUP_CLIENTS__ALLOW=10.0.0.0/8,fc00::/7`.
`GUP_UPSTREAM=http://manager:8014` names upstreams by URL alone, `GUP_UPSTREAM__URL` and the like describe
one. A list that is set again replaces the other one.

An unknown key or a bad value stops the start. All mistakes are listed, each with its key, the value and
what would be right; `upstream#2.url` is the second upstream's. `gup config check FILE` lists them without
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


def tables(table: type[BaseModel] = Settings, above: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every table with its head, `[path]` or `[[path]]`, followed by those in it."""
    for name, field in table.model_fields.items():
        if (model := model_of(field.annotation)) is not None:
            yield f"[[{above}{name}]]" if get_origin(field.annotation) is list else f"[{above}{name}]", model
            yield from tables(model, f"{above}{name}.")


def rows(table: type[BaseModel]) -> Iterator[Row]:
    for name, field in table.model_fields.items():
        if model_of(field.annotation) is None:
            yield Row(field.alias or name, name, _type(field), _default(field), field)


def _default(field: FieldInfo) -> Any:
    if field.is_required() or field.default == "" or field.default_factory not in (None, dict, list):
        return None  # another factory: computed by each machine, such as the host's name
    return field.get_default(call_default_factory=True)


def _type(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    origin, parts = get_origin(annotation), get_args(annotation)
    if (quantity := _quantity(field)) is not None:
        return quantity[0]
    if origin is Literal:
        return "one of " + ", ".join(f'"{value}"' for value in parts)
    if origin is list:
        return "list of texts"
    if origin is dict:
        return "table of lists" if get_origin(parts[1]) is list else "table of texts"
    # The rest are kinds of text, or None besides.
    return "path" if "Path" in str(annotation) else _PLAIN.get(annotation, "text")


def _quantity(field: FieldInfo) -> tuple[str, Callable[[Any], str]] | None:
    parsers = (getattr(checked, "func", None) for checked in field.metadata)
    return next((_QUANTITIES[parse] for parse in parsers if parse in _QUANTITIES), None)


def written(field: FieldInfo, value: Any) -> str:
    quantity = _quantity(field)
    return _toml(value if quantity is None else quantity[1](value))


def _toml(value: Any) -> str:
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


# --- the texts


def reference_toml() -> str:
    lines = [f"# {line}" for line in wrap(_TOML_HEAD, _WIDTH)]
    for head, table in tables():
        several = head.startswith("[[")
        lines += [*([""] if "." in head else ["", ""]), f"# {table.__doc__}", f"#{head}" if several else head]
        for row in rows(table):
            absent = row.default is None
            example = _EXAMPLES.get(f"{head}.{row.key}", _EXAMPLES.get(row.key))
            value = example if absent and example is not None else row.default
            hidden = "#" if several or absent else ""
            meaning = wrap(f"{row.field.description} ({row.type})", _WIDTH)
            lines += ["", *(f"# {line}" for line in meaning)]
            lines.append(f"{hidden}{row.key} = {written(row.field, value)}")
    return "\n".join(lines) + "\n"


def reference_page() -> str:
    lines = [_PAGE_HEAD]
    for head, table in tables():
        lines += [
            f"## `{head}`\n\n{table.__doc__}\n",
            "| key | type | default | meaning |\n|---|---|---|---|",
        ]
        for row in rows(table):
            default = "required" if row.field.is_required() else "none"
            if row.default is not None:
                default = f"`{written(row.field, row.default)}`"
            lines.append(f"| `{row.key}` | {row.type} | {default} | {row.field.description} |")
        lines.append("")
    return "\n".join(lines)


def metrics_page() -> str:
    lines = [_METRICS_HEAD, "| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ["`upstream`: the settings' names"] if metric.upstream else []
        labels += [
            f"`{name}`: {', '.join(values)}" if values else f"`{name}`" for name, values in metric.labels
        ]
        edges = ", ".join(f"{edge:g}" for edge in metric.buckets)
        meaning = metric.help + (f" Buckets end at {edges} s." if metric.kind == "histogram" else "")
        lines.append(f"| `{metric.name}` | {metric.kind} | {'<br>'.join(labels) or 'none'} | {meaning} |")
    return "\n".join([*lines, ""])


# --- settings in force


def settings_toml(settings: Settings) -> str:
    """`settings` as a TOML file that restores them, except for secrets, which are masked."""
    return "\n".join(_in_force(settings, "")).lstrip("\n") + "\n"


def _in_force(table: BaseModel, above: str) -> Iterator[str]:
    for row in rows(type(table)):
        value = masked(row.key, getattr(table, row.name))
        if value is not None:
            yield f"{row.key} = {written(row.field, value)}"
    for name, field in type(table).model_fields.items():
        if model_of(field.annotation) is not None:
            value = getattr(table, name)
            for item in value if isinstance(value, list) else [value]:
                yield from ("", f"[[{above}{name}]]" if isinstance(value, list) else f"[{above}{name}]")
                yield from _in_force(item, f"{above}{name}.")


def write_all(root: Path) -> None:
    (root / "config" / "gup.toml").write_text(reference_toml(), encoding="utf-8")
    (root / "docs" / "settings.md").write_text(reference_page(), encoding="utf-8")
    (root / "docs" / "metrics.md").write_text(metrics_page(), encoding="utf-8")


if __name__ == "__main__":
    write_all(Path())
