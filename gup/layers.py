"""The three places settings come from: file, environment, flags. Reads and merges them; checks no value."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource

from gup.complaints import Location, keys_at, model_at
from gup.errors import SettingsError

PREFIX = "GUP_"
DELIMITER = "__"

Values = Mapping[str, Any]


class _Environment(EnvSettingsSource):
    """Environment variables nested like the file. What is no JSON stays text: the table's types check it."""

    def __init__(self, table: type[BaseSettings], variables: Mapping[str, str]) -> None:
        super().__init__(table, case_sensitive=False, env_prefix=PREFIX, env_nested_delimiter=DELIMITER)
        self.env_vars = {name.lower(): value for name, value in variables.items() if value}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


class Layers:
    """What was read, and which place wins for a key. `problems` are variables that mean nothing."""

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
    bases: Any = (table, BaseSettings)  # the environment's source wants settings, children want none of it
    layered: type[BaseSettings] = create_model("Layered", __base__=bases)
    return _Environment(layered, variables)()


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError([f"{file}: can't be read: {error.strerror}"]) from error
    except ValueError as error:  # no TOML, or no UTF-8
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
