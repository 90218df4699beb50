"""Reads settings from file, environment and flags, and says what is wrong with them.

A mistake is one sentence: the key, the value found, what would be right, and where it came from.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from types import UnionType
from typing import Any, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gup.config.settings import Settings
from gup.errors import SettingsError

PREFIX = "GUP_"
DELIMITER = "__"
_MOST_LEVELS = 16
"""Of tables and lists within each other; the table of settings has five. What walks them is recursive."""

Location = tuple[str | int, ...]
"""The path of a key: names, and positions in lists."""
Values = Mapping[str, Any]


def load(
    file: Path | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Settings from `file` (TOML), `GUP_<SECTION>__<KEY>` and flags, the later winning.

    `flags` is nested like the file. SettingsError names every key that is wrong. `gup.cli.usable` checks the
    files that settings name.
    """
    settings, problems = read(file, flags=flags, environment=environment)
    if problems:
        raise SettingsError(problems)
    return settings


def read(
    file: Path | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    servable: bool = False,
) -> tuple[Settings, list[str]]:
    """The settings without what is wrong with them, and a sentence for each mistake.

    With `servable` it is a mistake too that there is nothing to fetch from.
    """
    given = os.environ if environment is None else environment
    variables = {name: text for name, text in given.items() if name.upper().startswith(PREFIX)}
    problems = _unknown_variables(variables)
    variables = {name: text for name, text in variables.items() if name.count(DELIMITER) <= _MOST_LEVELS}
    toml: Values = {}
    try:
        toml = _read_toml(file) if file else {}
    except SettingsError as error:
        problems = error.problems + problems
        servable = False  # nobody knows what the file names
    layers: list[tuple[str, Values]] = [
        ("the command line", flags or {}),
        (PREFIX, _read_environment(variables) if variables else {}),
        (str(file), toml),
    ]
    values: dict[str, Any] = {}
    for _, layer in reversed(layers):
        values = _merge(values, layer)
    if servable and not values.get("upstream"):
        remedy = "add --upstream http://manager:8014, or an [[upstream]] table"
        problems.append(f"upstream: none is given; {remedy}")
    first = True
    while True:
        try:
            return Settings.model_validate(values), SettingsError(problems).problems
        except ValidationError as error:
            if first:  # later ones may come of what was left out
                problems += complaints(error, Settings, lambda location: _origin(location, layers))
            first = False
            values = _without(values, error)


def parse(given: str | Values) -> tuple[Settings | None, list[str]]:
    """Settings from the text of a file, or from its tables, without the environment; else what is wrong."""
    try:
        tables = tomllib.loads(given) if isinstance(given, str) else given
        if _is_deep(tables):
            raise RecursionError  # noqa: TRY301 - as tomllib for brackets
        return Settings.model_validate(tables), []
    except ValidationError as error:
        return None, complaints(error, Settings, lambda _: "")
    except ValueError as error:
        return None, [f"the settings are not TOML: {error}"]
    except RecursionError:
        return None, [f"no table of settings: tables and lists may be nested {_MOST_LEVELS} levels deep"]


def _without(values: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """What is left when each wrong key is left out, or the whole list where one of its items is wrong.

    Where keys do not go together it is not known which is wrong: upstreams are left out, then `listen`.
    """
    left = deepcopy(values)
    for details in error.errors(include_url=False):
        place: Any = left
        table, key = left, "upstream" if "upstream" in left else "listen"
        for part in details["loc"]:
            if isinstance(place, dict) and part in place:
                table, key, place = place, str(part), place[part]
            elif isinstance(place, list) and isinstance(part, int) and part < len(place):
                place = place[part]
            else:
                break
        table.pop(key, None)
    return left if left != values else {}


def _read_environment(variables: Mapping[str, str]) -> dict[str, Any]:
    """Variables nested like the file. What is not JSON stays text: the table's types check it."""
    # pydantic-settings takes 0.1 s to import, and most starts have no such variables.
    from pydantic_settings import BaseSettings, EnvSettingsSource  # noqa: PLC0415

    class Environment(EnvSettingsSource):
        def __init__(self) -> None:
            bases: Any = (Settings, BaseSettings)  # the source requires a BaseSettings class
            layered: type[BaseSettings] = create_model("Layered", __base__=bases)
            super().__init__(layered, case_sensitive=False, env_prefix=PREFIX, env_nested_delimiter=DELIMITER)
            self.env_vars = {name.lower(): value for name, value in variables.items() if value}

        def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
            try:
                decoded = super().decode_complex_value(field_name, field, value)
            except (ValueError, RecursionError):
                return value
            return value if _is_deep(decoded) else decoded

    return Environment()()


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
        if _is_deep(tables):
            raise RecursionError  # noqa: TRY301 - as tomllib for brackets
    except OSError as error:
        raise SettingsError([f"{file}: can't be read: {error.strerror}"]) from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise SettingsError([f"{file}: is not TOML: {error}"]) from error
    except RecursionError as error:
        levels = f"tables and lists may be nested {_MOST_LEVELS} levels deep"
        raise SettingsError([f"{file}: is no table of settings: {levels}"]) from error
    return tables


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_MOST_LEVELS):
        held = (item.values() if isinstance(item, dict) else item for item in level if _holds_others(item))
        level = [below for items in held for below in items]
    return any(map(_holds_others, level))


def _holds_others(value: object) -> TypeGuard[dict[str, Any] | list[Any]]:
    return isinstance(value, dict | list)


def _merge(below: Values, above: Values) -> dict[str, Any]:
    """Lists are replaced whole, tables key by key."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _origin(location: Location, layers: list[tuple[str, Values]]) -> str:
    """Where the value at `location` came from, "" for a default."""
    keys = [part for part in location if isinstance(part, str)]
    for name, layer in layers:
        value, depth = layer, 0
        while depth < len(keys) and isinstance(value, Mapping) and keys[depth] in value:
            value, depth = value[keys[depth]], depth + 1
        if depth == len(keys) or (depth and not isinstance(value, Mapping)):
            return name + DELIMITER.join(keys[:depth]).upper() if name == PREFIX else name
    return ""


def _unknown_variables(variables: Mapping[str, str]) -> list[str]:
    """Sentences on variables of no section, and on known keys written with a single underscore.

    A wrong key of a known section is reported with the file's. Other names are ignored: container platforms
    set their own, such as GUP_PORT or GUP_SERVICE_HOST for a service called gup.
    """
    sections = keys_at((), Settings)
    right = {
        f"{one}_{key}": f"{one}{DELIMITER}{key}" for one in sections for key in keys_at((one,), Settings)
    }
    problems = []
    for name in sorted(variables):
        rest = name.lower().removeprefix(PREFIX.lower())
        if DELIMITER in rest and rest.split(DELIMITER)[0] not in sections:
            problems.append(f"{name}: unknown section; sections are {', '.join(sections)}")
        elif name.count(DELIMITER) > _MOST_LEVELS:
            problems.append(f"{name[:_MAX_SHOWN]}…: unknown variable; tables are not nested that deep")
        if rest in right:
            problems.append(f"{name}: unknown variable; did you mean {PREFIX}{right[rest].upper()}?")
    return problems


# --- sentences for what is wrong


SECRET_KEYS = frozenset({"headers", "webhook", "webhook_secret"})
"""Keys whose values no message shows."""

_USER_INFO = re.compile(r"(://[^/@\s:]*):[^/@\s]*@")
_MAX_SHOWN = 60
_MASK = "***"
_MOST_BITS = 128

_RIGHT = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text in quotes",
    "list_type": "must be a list",
    "dict_type": "must be a table",
    "path_type": "must be a path in quotes",
}


def mask_password(url: str) -> str:
    return _USER_INFO.sub(r"\1:***@", url)


def masked(key: str, value: Any) -> Any:
    """The value of a key without what is secret in it."""
    if key in ("proxy", "webhook_proxy") and value:
        return mask_password(value)
    if key not in SECRET_KEYS or not value:
        return value
    if isinstance(value, dict):
        return dict.fromkeys(value, _MASK)
    url, query, _ = value.partition("?")
    return _MASK if key == "webhook_secret" else f"{url}?{_MASK}" if query else url


def spell(location: Location) -> str:
    """The key as people write it: `cache.max_size`, `upstream#2.url` (the second one's)."""
    parts = (f"#{part + 1}" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def complaints(
    error: ValidationError, table: type[BaseModel], origin: Callable[[Location], str]
) -> list[str]:
    """One sentence for each mistake. `origin` names the place that a key's value came from, "" for none."""
    sentences: list[str] = []
    for details in error.errors(include_url=False):
        if not details["loc"]:  # a check over several keys, which names them itself
            sentences += _reason(details).splitlines()
            continue
        source = origin(details["loc"])
        sentences.append(_sentence(details, table) + (f" (from {source})" if source else ""))
    return sentences


def _sentence(details: ErrorDetails, table: type[BaseModel]) -> str:
    location = details["loc"]
    key, model = spell(location), model_at(location[:-1], table)
    if details["type"] == "extra_forbidden":
        names = keys_at(location[:-1], table)
        close = difflib.get_close_matches(str(location[-1]).lower(), names, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"here are: {', '.join(names)}"
        return f"{key}: unknown key; {remedy}"
    if details["type"] == "missing":
        fields = model.model_fields.items() if model else ()
        texts = [field.description for name, field in fields if location[-1] in (name, field.alias)]
        return f"{key}: missing; {next(iter(texts), 'it must be given')}"
    return f"{key}: {_shown(location, details['input'])} is not right: {_reason(details)}"


def _reason(details: ErrorDetails) -> str:
    if details["type"] in ("value_error", "assertion_error"):
        return str(details.get("ctx", {}).get("error", details["msg"]))
    if details["type"] in ("model_type", "model_attributes_type"):
        return f"must be a table with keys, such as [{spell(details['loc']).split('#', maxsplit=1)[0]}]"
    return _RIGHT.get(details["type"], details["msg"].replace("Input should be", "must be"))


def _shown(location: Location, value: object) -> str:
    """The value as found, but no secret: tables and JSON are not shown either, since they may hold one."""
    if SECRET_KEYS.intersection(location):
        return "the value (not shown)"
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:  # a long one has no decimal digits
        return f"a number of {value.bit_length()} bits"
    if not isinstance(value, str):
        return repr(value).lower() if isinstance(value, bool) else repr(value)
    if value.lstrip()[:1] in ("[", "{"):
        return "the JSON text"
    shown = mask_password(value)
    return repr(shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "…")


def keys_at(location: Location, table: type[BaseModel]) -> list[str]:
    """The keys that the table at `location` can have, as they are written in the file."""
    model = model_at(location, table)
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def model_at(location: Location, table: type[BaseModel]) -> type[BaseModel] | None:
    """The model that checks the table at `location` (list positions are skipped), None when there is none."""
    model: type[BaseModel] | None = table
    for part in (part for part in location if isinstance(part, str)):
        field = model.model_fields.get(part) if model else None
        model = model_of(field.annotation) if field else None
    return model


def model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, Union, UnionType):
        return next((model for model in map(model_of, get_args(annotation)) if model), None)
    return None
