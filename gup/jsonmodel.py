"""Reads JSON that others may have written: every value of its type and within bounds, or InvalidError.

A text is bounded before it is parsed. pydantic checks the values; the types below do not convert.
"""

import json
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import Field, Strict, TypeAdapter, ValidationError

from gup.errors import GupError, printable, quoted

MAX_INTEGER = 2**63 - 1
MAX_TIME = 1e11
_MOST_SHOWN = 60

Count = Annotated[int, Strict(), Field(ge=0, le=MAX_INTEGER)]
Time = Annotated[float, Strict(), Field(ge=-MAX_TIME, le=MAX_TIME, allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
_Model = TypeVar("_Model")


class InvalidError(GupError, ValueError):
    """The message names the model, the member and what is right; it is printable, whatever was read."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def parse(text: bytes, model: str, most_bytes: int) -> Any:
    """The JSON value in `text`; InvalidError when it is longer than allowed, or no JSON."""
    if len(text) > most_bytes:
        raise InvalidError(f"{model}: {len(text)} bytes long; {most_bytes} are allowed")

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InvalidError(f"{model}: not JSON: {quoted(str(error))[: 2 * _MOST_SHOWN]}") from error


def read(model: TypeAdapter[_Model], value: object, name: str) -> _Model:
    """InvalidError begins with `name` and names the first mistake."""
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
    """`given` as a model accepts it: cut to `most` characters, and what UTF-8 can't encode as an escape."""
    return (given if given.isascii() else given.encode(errors="backslashreplace").decode())[:most]
