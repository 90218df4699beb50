"""Records, states of fills, and content keys: bytes as they stand on the disk, and with a right checksum.

The first byte says which; `stores` has what becomes of them in a cache directory.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from fuzz import Check
from gup.cache.records import FillState, Record, head_of, remote_of, route_of, seal
from gup.content.key import ContentKey
from gup.content.routes import leads_to
from gup.jsonmodel import InvalidError

MODELS = {b"r": Record, b"s": FillState}
"""A capital letter: with a right checksum."""


@contextmanager
def target() -> Iterator[Check]:
    """Any bytes are refused in printable words, or are a record that is written and read back unchanged and
    leads to its own path upstream.
    """
    yield check


def check(given: bytes) -> None:
    which, text = given[:1], given[1:]
    model = MODELS.get(which.lower())
    try:
        if model is None:
            key = ContentKey.parse(text.decode(errors="surrogateescape"))
            assert ContentKey.parse(key.text) == key
            assert len(key.path.parts) == 5
            return
        kept = model.decode(sealed(text) if which.isupper() else text)
    except InvalidError as error:
        assert str(error).isprintable()
        return
    assert model.decode(kept.encode()) == kept
    route = route_of(kept)
    assert route.key(kept.key.variant) == kept.key
    assert not route.upstream_path or leads_to(route.upstream_path, kept.key)
    if kept.head is not None:
        head_of(kept.key, remote_of(kept.head))


def sealed(text: bytes) -> bytes:
    """With a right checksum, if it is a JSON object."""
    try:
        fields = json.loads(text)
        if isinstance(fields, dict):
            fields.pop("checksum", None)
            return seal(fields)
    except (ValueError, RecursionError):
        pass
    return text
