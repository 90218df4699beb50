"""Reads settings from file, environment and flags, and says what is wrong with them.

A mistake is told as one sentence: the key, the value found, what would be right, and where it came from.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gup.config.settings import Settings
from gup.errors import SettingsError

PREFIX = "GUP_"
DELIMITER = "__"

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

    `flags` is nested like the file. SettingsError names every key that is wrong. The files that settings name
    are not looked at: gup.cli.usable does that.
    """
    layers = Layers.read(Settings, file, flags or {}, os.environ if environment is None else environment)
    problems = list(layers.problems)
    try:
        settings = Settings.model_validate(layers.merged())
    except ValidationError as error:
        raise SettingsError(problems + complaints(error, Settings, layers.origin)) from error
    if problems:
        raise SettingsError(problems)
    return settings


def require_servable(settings: Settings) -> None:
    """SettingsError when a service could not fetch anything."""
    if not settings.upstream:
        raise SettingsError(
            ["upstream: none is given; add --upstream http://manager:8014, or an [[upstream]] table"]
        )


# --- file, environment, flags


class Layers:
    """The values of each place, in order of precedence. `problems` are variables without a meaning."""

    def __init__(self, named: list[tuple[str, Values]], problems: list[str]) -> None:
        self._named = named
        self.problems = problems

    @classmethod
    def read(
        cls, table: type[BaseModel], file: Path | None, flags: Values, environment: Mapping[str, str]
    ) -> "Layers":
        """SettingsError when the file can't be read or is no TOML."""
        variables = {name: text for name, text in environment.items() if name.upper().startswith(PREFIX)}
        return cls(
            [
                ("the command line", flags),
                (PREFIX, _read_environment(table, variables) if variables else {}),
                (str(file), _read_toml(file) if file else {}),
            ],
            _unknown_variables(variables, table),
        )

    def merged(self) -> dict[str, Any]:
        """One nested mapping; lists are replaced whole, tables key by key."""
        values: dict[str, Any] = {}
        for _, layer in reversed(self._named):
            values = _merge(values, layer)
        return values

    def origin(self, location: Location) -> str:
        """Where the value at `location` came from, "" when it stands nowhere."""
        keys = [part for part in location if isinstance(part, str)]
        for name, layer in self._named:
            depth = _depth(keys, layer)
            if depth == len(keys) or (depth and not isinstance(_at(keys[:depth], layer), Mapping)):
                return name + DELIMITER.join(keys[:depth]).upper() if name == PREFIX else name
        return ""


def _read_environment(table: type[BaseModel], variables: Mapping[str, str]) -> dict[str, Any]:
    """Variables nested like the file. What is no JSON stays text: the table's types check it."""
    # pydantic-settings takes 0.1 s to import, and most starts have no such variables.
    from pydantic_settings import BaseSettings, EnvSettingsSource  # noqa: PLC0415

    class Environment(EnvSettingsSource):
        def __init__(self) -> None:
            bases: Any = (table, BaseSettings)  # the source wants settings of its own kind
            layered: type[BaseSettings] = create_model("Layered", __base__=bases)
            super().__init__(layered, case_sensitive=False, env_prefix=PREFIX, env_nested_delimiter=DELIMITER)
            self.env_vars = {name.lower(): value for name, value in variables.items() if value}

        def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
            try:
                return super().decode_complex_value(field_name, field, value)
            except ValueError:
                return value

    return Environment()()


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError([f"{file}: can't be read: {error.strerror}"]) from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise SettingsError([f"{file}: is not TOML: {error}"]) from error


def _merge(below: Values, above: Values) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _depth(keys: list[str], values: Any) -> int:
    """How many of `keys` can be followed into `values`."""
    for depth, key in enumerate(keys):
        if not isinstance(values, Mapping) or key not in values:
            return depth
        values = values[key]
    return len(keys)


def _at(keys: list[str], values: Any) -> Any:
    for key in keys:
        values = values[key]
    return values


def _unknown_variables(variables: Mapping[str, str], table: type[BaseModel]) -> list[str]:
    """Sentences on variables of no section, and on known keys written with a single underscore.

    A wrong key of a known section is found with the file's. Other names are left alone: container platforms
    set their own, such as GUP_PORT or GUP_SERVICE_HOST for a service called gup.
    """
    sections = keys_at((), table)
    single = {
        f"{section}_{key}".upper(): f"{PREFIX}{section}{DELIMITER}{key}".upper()
        for section in sections
        if model_at((section,), table)
        for key in keys_at((section,), table)
    }
    problems = []
    for name in sorted(variables):
        rest = name.upper().removeprefix(PREFIX)
        if DELIMITER in rest and rest.split(DELIMITER)[0].lower() not in sections:
            problems.append(f"{name}: unknown section; sections are {', '.join(sections)}")
        elif rest in single:
            problems.append(f"{name}: unknown variable; did you mean {single[rest]}?")
    return problems


# --- sentences for what is wrong


SECRET_KEYS = frozenset({"headers"})
"""Keys whose values are never shown."""

_USER_INFO = re.compile(r"(://[^/@\s:]*):[^/@\s]*@")
_MAX_SHOWN = 60

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
    """`url` with the password of its user information, if any, made unreadable."""
    return _USER_INFO.sub(r"\1:***@", url)


def spell(location: Location) -> str:
    """The key as people write it: `cache.max_size`, `upstream#2.url` (the second one's)."""
    text = ""
    for part in location:
        text += f"#{part + 1}" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


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
    key = spell(location)
    if details["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_suggestion(location, table)}"
    if details["type"] == "missing":
        return f"{key}: missing; {_help(location, table)}"
    return f"{key}: {_shown(location, details['input'])} is not right: {_reason(details)}"


def _reason(details: ErrorDetails) -> str:
    if details["type"] in ("value_error", "assertion_error"):
        return str(details.get("ctx", {}).get("error", details["msg"]))
    if details["type"] in ("model_type", "model_attributes_type"):
        return f"must be a table with keys, such as [{spell(details['loc']).split('#', maxsplit=1)[0]}]"
    return _RIGHT.get(details["type"], details["msg"].replace("Input should be", "must be"))


def _shown(location: Location, value: object) -> str:
    """The value as found, unless it may hold a secret: tables and JSON are not shown either."""
    if SECRET_KEYS.intersection(location):
        return "the value (not shown)"
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        if value.lstrip()[:1] in ("[", "{"):
            return "the JSON text"
        shown = mask_password(value)
        return repr(shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "…")
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def _suggestion(location: Location, table: type[BaseModel]) -> str:
    names = keys_at(location[:-1], table)
    close = difflib.get_close_matches(str(location[-1]).lower(), names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"here are: {', '.join(names)}"


def _help(location: Location, table: type[BaseModel]) -> str:
    model = model_at(location[:-1], table)
    for name, field in (model.model_fields if model else {}).items():
        if location[-1] in (name, field.alias):
            return field.description or ""
    return "it must be given"


def keys_at(location: Location, table: type[BaseModel]) -> list[str]:
    """The keys that the table at `location` can have, as they are written in the file."""
    model = model_at(location, table)
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def model_at(location: Location, table: type[BaseModel]) -> type[BaseModel] | None:
    """The model that checks the table at `location` (list positions are skipped), None when there is none."""
    model: type[BaseModel] | None = table
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part)) if model else None
        model = model_of(field.annotation) if field else None
    return model


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model`, `list[Model]` or `Model | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, Union, UnionType):
        return next((model for model in map(model_of, get_args(annotation)) if model), None)
    return None
