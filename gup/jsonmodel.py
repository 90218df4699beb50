"""Reads JSON that others may have written: every value of its type and within bounds, or InvalidError.

Records, states, archives and events are read with it. A text is bounded before it is parsed, so that none of
them costs more memory than its model allows. pydantic checks the values; the types below do not convert.
"""

import json
from enum import Enum
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import Field, Strict, TypeAdapter, ValidationError

from gup.errors import GupError, quoted

MAX_INTEGER = 2**63 - 1
MAX_TIME = 1e11
_MOST_SHOWN = 60

Count = Annotated[int, Strict(), Field(ge=0, le=MAX_INTEGER)]
Time = Annotated[float, Strict(), Field(ge=-MAX_TIME, le=MAX_TIME, allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
_Model = TypeVar("_Model")
_Enum = TypeVar("_Enum", bound=Enum)


class InvalidError(GupError, ValueError):
    """A text or value that is not of its model; the message names the model, the member and what is right."""


def parse(text: bytes, model: str, most_bytes: int) -> Any:
    """The JSON value in `text`; InvalidError when it is longer than allowed, or no JSON."""
    if len(text) > most_bytes:
        raise InvalidError(f"{model}: {len(text)} bytes long; {most_bytes} are allowed")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InvalidError(f"{model}: not JSON: {quoted(str(error))[: 2 * _MOST_SHOWN]}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def read(model: TypeAdapter[_Model], value: object, name: str) -> _Model:
    """`value` as the model; InvalidError, which begins with `name`, tells the first thing that is wrong."""
    try:
        return model.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = "".join(f"{quoted(str(part))[:_MOST_SHOWN]!r}: " for part in first["loc"])
        why = quoted(first["msg"].removeprefix("Value error, "))[:200]
        if first["type"] == "missing":
            why = "it is missing"
        elif first["type"] != "value_error":
            why += f", not {shown(first['input'])}"
        raise InvalidError(f"{name}: {where}{why}") from error


def shown(value: object) -> str:
    """A value for a message: short, and printable whatever it is."""
    if isinstance(value, str):
        return ascii(value[:_MOST_SHOWN]) + ("…" if len(value) > _MOST_SHOWN else "")
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER.bit_length():
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)} members"
    return json.dumps(value)


def plain_text(given: str, most: int) -> str:
    """`given` as a model takes it back: cut to so many characters, what UTF-8 can't encode as an escape."""
    return given.encode(errors="backslashreplace").decode()[:most]


def whole(value: object, name: str, least: int = 0, most: int = MAX_INTEGER) -> int:
    """A whole number; 80.0 and true are none."""
    if type(value) is not int or not least <= value <= most:
        raise InvalidError(f"{name} must be a whole number from {least} to {most}, not {shown(value)}")
    return value


def number(value: object, name: str, least: float, most: float) -> float:
    """A finite number within bounds."""
    fits = type(value) in (int, float) and least <= value <= most  # type: ignore[operator]
    if not fits:
        raise InvalidError(f"{name} must be a number from {least:g} to {most:g}, not {shown(value)}")
    return float(value)  # type: ignore[arg-type]


def text(value: object, name: str, most: int) -> str:
    """A text of so many characters at most that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InvalidError(f"{name} must be a text, not {shown(value)}")
    if len(value) > most:
        raise InvalidError(f"{name} is {len(value)} characters long; {most} are allowed")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InvalidError(f"{name} is no text that UTF-8 can encode: {shown(value)}")
    return value


class Members:
    """The members of one JSON object, taken by name; what is not asked for is ignored.

    `model` stands at the beginning of every message.
    """

    def __init__(self, value: object, model: str) -> None:
        if not isinstance(value, dict):
            raise InvalidError(f"{model} must be an object, not {shown(value)}")
        self.values: dict[str, Any] = value
        self.model = model

    def __contains__(self, name: str) -> bool:
        """Whether the member is there and not null."""
        return self.values.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise InvalidError(f"{self.model}: {name!r} is missing")
        return self.values[name]

    def _named(self, name: str) -> str:
        return f"{self.model}: {name!r}"

    def whole(self, name: str, least: int = 0, most: int = MAX_INTEGER) -> int:
        return whole(self[name], self._named(name), least, most)

    def time(self, name: str) -> float:
        """Unix seconds."""
        return number(self[name], self._named(name), -MAX_TIME, MAX_TIME)

    def text(self, name: str, most: int) -> str:
        return text(self[name], self._named(name), most)

    def flag(self, name: str) -> bool:
        value = self[name]
        if not isinstance(value, bool):
            raise InvalidError(f"{self._named(name)} must be true or false, not {shown(value)}")
        return value

    def one_of(self, name: str, kind: type[_Enum]) -> _Enum:
        """A member of an enum of texts."""
        value = self.text(name, _MOST_SHOWN)
        for member in kind:
            if member.value == value:
                return member
        raise InvalidError(f"{self._named(name)} is unknown: {shown(value)}")
