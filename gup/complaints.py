"""Says what pydantic finds wrong with settings: the key, the value, what would be right; never any I/O."""

import difflib
import re
from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Location = tuple[str | int, ...]

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
    """One sentence a mistake. `origin` names where a key's value came from ("" when that is no news)."""
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
