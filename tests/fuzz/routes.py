"""Request targets, one a line: what they name, the key of that, and the way back."""

import re
import string
from collections.abc import Iterator
from contextlib import contextmanager

from fuzz import Check
from gup.content.key import MAX_PART_BYTES, ContentKey, Variant, named
from gup.content.routes import Routes, leads_to, parse_target, path_of, spelled_moniker
from gup.errors import Problem

_MOST_LINES = 4
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_MONIKER = re.compile(r"(/content/)(\{[0-9A-Fa-f-]{36}\})(/.*)")


@contextmanager
def target() -> Iterator[Check]:
    """A target is a Problem, or has a key that is a safe path and that its upstream path leads back to; two
    targets share a key only where nothing but case differs.
    """
    yield check


def check(given: bytes) -> None:
    for fold_case in (False, True):
        paths: dict[ContentKey, str] = {}
        for line in given.split(b"\n")[:_MOST_LINES]:
            found = _routed(Routes(liveupdate=True, fold_case=fold_case), line)
            if found is None:
                continue
            key, path = found
            like = path.translate(_LOWER) if fold_case else _with_moniker_in_upper_case(path)
            assert paths.setdefault(key, like) == like, f"{paths[key]!r} and {like!r} share {key.text!r}"


def _routed(routes: Routes, raw: bytes) -> tuple[ContentKey, str] | None:
    try:
        path = parse_target(raw).path
        route = routes.route(path)
    except Problem:
        return None
    keys = route.keys(Variant("14.3 RU2", "Français"))
    for key in keys:
        assert ContentKey.parse(key.text) == key
        parts = key.path.parts
        assert len(parts) == 5
        assert not any(part.startswith(".") or len(part.encode()) > MAX_PART_BYTES for part in parts)
        assert leads_to(route.upstream_path, key)
        assert leads_to(path_of(key), key)
        named(key)
    assert spelled_moniker(route.upstream_path).isascii()
    again = routes.route(parse_target(route.upstream_path.encode("ascii")).path)
    assert (again.keys(Variant("14.3 RU2", "Français")), again.kind) == (keys, route.kind)
    return route.key(Variant()), path


def _with_moniker_in_upper_case(path: str) -> str:
    found = _MONIKER.fullmatch(path)
    return path if found is None else f"{found[1]}{found[2].upper()}{found[3]}"
