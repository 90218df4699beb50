"""Fuzzing: a target is a module whose `target()` yields a function of bytes; its docstring is the property.

The function returns when the property holds, and raises whatever shows that it does not.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

Check = Callable[[bytes], None]
NAMES = ("answers", "archives", "catalogues", "heads", "proxies", "records", "routes", "settings", "stores")
CORPUS = Path(__file__).with_name("corpus")
BUILD = Path(__file__).parents[2] / "build" / "fuzz"


def target(name: str) -> AbstractContextManager[Check]:
    made: AbstractContextManager[Check] = importlib.import_module(f"fuzz.{name}").target()
    return made
